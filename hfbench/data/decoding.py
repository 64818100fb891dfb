"""From encoded images to uint8 pixels, RGB and of one size: a part at a time, in several threads.

No more whole pictures are held than are being decoded. If all images have one size, and it is not
far larger than the model's input, they stay as they are; else each is resized from its original
straight to the model's input.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from hfbench.data.pixel_cache import ShapeChangedError
from hfbench.errors import DataError
from hfbench.machine.bounds import free_memory, require_memory
from hfbench.machine.failures import is_out_of_memory

Entry = dict[str, Any] | None
_Take = Callable[[int, int], AbstractContextManager[None]]


def _cores() -> int:
    """Return on how many cores this process may run."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_LONGEST_MESSAGE = 1000
_SHOWN = 5  # how many of many like problems a message lists
_ELSEWHERE = re.compile(r"(^|::)(?!zip:|gzip:|tar:|file:)[A-Za-z][A-Za-z0-9+.\-]*://")
_PART_BYTES = 2**20  # of pixels that a thread decodes at a time
_PART_IMAGES = 256  # at most; handing over each would cost as much as decoding it
_THREADS = min(32, _cores())  # more would hold more pictures and decode no faster
_FIRST_TURNED = 5  # of EXIF's orientations: from here on height and width change places
_SAMPLE = 16  # images, spread over the split, that are looked at before the others
_KEPT_TIMES = 2  # as long a side as that of the model's input: of more, the model sees little
_BAND_PIXELS = 2**20  # that are taken out of PIL at a time
_DECODING_BYTES = 12  # a pixel: 4 in PIL, 4 more when it is turned, 3 as an array, some on the way
_DECODING_SHARE = 0.5  # of the free memory, for the pictures that are being decoded
_SMALLER = (
    "train on fewer, with dataset.max_train_samples and dataset.max_eval_samples, or smaller ones"
)


def largest_kept(image_size: int) -> int:
    """Return how many pixels images of one size may have to be kept as they are stored.

    Args:
        image_size: Of the model's input.
    """
    return (_KEPT_TIMES * image_size) ** 2


class EncodedImages:
    """The images of a split, to be decoded a part at a time.

    Attributes:
        shape: (N, 3, H, W) that the pixels will have.
        is_resized: Whether they depend on `image_size` and `interpolation`.
        notes: What was changed on the way in, a sentence each; complete after the last part.
    """

    def __init__(
        self,
        read: Callable[[int, int], Iterable[Entry]],
        count: int,
        name: Callable[[int, Entry], str],
        public_name: Callable[[int, Entry], str],
        image_size: int,
        interpolation: str,
        where: str = "dataset",
    ) -> None:
        """Look at a few images to see which size they have.

        Args:
            read: Reads images from one position to before another, as `datasets` stores them:
                bytes, or where they lie. It is called by several threads.
            count: How many there are.
            name: Says which image one is, by position and content, for errors.
            public_name: The same for notes, which are published with a model.
            image_size: That images are resized to if their sizes are mixed, or far larger: the
                model's input.
            interpolation: How they are resized.
            where: The beginning of errors, as in "cifar10".
        """
        self._read, self._count, self._where = read, count, where
        self._name, self._public_name = name, public_name
        self._image_size, self._mode = image_size, InterpolationMode(interpolation)
        self.notes: list[str] = []
        positions = np.unique(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)).tolist()
        # For good: `catch_warnings` is for one thread, and models are built meanwhile. What PIL
        # would refuse it refuses still; what is only large is held against the free memory.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        room = _Room()
        seen = (_stored_size(entry, room) for n in positions for entry in read(n, n + 1))
        sizes = {size for size in seen if size is not None}
        self._largest = max((width * height for width, height in sizes), default=0)  # pixels
        self._is_mixed = len(sizes) > 1
        is_kept = len(sizes) == 1 and self._largest <= largest_kept(image_size)
        self._size = next(iter(sizes)) if is_kept else (image_size, image_size)
        self.is_resized = not is_kept

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return the shape of the pixels, (N, 3, H, W)."""
        return self._count, 3, self._size[1], self._size[0]

    def parts(self) -> Iterator[np.ndarray]:
        """Decode the images, in order.

        Yields:
            uint8, (n, 3, H, W).

        Raises:
            ShapeChangedError: If an image has another size than those that were looked at; `shape`
                is another one now, and all have to be asked for again.
            DataError: If images cannot be used, all that cannot named; or what they would take is
                not free.
        """
        images, _, height, width = self.shape
        image_bytes = 3 * height * width
        require_memory(
            images * image_bytes, f"dataset: {images:,} images of {width} x {height}", _SMALLER
        )
        decoded_bytes = max(image_bytes, 3 * self._largest)
        step = max(1, min(_PART_IMAGES, _PART_BYTES // decoded_bytes))
        room, seen = _Room(), _Seen()
        with ThreadPoolExecutor(_THREADS) as pool:  # PIL decodes outside the interpreter's lock
            ends = ((start, min(start + step, images)) for start in range(0, images, step))
            tasks = (pool.submit(self._decode, start, stop, room) for start, stop in ends)
            ahead: deque[Future[_Part]] = deque()
            try:
                ahead.extend(islice(tasks, 2 * _THREADS))
                while ahead:
                    part = ahead.popleft().result()
                    ahead.extend(islice(tasks, 1))
                    seen.add(part)
                    if not seen.failed:
                        yield part.pixels
            except ShapeChangedError:
                self._size = (self._image_size, self._image_size)
                self._is_mixed = self.is_resized = True
                raise
            except MemoryError as error:
                raise DataError(
                    f"{self._where}: memory ran out while images were decoded; "
                    f"{free_memory() / 2**30:,.1f} GiB are free on the machine, and ulimit -v says "
                    f"how much the process may take. Close other programs, or {_SMALLER}."
                ) from error
            finally:
                for task in ahead:
                    task.cancel()
        if seen.failed:
            raise self._refusal(seen.failed)
        self.notes = self._say(seen)

    def _decode(self, start: int, stop: int, room: _Room) -> _Part:
        width, height = self._size
        part = _Part(np.empty((stop - start, 3, height, width), dtype=np.uint8))
        for position, entry in enumerate(self._read(start, stop), start):
            try:
                picture = self._picture(entry, room)
            except _UnusableError as error:
                part.failed.append(f"{self._name(position, entry)}: {error}")
                continue
            except _NoRoomError as error:
                where = f"{self._where}: {self._name(position, entry)}"
                raise DataError(f"{where}: {error}") from None
            part.pixels[position - start] = picture.pixels
            for names, applies in (
                (part.converted, picture.mode != "RGB"),
                (part.animated, picture.is_animated),
                (part.resized, picture.size != self._size),
            ):
                if applies:
                    names.append(self._public_name(position, entry))
        return part

    def _picture(self, entry: Entry, room: _Room) -> _Picture:
        try:
            return self._picture_within(entry, room.taken)
        except MemoryError:  # others decoded meanwhile, and not every limit can be known
            return self._picture_within(entry, room.taken_alone)

    def _picture_within(self, entry: Entry, take: _Take) -> _Picture:
        with _said(), _open(entry) as picture, take(*picture.size):
            # Phones add frames to photos (MPO) that are none of a film.
            is_animated = getattr(picture, "is_animated", False) and picture.format != "MPO"
            pixels, mode = _pixels(picture)
            size = (pixels.shape[1], pixels.shape[0])
            if size != self._size and not self.is_resized:
                raise ShapeChangedError
            return _Picture(self._resize(pixels), size, mode, bool(is_animated))

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        """Return (3, H, W) of (H, W, 3): the same resize as in `Preprocessing`."""
        size = [self._size[1], self._size[0]]
        if list(pixels.shape[:2]) == size:
            return pixels.transpose(2, 0, 1)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        resized: np.ndarray = F.resize(image, size, self._mode, antialias=True).numpy()
        return resized

    def _refusal(self, failed: list[str]) -> DataError:
        more = f"\n  … and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
        shown = "".join(f"\n  {line}" for line in failed[:_SHOWN])
        return DataError(
            f"{self._where}: {len(failed)} of {self._count} images cannot be used:{shown}{more}"
        )

    def _say(self, seen: _Seen) -> list[str]:
        size = f"{self._size[0]} x {self._size[1]}"
        why = "sizes are mixed" if self._is_mixed else "they are more than twice as large"
        changes = (
            (seen.converted, "are not RGB and were converted"),
            (seen.animated, "have several frames, of which the first was taken"),
            (seen.resized, f"were resized to {size}, the model's input, since {why}"),
        )
        return [
            f"{count} of {self._count} images {change}; the first is {first}."
            for (count, first), change in changes
            if count
        ]


@dataclass
class _Picture:
    """An image, (3, H, W), and what it was before."""

    pixels: np.ndarray
    size: tuple[int, int]
    mode: str
    is_animated: bool


@dataclass
class _Part:
    """Some images, and the names of those that something is to be said of."""

    pixels: np.ndarray
    failed: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    animated: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)


class _Seen:
    """What parts have in common; of names the first alone, since there may be very many."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.converted = self.animated = self.resized = (0, "")

    def add(self, part: _Part) -> None:
        self.failed += part.failed
        for kind in ("converted", "animated", "resized"):
            names = getattr(part, kind)
            count, first = getattr(self, kind)
            setattr(self, kind, (count + len(names), first or next(iter(names), "")))


class _UnusableError(Exception):
    """What is wrong with an image."""


class _NoRoomError(Exception):
    """What an image would need that the machine has not."""


class _Room:
    """Lets as many threads decode at a time as half of the free memory has room for."""

    def __init__(self) -> None:
        self._free = free_memory()
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, width: int, height: int) -> Iterator[None]:
        """Wait until there is room for a picture; refuse one that all would not be enough for."""
        size = _DECODING_BYTES * width * height
        if size > self._free:
            raise _NoRoomError(
                f"decoding its {width:,} x {height:,} pixels would take {size / 2**30:,.1f} GiB of "
                f"memory, and {self._free / 2**30:,.1f} GiB are free. Shrink it, or close other "
                "programs."
            )
        with self._counted(size, _DECODING_SHARE * self._free):
            yield

    @contextmanager
    def taken_alone(self, width: int, height: int) -> Iterator[None]:
        """Wait until nobody else decodes."""
        with self._counted(_DECODING_BYTES * width * height, 0):
            yield

    @contextmanager
    def _counted(self, size: int, limit: float) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= limit)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


@contextmanager
def _said() -> Iterator[None]:
    """Turn what damaged bytes lead PIL to into a sentence; memory is blamed on no image."""
    ours = (_UnusableError, _NoRoomError, ShapeChangedError)
    try:
        yield
    except (MemoryError, *ours):
        raise
    except Image.DecompressionBombError as error:
        raise _UnusableError(f"it is too large, or made to fill the memory: {error}") from None
    except Exception as error:  # PIL raises whatever the damaged bytes lead to
        said = str(error)[:_LONGEST_MESSAGE]
        lacked = getattr(error, "errno", None) == errno.ENOMEM or "out of memory error" in said
        if lacked or is_out_of_memory(error):  # the one before is PIL's
            raise MemoryError(said) from error
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # of the machine, which no image is to blame for
        said = re.sub(r" <_io\.[^>]*>", "", said) or type(error).__name__
        raise _UnusableError(said) from None


def _open(entry: Entry) -> Image.Image:
    """Open an image, of which no more than the head is read."""
    path, content = (entry.get("path"), entry.get("bytes")) if entry else (None, None)
    if content is not None:
        return Image.open(BytesIO(content))
    if not path:
        raise _UnusableError("there is no image")
    if _ELSEWHERE.search(path):
        raise _UnusableError("it lies on another machine; download it first")
    if os.path.exists(path) and not os.path.isfile(path):
        raise _UnusableError("it is no file")  # a pipe would be waited for
    if "::" in path:  # in an archive
        import datasets

        inside: Image.Image = datasets.Image().decode_example(entry)
        return inside
    return Image.open(path)


def _stored_size(entry: Entry, room: _Room) -> tuple[int, int] | None:
    """Return width and height of an image as it is seen; ``None`` if it cannot be read."""
    try:
        with _said(), _open(entry) as picture:
            if picture.width == picture.height:
                return picture.size
            with room.taken(*picture.size):  # of a PNG, all is read for how it is turned
                picture.getexif()
            # PIL turns a TIFF itself, and says so of its size before.
            turned = (
                picture.format != "TIFF"
                and picture.getexif().get(ExifTags.Base.Orientation, 1) >= _FIRST_TURNED
            )
            return (picture.height, picture.width) if turned else picture.size
    except (_UnusableError, _NoRoomError, MemoryError):  # which decoding says
        return None


def _pixels(picture: Image.Image) -> tuple[np.ndarray, str]:
    """Return the pixels of an opened image, (H, W, 3), and its mode before it became RGB."""
    picture.load()
    if picture.getexif().get(ExifTags.Base.Orientation) is not None:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF":
        raise _UnusableError("it has more than 8 bits a channel; convert it to 8 bits")
    width, height = picture.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):  # in one go there would be two more copies of all
        bottom = min(top + rows, height)
        band = picture if rows >= height else picture.crop((0, top, width, bottom))
        pixels[top:bottom] = np.asarray(_to_rgb(band))
    return pixels, picture.mode


def _to_rgb(picture: Image.Image) -> Image.Image:
    # By way of RGBA, else PIL warns of a palette with transparency; the colours are the same.
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # convert copies

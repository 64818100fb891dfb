"""Read CIFAR's original archives without running what is pickled in them.

`cifar-10-python.tar.gz` and `cifar-100-python.tar.gz`
(https://www.cs.toronto.edu/~kriz/cifar.html), extracted or not, hold Python pickles. Unpickling
calls whatever a file names; here a file may name nothing but the few constructors that a numpy
array is pickled with, and even these are replaced by stand-ins that only keep their arguments.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfbench.errors import DataError, first_line, listed
from hfbench.machine.bounds import BoundedReader

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".gz")
_LARGEST_TAR = 512 * 2**20  # bytes, unpacked; the larger one of the two has 178 MiB
_LARGEST_MEMBER = 256 * 2**20  # bytes; CIFAR-100's images are one of 148 MiB
_SHAPE = (3, 32, 32)  # channels first, row-major, as the author describes


@dataclass(frozen=True)
class _Layout:
    folder: str
    splits: dict[str, tuple[str, ...]]
    meta: str
    labels: dict[str, str]  # key of the labels in a batch -> key of their names in the meta file


LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)},
        "batches.meta",
        {"labels": "label_names"},
    ),
    "cifar100": _Layout(
        "cifar-100-python",
        {"train": ("train",), "test": ("test",)},
        "meta",
        {"fine_labels": "fine_label_names", "coarse_labels": "coarse_label_names"},
    ),
}


@dataclass(frozen=True)
class ArchiveSplit:
    """One split of an archive.

    Attributes:
        images: uint8, (N, 3, 32, 32).
        labels: int64, (N,).
        label_names: Name of each class.
    """

    images: np.ndarray
    labels: np.ndarray
    label_names: list[str]


@dataclass(frozen=True)
class Archive:
    """One of CIFAR's archives, its files found but not yet interpreted.

    Attributes:
        name: For messages.
        files: Content of each member by name, or where it lies.
    """

    name: str
    layout: _Layout
    files: dict[str, bytes | Path]

    @property
    def splits(self) -> list[str]:
        """Names of its splits."""
        return list(self.layout.splits)

    @property
    def label_columns(self) -> list[str]:
        """Names of its labels, as the Hub's copies have them."""
        return [key.removesuffix("s") for key in self.layout.labels]

    def read_split(self, split: str, label_column: str) -> ArchiveSplit:
        """Read one split.

        Args:
            split: One of `splits`.
            label_column: One of `label_columns`.

        Raises:
            DataError: If a file is missing, damaged, or not what the author publishes.
        """
        key = f"{label_column}s"
        batches = [self._load_batch(member, key) for member in self.layout.splits[split]]
        meta = _unpickle(self._read(self.layout.meta), f"{self.name}: {self.layout.meta}")
        names = meta.get(self.layout.labels[key])
        if not isinstance(names, list) or not names:
            raise DataError(f"{self.name}: {self.layout.meta} holds no {self.layout.labels[key]}.")
        labels = np.concatenate([labels for _, labels in batches])
        if labels.size and not 0 <= labels.min() <= labels.max() < len(names):
            raise DataError(
                f"{self.name}: labels run from {labels.min()} to {labels.max()}, but there are "
                f"{len(names)} classes."
            )
        images = np.concatenate([images for images, _ in batches])
        return ArchiveSplit(images, labels, [str(_text(name)) for name in names])

    def _load_batch(self, member: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        where = f"{self.name}: {member}"
        content = _unpickle(self._read(member), where)
        for needed in ("data", key):
            if needed not in content:
                raise DataError(f'{where} holds no "{needed}"; it holds {listed(content)}.')
        data = _as_array(content["data"], where)
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != int(np.prod(_SHAPE)):
            raise DataError(
                f"{where}: expected uint8 images as rows of 3072, found {data.dtype} of shape "
                f"{data.shape}."
            )
        labels = _as_array(content[key], where)
        if labels.dtype.kind not in "iu":
            raise DataError(f"{where}: expected whole numbers as {key}, found {labels.dtype}.")
        if labels.shape != (len(data),):
            raise DataError(f"{where} holds {len(data)} images, but {labels.size} labels.")
        return data.reshape(-1, *_SHAPE), labels.astype(np.int64)

    def _read(self, member: str) -> bytes:
        content = self.files.get(member)
        if content is None:
            raise DataError(f"{self.name} holds no {member}; download it again.")
        try:
            if isinstance(content, bytes):
                return content
            if content.stat().st_size > _LARGEST_MEMBER:
                raise OSError(f"it is larger than {_LARGEST_MEMBER // 2**20} MiB")
            return content.read_bytes()
        except OSError as error:
            raise DataError(f"{self.name}: {member} cannot be read: {error}") from None


def find_archive(path: Path) -> Archive | None:
    """Recognise an archive, extracted or not.

    Args:
        path: A tar file, the folder extracted from it, or a folder that holds either.

    Returns:
        The archive, a tar file's members read already; ``None`` if it is no archive.

    Raises:
        DataError: If it is a file, but none of CIFAR's archives, or a damaged one.
    """
    tar = _find_tar(path)
    if tar is not None:
        return _open_tar(tar)
    extracted = _find_extracted(path)
    if extracted is None:
        return None
    layout, folder = extracted
    return Archive(str(folder), layout, dict(_members(folder)))


def find_archive_files(path: Path) -> list[Path]:
    """Return the files that `find_archive` and `Archive.read_split` read; none if it is no archive.

    Nothing is read: that a file is an archive, and a whole one, is found out by those.
    """
    tar = _find_tar(path)
    if tar is not None:
        return [tar]
    extracted = _find_extracted(path)
    return [] if extracted is None else sorted(_members(extracted[1]).values())


def _find_tar(path: Path) -> Path | None:
    if path.is_file():
        return path
    if _find_extracted(path) is not None:
        return None
    names = ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz")
    return next((path / name for name in names if (path / name).is_file()), None)


def _find_extracted(path: Path) -> tuple[_Layout, Path] | None:
    for layout in LAYOUTS.values():
        for folder in (path, path / layout.folder):
            tests = [folder / name for name in layout.splits["test"]]
            if (folder / layout.meta).is_file() and any(file.is_file() for file in tests):
                return layout, folder
    return None


def _members(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in folder.iterdir() if file.is_file()}


def _open_tar(path: Path) -> Archive:
    if not path.name.endswith(_TAR_ENDINGS):
        raise DataError(
            f"{path} is a file; expected a folder, or CIFAR's own cifar-10-python.tar.gz."
        )
    wanted = {
        member
        for layout in LAYOUTS.values()
        for member in (layout.meta, *(name for names in layout.splits.values() for name in names))
    }
    files: dict[str, bytes | Path] = {}
    others = []
    try:
        with _unpacked(path) as source, tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                name = Path(member.name).name
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None and name in wanted:
                    files[name] = content.read()
                elif content is not None:
                    others.append(name)
            # To the end of the stream: gzip's checksum stands there, and tarfile stops before it.
            while source.read(2**20):
                pass
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as a tar archive: {first_line(error)}. Download it again."
        ) from None
    for layout in LAYOUTS.values():
        if layout.meta in files and set(layout.splits["test"]) <= set(files):
            return Archive(str(path), layout, files)
    raise DataError(
        f"{path} is not one of CIFAR's archives: expected cifar-10-batches-py/ or "
        f"cifar-100-python/ inside, found {listed([*files, *others][:5]) or 'nothing'}."
    )


@contextmanager
def _unpacked(path: Path) -> Iterator[BoundedReader]:
    """Open a tar file, unpacked; at most as many bytes of it as CIFAR's archives may have."""
    with path.open("rb") as packed:
        is_gzip = packed.read(2) == b"\x1f\x8b"
        packed.seek(0)
        yield BoundedReader(gzip.GzipFile(fileobj=packed) if is_gzip else packed, _LARGEST_TAR)


# --- unpickling without running anything ---


class _Array:
    """Stands for a numpy array: keeps what a pickle says about it."""

    def __init__(
        self, shape: tuple[int, ...] = (0,), dtype: str = "|u1", data: bytes = b""
    ) -> None:
        self.shape, self.dtype, self.data, self.fortran = shape, dtype, data, False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, dtype, self.fortran, self.data = state
        self.dtype = dtype.name


class _Dtype:
    """Stands for a numpy dtype: keeps its name and byte order."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = str(_text(name))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = _text(state[1])
        self.name = (order if order in ("<", ">", "=") else "|") + self.name.lstrip("<>=|")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(
    data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any = "C", *_: Any
) -> _Array:
    array = _Array(shape, dtype.name, bytes(data))
    array.fortran = _text(order) == "F"
    return array


def _scalar(dtype: _Dtype, data: Any) -> int:
    return int(np.frombuffer(_bytes(data), dtype=dtype.name)[0])


def _encode(text: str, _encoding: str = "latin1") -> bytes:
    return text.encode("latin1")  # Python 3 pickles bytes as text in protocols below 3


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _InertUnpickler(pickle.Unpickler):
    """Unpickle with stand-ins only; each use of a function gets a fresh one.

    A pickle can set attributes of what it was given: a function made for this one call is thrown
    away afterwards, and the classes refuse through their `__setstate__`.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks to run {module}.{name}, which an image archive never needs"
            )
        allowed = _ALLOWED[(module, name)]
        return allowed if isinstance(allowed, type) else lambda *arguments: allowed(*arguments)


def _unpickle(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = _InertUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{where} cannot be read: {error or type(error).__name__}.") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a dictionary, found {type(value).__name__}.")
    return {str(_text(key)): item for key, item in value.items()}


def _as_array(value: Any, where: str) -> np.ndarray:
    try:
        if isinstance(value, _Array):
            flat = np.frombuffer(_bytes(value.data), dtype=np.dtype(value.dtype))
            return flat.reshape(value.shape, order="F" if value.fortran else "C")
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} holds an array that cannot be read: {error}.") from None


def _bytes(value: Any) -> bytes:
    return value.encode("latin1") if isinstance(value, str) else bytes(value)


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

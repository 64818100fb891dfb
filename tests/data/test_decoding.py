"""Decoding holds no more than it must, sees each image once, and blames none for the machine."""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers import pipeline

from hfbench.data.decoding import EncodedImages
from hfbench.data.sources import load_splits
from hfbench.errors import DataError
from hfbench.recipe.schema import DatasetSection
from hfbench.results.schema import find_runs
from hfbench.training.run import run_recipe
from tests.builders import tiny_recipe, vit_config, write_model
from tests.data.test_images import (
    as_tensor,
    encoded,
    good,
    load,
    load_error,
    picture,
    quiet,
    saved,
    table,
)

__all__ = ["quiet"]

# Loads a data set in a process of its own and says what that took beyond what it had before, in
# bytes: the peak of all resident memory, and of what belongs to the process alone (the rest are
# pages of files, which the kernel drops when others need them).
_MEASURE = """
import json, resource, sys, threading, time
import datasets, psutil, torch, PIL.Image, sklearn
from hfbench.recipe.schema import DatasetSection
from hfbench.data.sources import load_splits

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])

def watch():
    while not done.is_set():
        own.append(status("RssAnon"))
        time.sleep(0.002)

datasets.disable_progress_bars()
small, path, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
load_splits(DatasetSection(name_or_path=small), 16, "bilinear")  # imports, threads
before, own, done = status("VmRSS"), [status("RssAnon")], threading.Event()
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
if limit:
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.RLIM_INFINITY))
else:
    threading.Thread(target=watch, daemon=True).start()
train, _ = load_splits(DatasetSection(name_or_path=path), 32, "bilinear")
train.fingerprint()  # every pixel is read
peak = status("VmHWM") - before
done.set()
print(json.dumps([train.images.nbytes, peak, max(own) - own[0], list(train.images.shape)]))
"""


def measure(tmp_path: Path, path: Path, limit: int = 0) -> tuple[int, int, int, list[int]]:
    """Return bytes of pixels, peak of the resident memory, of the process's own, and the shape."""
    (tmp_path / "small").mkdir()
    small = saved(tmp_path / "small", good(), good(2))
    command = [sys.executable, "-c", _MEASURE, str(small), str(path), str(limit)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pixels, peak, own, shape = json.loads(done.stdout.splitlines()[-1])
    return pixels, peak, own, shape


def write_photos(folder: Path, count: int, *, mixed: bool = True) -> Path:
    """Write JPEG photos of 12 megapixels, 36 million bytes each as pixels."""
    whole = Image.fromarray(np.full((3000, 4000, 3), (220, 40, 40), np.uint8))
    for split, number in (("train", count), ("test", 2)):
        for n in range(number):
            place = folder / "photos" / split / ("cat", "dog")[n % 2]
            place.mkdir(parents=True, exist_ok=True)
            whole.crop((0, 0, 4000 - n * mixed, 3000)).save(place / f"{n}.jpg", quality=60)
    return folder / "photos"


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@linux
@pytest.mark.slow
def test_small_images_take_at_most_a_fifth_more_than_their_pixels(tmp_path: Path) -> None:
    buffer = [encoded(picture(n, size=(64, 64)), "JPEG") for n in range(50)]
    many = [buffer[n % 50] for n in range(20_000)]
    path = saved(tmp_path, table(many, [n % 2 for n in range(20_000)]), good(2))

    pixels, peak, own, _ = measure(tmp_path, path)
    assert pixels == 20_000 * 3 * 64 * 64
    assert peak <= 1.2 * pixels
    assert own <= 0.2 * pixels


@linux
@pytest.mark.slow
@pytest.mark.parametrize("mixed", [True, False])
def test_no_more_photos_are_held_than_are_being_decoded(tmp_path: Path, mixed: bool) -> None:
    few = measure(tmp_path, write_photos(tmp_path, 16, mixed=mixed))
    (tmp_path / "more").mkdir()
    many = measure(tmp_path / "more", write_photos(tmp_path / "more", 48, mixed=mixed))

    assert few[3] == [16, 3, 32, 32]
    assert many[1] - few[1] < 4 * 36_000_000  # 32 more, which would be 1.2 billion bytes


@linux
@pytest.mark.slow
def test_photos_are_decoded_one_by_one_where_memory_allows_no_more(tmp_path: Path) -> None:
    # Address space for threads and one picture, not for six.
    assert measure(tmp_path, write_photos(tmp_path, 16), 700 * 2**20)[3] == [16, 3, 32, 32]


# --- the machine, which no image is to blame for ---


def decode(entries: list[Any], size: int = 16) -> tuple[torch.Tensor, EncodedImages]:
    """Decode images as they are stored."""

    def name(position: int, _: Any) -> str:
        return f"image {position}"

    content = EncodedImages(
        lambda start, stop: entries[start:stop], len(entries), name, name, size, "bilinear"
    )
    return torch.from_numpy(np.concatenate(list(content.parts()))), content


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        OSError("out of memory error when reading image file"),  # what PIL makes of a decoder's
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_is_blamed_on_no_image(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(DataError, match="memory ran out while images were decoded") as caught:
        decode([encoded(picture(n, size=(8, 8)), "BMP") for n in range(4)])
    assert "cannot be used" not in str(caught.value)


def test_picture_that_memory_was_too_small_for_beside_others_is_decoded_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_picture, failed = ImageFile.ImageFile.load, []

    def fail_once(self: Any) -> Any:
        if not failed:
            failed.append(True)
            raise MemoryError
        return load_picture(self)

    images = [picture(n, size=(8, 8)) for n in range(4)]
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail_once)
    pixels, _ = decode([encoded(image, "BMP") for image in images])
    assert failed
    assert torch.equal(pixels, torch.stack([as_tensor(image) for image in images]))


def test_disk_without_room_is_said_with_both_sizes_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hfbench.data.pixel_cache.shutil.disk_usage", lambda _: Free(2**29))
    monkeypatch.setattr("hfbench.data.pixel_cache.math.prod", lambda shape: 3 * 2**29)
    caplog.set_level(logging.WARNING, logger="hfbench")

    train, _ = load(saved(tmp_path, good(), good(2)))
    assert "are not kept for the next run: they take 1.5 GiB, and" in caplog.text
    assert "has 0.5 GiB free" in caplog.text
    assert len(train) == 4


class Free:
    """What is said of a disk."""

    def __init__(self, free: int) -> None:
        self.free = free


# --- one size, known from a few ---


def test_odd_image_that_was_not_looked_at_makes_all_be_resized(tmp_path: Path) -> None:
    images = [picture(n) for n in range(300)]
    images[299 - 7] = picture(1000, size=(30, 20))
    train, test = load(saved(tmp_path, table(images, [n % 2 for n in range(300)]), good(2)))

    assert train.images.shape == (300, 3, 16, 16)
    assert test.images.shape == (2, 3, 6, 8)
    for n in (0, 292, 299):
        image = as_tensor(images[n])
        straight = F.resize(image, [16, 16], InterpolationMode.BILINEAR, antialias=True)
        assert torch.equal(train.images[n], straight)
    assert train.notes[0].startswith("300 of 300 images were resized to 16 x 16")


def test_saved_model_sees_images_of_mixed_sizes_as_the_evaluation_did(tmp_path: Path) -> None:
    sizes = [(24, 24)] * 8 + [(288, 200)] * 2  # most of them smaller than the input
    files = []
    for split in ("train", "test"):
        for n, size in enumerate(sizes):
            file = tmp_path / "images" / split / ("cat", "dog")[n % 2] / f"{n}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(n, size=size).save(file)
            files.append(file)
    dataset = {"name_or_path": str(tmp_path / "images"), "max_train_samples": None}
    vit = write_model(tmp_path / "vit", vit_config())
    recipe = tiny_recipe(vit, pretrained=True, dataset=dataset | {"max_eval_samples": None})
    run_recipe(recipe, tmp_path / "runs")

    (run,) = find_runs(tmp_path / "runs")
    classify = pipeline("image-classification", model=str(run.folder / "model"))
    order = sorted(files[10:], key=lambda file: (file.parent.name, file.name))
    seen = [classify(Image.open(file))[0]["score"] for file in order]
    evaluated = np.load(run.folder / "predictions.npz")["probability"]
    assert np.abs(np.array(seen) - evaluated).max() < 1e-5


def test_photos_far_larger_than_the_input_are_shrunk_as_they_are_decoded(tmp_path: Path) -> None:
    # For a model of 16 px, images of up to 32 x 32 pixels are kept.
    for side, kept in ((32, True), (33, False)):
        images = [picture(n, size=(side, side)) for n in range(4)]
        (tmp_path / str(side)).mkdir()
        train, _ = load(saved(tmp_path / str(side), table(images, [0, 1, 0, 1]), good(2)))
        size = side if kept else 16
        first = F.resize(as_tensor(images[0]), [size, size], antialias=True)
        assert torch.equal(train.images[0], first)
        assert train.notes == (
            []
            if kept
            else [
                "4 of 4 images were resized to 16 x 16, the model's input, since they are more "
                "than twice as large; the first is train image 0."
            ]
        )


def test_what_a_larger_model_left_in_the_cache_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = saved(tmp_path, table([picture(n, (40, 40)) for n in range(4)], [0, 1] * 2), good(2))
    dataset = DatasetSection(name_or_path=str(path))

    assert load_splits(dataset, 64, "bilinear")[0].images.shape == (4, 3, 40, 40)
    for _ in range(2):
        assert load_splits(dataset, 16, "bilinear")[0].images.shape == (4, 3, 16, 16)
    assert load_splits(dataset, 64, "bilinear")[0].images.shape == (4, 3, 40, 40)


def turned(image: Image.Image, kind: str) -> dict[str, Any]:
    """Encode a picture that was taken with the camera on its side."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_photos_are_turned_as_their_exif_says(kind: str) -> None:
    entries = [turned(picture(n, size=(8, 6)), kind) for n in range(3)]

    pixels, content = decode(entries)
    assert content.shape == (3, 3, 8, 6)
    assert not content.is_resized
    if kind in ("PNG", "TIFF"):
        assert torch.equal(pixels[0], as_tensor(picture(0)).rot90(-1, (1, 2)))
    mixed, _ = decode([*entries, turned(picture(0, size=(6, 8)), kind)])
    assert mixed.shape == (4, 3, 16, 16)


# --- kinds of images ---


def test_truncated_image_is_refused_by_name(tmp_path: Path) -> None:
    content = encoded(picture(0, size=(64, 64)), "JPEG")
    content["bytes"] = content["bytes"][: len(content["bytes"]) // 2]

    said = load_error(saved(tmp_path, table([picture(1), content], [0, 1]), good()))
    assert "1 of 2 images cannot be used:\n  train image 1: image file is truncated" in said


def test_of_an_animation_the_first_frame_is_taken_and_said() -> None:
    frames = [picture(n).convert("P") for n in range(3)]
    film = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])

    pixels, content = decode([encoded(picture(9)), film])
    assert torch.equal(pixels[1], as_tensor(frames[0]))
    assert content.notes == [
        "1 of 2 images are not RGB and were converted; the first is image 1.",
        "1 of 2 images have several frames, of which the first was taken; the first is image 1.",
    ]


def test_photo_with_a_preview_is_no_animation() -> None:
    photo = encoded(picture(0), "MPO", save_all=True, append_images=[picture(1)])

    assert decode([photo, photo])[1].notes == []


def test_sixteen_bits_of_grey_are_refused_and_of_colour_are_rounded_down() -> None:
    grey = Image.fromarray(np.full((6, 8), 40_000, np.uint16))
    with pytest.raises(DataError, match="image 1: it has more than 8 bits a channel; convert"):
        decode([encoded(picture(0)), encoded(grey)])

    pixels, content = decode([{"bytes": sixteen_bits(0x12FF, 0x3480, 0xFF00), "path": None}])
    assert pixels.view(3, -1)[:, 0].tolist() == [0x12, 0x34, 0xFF]
    assert content.notes == []


def sixteen_bits(*colour: int) -> bytes:
    """Write a PNG of 4 x 4 pixels with 16 bits a channel, which PIL does not."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    lines = (b"\0" + struct.pack(">3H", *colour) * 4) * 4
    body = chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def test_large_photo_is_taken_in_bands_without_a_seam() -> None:
    image = picture(0, size=(2000, 1100)).convert("CMYK")

    pixels, _ = decode([encoded(image, "TIFF")], 2000)
    assert torch.equal(pixels[0], as_tensor(image))


def test_image_of_more_pixels_than_pil_warns_of_is_decoded_without_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    assert decode([encoded(picture(0, size=(10, 10)))])[0].shape == (1, 3, 10, 10)
    with pytest.raises(DataError, match="image 0: it is too large, or made to fill the memory"):
        decode([encoded(picture(0, size=(20, 20)))])

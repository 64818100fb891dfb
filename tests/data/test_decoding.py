"""Decoding holds no more than it must, sees each image once, and blames none for the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.test_images import encoded, good, picture, quiet, saved, table

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


def write_photos(folder: Path, count: int) -> Path:
    """Write JPEG photos of 12 megapixels, of several sizes, 36 million bytes each as pixels."""
    whole = Image.fromarray(np.full((3000, 4000, 3), (220, 40, 40), np.uint8))
    for split, number in (("train", count), ("test", 2)):
        for n in range(number):
            place = folder / "photos" / split / ("cat", "dog")[n % 2]
            place.mkdir(parents=True, exist_ok=True)
            whole.crop((0, 0, 4000 - n, 3000)).save(place / f"{n}.jpg", quality=60)
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
def test_no_more_photos_are_held_than_are_being_decoded(tmp_path: Path) -> None:
    few = measure(tmp_path, write_photos(tmp_path, 16))
    (tmp_path / "more").mkdir()
    many = measure(tmp_path / "more", write_photos(tmp_path / "more", 48))

    assert few[3] == [16, 3, 32, 32]
    assert many[1] - few[1] < 4 * 36_000_000  # 32 more, which would be 1.2 billion bytes


@linux
@pytest.mark.slow
def test_photos_are_decoded_one_by_one_where_memory_allows_no_more(tmp_path: Path) -> None:
    # Address space for threads and one picture, not for six.
    assert measure(tmp_path, write_photos(tmp_path, 16), 700 * 2**20)[3] == [16, 3, 32, 32]

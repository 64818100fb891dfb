"""What was decoded once is not decoded again, unless something that it depends on has changed."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
import torch

from hfbench.data.images import ImageBatches, ImageSplit
from hfbench.data.sources import load_splits
from hfbench.data.transforms import Normalization, Preprocessing
from hfbench.errors import DataError
from hfbench.recipe.schema import DatasetSection
from tests.data.test_cifar import TEN, changed, cifar10, extract, pack
from tests.data.test_images import as_tensor, encoded, good, picture, quiet, saved, table

__all__ = ["quiet"]

Splits = tuple[ImageSplit, ImageSplit]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that the decoded images of a test are kept in."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "hfbench-decoded"


def load(path: Path, image_size: int = 16, how: str = "bilinear", **options: Any) -> Splits:
    return load_splits(DatasetSection(name_or_path=str(path), **options), image_size, how)


@contextmanager
def no_decoding() -> Iterator[None]:
    """Make PIL refuse all images."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("PIL was asked")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PIL.Image, "open", refuse)
        yield


def is_decoded(path: Path, **options: Any) -> bool:
    """Tell whether loading would decode an image; it stays as undecoded as it was."""
    with no_decoding():
        try:
            load(path, **options)
        except DataError as error:
            said = str(error)
        else:
            return False
    assert "PIL was asked" in said
    return True


def assert_same(one: Splits, other: Splits) -> None:
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left.images, right.images)
        assert left.images.dtype == right.images.dtype
        assert torch.equal(left.labels, right.labels)
        assert torch.equal(left.index, right.index)
        assert left.label_names == right.label_names
        assert left.notes == right.notes
        assert left.fingerprint() == right.fingerprint()


# --- the second time ---


def save_to_disk(folder: Path) -> Path:
    return saved(folder, good(), good(2))


def write_parquet(folder: Path) -> Path:
    (folder / "parquet" / "plain_text").mkdir(parents=True)
    for name, split in (("train", good()), ("test", good(2))):
        split.to_parquet(str(folder / "parquet" / "plain_text" / f"{name}-00000-of-00001.parquet"))
    return folder / "parquet"


def write_images(folder: Path) -> Path:
    for split, count in (("train", 4), ("test", 2)):
        for n in range(count):
            place = folder / "files" / split / ("cat", "dog")[n % 2]
            place.mkdir(parents=True, exist_ok=True)
            picture(n).save(place / f"{n}.bmp")
    return folder / "files"


@pytest.mark.parametrize("write", [save_to_disk, write_parquet, write_images])
def test_second_time_nothing_is_decoded(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)

    assert is_decoded(path)
    first = load(path)
    with no_decoding():
        assert_same(load(path), first)


def test_notes_are_said_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [picture(0), picture(1, mode="L"), picture(2), picture(3, size=(5, 5))]
    path = saved(tmp_path, table(images, [0, 1, 0, 1]), good(2))
    caplog.set_level(logging.INFO, logger="hfbench")

    first = load(path)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(first[0].notes) == 2
    caplog.clear()
    with no_decoding():
        assert_same(load(path), first)
    assert [record.getMessage() for record in caplog.records] == said


@pytest.mark.parametrize("write", [pack, extract])
def test_archive_is_not_read_again(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path, TEN, cifar10())

    first = load(path, image_column="img")
    file = path if path.is_file() else path / "data_batch_1"
    found = file.stat()
    file.write_bytes(bytes(found.st_size))  # nothing can be read from it now
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert_same(load(path, image_column="img"), first)


def test_archive_is_read_again_after_a_change(tmp_path: Path) -> None:
    path = pack(tmp_path, TEN, cifar10())
    before, _ = load(path, image_column="img")

    path.unlink()
    files = cifar10()
    swapped = {"data_batch_1": files["data_batch_2"], "data_batch_2": files["data_batch_1"]}
    after, _ = load(pack(tmp_path, TEN, changed(files, swapped)), image_column="img")
    assert before.fingerprint() != after.fingerprint()


def test_archive_keeps_refusing_a_split_that_it_does_not_have(tmp_path: Path) -> None:
    path = pack(tmp_path, TEN, cifar10())
    load(path)

    for _ in range(2):
        with pytest.raises(DataError, match='"tset" is not a split'):
            load(path, eval_split="tset")


def test_images_from_the_cache_train_like_those_decoded(tmp_path: Path) -> None:
    path = save_to_disk(tmp_path)
    normalization = Normalization(8, "bilinear", (0.5,) * 3, (0.25,) * 3)

    def serve(location: str) -> list[torch.Tensor]:
        split, _ = load(path)
        before = split.fingerprint()
        preprocessing = Preprocessing(normalization, ["random_crop", "horizontal_flip"], 0)
        batches = ImageBatches(split, preprocessing, location, augment=True)
        served = [batches.__getitems__([0, 1, 2, 3])["pixel_values"] for _ in range(2)]
        assert split.fingerprint() == before  # a file that is mapped cannot be written to
        return served

    for location in ("host", "device"):
        decoded, cached = serve(location), serve(location)
        assert all(torch.equal(a, b) for a, b in zip(decoded, cached, strict=True))


# --- what makes images be decoded anew ---


def test_overwritten_data_set_is_decoded_anew(tmp_path: Path) -> None:
    path = save_to_disk(tmp_path)
    load(path)
    shutil.rmtree(path)

    other = [picture(n) for n in (7, 8, 9, 10)]
    train, test = load(saved(tmp_path, table(other, [0, 1, 0, 1]), good(2)))
    assert torch.equal(train.images[0], as_tensor(other[0]))
    assert torch.equal(test.images[0], as_tensor(picture(0)))


def test_table_exchanged_under_its_old_fingerprint_is_decoded_anew(tmp_path: Path) -> None:
    path = save_to_disk(tmp_path)
    load(path)

    (tmp_path / "other").mkdir()
    other = saved(tmp_path / "other", table([picture(9)] * 4, [0, 1, 0, 1]), good(2))
    name = "data-00000-of-00001.arrow"
    (other / "train" / name).replace(path / "train" / name)
    train, _ = load(path)
    assert torch.equal(train.images[0], as_tensor(picture(9)))


def test_changed_parquet_file_is_decoded_anew(tmp_path: Path) -> None:
    path = write_parquet(tmp_path)
    load(path)

    changed_split = table([picture(9)] * 4, [0, 1, 0, 1])
    changed_split.to_parquet(str(path / "plain_text" / "train-00000-of-00001.parquet"))
    train, _ = load(path)
    assert torch.equal(train.images[0], as_tensor(picture(9)))


def test_changed_image_file_is_decoded_anew(tmp_path: Path) -> None:
    path = write_images(tmp_path)
    load(path)

    picture(9).save(path / "train" / "cat" / "0.bmp")  # of the same size in bytes
    train, _ = load(path)
    assert torch.equal(train.images[0], as_tensor(picture(9)))


def test_changed_image_that_a_table_only_names_is_decoded_anew(tmp_path: Path) -> None:
    for n in range(4):
        picture(n).save(tmp_path / f"{n}.bmp")
    features = datasets.Features(
        {"image": datasets.Value("string"), "label": good().features["label"]}
    )
    rows = {"image": [str(tmp_path / f"{n}.bmp") for n in range(4)], "label": [0, 1, 0, 1]}
    split = datasets.Dataset.from_dict(rows, features=features)
    path = saved(tmp_path, split, split)
    load(path)

    assert not is_decoded(path)
    picture(9).save(tmp_path / "0.bmp")
    train, _ = load(path)
    assert torch.equal(train.images[0], as_tensor(picture(9)))


def test_column_split_and_subset_are_kept_apart(tmp_path: Path) -> None:
    images = {"image": [picture(n) for n in range(4)], "other": [picture(n + 4) for n in range(4)]}
    features = datasets.Features(
        {"image": datasets.Image(), "other": datasets.Image(), "label": good().features["label"]}
    )
    both = datasets.Dataset.from_dict(images | {"label": [0, 1, 0, 1]}, features=features)
    path = saved(tmp_path, both, both)

    whole = load(path)
    assert is_decoded(path, image_column="other")
    assert torch.equal(load(path, image_column="other")[0].images[0], as_tensor(picture(4)))
    assert is_decoded(path, max_train_samples=2)
    subset, _ = load(path, max_train_samples=2)
    assert torch.equal(subset.images, whole[0].images[subset.index])
    assert not is_decoded(path, max_train_samples=2)


def test_subset_is_cached_without_decoding_the_rest(tmp_path: Path) -> None:
    images: list[Any] = [picture(n) for n in range(8)]
    path = saved(tmp_path, table(images, [n % 2 for n in range(8)]), good())
    left_out = next(n for n in range(8) if n not in load(path, max_train_samples=4)[0].index)
    shutil.rmtree(path)

    images[left_out] = {"bytes": b"junk", "path": None}
    path = saved(tmp_path, table(images, [n % 2 for n in range(8)]), good())
    first = load(path, max_train_samples=4)
    with no_decoding():
        assert_same(load(path, max_train_samples=4), first)


@pytest.mark.parametrize("other", [{"image_size": 12}, {"how": "bicubic"}])
def test_size_counts_only_where_images_are_resized(
    tmp_path: Path, cache: Path, other: dict[str, Any]
) -> None:
    (tmp_path / "uniform").mkdir()
    uniform = save_to_disk(tmp_path / "uniform")
    load(uniform)
    assert not is_decoded(uniform, **other)

    images = [picture(n, size=(8 + n, 6 + n)) for n in range(4)]
    mixed = saved(tmp_path, table(images, [0, 1, 0, 1]), good(2))
    first, _ = load(mixed)
    assert is_decoded(mixed, **other)
    second, _ = load(mixed, **other)
    assert first.fingerprint() != second.fingerprint()
    with no_decoding():
        assert torch.equal(load(mixed)[0].images, first.images)
        assert torch.equal(load(mixed, **other)[0].images, second.images)


def test_images_that_cannot_be_used_are_refused_each_time(tmp_path: Path, cache: Path) -> None:
    damaged = table([picture(0), {"bytes": b"junk", "path": None}], [0, 1])
    path = saved(tmp_path, damaged, good())

    said = set()
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            load(path)
        said.add(str(caught.value))
    assert len(said) == 1
    assert not list(cache.glob("*"))


# --- a cache that does not work ---


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: bytes(len(content)),
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
        lambda content: content[:-300] + bytes([content[-300] ^ 1]) + content[-299:],
        lambda content: content + b"x",
    ],
    ids=["empty", "half", "a byte short", "zeros", "one bit of head", "one bit", "a byte more"],
)
def test_damaged_file_is_noticed_and_written_anew(
    tmp_path: Path, cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = save_to_disk(tmp_path)
    first = load(path)

    files = sorted(cache.iterdir())
    assert len(files) == 2
    for file in files:
        content = file.read_bytes()
        file.unlink()  # it may still be mapped
        file.write_bytes(damage(content))
    assert_same(load(path), first)
    with no_decoding():
        assert_same(load(path), first)
    assert sorted(cache.iterdir()) == files


def test_cache_that_cannot_be_written_is_said_and_does_no_harm(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")

    path = save_to_disk(tmp_path)
    assert_same(load(path), load(path))
    assert "are not kept for the next run" in caplog.text
    assert is_decoded(path)


def test_full_disk_is_said_and_leaves_nothing_behind(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    many = [encoded(picture(n, size=(32, 32))) for n in range(40)]
    path = saved(tmp_path, table(many, [n % 2 for n in range(40)]), good())

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # 40 images take 122,880 bytes
    try:
        first = load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "are not kept for the next run" in caplog.text
    assert len(list(cache.iterdir())) == 1  # the test split, which is small enough
    assert_same(load(path), first)


def test_disabled_caching_is_respected(tmp_path: Path, cache: Path) -> None:
    path = save_to_disk(tmp_path)
    datasets.disable_caching()
    try:
        load(path)
        assert not cache.exists()
        assert is_decoded(path)
    finally:
        datasets.enable_caching()

"""Limits hold before memory or time is taken, whatever a file says of its size."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hfbench.data import cifar as archives
from hfbench.data.cifar import find_archive
from hfbench.data.decoding import EncodedImages
from hfbench.data.sources import load_splits
from hfbench.errors import DataError, HfbenchError, ModelError, RecipeError, ResultError
from hfbench.machine.bounds import (
    BoundedReader,
    check_unpacked_size,
    free_memory,
    read_text,
    require_memory,
)
from hfbench.models.inference import predict
from hfbench.models.loading import load_model, open_model
from hfbench.recipe.schema import check_recipe, load_recipe
from hfbench.results.predictions import load_predictions
from hfbench.results.schema import load_result, save_result
from tests.builders import make_recipe, make_result, tiny_recipe, vit_config, write_model

LIMIT = 4 * 2**20


def png(width: int, height: int) -> bytes:
    """Return an image that says it is so large, and holds a line."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + lines + chunk(b"IEND", b"")


# --- images ---


def refusal(entries: list[Any], image_size: int = 16) -> list[str]:
    """Return what is said of images that cannot be used, a line each behind the first."""

    def name(position: int, _: Any) -> str:
        return f"image {position}"

    def read(start: int, stop: int) -> list[Any]:
        return entries[start:stop]

    with pytest.raises(DataError) as caught:
        list(EncodedImages(read, len(entries), name, name, image_size, "bilinear").parts())
    return str(caught.value).splitlines()


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 1), (30_000, 30_000)])
def test_image_that_claims_to_be_huge_is_refused_by_name(size: tuple[int, int]) -> None:
    start = time.perf_counter()

    said = refusal([{"bytes": png(*size), "path": None}])

    assert said[0] == "dataset: 1 of 1 images cannot be used:"
    assert "image 0: it is too large, or made to fill the memory" in said[1]
    assert time.perf_counter() - start < 5


def leave_free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": size}))


def test_images_that_fill_the_memory_are_refused_before_the_first_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(buffer, "PNG")
    leave_free(monkeypatch, 5_000_000)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda *_: pytest.fail("decoded"))

    # No more than their heads is read; four take 12 million bytes.
    entry = {"bytes": buffer.getvalue(), "path": None}
    said = refusal([entry] * 4, 1000)
    assert said == [
        "dataset: 4 images of 1000 x 1000 would take 0.0 GiB of memory, and 0.0 GiB are free; "
        "train on fewer, with dataset.max_train_samples and dataset.max_eval_samples, or smaller "
        "ones."
    ]


def test_picture_that_memory_is_too_small_to_decode_is_named_with_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = []
    for size in ((8, 8), (1000, 1000)):
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        entries.append({"bytes": buffer.getvalue(), "path": None})
    leave_free(monkeypatch, 5_000_000)

    (said,) = refusal(entries)
    assert said.startswith("dataset: image 1: decoding its 1,000 x 1,000 pixels would take")


def test_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_free(monkeypatch, 2**50)
    monkeypatch.setattr("hfbench.machine.bounds._CGROUP", tmp_path)
    everything = free_memory()
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 120\nactive_file 30\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == everything
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory() == 1000 - 700 + 150


def test_images_elsewhere_and_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    paths = ["https://example.org/x.png", "s3://bucket/x.png", str(tmp_path / "pipe.png")]

    _, *said = refusal([{"bytes": None, "path": path} for path in paths])

    assert ["another machine" in line for line in said] == [True, True, False]
    assert "it is no file" in said[2]


# --- archives ---


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


def test_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_LARGEST_TAR", LIMIT)
    info = tarfile.TarInfo("cifar-10-batches-py/other")
    info.size = 4 * LIMIT
    path = write_tar(tmp_path / "cifar.tar.gz", (info, b"\0" * info.size))

    with pytest.raises(DataError, match="unpacks to more than 4 MiB"):
        find_archive(path)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_member_that_lies_about_its_size_is_refused(kind: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    info.size, info.type = 2**36, kind
    path = tmp_path / "cifar.tar.gz"
    with gzip.open(path, "wb") as file:
        file.write(info.tobuf() + b"\0" * 10_000)

    with pytest.raises(DataError, match=r"cifar\.tar\.gz"):
        find_archive(path)


def test_stream_ends_at_its_limit() -> None:
    assert BoundedReader(io.BytesIO(b"abc"), 3).read() == b"abc"
    reader = BoundedReader(io.BytesIO(b"abcd"), 3)
    with pytest.raises(OSError, match="unpacks"):
        reader.read()


# --- JSON, predictions, weights ---


def test_large_or_deep_result_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    with file.open("wb") as stream:
        stream.truncate(3 * 2**30)
    with pytest.raises(ResultError, match="3,072 MiB"):
        load_result(tmp_path)
    file.write_text("[" * 200_000)
    with pytest.raises(ResultError, match="cannot be read"):
        load_result(tmp_path)


def test_large_text_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    assert read_text(tmp_path / "a", 3) == "abc"
    with pytest.raises(ValueError, match="expected at most"):
        read_text(tmp_path / "a", 2)


@pytest.mark.parametrize("shape", [(10**12,), (50_000_000,)])
def test_predictions_that_unpack_to_too_much_are_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    import zipfile

    save_result(make_result(), tmp_path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(tmp_path / "predictions.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("index", "label", "prediction", "probability"):
            file.writestr(f"{name}.npy", header.getvalue() + b"\0" * 4_000_000)
    start = time.perf_counter()

    with pytest.raises(ResultError, match=r"predictions\.npz"):
        load_predictions(load_result(tmp_path))

    assert time.perf_counter() - start < 2


def test_header_of_an_array_that_lies_is_refused(tmp_path: Path) -> None:
    import zipfile

    save_result(make_result(), tmp_path)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)}
    )
    with zipfile.ZipFile(tmp_path / "predictions.npz", "w") as file:
        for name in ("index", "label", "prediction", "probability"):
            file.writestr(f"{name}.npy", header.getvalue())

    with pytest.raises(ResultError, match=r"predictions\.npz"):
        load_predictions(load_result(tmp_path))


def test_zip_is_measured_by_its_table(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1000, np.uint8))
    check_unpacked_size(tmp_path / "a.npz", 10_000)
    with pytest.raises(ValueError, match="unpacks"):
        check_unpacked_size(tmp_path / "a.npz", 100)


@pytest.mark.parametrize("length", [2**60, 2**31, 10])
def test_weights_whose_header_lies_are_refused(length: int, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", vit_config())
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 20)
    recipe = tiny_recipe(folder, pretrained=True)

    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(recipe, open_model(recipe), [str(n) for n in range(10)])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_labels", 10**9),
        ("hidden_size", 2**30),
        ("intermediate_size", 10**14),
        ("image_size", 2**24),
    ],
)
def test_configuration_of_a_giant_is_refused(key: str, value: int, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", vit_config())
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {key: value}))
    recipe = tiny_recipe(folder, pretrained=key != "image_size")
    start = time.perf_counter()

    if key == "image_size":  # fresh weights take the recipe's size
        load_model(recipe, open_model(recipe), [str(n) for n in range(10)])
    else:
        with pytest.raises(ModelError):
            load_model(recipe, open_model(recipe), [str(n) for n in range(10)])

    assert time.perf_counter() - start < 10


def test_large_configuration_is_not_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", vit_config())
    with (folder / "config.json").open("ab") as file:
        file.truncate(2**31)

    with pytest.raises(ModelError, match="2048 MiB"):
        open_model(tiny_recipe(folder, pretrained=True))


# --- recipes and data sets ---


def test_large_recipe_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "recipe.json").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(RecipeError, match="4,096 MiB"):
        load_recipe(tmp_path / "recipe.json")


def test_more_synthetic_images_than_memory_holds_are_refused() -> None:
    dataset = {"name_or_path": "synthetic", "max_train_samples": 10**12}
    recipe = tiny_recipe(dataset=dataset)
    with pytest.raises(DataError, match=r"dataset: .* GiB"):
        load_splits(recipe.dataset, 32, "bilinear")


def test_memory_that_there_is_may_be_taken() -> None:
    require_memory(1000, "this", "nothing")
    with pytest.raises(HfbenchError, match="GiB are free"):
        require_memory(1e18, "this", "take less")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize("depth", [20, 400, 100_000])
def test_deeply_nested_recipe_is_refused(depth: int) -> None:
    content = make_recipe().as_json()
    content["training_args"]["lr_scheduler_kwargs"] = nested(depth)

    _, problems = check_recipe(content)

    assert len(problems) == 1
    assert problems[0].startswith("training_args.lr_scheduler_kwargs.a")
    assert "nested" in problems[0]


@pytest.mark.parametrize("shape", ["keys", "wrong", "twice"])
def test_time_to_check_a_recipe_grows_no_faster_than_the_recipe(shape: str, tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        content = make_recipe().as_json()
        if shape == "wrong":
            content["training_args"] |= {"seed": "x" * (10 * count)}
        else:
            content["training_args"] |= {f"nosuch{n}": n for n in range(count)}
        text = json.dumps(content)
        if shape == "twice":
            pairs = ", ".join(f'"a{n}": 1, "a{n}": 2' for n in range(count))
            text = f"{{{pairs}}}"
        path = tmp_path / f"{count}.json"
        path.write_text(text)
        start = time.perf_counter()
        with pytest.raises(RecipeError):
            load_recipe(path)
        return time.perf_counter() - start

    seconds(10)
    assert seconds(800) < 7 * seconds(200) + 0.1
    assert seconds(20_000) < 5


def test_image_processor_of_giant_images_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", vit_config())
    file = folder / "preprocessor_config.json"
    size = {"height": 10**6, "width": 10**6}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": size}))
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")

    with pytest.raises(ModelError, match="1,000,000 pixels"):
        predict(str(folder), [tmp_path / "image.png"])


def test_pipe_is_no_image_to_predict(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png is no file"):
        predict("nosuch", [tmp_path / "pipe.png"])

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbench.data.cifar import ArchiveSplit, find_archive
from hfbench.errors import DataError

TEN, HUNDRED = "cifar-10-batches-py", "cifar-100-python"
PER_FILE = 4
NAMES_10 = [b"airplane", b"automobile", b"bird"]
NAMES_FINE = [b"apple", b"aquarium_fish", b"baby", b"bear"]
NAMES_COARSE = [b"aquatic_mammals", b"fish"]

Files = dict[str, bytes]
Dump = Callable[[Any], bytes]


def python_2(value: Any) -> bytes:
    """Pickle as the author did, in protocol 2 of Python 2, whose strings are bytes."""
    return b"\x80\x02" + _python_2(value) + b"."


def _python_2(value: Any) -> bytes:
    if isinstance(value, bytes):
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python_2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python_2(k) + _python_2(v) for k, v in value.items()) + b"u"
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.uint8
    blank = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = (
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"".join(map(_python_2, value.shape)) + b"\x86"
    return blank + b"(K\x01" + shape + dtype + b"\x89" + _python_2(value.tobytes()) + b"tb"


def python_3(protocol: int) -> Dump:
    return lambda value: pickle.dumps(value, protocol=protocol)


PICKLERS = [python_2, python_3(2), python_3(4), python_3(5)]
PICKLER_IDS = ["python 2", "protocol 2", "protocol 4", "protocol 5"]


def pixels(seed: int, count: int = PER_FILE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def batch_10(seed: int) -> dict[bytes, Any]:
    return {
        b"batch_label": b"training batch 1 of 5",
        b"labels": [(seed + n) % len(NAMES_10) for n in range(PER_FILE)],
        b"data": pixels(seed),
        b"filenames": [b"image_%d.png" % n for n in range(PER_FILE)],
    }


def batch_100(seed: int) -> dict[bytes, Any]:
    fine = [(seed + n) % len(NAMES_FINE) for n in range(PER_FILE)]
    return {
        b"filenames": [b"image_%d.png" % n for n in range(PER_FILE)],
        b"batch_label": b"training batch 1 of 1",
        b"fine_labels": fine,
        b"coarse_labels": [label // 2 for label in fine],
        b"data": pixels(seed),
    }


def cifar10(dump: Dump = python_2, **changes: bytes | None) -> Files:
    files: Files = {f"data_batch_{n}": dump(batch_10(n)) for n in range(1, 6)}
    files["test_batch"] = dump(batch_10(6))
    meta = {b"num_cases_per_batch": PER_FILE, b"label_names": NAMES_10, b"num_vis": 3072}
    files["batches.meta"] = dump(meta)
    files["readme.html"] = b"<html></html>"
    return changed(files, changes)


def cifar100(dump: Dump = python_2, **changes: bytes | None) -> Files:
    files = {"train": dump(batch_100(1)), "test": dump(batch_100(2))}
    files["meta"] = dump({b"fine_label_names": NAMES_FINE, b"coarse_label_names": NAMES_COARSE})
    files["file.txt~"] = b""
    return changed(files, changes)


def changed(files: Files, changes: Mapping[str, bytes | None]) -> Files:
    files |= {name: value for name, value in changes.items() if value is not None}
    return {name: value for name, value in files.items() if changes.get(name, b"") is not None}


def pack(folder: Path, inside: str, files: Files, name: str | None = None) -> Path:
    path = folder / (name or {TEN: "cifar-10-python", HUNDRED: "cifar-100-python"}[inside])
    path = path if name else path.with_name(path.name + ".tar.gz")
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        top = tarfile.TarInfo(inside)
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        for member, content in files.items():
            info = tarfile.TarInfo(f"{inside}/{member}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def extract(folder: Path, inside: str, files: Files) -> Path:
    target = folder / inside
    target.mkdir()
    for member, content in files.items():
        (target / member).write_bytes(content)
    return target


def read_split(path: Path, split: str, label: str) -> ArchiveSplit:
    archive = find_archive(path)
    assert archive is not None
    return archive.read_split(split, label)


def read_error(path: Path, split: str = "train", label: str = "label") -> str:
    with pytest.raises(DataError) as caught:
        read_split(path, split, label)
    return str(caught.value)


# --- what the author publishes ---


@pytest.mark.parametrize("dump", PICKLERS, ids=PICKLER_IDS)
@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_is_read_in_the_order_of_its_batches(
    tmp_path: Path, dump: Dump, packed: bool
) -> None:
    path = (pack if packed else extract)(tmp_path, TEN, cifar10(dump))

    train = read_split(path, "train", "label")
    assert train.images.dtype == np.uint8
    assert train.images.shape == (5 * PER_FILE, 3, 32, 32)
    assert train.images.reshape(-1, 3072).tolist() == (
        np.concatenate([pixels(n) for n in range(1, 6)]).tolist()
    )
    assert train.labels.dtype == np.int64
    assert train.labels.tolist() == [(n + i) % 3 for n in range(1, 6) for i in range(PER_FILE)]
    assert train.label_names == ["airplane", "automobile", "bird"]

    test = read_split(path, "test", "label")
    assert (test.images.reshape(-1, 3072) == pixels(6)).all()
    assert test.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("dump", PICKLERS, ids=PICKLER_IDS)
@pytest.mark.parametrize("packed", [True, False])
def test_cifar100_has_fine_and_coarse_labels(tmp_path: Path, dump: Dump, packed: bool) -> None:
    path = (pack if packed else extract)(tmp_path, HUNDRED, cifar100(dump))

    fine, coarse = (read_split(path, "train", f"{kind}_label") for kind in ("fine", "coarse"))
    assert fine.labels.tolist() == [1, 2, 3, 0]
    assert fine.label_names == ["apple", "aquarium_fish", "baby", "bear"]
    assert coarse.labels.tolist() == [0, 1, 1, 0]
    assert coarse.label_names == ["aquatic_mammals", "fish"]
    assert (fine.images == coarse.images).all()
    assert (read_split(path, "test", "fine_label").images.reshape(-1, 3072) == pixels(2)).all()


def test_rows_are_red_then_green_then_blue_from_top_left(tmp_path: Path) -> None:
    data = np.zeros((PER_FILE, 3072), np.uint8)
    data[0, 5] = 11  # red, first row, sixth column
    data[1, 1024 + 32] = 22  # green, second row, first column
    data[2, 3071] = 33  # blue, last row, last column
    files = cifar10(test_batch=python_2({b"labels": [0] * PER_FILE, b"data": data}))

    images = read_split(extract(tmp_path, TEN, files), "test", "label").images
    assert np.argwhere(images).tolist() == [[0, 0, 0, 5], [1, 1, 1, 0], [2, 2, 31, 31]]
    assert (images[0, 0, 0, 5], images[1, 1, 1, 0], images[2, 2, 31, 31]) == (11, 22, 33)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "labels",
    [
        np.array([2, 0, 1, 1]),
        np.array([2, 0, 1, 1], np.uint8),
        np.array([2, 0, 1, 1], ">i4"),
        [np.int64(2), np.int64(0), np.int64(1), np.int64(1)],
        (2, 0, 1, 1),
    ],
    ids=["int64", "uint8", "big endian", "scalars", "tuple"],
)
def test_labels_may_be_numpy(tmp_path: Path, protocol: int, labels: Any) -> None:
    batch = pickle.dumps({b"data": pixels(6), b"labels": labels}, protocol)
    path = extract(tmp_path, TEN, cifar10(test_batch=batch))

    assert read_split(path, "test", "label").labels.tolist() == [2, 0, 1, 1]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_array_in_column_order_is_read_as_it_was(tmp_path: Path, protocol: int) -> None:
    batch = {"data": np.asfortranarray(pixels(6)), "labels": [0, 1, 2, 0]}
    path = extract(tmp_path, TEN, cifar10(test_batch=pickle.dumps(batch, protocol)))

    assert (read_split(path, "test", "label").images.reshape(-1, 3072) == pixels(6)).all()


@pytest.mark.parametrize(("inside", "files"), [(TEN, cifar10()), (HUNDRED, cifar100())])
def test_folder_that_holds_the_archive_is_recognised(
    tmp_path: Path, inside: str, files: Files
) -> None:
    label = "label" if inside == TEN else "fine_label"
    for place, make in (("tar", pack), ("extracted", extract)):
        (tmp_path / place).mkdir()
        make(tmp_path / place, inside, files)

        assert find_archive(tmp_path / place) is not None
        assert len(read_split(tmp_path / place, "test", label).labels) == PER_FILE


def test_archive_may_have_any_name_and_be_uncompressed(tmp_path: Path) -> None:
    path = pack(tmp_path, TEN, cifar10(), name="mine.tar")

    assert len(read_split(path, "train", "label").labels) == 5 * PER_FILE


def test_folder_without_an_archive_is_none(tmp_path: Path) -> None:
    (tmp_path / "meta").write_bytes(b"")  # common names alone are not enough

    assert find_archive(tmp_path) is None


# --- pickles that would run something ---


class _Calls:
    """Pickles into a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _global(module: str, name: str, arguments: bytes = b")") -> bytes:
    return f"c{module}\n{name}\n".encode() + arguments + b"R."


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", ["system", "eval", "exec", "getattr", "mkdir"])
@pytest.mark.parametrize("place", ["value", "key", "whole", "meta"])
def test_pickle_that_calls_anything_is_refused_and_does_nothing(
    tmp_path: Path, protocol: int, function: str, place: str
) -> None:
    marker = tmp_path / "executed"
    code = f"__import__('os').mkdir({str(marker)!r})"
    evil = {
        "system": _Calls(os.system, f"mkdir {marker}"),
        "eval": _Calls(eval, code),
        "exec": _Calls(exec, code),
        "getattr": _Calls(getattr, "", "upper"),
        "mkdir": _Calls(os.mkdir, str(marker)),
    }[function]
    content: Any = {**batch_10(6), "extra": evil}
    if place == "key":
        content = {**batch_10(6), evil: 1}
    if place == "whole":
        content = evil
    if place == "meta":
        content = {"label_names": evil}
    member = "batches.meta" if place == "meta" else "test_batch"
    files = {**cifar10(), member: pickle.dumps(content, protocol)}

    message = read_error(extract(tmp_path, TEN, files), "test")
    assert f"{member} cannot be read: it asks to run " in message
    assert "which an image archive never needs" in message
    assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy", "load"),
        ("numpy", "fromfile"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy._core.multiarray", "frombuffer"),
        ("numpy", "ndarray.tofile"),
        ("numpy.testing._private.utils", "runstring"),
        ("_codecs", "decode"),
        ("hfbench.data.cifar", "_read_member"),
        ("builtins", "open"),
        ("__builtin__", "eval"),
        ("copyreg", "_reconstructor"),
        ("subprocess", "Popen"),
    ],
)
def test_name_beside_the_few_that_arrays_need_is_refused(
    tmp_path: Path, module: str, name: str
) -> None:
    files = cifar10(test_batch=_global(module, name))

    message = read_error(extract(tmp_path, TEN, files), "test")
    assert f"it asks to run {module}.{name}," in message


def test_dotted_name_of_a_later_protocol_is_refused(tmp_path: Path) -> None:
    content = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."

    message = read_error(extract(tmp_path, TEN, cifar10(test_batch=content)), "test")
    assert "it asks to run numpy.ndarray.tofile," in message


@pytest.mark.parametrize(
    "content",
    [
        b"Psomewhere\n.",  # persistent id
        b"\x80\x02\x82\x01.",  # extension registry
        b"c_codecs\nencode\n(K\x01K\x02tR.",
        b"cnumpy\nndarray\nK\x01b.",
        b"cnumpy\ndtype\n)R.",
    ],
)
def test_pickle_that_misuses_what_is_allowed_is_refused(tmp_path: Path, content: bytes) -> None:
    message = read_error(extract(tmp_path, TEN, cifar10(test_batch=content)), "test")

    assert "test_batch cannot be read: " in message


@pytest.mark.parametrize(
    "function", ["numpy._core.numeric\n_frombuffer", "_codecs\nencode"], ids=["array", "text"]
)
def test_pickle_cannot_change_how_the_next_one_is_read(tmp_path: Path, function: str) -> None:
    from hfbench.data import cifar as archives

    reader = getattr(archives, "_from_buffer" if "_frombuffer" in function else "_encode")
    before = reader.__defaults__
    # BUILD with a state of (None, {name: value}) sets attributes on what lies before it.
    state = b"N}X" + struct.pack("<i", 12) + b"__defaults__U\x01F\x85s\x86b"
    evil = b"\x80\x02c" + function.encode() + b"\n" + state + b"."
    try:
        read_error(extract(tmp_path, TEN, cifar10(test_batch=evil)), "test")
        assert reader.__defaults__ == before
    finally:
        reader.__defaults__ = before


# --- damage ---


def test_truncated_tar_says_to_download_it_again(tmp_path: Path) -> None:
    path = pack(tmp_path, TEN, cifar10())
    path.write_bytes(path.read_bytes()[:-4000])

    message = read_error(path)
    assert message.startswith(f"{path} cannot be read as a tar archive: ")
    assert message.endswith("Download it again.")


@given(share=st.floats(0, 0.999))
@settings(max_examples=40, deadline=None)
def test_tar_cut_anywhere_is_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    path = pack(tmp_path_factory.mktemp("cut"), HUNDRED, cifar100())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])

    assert str(path) in read_error(path, "train", "fine_label")


@given(share=st.floats(0, 0.9999), dump=st.sampled_from(PICKLERS))
@settings(max_examples=60, deadline=None)
def test_pickle_cut_anywhere_is_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, share: float, dump: Dump
) -> None:
    files = cifar100(dump)
    files["test"] = files["test"][: int(len(files["test"]) * share)]
    path = extract(tmp_path_factory.mktemp("cut"), HUNDRED, files)

    assert f"{path}: test cannot be read: " in read_error(path, "test", "fine_label")


def test_gzip_with_a_flipped_byte_is_a_data_error(tmp_path: Path) -> None:
    path = pack(tmp_path, TEN, cifar10())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)

    assert str(path) in read_error(path)


@pytest.mark.parametrize("name", ["notes.txt", "archive.tar.gz"])
def test_file_that_is_no_tar_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("hello")

    message = read_error(path)
    assert str(path) in message
    assert "\n" not in message


def test_tar_of_something_else_says_what_was_expected_and_found(tmp_path: Path) -> None:
    path = pack(tmp_path, "cats", {"cat.png": b"", "dog.png": b""}, name="cats.tar.gz")

    assert read_error(path) == (
        f"{path} is not one of CIFAR's archives: expected cifar-10-batches-py/ or "
        'cifar-100-python/ inside, found "cat.png" and "dog.png".'
    )


def test_empty_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.tar.gz"
    with tarfile.open(path, "w:gz"):
        pass

    assert read_error(path).endswith("inside, found nothing.")


def test_gzip_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(b"hello" * 1000))

    assert "Download it again." in read_error(path)


@pytest.mark.parametrize("packed", [True, False])
def test_missing_batch_is_named(tmp_path: Path, packed: bool) -> None:
    path = (pack if packed else extract)(tmp_path, TEN, cifar10(data_batch_3=None))

    message = read_error(path)
    assert "data_batch_3" in message
    assert str(path) in message


# --- content that is not the author's ---


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (np.zeros((4, 3071), np.uint8), "uint8 of shape (4, 3071)"),
        (np.zeros((4, 3, 1024), np.uint8), "uint8 of shape (4, 3, 1024)"),
        (np.zeros((4, 3072), np.int64), "int64 of shape (4, 3072)"),
        (np.zeros((4, 3072), np.float32), "float32 of shape (4, 3072)"),
        (np.zeros(3072, np.uint8), "uint8 of shape (3072,)"),
        ([], "float64 of shape (0,)"),
    ],
)
def test_wrong_images_say_what_was_expected_and_found(
    tmp_path: Path, data: Any, found: str
) -> None:
    batch = pickle.dumps({"data": data, "labels": [0, 1, 2, 0]})
    message = read_error(extract(tmp_path, TEN, cifar10(test_batch=batch)), "test")

    assert message.endswith(f"test_batch: expected uint8 images as rows of 3072, found {found}.")


@pytest.mark.parametrize("data", [np.array([None] * 4), "text", {"a": 1}, None])
def test_images_that_are_no_array_are_refused(tmp_path: Path, data: Any) -> None:
    batch = pickle.dumps({"data": data, "labels": [0, 1, 2, 0]})

    assert "test_batch" in read_error(extract(tmp_path, TEN, cifar10(test_batch=batch)), "test")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, 2], "test_batch holds 4 images, but 3 labels."),
        ([0, 1, 2, 3], "labels run from 0 to 3, but there are 3 classes."),
        ([0, 1, 2, -1], "labels run from -1 to 2, but there are 3 classes."),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: list[int], said: str) -> None:
    batch = python_2({b"data": pixels(6), b"labels": labels})

    assert said in read_error(extract(tmp_path, TEN, cifar10(test_batch=batch)), "test")


@pytest.mark.parametrize(
    "labels", [["a", "b", "c", "d"], [0, 1, 2, None], [[0], [1, 2], [0], [0]], {"a": 1}, 3]
)
def test_labels_that_are_no_numbers_are_a_data_error(tmp_path: Path, labels: Any) -> None:
    batch = pickle.dumps({"data": pixels(6), "labels": labels})

    message = read_error(extract(tmp_path, TEN, cifar10(test_batch=batch)), "test")
    assert "test_batch" in message


def test_labels_with_fractions_are_refused(tmp_path: Path) -> None:
    batch = pickle.dumps({"data": pixels(6), "labels": [0.5, 1.0, 1.7, 2.0]})

    assert "test_batch" in read_error(extract(tmp_path, TEN, cifar10(test_batch=batch)), "test")


def test_batch_without_images_lists_what_it_holds(tmp_path: Path) -> None:
    batch = python_2({b"labels": [0], b"filenames": [b"a.png"]})

    message = read_error(extract(tmp_path, TEN, cifar10(test_batch=batch)), "test")
    assert message.endswith('test_batch holds no "data"; it holds "labels" and "filenames".')


@pytest.mark.parametrize("content", [[1, 2], 3, "text", None])
def test_batch_that_is_no_dictionary_is_refused(tmp_path: Path, content: Any) -> None:
    files = cifar10(test_batch=pickle.dumps(content))
    kind = type(content).__name__

    message = read_error(extract(tmp_path, TEN, files), "test")
    assert message.endswith(f"test_batch: expected a dictionary, found {kind}.")


@pytest.mark.parametrize("meta", [{b"num_vis": 3072}, {b"label_names": []}, {b"label_names": 3}])
def test_meta_without_names_is_refused(tmp_path: Path, meta: dict[bytes, Any]) -> None:
    files = {**cifar10(), "batches.meta": python_2(meta)}

    message = read_error(extract(tmp_path, TEN, files), "test")
    assert message.endswith("batches.meta holds no label_names.")

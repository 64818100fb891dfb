"""Read CIFAR's original archives without running what is pickled in them.

`cifar-10-python.tar.gz` and `cifar-100-python.tar.gz`
(https://www.cs.toronto.edu/~kriz/cifar.html), extracted or not, hold Python pickles. Unpickling
calls whatever a file names; here a file may name nothing but the few constructors that a numpy
array is pickled with, and even these are replaced by stand-ins that only keep their arguments.
"""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfbench.errors import DataError

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


def find_archive(path: Path) -> tuple[_Layout, Callable[[str], bytes], str] | None:
    """Recognise an archive, extracted or not.

    Args:
        path: A tar file, the folder extracted from it, or a folder that holds either.

    Returns:
        Its layout, a function from a member's name to its bytes, and a name for messages; ``None``
        if it is none.

    Raises:
        DataError: If it is a tar file, but none of CIFAR's.
    """
    if path.is_file():
        return _open_tar(path)
    for layout in LAYOUTS.values():
        for folder in (path, path / layout.folder):
            if (folder / layout.meta).is_file() and any(
                (folder / n).is_file() for n in layout.splits["test"]
            ):
                return layout, _folder_reader(folder), str(folder)
    for name in ("cifar-10-python.tar.gz", "cifar-100-python.tar.gz"):
        if (path / name).is_file():
            return _open_tar(path / name)
    return None


def read_split(path: Path, split: str, label_column: str) -> ArchiveSplit:
    """Read one split.

    Args:
        path: As in `find_archive`, which must have recognised it.
        split: ``train`` or ``test``.
        label_column: ``label`` for CIFAR-10, ``fine_label`` or ``coarse_label`` for CIFAR-100 (the
            Hub's names).

    Raises:
        DataError: If the split or column does not exist, or a file is damaged or not what the
            author publishes.
    """
    found = find_archive(path)
    if found is None:
        raise DataError(f"{path} is not one of CIFAR's archives.")
    layout, read, name = found
    if split not in layout.splits:
        raise DataError(f'"{split}" is not a split of {name}; it has {_and(layout.splits)}.')
    key = label_column if label_column in layout.labels else f"{label_column}s"
    if key not in layout.labels:
        columns = [label.removesuffix("s") for label in layout.labels]
        raise DataError(
            f'"{label_column}" is not a label of {name}; it has {_and(columns)}. '
            f"Set dataset.label_column={columns[0]}"
        )
    batches = [_load_batch(read, member, key, name) for member in layout.splits[split]]
    names = _unpickle(read(layout.meta), f"{name}: {layout.meta}").get(layout.labels[key])
    if not isinstance(names, list) or not names:
        raise DataError(f"{name}: {layout.meta} holds no {layout.labels[key]}.")
    labels = np.concatenate([labels for _, labels in batches])
    if labels.size and not 0 <= labels.min() <= labels.max() < len(names):
        raise DataError(
            f"{name}: labels run from {labels.min()} to {labels.max()}, but there are {len(names)} "
            f"classes."
        )
    return ArchiveSplit(
        np.concatenate([images for images, _ in batches]), labels, [str(_text(n)) for n in names]
    )


def _load_batch(
    read: Callable[[str], bytes], member: str, key: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    where = f"{name}: {member}"
    content = _unpickle(read(member), where)
    for needed in ("data", key):
        if needed not in content:
            raise DataError(f'{where} holds no "{needed}"; it holds {_and(content)}.')
    data = _as_array(content["data"], where)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != int(np.prod(_SHAPE)):
        raise DataError(
            f"{where}: expected uint8 images as rows of 3072, found {data.dtype} of shape "
            f"{data.shape}."
        )
    labels = np.asarray(_as_array(content[key], where), dtype=np.int64)
    if labels.shape != (len(data),):
        raise DataError(f"{where} holds {len(data)} images, but {labels.size} labels.")
    return data.reshape(-1, *_SHAPE), labels


def _open_tar(path: Path) -> tuple[_Layout, Callable[[str], bytes], str]:
    try:
        with tarfile.open(path) as archive:
            files = {Path(member.name).name for member in archive if member.isfile()}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as a tar archive: {error}. Download it again."
        ) from None
    for layout in LAYOUTS.values():
        if layout.meta in files and set(layout.splits["test"]) <= files:
            return layout, _reader(lambda name: _read_member(path, name), path), str(path)
    raise DataError(
        f"{path} is not one of CIFAR's archives: expected cifar-10-batches-py/ or "
        f"cifar-100-python/ inside, found {_and(sorted(files)[:5]) or 'nothing'}."
    )


def _folder_reader(folder: Path) -> Callable[[str], bytes]:
    return _reader(lambda name: (folder / name).read_bytes(), folder)


def _reader(read: Callable[[str], bytes], place: Path) -> Callable[[str], bytes]:
    """Give the errors of reading a member the member's name."""

    def wrapped(name: str) -> bytes:
        try:
            return read(name)
        except KeyError:
            raise DataError(f"{place} holds no {name}; download it again.") from None
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{place}: {name} cannot be read: {error}. Download it again."
            ) from None

    return wrapped


def _read_member(path: Path, name: str) -> bytes:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and Path(member.name).name == name:
                content = archive.extractfile(member)
                if content is not None:
                    return content.read()
    raise KeyError(name)


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
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks to run {module}.{name}, which an image archive never needs"
            )
        return _ALLOWED[(module, name)]


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


def _and(names: Any) -> str:
    quoted = [f'"{name}"' for name in names]
    return (
        " and ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else "".join(quoted)
    )

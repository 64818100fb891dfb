"""Images in folders: a folder a class, or tables of names and labels beside them; also in archives.

`datasets` takes a split's name from anywhere in a path, so that the test images of a class called
"train" would be trained on, and brackets in a path for a pattern. Here only the first level of
folders names splits, and paths are what they are.
"""

from __future__ import annotations

import csv
import hashlib
import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfbench.errors import DataError, listed

if TYPE_CHECKING:
    import datasets

    from hfbench.recipe.schema import DatasetSection

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_IMAGE_COLUMNS = (
    *("file_name", "filename", "file", "image", "image_path", "filepath", "path", "img"),
    *("image_name", "image_id", "id", "name"),
)
_LABEL_COLUMNS = (
    *("label", "labels", "class", "class_name", "label_name", "category", "target", "species"),
    *("fine_label", "y"),
)
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_MOST_MEMBERS = 5_000_000
_LOOKED_AT = 1000  # members
_TABLES = ("parquet", "arrow")
_LARGEST_CARD = 2**20  # bytes
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # `datasets` reads them


@dataclass(frozen=True)
class Listed:
    """One split: the file of each image, and its label as it is written."""

    files: list[str]
    labels: list[Any]


def read_folder(dataset: DatasetSection, path: Path, cache: Path) -> datasets.DatasetDict | None:
    """Read a folder or an archive of images.

    Args:
        dataset: The recipe's section; its columns are those of what is returned.
        path: Of the folder or archive.
        cache: Where archives are unpacked, once.

    Returns:
        The splits; ``None`` if it holds something else, such as parquet files.

    Raises:
        DataError: If a table of names and labels cannot be understood, if files are missing, or if
            an archive is damaged, does not fit on the disk, or has members outside of itself.
    """
    path = _unpacked(path, cache)
    if not path.is_dir() or dataset.config_name is not None or _is_described(path):
        return None
    splits = _tables(dataset, path) or _class_folders(path)
    return _as_datasets(dataset, splits, path) if splits else None


def holds_images(archive: Path) -> bool:
    """Tell whether an archive is one of image files, and not CIFAR's own; its head decides."""
    suffixes = _image_suffixes()
    try:
        if zipfile.is_zipfile(archive):
            return True
        with tarfile.open(archive) as opened:
            for _, member in zip(range(_LOOKED_AT), opened, strict=False):
                if os.path.splitext(member.name)[1].lower() in suffixes:
                    return True
    except (OSError, tarfile.TarError, EOFError):
        return False
    return False


def what_lies_there(path: Path) -> str:
    """Say what a folder holds and what would be read, for a message."""
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [path.name]
    return (
        f"It holds {listed(names)}. What is read: a folder for each class in train/ and test/; "
        "train.csv and test.csv with a column of file names and one of labels; metadata.csv with "
        "file_name and a label beside the images; parquet; what save_to_disk writes."
    )


def _is_described(root: Path) -> bool:
    """Tell whether a folder is a data set of `datasets`: with tables, or a card that says what."""
    card = root / "README.md"
    if card.is_file() and card.stat().st_size < _LARGEST_CARD:
        head = card.read_text("utf-8", errors="replace").partition("\n---")[0]
        if head.startswith("---") and re.search(r"^(configs|dataset_info):", head, re.M):
            return True
    patterns = ("*", "*/*", "*/*/*")
    return any(next(root.glob(f"{p}.{kind}"), None) for p in patterns for kind in _TABLES)


def _image_suffixes() -> frozenset[str]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return frozenset(ImageFolder.EXTENSIONS)


def _class_folders(root: Path) -> dict[str, Listed] | None:
    """List a folder of splits, or of classes without splits."""
    suffixes = _image_suffixes()
    folders = [entry for entry in sorted(root.iterdir()) if _counts(entry) and entry.is_dir()]
    of_splits: dict[str, list[Path]] = {}
    for folder in folders:
        split = _SPLIT_OF.get(folder.name.lower())
        if split:
            of_splits.setdefault(split, []).append(folder)
    if len(of_splits) < 2 and len(folders) > len(of_splits):  # "train" beside "cat" is a class
        of_splits = {"train": [root]}
    found = {}
    for split, places in of_splits.items():
        if len(places) > 1:
            names = listed([place.name for place in places])
            raise DataError(f"{root}: {names} would all be the split {split}; keep one of them.")
        files = list(_images_below(places[0], suffixes))
        if any(name in _METADATA for name in os.listdir(places[0])):
            return None
        # An image beside the folders of classes has no class: something else decides on it.
        if not files or any(file.parent == places[0] for file in files):
            return None
        found[split] = Listed([str(file) for file in files], [file.parent.name for file in files])
    return found or None


def _images_below(folder: Path, suffixes: frozenset[str]) -> Iterator[Path]:
    seen = set()  # a link may lead back
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if _counts(Path(name)))
        for name in sorted(names):
            if _counts(Path(name)) and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(place, name)


def _counts(path: Path) -> bool:
    """Leave out what systems put beside files: ``.DS_Store``, ``__MACOSX``."""
    return not path.name.startswith((".", "__MACOSX"))


def _tables(dataset: DatasetSection, root: Path) -> dict[str, Listed] | None:
    """Read ``train.csv`` and ``test.csv`` beside the images."""
    found = {}
    for file in sorted(root.glob("*.csv")):
        split = _SPLIT_OF.get(file.stem.lower())
        if split:
            found[split] = _read_table(dataset, file, split)
    return found or None


def _read_table(dataset: DatasetSection, file: Path, split: str) -> Listed:
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as a table: {error}") from None
    if not rows:
        raise DataError(f"{file} holds no row.")
    columns = [name for name in rows[0] if name]
    image = _choose(dataset.image_column, _IMAGE_COLUMNS, columns, [])
    label = _choose(dataset.label_column, _LABEL_COLUMNS, columns, [image] if image else [])
    if image is None or label is None:
        missing = "file names" if image is None else "labels"
        option = "image_column" if image is None else "label_column"
        raise DataError(
            f"{file}: none of the columns {listed(columns)} is known to hold {missing}; name it: "
            f"dataset.{option}=…"
        )
    suffixes = sorted(_image_suffixes())
    folders = _folders_of_images(file.parent, split)
    files, lost = [], []
    for row in rows:
        name = (row[image] or "").strip()
        place = _find(name, folders, suffixes)
        files.append(str(place))
        if place is None:
            lost.append(name)
    if lost:
        where = listed([str(folder) for folder in folders])
        raise DataError(
            f"{file}: {len(lost)} of {len(rows)} images are not there, the first is "
            f'"{lost[0]}"; looked for in {where}.'
        )
    values = [(row[label] or "").strip() or None for row in rows]
    numbers = all(value is not None and value.lstrip("-").isdigit() for value in values)
    return Listed(files, [int(value or 0) for value in values] if numbers else values)


def _choose(
    named: str, known: Sequence[str], columns: Sequence[str], taken: Sequence[str]
) -> str | None:
    """Return the recipe's column, or the one of a usual name, or the only one that is left."""
    left = [column for column in columns if column not in taken]
    if named in left:
        return named
    for name in known:
        for column in left:
            if column.strip().lower() == name:
                return column
    return left[0] if taken and len(left) == 1 else None


def _folders_of_images(root: Path, split: str) -> list[Path]:
    named = [root / word for word in _SPLITS[split] if (root / word).is_dir()]
    usual = [root / name for name in ("images", "img", "data") if (root / name).is_dir()]
    return [root, *named, *usual]


def _find(name: str, folders: Sequence[Path], suffixes: Sequence[str]) -> Path | None:
    """Return the file of a name, which may lack its suffix."""
    if not name or "\0" in name:
        return None
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    for folder in folders:
        for suffix in suffixes:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    return None


def _as_datasets(
    dataset: DatasetSection, splits: dict[str, Listed], root: Path
) -> datasets.DatasetDict:
    """Return the splits as `datasets` has them, images as paths."""
    import datasets

    _check_encoding([file for found in splits.values() for file in found.files])
    labels = [label for found in splits.values() for label in found.labels]
    feature: Any = datasets.Value("int64")
    if any(isinstance(label, str) for label in labels):
        feature = datasets.Value("string")
    features = datasets.Features(
        {dataset.image_column: datasets.Image(), dataset.label_column: feature}
    )
    made = {}
    for split, found in splits.items():
        columns = {dataset.image_column: found.files, dataset.label_column: found.labels}
        table = datasets.Dataset.from_dict(columns, features=features)
        digest = hashlib.sha256(repr((str(root), split, found)).encode("utf-8", "surrogateescape"))
        table._fingerprint = digest.hexdigest()[:16]  # its own is another one in each process
        made[split] = table
    return datasets.DatasetDict(made)


def _check_encoding(files: Sequence[str]) -> None:
    """Refuse file names that are no text, as those from another system may be."""
    odd = [file for file in files if not _is_text(file)]
    if odd:
        raise DataError(
            f"{len(odd)} of {len(files)} images have names in another encoding than this system's, "
            f"the first is {odd[0]}; rename them (convmv does many)."
        )


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# --- archives ---


def _unpacked(path: Path, cache: Path) -> Path:
    """Unpack an archive, or the archives of a folder that holds nothing else, and return where."""
    if path.is_file() and _is_archive(path):
        return _inside(_unpack(path, cache))
    if not path.is_dir():
        return path
    entries = [entry for entry in sorted(path.iterdir()) if _counts(entry)]
    archives = [entry for entry in entries if entry.is_file() and _is_archive(entry)]
    if not archives or any(entry.is_dir() for entry in entries):
        return path
    if len(archives) == 1:
        return _inside(_unpack(archives[0], cache))
    identity = hashlib.sha256(repr([_identity(file) for file in archives]).encode()).hexdigest()
    together = cache / identity[:32]
    together.mkdir(parents=True, exist_ok=True)
    for file in archives:
        link = together / _stem(file)
        if not link.exists():
            link.symlink_to(_inside(_unpack(file, cache)), target_is_directory=True)
    return together


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith(_ARCHIVES)


def _stem(path: Path) -> str:
    suffixes = [suffix for suffix in _ARCHIVES if path.name.lower().endswith(suffix)]
    return path.name[: -max(map(len, suffixes))]


def _identity(file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return str(file.resolve()), found.st_size, found.st_mtime_ns


def _inside(folder: Path) -> Path:
    """Go into the one folder that everything lies in, unless it is a class."""
    while True:
        entries = [entry for entry in folder.iterdir() if _counts(entry)]
        if len(entries) != 1 or not entries[0].is_dir():
            return folder
        folder = entries[0]


def _unpack(file: Path, cache: Path) -> Path:
    """Unpack an archive into the cache, unless that was done."""
    digest = hashlib.sha256(repr(_identity(file)).encode("utf-8", "surrogateescape")).hexdigest()
    place = cache / digest[:32]
    if place.is_dir():
        return place
    partial = cache / f".{digest[:32]}.{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        if file.name.lower().endswith(".zip"):
            with zipfile.ZipFile(file) as opened:
                members = opened.infolist()
                _check(file, cache, [(m.filename, m.file_size) for m in members])
                opened.extractall(partial)  # leaves out "..", and what begins with "/"
        else:
            with tarfile.open(file) as packed:
                inside = packed.getmembers()
                _check(file, cache, [(m.name, m.size) for m in inside])
                packed.extractall(partial, filter="data")  # PEP 706
        partial.rename(place)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{file} cannot be unpacked: {error}") from None
    except (RuntimeError, NotImplementedError) as error:  # a password, or a rare compression
        raise DataError(f"{file} cannot be unpacked: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place


def _check(file: Path, cache: Path, members: Sequence[tuple[str, int]]) -> None:
    """Refuse what cannot be unpacked, before anything is."""
    size, free = sum(size for _, size in members), shutil.disk_usage(cache).free
    if len(members) > _MOST_MEMBERS:
        raise DataError(f"{file} holds {len(members):,} files; expected at most {_MOST_MEMBERS:,}.")
    if size > 0.9 * free:
        raise DataError(
            f"{file}: unpacked it takes {size / 2**20:,.0f} MiB, and {cache} has "
            f"{free / 2**20:,.0f} MiB free. Make room, or set HF_DATASETS_CACHE."
        )
    outside = [
        name for name, _ in members if name.startswith(("/", "\\")) or ".." in Path(name).parts
    ]
    if outside:
        raise DataError(f"{file} has members outside of itself, the first is {outside[0]!r}.")

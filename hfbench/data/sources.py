"""From a recipe's data set to `ImageSplit`, whatever it is stored as.

The Hub, a folder in the Hub's parquet layout, `save_to_disk`, imagefolder, CIFAR's own archives,
and two that need no file: scikit-learn's digits and synthetic noise.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfbench.data.cifar import Archive, find_archive, find_archive_files
from hfbench.data.class_folders import holds_images, read_folder, what_lies_there
from hfbench.data.decoding import EncodedImages, largest_kept
from hfbench.data.images import ImageSplit, balanced_subset
from hfbench.data.overlap import say_classes
from hfbench.data.pixel_cache import Decoded, describe_file, load_decoded
from hfbench.errors import DataError, first_line, listed
from hfbench.machine.answers import chain_of, say_cache_trouble
from hfbench.machine.bounds import require_memory
from hfbench.machine.connection import explain_hub_failure
from hfbench.recipe.arguments import suggest
from hfbench.recipe.schema import local_path

if TYPE_CHECKING:
    import datasets

    from hfbench.recipe.schema import DatasetSection

logger = logging.getLogger(__name__)

_SYNTHETIC_SIZE = (3, 32, 32)
_SYNTHETIC_COUNT = {"train": 50_000, "test": 10_000}
_DIGITS_TEST_FRACTION = 0.2
_UNPACKED = "hfbench-unpacked"  # in HF_DATASETS_CACHE: archives of folders of images
_SPLIT_OPTIONS = ("dataset.train_split", "dataset.eval_split")
_FEW_CLASSES = 10
_BATCH = 1000  # rows that are read at a time


def load_splits(
    dataset: DatasetSection, image_size: int, interpolation: str
) -> tuple[ImageSplit, ImageSplit]:
    """Load the training and the test images of a recipe.

    Args:
        dataset: The recipe's section.
        image_size: Size that images of mixed sizes are resized to when no size prevails.
        interpolation: How images of mixed sizes are resized.

    Returns:
        The training and the test split, subsets already taken.

    Raises:
        DataError: If there is no such folder, split or column, or images or labels are not usable.
        HubError: If the Hub cannot be reached and the data set is not in the cache.
    """
    _, read = open_splits(dataset, image_size, interpolation)
    return read()


def open_splits(
    dataset: DatasetSection, image_size: int, interpolation: str
) -> tuple[list[str], Callable[[], tuple[ImageSplit, ImageSplit]]]:
    """Do what `load_splits` does in two parts, so that a model can be built during the second.

    Returns:
        Name of each class, and a function that decodes the images.

    Raises:
        DataError: As `load_splits`; for images that are not usable when the function is called.
        HubError: The same.
    """
    source = _open(dataset, image_size, interpolation)

    def read() -> tuple[ImageSplit, ImageSplit]:
        train = source.read(dataset.train_split, dataset.max_train_samples)
        test = source.read(dataset.eval_split, dataset.max_eval_samples)
        for note in dict.fromkeys(train.notes + test.notes):
            logger.info(note)
        warnings = say_classes(train, test)
        for warning in warnings:
            logger.warning(warning)
        return replace(train, notes=[*train.notes, *warnings]), test

    if isinstance(source, _Table):
        return source.label_names(), read
    splits = read()  # there is no image to decode
    return splits[0].label_names, lambda: splits


def _open(dataset: DatasetSection, image_size: int, interpolation: str) -> Source:
    if dataset.name_or_path == "digits":
        return _Digits(dataset)
    if dataset.name_or_path == "synthetic":
        return _Synthetic(dataset)
    path = local_path(dataset.name_or_path)
    files = find_archive_files(path) if path.exists() else []
    if files and not (path.is_file() and holds_images(path)):
        return _Archive(dataset, path, files)
    return _Table(dataset, image_size, interpolation)


@dataclass
class Source:
    """One data set; subclasses read a split of it."""

    dataset: DatasetSection

    def read(self, split: str, count: int | None) -> ImageSplit:
        """Read a split, or a class-balanced subset of `count` images."""
        raise NotImplementedError

    def check(self, splits: Sequence[str], columns: Sequence[str]) -> None:
        """Refuse splits and columns that do not exist, all in one error."""
        name, problems = self.dataset.name_or_path, []
        for option in ("train_split", "eval_split"):
            value = getattr(self.dataset, option)
            if value not in splits:
                near = suggest(value, splits) or "."
                problems.append(
                    f'dataset.{option}: "{value}" is not a split of {name}; it has '
                    f"{listed(splits)}{near}"
                )
        left = {  # what the other option does not take already
            "image_column": [n for n in columns if n != self.dataset.label_column],
            "label_column": [n for n in columns[1:] if n != self.dataset.image_column],
        }
        for option, others in left.items():
            value = getattr(self.dataset, option)
            if value not in columns:
                near = suggest(value, others)
                if not near and others:
                    example = others[0] if option == "image_column" else others[-1]
                    near = f". Set, for instance, dataset.{option}={example}"
                if not near and local_path(name).is_dir():
                    near = f". {what_lies_there(local_path(name))}"
                problems.append(
                    f'dataset.{option}: "{value}" is not a column of {name}; it has '
                    f"{listed(columns)}{near}"
                )
        if problems:
            puzzling = [line for line in problems if line.startswith(_SPLIT_OPTIONS)]
            if any("did you mean" not in line for line in puzzling) and local_path(name).is_dir():
                problems.append(what_lies_there(local_path(name)))
            raise DataError.from_problems(name, problems)


class _Digits(Source):
    """scikit-learn's 1,797 digits, 8 x 8 grey: a fixed, stratified fifth is the test split."""

    def read(self, split: str, count: int | None) -> ImageSplit:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        self.check(("train", "test"), ("image", "label"))
        bunch = load_digits()
        everything = np.arange(len(bunch.target))
        parts = train_test_split(
            everything, test_size=_DIGITS_TEST_FRACTION, stratify=bunch.target, random_state=0
        )
        index = np.sort(parts[("train", "test").index(split)])
        index = index[balanced_subset(bunch.target[index], count, self.dataset.subset_seed)]
        grey = np.rint(bunch.images[index] * (255 / 16)).astype(np.uint8)  # stored as 0 … 16
        images = torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1).contiguous()
        labels = torch.from_numpy(bunch.target[index].astype(np.int64))
        return ImageSplit(
            images, labels, [str(name) for name in bunch.target_names], torch.from_numpy(index)
        )


class _Synthetic(Source):
    """Uniform noise with balanced labels, CIFAR's size: good for throughput only."""

    def read(self, split: str, count: int | None) -> ImageSplit:
        is_train = split == self.dataset.train_split
        count = count or _SYNTHETIC_COUNT["train" if is_train else "test"]
        height, width = _SYNTHETIC_SIZE[1:]
        require_memory(
            count * (3 * height * width + 8),
            f"dataset: {count:,} synthetic images",
            "train on fewer, with dataset.max_train_samples and dataset.max_eval_samples",
        )
        generator = torch.Generator().manual_seed(0 if is_train else 1)
        images = torch.randint(
            0, 256, (count, *_SYNTHETIC_SIZE), dtype=torch.uint8, generator=generator
        )
        index, classes = torch.arange(count), self.dataset.num_classes or 10
        return ImageSplit(images, index % classes, [str(n) for n in range(classes)], index)


class _Archive(Source):
    """CIFAR as its author publishes it."""

    def __init__(self, dataset: DatasetSection, path: Path, files: Sequence[Path]) -> None:
        super().__init__(dataset)
        self.path, self.files = path, files

    def read(self, split: str, count: int | None) -> ImageSplit:
        identity = {
            "archive": [describe_file(file.resolve()) for file in self.files],
            "split": split,
            "label_column": self.dataset.label_column,
        }
        whole = load_decoded(identity, {}, lambda: self._decode(split))
        index = torch.arange(len(whole.labels))
        split_of_all = ImageSplit(whole.images, whole.labels, whole.label_names, index)
        return split_of_all.subset(count, self.dataset.subset_seed)

    def _decode(self, split: str) -> Decoded:
        content = self._archive.read_split(split, self.dataset.label_column)
        return Decoded(
            torch.from_numpy(content.images),
            labels=torch.from_numpy(content.labels),
            label_names=content.label_names,
        )

    @cached_property
    def _archive(self) -> Archive:
        archive = find_archive(self.path)
        if archive is None:
            raise DataError(f"{self.dataset.name_or_path}: the archive is gone.")
        # It has one kind of images, whatever the recipe calls their column.
        self.check(archive.splits, [self.dataset.image_column, *archive.label_columns])
        return archive


class _Table(Source):
    """Anything that `datasets` reads."""

    def __init__(self, dataset: DatasetSection, image_size: int, interpolation: str) -> None:
        super().__init__(dataset)
        self.image_size, self.interpolation = image_size, interpolation
        self.splits = _load_table(dataset)
        self._columns: dict[str, list[Any]] = {}
        both = (dataset.train_split, dataset.eval_split)
        tables = [self.splits[split] for split in both if split in self.splits]
        # A column counts if every split that is used has it.
        first = tables[0] if tables else next(iter(self.splits.values()))
        shared = [n for n in first.column_names if all(n in table.column_names for table in tables)]
        self.check(list(self.splits), shared or first.column_names)

    def read(self, split: str, count: int | None) -> ImageSplit:
        labels, label_names = self._labels(split)
        index = balanced_subset(labels, count, self.dataset.subset_seed)
        rows = self._encoded(self.splits[split].select(index))
        decoded = load_decoded(
            self._identity(rows, split, index),
            {"image_size": self.image_size, "interpolation": self.interpolation},
            lambda: self._decode(rows, split, index),
            largest_kept(self.image_size),
        )
        return ImageSplit(
            decoded.images,
            torch.from_numpy(labels[index]),
            label_names,
            torch.from_numpy(index),
            decoded.notes,
            self._revision(split),
        )

    def label_names(self) -> list[str]:
        """Return the names of the classes; the training split's labels are checked."""
        return self._labels(self.dataset.train_split)[1]

    def _labels(self, split: str) -> tuple[np.ndarray, list[str]]:
        """Return the labels of a split as numbers, (N,), and the names of the classes."""
        if not len(self.splits[split]):
            raise DataError(f"{self.dataset.name_or_path}: split {split} is empty.")
        where = f"{self.dataset.name_or_path}: {split}.{self.dataset.label_column}"
        values = self._column(split)
        empty = [position for position, value in enumerate(values) if value is None]
        if empty:
            raise DataError(
                f"{where}: {len(empty)} of {len(values)} images have no label, the first is number "
                f"{empty[0]}."
            )
        names, as_number = self._classes(where)
        numbers = np.asarray([as_number(value) for value in values], dtype=np.int64)
        wrong = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
        if len(wrong):
            raise DataError(
                f"{where}: {len(wrong)} of {len(values)} labels are no class, the first is "
                f"{values[wrong[0]]} of image {wrong[0]}; expected 0 to {len(names) - 1}."
            )
        return numbers, names

    def _classes(self, where: str) -> tuple[list[str], Callable[[Any], int]]:
        """Return the names of the classes, and how a stored label becomes its number.

        Both splits count, so that a class that one of them lacks keeps its number.
        """
        import datasets

        as_number: Callable[[Any], int] = int
        both = (self.dataset.train_split, self.dataset.eval_split)
        features = [self.splits[split].features[self.dataset.label_column] for split in both]
        stored = [value for split in both for value in self._column(split) if value is not None]
        if all(isinstance(feature, datasets.ClassLabel) for feature in features):
            if features[0].names != features[1].names:
                raise DataError(
                    f"{self.dataset.name_or_path}: {both[0]} and {both[1]} name different classes: "
                    f"{listed(features[0].names)} against {listed(features[1].names)}."
                )
            names = list(features[0].names)
        elif all(isinstance(value, str) for value in stored):
            names = sorted(set(stored))
            as_number = {name: number for number, name in enumerate(names)}.__getitem__
        elif all(isinstance(value, int) and not isinstance(value, bool) for value in stored):
            used = sorted({n for n in stored if n >= 0})  # from 1, or with gaps: none is made up
            if len(used) > _FEW_CLASSES and len(used) == len(stored):
                raise DataError(
                    f"{where}: {len(stored)} images have {len(used)} different numbers for labels; "
                    "is this the column of classes?"
                )
            names = [str(number) for number in used]
            places = {number: place for place, number in enumerate(used)}
            as_number = functools.partial(_place_of, places)
        else:
            kinds = " and ".join(dict.fromkeys(str(feature) for feature in features))
            raise DataError(f"{where} holds {kinds}; expected class numbers or names throughout.")
        require_memory(
            16 * len(names) ** 2,
            f"{where}: a table of mistakes of {len(names):,} x {len(names):,} classes",
            "is this the column of classes?",
        )
        if len(names) < 2:
            raise DataError(
                f"{where}: found one class only, {listed(names)}; expected two or more."
            )
        if len(set(names)) < len(names):
            raise DataError(f"{where}: two classes have the same name, among {listed(names)}.")
        return names, as_number

    def _column(self, split: str) -> list[Any]:
        if split not in self._columns:
            self._columns[split] = _read_column(self.splits[split], self.dataset.label_column)
        return self._columns[split]

    def _revision(self, split: str) -> str | None:
        """Return the commit of a data set from the Hub: its cache is in a folder of that name."""
        files = self.splits[split].cache_files
        folder = Path(files[0]["filename"]).parent.name if files else ""
        from_hub = not local_path(self.dataset.name_or_path).exists()
        return folder if from_hub and re.fullmatch("[0-9a-f]{40}", folder) else None

    def _encoded(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Return the images alone, as they are stored."""
        import datasets

        column = self.dataset.image_column
        feature = rows.features[column]
        if not isinstance(feature, datasets.Image):
            try:
                rows = rows.cast_column(column, datasets.Image())
            except Exception:  # pyarrow raises several kinds
                raise DataError(
                    f"dataset.image_column: {column} of {self.dataset.name_or_path} holds "
                    f"{feature}, no images."
                ) from None
        return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def _identity(self, rows: datasets.Dataset, split: str, index: np.ndarray) -> dict[str, Any]:
        """Return all that decides on the pixels and notes of a split."""
        table = self.splits[split]
        return {
            # Of what was loaded: `datasets` makes it of the names and changes of its files.
            "fingerprint": table._fingerprint,
            # A folder of save_to_disk keeps its fingerprint whatever is done to its files.
            "tables": [describe_file(file["filename"]) for file in table.cache_files],
            "images": _external_files(rows, self.dataset.image_column),
            "root": str(self._root),
            "split": split,
            "column": self.dataset.image_column,
            "index": hashlib.sha256(index.astype("<i8").tobytes()).hexdigest(),
        }

    @property
    def _root(self) -> Path:
        return local_path(self.dataset.name_or_path).resolve()

    def _decode(self, rows: datasets.Dataset, split: str, index: np.ndarray) -> EncodedImages:
        column, root = self.dataset.image_column, self._root
        stored = rows.with_format("arrow")

        def read(start: int, stop: int) -> Iterator[Any]:
            return (value.as_py() for value in stored[start:stop].column(column))

        def name(position: int, entry: Any) -> str:
            return f"{split} image {index[position]}{_path(entry)}"

        def public_name(position: int, entry: Any) -> str:
            # Notes are published with a model: without the folders above the data set.
            return f"{split} image {index[position]}{_path(entry, root)}"

        return EncodedImages(
            read,
            len(index),
            name,
            public_name,
            self.image_size,
            self.interpolation,
            self.dataset.name_or_path,
        )


def _place_of(places: dict[int, int], number: int) -> int:
    return places.get(number, -1)  # which is no class


def _external_files(rows: datasets.Dataset, column: str) -> list[list[str | int]]:
    """Describe the files of images that are stored as paths, as those of a folder of images are."""
    files = []
    for batch in rows.with_format("arrow").iter(_BATCH):  # all at once may copy every image
        for part in batch.column(column).chunks:
            content = part.field("bytes")
            if content.null_count:
                paths = part.field("path").filter(content.is_null()).to_pylist()
                files += [describe_file(path) for path in paths if path is not None]
    return files


def _load_table(dataset: DatasetSection) -> datasets.DatasetDict:
    import datasets

    name, path = dataset.name_or_path, local_path(dataset.name_or_path)
    local = path.exists()
    if local:
        cache = Path(datasets.config.HF_DATASETS_CACHE) / _UNPACKED
        found = read_folder(dataset, path, cache)
        if found is not None:
            return found
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(
                str(path) if local else name,
                dataset.config_name,
                revision=None if local else dataset.revision,
            )
    except Exception as error:  # `datasets` raises some dozen kinds; each becomes a sentence
        if not local:
            raise explain_hub_failure("dataset", name, error) from error
        if isinstance(error, IndexError):  # what `load_from_disk` raises for no rows
            raise DataError(f"{name}: a split is empty.") from error
        if configs := _say_configs(error):
            raise DataError(f"{name}: {configs}") from error
        said = say_cache_trouble(chain_of(error)) or _root_cause(error)
        pattern = set("[]*?") & set(str(path))
        if pattern:
            said += (
                f" `datasets` takes {listed(sorted(pattern))} in a path for a pattern; rename it."
            )
        raise DataError(
            f"{name} cannot be loaded as a data set: {said} {what_lies_there(path)}"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        raise DataError(
            f"{name} is one data set without splits; save a DatasetDict with "
            f"{listed((dataset.train_split, dataset.eval_split))}."
        )
    if not loaded:
        raise DataError(f"{name} holds no split.")
    return loaded


def _read_column(table: datasets.Dataset, column: str) -> list[Any]:
    """Return a column as stored; the arrow format heeds a selection, `Dataset.data` does not."""
    values = table.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    return list(values)


def _say_configs(error: BaseException) -> str | None:
    """Say which configurations there are, where one has to be chosen."""
    text = next((str(link) for link in chain_of(error) if "onfig name is missing" in str(link)), "")
    found = re.search(r"available configs: \[(.*?)\]", text, re.S)
    names = re.findall(r"'([^']*)'", found[1]) if found else []
    if not names:
        return None
    return f"choose one of its configurations, {listed(names)}: dataset.config_name={names[0]}"


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _path(entry: dict[str, Any] | None, root: Path | None = None) -> str:
    """Say where an image lies, if it is a file; relative to `root`, or only its name outside it."""
    if not entry or not entry.get("path"):
        return ""
    path = Path(entry["path"])
    if root is not None:
        path = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    return f" ({path})"

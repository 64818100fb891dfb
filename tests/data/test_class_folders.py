"""Folders of images as people have them: split names inside paths mean nothing."""

from __future__ import annotations

import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hfbench.data.images import ImageSplit
from hfbench.data.sources import load_splits
from hfbench.errors import DataError
from hfbench.recipe.schema import DatasetSection

COLOURS = {"cat": (220, 40, 40), "dog": (40, 200, 60), "train": (50, 60, 220)}


def write(path: Path, colour: tuple[int, int, int] = (9, 9, 9)) -> None:
    """Write a small image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(path)


def write_classes(root: Path, splits: dict[str, int], classes: list[str]) -> Path:
    """Write so many images of each class into each split's folder."""
    for split, count in splits.items():
        for name in classes:
            for number in range(count):
                write(root / split / name / f"{number}.png", COLOURS.get(name, (1, 2, 3)))
    return root


def load(path: Path, **changes: object) -> tuple[ImageSplit, ImageSplit]:
    """Load both splits of a folder."""
    section = DatasetSection.model_validate({"name_or_path": str(path), **changes})
    return load_splits(section, 8, "bilinear")


@pytest.mark.parametrize("name", ["train", "test", "validation", "Training", "eval", "dev-train"])
def test_class_called_like_a_split_is_a_class(name: str, tmp_path: Path) -> None:
    root = write_classes(tmp_path / "train-test", {"train": 4, "test": 2}, ["cat", "dog", name])
    train, test = load(root)
    assert (len(train), len(test)) == (12, 6)
    assert train.label_names == sorted(["cat", "dog", name])


@pytest.mark.parametrize(
    ("train", "test"), [("train", "test"), ("Training", "TEST"), ("training", "testing")]
)
def test_folders_of_splits_may_be_called_as_is_usual(train: str, test: str, tmp_path: Path) -> None:
    splits = load(write_classes(tmp_path / "data", {train: 3, test: 1}, ["cat", "dog"]))
    assert [len(split) for split in splits] == [6, 2]


def test_validation_is_a_split_of_its_own(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "d", {"train": 3, "val": 2, "test": 1}, ["cat", "dog"])
    _, found = load(root, eval_split="validation")
    assert len(found) == 4


@pytest.mark.parametrize("name", ["[old] data", "a*b", "what?", "ä ö", "100%", "{x}"])
def test_path_is_no_pattern(name: str, tmp_path: Path) -> None:
    root = write_classes(tmp_path / name, {"train": 3, "test": 1}, ["cat", name])
    train, test = load(root)
    assert (len(train), len(test)) == (6, 2)
    assert name in train.label_names


def test_what_systems_leave_beside_files_is_no_image(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "d", {"train": 3, "test": 1}, ["cat", "dog"])
    (root / "train" / ".DS_Store").write_text("x")
    (root / "train" / "cat" / "._0.png").write_text("x")
    write(root / "__MACOSX" / "train" / "cat" / "0.png")
    (root / "readme.txt").write_text("x")
    assert [len(split) for split in load(root)] == [6, 2]


def test_link_that_leads_back_is_followed_once(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "d", {"train": 3, "test": 1}, ["cat", "dog"])
    (root / "train" / "cat" / "back").symlink_to(root / "train", target_is_directory=True)
    assert [len(split) for split in load(root)] == [6, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_name_in_another_encoding_is_said(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "d", {"train": 3, "test": 1}, ["cat", "dog"])
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "\udce9t\udce9.png")
    with pytest.raises(DataError, match=r"names in another encoding .* first is .*udce9"):
        load(root)


def test_classes_without_splits_say_that_there_is_no_test(tmp_path: Path) -> None:
    root = write_classes(tmp_path, {"d": 3}, ["cat", "dog", "train"])
    with pytest.raises(DataError, match=r'"test" is not a split of .* it has "train"'):
        load(root / "d")


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "d", {"val": 1, "dev": 1, "train": 1}, ["cat", "dog"])
    with pytest.raises(DataError, match="would all be the split validation"):
        load(root)


def test_picture_beside_tables_is_no_class(tmp_path: Path) -> None:
    # As in a data set that was cloned from the Hub.
    names = ["cat", "dog"]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    for split, count in (("train", 6), ("test", 2)):
        pictures = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(count)]
        columns = {"image": pictures, "label": [number % 2 for number in range(count)]}
        file = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
    write(tmp_path / "assets" / "logo.png")
    train, test = load(tmp_path)
    assert (len(train), len(test)) == (6, 2)
    assert train.label_names == names


def test_card_that_names_configurations_is_heeded(tmp_path: Path) -> None:
    for name in ("clean", "noisy"):
        write_classes(tmp_path / name, {"train": 3, "test": 1}, ["cat", "dog"])
    entries = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("clean", "noisy"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n", "utf-8")
    with pytest.raises(
        DataError, match=r'configurations, "clean" and "noisy": dataset.config_name'
    ):
        load(tmp_path)


# --- tables beside the images ---


@pytest.mark.parametrize(
    ("header", "suffix", "place"),
    [
        ("image,label", ".png", "images"),
        ("file_name,label", ".png", "."),
        ("id,breed", "", "train"),
        ("Filename,Class,size", ".png", "images"),
    ],
)
def test_table_beside_the_images_names_labels(
    header: str, suffix: str, place: str, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        lines = [header]
        for number in range(4):
            name = f"{split}{number}"
            folder = split if place == "train" else place
            write(tmp_path / folder / f"{name}.png")
            extra = "," * header.count(",")
            lines.append(f"{name}{suffix},{['no', 'yes'][number % 2]}{extra[1:]}")
        (tmp_path / f"{split}.csv").write_text("\n".join(lines), "utf-8-sig")
    train, test = load(tmp_path)
    assert (len(train), len(test)) == (4, 4)
    assert train.label_names == ["no", "yes"]
    assert train.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["image,label", "gone.png,yes"], 'the first is "gone.png"; looked for in'),
        (["image,label"], "holds no row"),
        (["a,b,c", "x,y,z"], "none of the columns .* file names; name it: dataset.image_column="),
        (["image,b,c", "0.png,y,z"], "hold labels; name it: dataset.label_column="),
    ],
)
def test_table_that_is_not_understood_is_named(lines: list[str], said: str, tmp_path: Path) -> None:
    write(tmp_path / "0.png")
    (tmp_path / "train.csv").write_text("\n".join(lines), "utf-8")
    with pytest.raises(DataError, match=said):
        load(tmp_path)


def test_no_column_of_images_is_advised_as_labels(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "images" / f"{number}.png")
    (tmp_path / "names.csv").write_text("image,label\nimages/0.png,a\n", "utf-8")
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert "dataset.label_column=image" not in str(caught.value)
    assert "names.csv" in str(caught.value)
    assert "a folder for each class in train/ and test/" in str(caught.value)


# --- archives ---


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_archive_of_class_folders_is_read(kind: str, wrapped: bool, tmp_path: Path) -> None:
    root = write_classes(tmp_path / "in" / "my data", {"train": 3, "test": 1}, ["cat", "train"])
    format_of = {"zip": "zip", "tar": "tar", "tar.gz": "gztar"}[kind]
    base = root.parent if wrapped else root
    file = shutil.make_archive(str(tmp_path / "packed"), format_of, base)
    train, test = load(Path(file))
    assert (len(train), len(test)) == (6, 2)
    again, _ = load(Path(file))
    assert again.fingerprint() == train.fingerprint()


def test_folder_of_one_archive_a_split_is_read(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "in", {"train": 3, "test": 1}, ["cat", "dog"])
    for split in ("train", "test"):
        shutil.make_archive(str(tmp_path / "out" / split), "zip", root / split)
    assert [len(split) for split in load(tmp_path / "out")] == [6, 2]


def test_member_outside_of_an_archive_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.png")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as packed:
        packed.write(tmp_path / "0.png", "../../train/cat/0.png")
    with pytest.raises(DataError, match="members outside of itself"):
        load(tmp_path / "bad.zip")
    with tarfile.open(tmp_path / "bad.tar", "w") as packed_tar:
        packed_tar.add(tmp_path / "0.png", "../train/cat/0.png")
    with pytest.raises(DataError, match="members outside of itself"):
        load(tmp_path / "bad.tar")


@pytest.mark.parametrize("halved", [False, True])
def test_damaged_archive_is_named(halved: bool, tmp_path: Path) -> None:
    root = write_classes(tmp_path / "in", {"train": 3, "test": 1}, ["cat", "dog"])
    file = Path(shutil.make_archive(str(tmp_path / "data"), "zip", root))
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as packed:
        info = next(member for member in packed.infolist() if not member.is_dir())
    start = info.header_offset + 30 + len(info.filename)  # of its compressed bytes
    content[start : start + 16] = bytes(16)
    file.write_bytes(content[: len(content) // 2] if halved else content)
    with pytest.raises(DataError, match=r"data\.zip"):
        load(file)

"""Equal images in both splits, and classes that only one of them has, are counted and said."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from hfbench.data.images import ImageSplit
from hfbench.data.overlap import Overlap, find_overlap, say_classes, say_overlap
from hfbench.data.sources import load_splits
from hfbench.recipe.schema import DatasetSection
from hfbench.training.run import run_recipe
from tests.builders import tiny_recipe
from tests.data.test_class_folders import write


def split(values: list[int], labels: list[int], names: list[str] | None = None) -> ImageSplit:
    """Return images of one value each."""
    images = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    index = torch.arange(len(values))
    return ImageSplit(images.clone(), torch.tensor(labels), names or ["a", "b", "c"], index)


def test_equal_images_are_counted_by_hand() -> None:
    train = split([1, 1, 2, 3, 3, 3], [0] * 6)
    test = split([3, 3, 4, 2, 5], [0] * 5)
    found = find_overlap(train, test)
    assert found == Overlap(test_in_train=3, test_doubles=1, train_doubles=3)
    assert say_overlap(found, 6, 5) == [
        "3 of 5 test images were trained on: equal images are in the training split.",
        "1 of 5 test images are doubles of others there.",
        "3 of 6 training images are doubles of others there.",
    ]
    assert say_overlap(Overlap(0, 0, 0), 6, 5) == []


def test_one_changed_value_is_another_image() -> None:
    train, test = split([7], [0]), split([7], [0])
    test.images[0, 2, 3, 3] += 1
    assert find_overlap(train, test).test_in_train == 0


def test_cifar_100_has_the_known_doubles(shared: Path) -> None:
    section = DatasetSection(
        name_or_path=str(shared / "data" / "cifar100"),
        image_column="img",
        label_column="fine_label",
    )
    train, test = load_splits(section, 32, "bilinear")
    assert (len(train), len(test)) == (50_000, 10_000)
    found = find_overlap(train, test)
    assert found == Overlap(test_in_train=10, test_doubles=2, train_doubles=14)


@pytest.mark.parametrize(
    ("train", "test", "names", "said"),
    [
        ([0, 1], [0, 1, 2], ["a", "b", "c"], 'No training image is of class "c", but 1 of 3 test'),
        ([0, 1, 2], [0], ["a", "b", "c"], 'No test image is of classes "b" and "c", but 2 of 3'),
        ([0, 1], [0, 1], ["a", "b", "c"], 'No image at all is of class "c"'),
        ([0, 1], [0, 1], ["Cat", "cat "], 'The classes "Cat" and "cat " differ in writing alone'),
        ([0, 1], [0, 1], ["e\u0301", "\u00e9"], "differ in writing alone"),
        ([0, 1], [0, 1], ["sea_lion", "Sea lion"], "differ in writing alone"),
        ([0, 1], [0, 1], ["cat", "cat\u200b"], "differ in writing alone"),
    ],
)
def test_odd_classes_are_said(
    train: list[int], test: list[int], names: list[str], said: str
) -> None:
    found = say_classes(split(train, train, names), split(test, test, names))
    assert any(said in sentence for sentence in found), found


@pytest.mark.parametrize("names", [["1-2", "12"], ["-", "_"], ["c", "c-"], ["1", "-1"]])
def test_names_that_differ_are_not_alike(names: list[str]) -> None:
    assert say_classes(split([0, 1], [0, 1], names), split([0, 1], [0, 1], names)) == []


def test_ordinary_classes_need_no_word() -> None:
    assert say_classes(split([0, 1], [0, 1], ["a", "b"]), split([1, 0], [1, 0], ["a", "b"])) == []


def test_run_says_that_test_images_were_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hfbench"), "propagate", True)
    generator = np.random.default_rng(0)
    for name in ("cat", "$5 to $10 \\frac{", "dog"):
        for number in range(6):
            colour = tuple(int(value) for value in generator.integers(0, 255, 3))
            write(tmp_path / "data" / "train" / name / f"{number}.png", colour)
            if number < 2:
                write(tmp_path / "data" / "test" / name / f"{number}.png", colour)
    data = {
        "name_or_path": str(tmp_path / "data"),
        "max_train_samples": None,
        "max_eval_samples": None,
    }
    result = run_recipe(tiny_recipe(dataset=data, max_steps=1), tmp_path / "runs")
    assert (result.data.test_in_train, result.data.test_doubles) == (6, 0)
    sentence = "6 of 6 test images were trained on: equal images are in the training split."
    assert sentence in result.data.notes
    assert sentence in caplog.text

    assert result.folder is not None
    assert (result.folder / "confusion.png").is_file()
    assert sentence in (result.folder / "README.md").read_text("utf-8")


def test_picture_that_fails_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("hfbench"), "propagate", True)

    def fail(*_: object) -> None:
        raise ValueError("ParseException")

    monkeypatch.setattr("hfbench.training.plots.plot_confusion", fail)
    result = run_recipe(tiny_recipe(max_steps=1), tmp_path)
    assert result.metrics.test is not None
    assert "confusion.png cannot be drawn, and is left out: ParseException" in caplog.text

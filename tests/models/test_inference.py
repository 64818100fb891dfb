"""Classifying image files with what a run left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional as F

from hfbench.data.sources import load_splits
from hfbench.errors import DataError, HubError, ModelError
from hfbench.models.inference import predict
from hfbench.training.run import run_recipe
from tests.builders import tiny_recipe, vit_config, write_model


class Finished(NamedTuple):
    """A run's folder and its test images as files."""

    folder: Path
    files: list[Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Train a tiny ViT once."""
    root = tmp_path_factory.mktemp("prediction")
    recipe = tiny_recipe(write_model(root / "vit", vit_config()), pretrained=True)
    result = run_recipe(recipe, root / "runs")
    _, test = load_splits(recipe.dataset, 32, "bilinear")
    files = []
    for number, image in enumerate(test.images):
        files.append(root / f"{number}.png")
        F.to_pil_image(image).save(files[-1])
    return Finished(root / "runs" / "tiny" / result.run_id, files)


def test_files_get_the_probabilities_of_the_run(finished: Finished) -> None:
    saved = np.load(finished.folder / "predictions.npz")
    found = predict(str(finished.folder), finished.files, top_k=10)
    assert len(found) == len(finished.files) == 20
    for number, classes in enumerate(found):
        scores = {item["label"]: item["score"] for item in classes}
        assert classes[0]["label"] == str(saved["prediction"][number])
        assert classes[0]["score"] == pytest.approx(saved["probability"][number], abs=1e-5)
        assert scores[str(saved["label"][number])] == pytest.approx(
            saved["label_probability"][number], abs=1e-5
        )
        assert [int(item["label"]) for item in classes[:5]] == saved["top"][number].tolist()
        assert sum(scores.values()) == pytest.approx(1.0, abs=1e-5)


def test_run_folder_and_model_folder_are_the_same(finished: Finished) -> None:
    files = finished.files[:2]
    by_run = predict(str(finished.folder), files)
    assert by_run == predict(str(finished.folder / "model"), files)
    assert [len(classes) for classes in by_run] == [5, 5]
    scores = [item["score"] for item in by_run[0]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(("top_k", "expected"), [(1, 1), (10, 10), (100, 10)])
def test_no_more_classes_than_there_are(top_k: int, expected: int, finished: Finished) -> None:
    (classes,) = predict(str(finished.folder), finished.files[:1], top_k=top_k)
    assert len(classes) == expected


def test_other_colour_modes_are_read_as_rgb(finished: Finished, tmp_path: Path) -> None:
    rgb = Image.open(finished.files[0]).convert("RGB")  # grey, so that every mode keeps it
    opaque = rgb.copy()
    opaque.putalpha(255)
    modes = {
        "rgb": rgb,
        "rgba": opaque,
        "grey": rgb.convert("L"),
        "grey_alpha": rgb.convert("L").convert("LA"),
        "palette": rgb.convert("L").convert("P"),
    }
    files = []
    for name, picture in modes.items():
        files.append(tmp_path / f"{name}.png")
        picture.save(files[-1])
    found = predict(str(finished.folder), files)
    assert found == [found[0]] * len(modes)


def test_photo_on_its_side_is_turned(finished: Finished, tmp_path: Path) -> None:
    upright = Image.open(finished.files[0]).convert("RGB")
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to view
    sideways.save(tmp_path / "photo.png", exif=exif)
    one, two = predict(str(finished.folder), [finished.files[0], tmp_path / "photo.png"])
    assert one == two


def test_every_missing_and_broken_file_is_listed(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image", "utf-8")
    whole = finished.files[0].read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    names = ("text.png", "half.png", "empty.png", "folder", "missing.png")
    files = [finished.files[0], *(tmp_path / name for name in names), finished.files[1]]
    with pytest.raises(DataError, match="The list of images has 5 problems") as caught:
        predict(str(finished.folder), files)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 5
    for line, name, reason in zip(
        lines,
        names,
        ("cannot be read", "cannot be read", "cannot be read", "is a folder", "does not exist"),
        strict=True,
    ):
        assert f"{name} {reason}" in line


def test_images_are_checked_before_the_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.png does not exist"):
        predict(str(tmp_path), [tmp_path / "missing.png"])


def test_folder_without_a_model_is_refused(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json; give the model/ folder of a"):
        predict(str(tmp_path), finished.files[:1])


def test_damaged_model_is_refused(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", "utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        predict(str(tmp_path), finished.files[:1])


def test_model_that_is_nowhere_is_refused(finished: Finished) -> None:
    with pytest.raises(HubError, match=r"there is no folder owner/nothing"):
        predict("owner/nothing", finished.files[:1])

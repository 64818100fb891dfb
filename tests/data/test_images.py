from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

import hfbench.data.images
from hfbench.data.decoding import EncodedImages
from hfbench.data.images import ImageBatches, ImageSplit, balanced_subset
from hfbench.data.sources import load_splits
from hfbench.data.transforms import Normalization, Preprocessing
from hfbench.errors import DataError, HubError
from hfbench.recipe.schema import DatasetSection
from tests.data.test_cifar import HUNDRED, TEN, cifar10, cifar100, extract, pack, pixels

NAMES = ["cat", "dog"]
CLASSES = datasets.ClassLabel(names=NAMES)
Splits = tuple[ImageSplit, ImageSplit]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(seed: int = 0, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0], 3)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def table(
    images: Sequence[Any], labels: Sequence[Any], feature: Any = CLASSES, column: str = "label"
) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), column: feature})
    return datasets.Dataset.from_dict({"image": images, column: labels}, features=features)


def saved(folder: Path, train: datasets.Dataset, test: datasets.Dataset) -> Path:
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def good(count: int = 4) -> datasets.Dataset:
    return table([picture(n) for n in range(count)], [n % 2 for n in range(count)])


def load(path: Any, **options: Any) -> Splits:
    return load_splits(DatasetSection(name_or_path=str(path), **options), 16, "bilinear")


def load_error(path: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **options)
    return str(caught.value)


# --- every kind of storage ---


def assert_good(train: ImageSplit, test: ImageSplit) -> None:
    assert train.label_names == test.label_names == NAMES
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == train.index.dtype == torch.int64
    assert train.images.shape == (4, 3, 6, 8)
    assert torch.equal(train.images, torch.stack([as_tensor(picture(n)) for n in range(4)]))
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert train.index.tolist() == [0, 1, 2, 3]
    assert torch.equal(test.images, torch.stack([as_tensor(picture(n)) for n in range(2)]))
    assert test.labels.tolist() == [0, 1]
    assert train.notes == test.notes == []


def test_parquet_folder_is_read(tmp_path: Path) -> None:
    for name, split in (("train", good()), ("test", good(2))):
        (tmp_path / "plain_text").mkdir(exist_ok=True)
        split.to_parquet(str(tmp_path / "plain_text" / f"{name}-00000-of-00001.parquet"))

    assert_good(*load(tmp_path))


def test_save_to_disk_folder_is_read(tmp_path: Path) -> None:
    assert_good(*load(saved(tmp_path, good(), good(2))))


def test_folder_of_image_files_is_read_with_the_folders_as_classes(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        for name in NAMES:
            (tmp_path / split / name).mkdir(parents=True)
        for n in range(count):
            picture(n).save(tmp_path / split / NAMES[n % 2] / f"{n}.png")

    train, test = load(tmp_path)
    assert train.label_names == test.label_names == NAMES
    assert sorted(train.labels.tolist()) == [0, 0, 1, 1]
    expected = {as_tensor(picture(n)).numpy().tobytes(): n % 2 for n in range(4)}
    for image, label in zip(train.images, train.labels, strict=True):
        assert expected[image.numpy().tobytes()] == label


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_column_of_file_names_or_encoded_bytes_is_read(tmp_path: Path, kind: str) -> None:
    values: list[Any] = [encoded(picture(n))["bytes"] for n in range(4)]
    if kind == "string":
        for n in range(4):
            (tmp_path / f"{n}.png").write_bytes(values[n])
        values = [str(tmp_path / f"{n}.png") for n in range(4)]
    features = datasets.Features({"image": datasets.Value(kind), "label": CLASSES})
    rows = {"image": values, "label": [0, 1, 0, 1]}
    train = datasets.Dataset.from_dict(rows, features=features)

    assert_good(*load(saved(tmp_path, train, train.select([0, 1]))))


def test_file_name_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Value("string"), "label": CLASSES})
    rows = {"image": ["/no/such/1.png", "/no/such/2.png"], "label": [0, 1]}
    train = datasets.Dataset.from_dict(rows, features=features)

    lines = load_error(saved(tmp_path, train, good())).splitlines()
    assert lines[1].startswith("  train image 0 (/no/such/1.png): ")
    assert lines[2].startswith("  train image 1 (/no/such/2.png): ")


@pytest.mark.parametrize("make", [pack, extract])
def test_archive_of_the_author_is_read(tmp_path: Path, make: Any) -> None:
    train, test = load(make(tmp_path, TEN, cifar10()))

    assert train.label_names == ["airplane", "automobile", "bird"]
    assert train.images.shape == (20, 3, 32, 32)
    assert (test.images.reshape(-1, 3072).numpy() == pixels(6)).all()
    assert train.index.tolist() == list(range(20))


def test_folder_that_holds_the_archive_is_read(tmp_path: Path) -> None:
    pack(tmp_path, HUNDRED, cifar100())

    train, _ = load(tmp_path, label_column="coarse_label", max_train_samples=2)
    assert train.label_names == ["aquatic_mammals", "fish"]
    assert sorted(train.labels.tolist()) == [0, 1]
    assert (train.images.reshape(-1, 3072).numpy() == pixels(1)[train.index.numpy()]).all()


def test_archive_with_wrong_splits_and_column_is_refused_all_at_once(tmp_path: Path) -> None:
    path = pack(tmp_path, HUNDRED, cifar100())

    message = load_error(path, train_split="trian", eval_split="tset", label_column="label")
    assert "trian" in message
    assert "tset" in message
    assert "fine_label" in message


def test_digits_need_no_file() -> None:
    train, test = load("digits")

    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 3, 8, 8)
    assert (train.images[:, 0] == train.images[:, 2]).all()
    assert int(train.images.max()) == 255  # stored as 0 to 16
    assert train.label_names == [str(n) for n in range(10)]
    assert not set(train.index.tolist()) & set(test.index.tolist())
    assert max(Counter(test.labels.tolist()).values()) <= 37


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    _, test = load("digits", max_eval_samples=50)
    for image, label, index in zip(test.images, test.labels, test.index.tolist(), strict=True):
        assert int(label) == bunch.target[index]
        assert np.abs(image[0].numpy() - bunch.images[index] * 255 / 16).max() <= 0.5


def test_digits_check_splits_and_columns() -> None:
    message = load_error("digits", eval_split="validation", image_column="img")

    assert message.splitlines()[0] == "digits has 2 problems:"
    assert 'dataset.eval_split: "validation" is not a split of digits' in message
    assert "did you mean image?" in message


def test_synthetic_data_are_noise_with_balanced_labels() -> None:
    train, test = load("synthetic", max_train_samples=100, max_eval_samples=30, num_classes=3)

    assert train.images.shape == (100, 3, 32, 32)
    assert sorted(Counter(train.labels.tolist()).values()) == [33, 33, 34]
    assert len(test) == 30
    assert not torch.equal(train.images[:30], test.images)
    assert abs(float(train.images.float().mean()) - 127.5) < 1
    assert train.label_names == ["0", "1", "2"]
    assert load("synthetic", max_train_samples=100)[0].fingerprint() != train.fingerprint()


def test_synthetic_data_are_the_same_each_time() -> None:
    first, second = (load("synthetic", max_train_samples=9, max_eval_samples=9) for _ in range(2))

    assert [s.fingerprint() for s in first] == [s.fingerprint() for s in second]


# --- subsets ---


@given(
    labels=hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 5)),
    count=st.none() | st.integers(1, 70),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None)
def test_subset_is_as_balanced_as_the_images_allow(
    labels: np.ndarray, count: int | None, seed: int
) -> None:
    chosen = balanced_subset(labels, count, seed)

    assert len(chosen) == min(len(labels), len(labels) if count is None else count)
    assert (np.diff(chosen) > 0).all()  # the data set's order, nothing twice
    taken, all_of_them = Counter(labels[chosen].tolist()), Counter(labels.tolist())
    most = max(taken.values())
    assert all(taken[name] >= min(most - 1, total) for name, total in all_of_them.items())
    assert (balanced_subset(labels, count, seed) == chosen).all()


def test_subset_depends_on_its_seed() -> None:
    labels = np.arange(100) % 10

    assert (balanced_subset(labels, 20, 0) != balanced_subset(labels, 20, 1)).any()


def test_subset_does_not_favour_the_first_images() -> None:
    labels = np.arange(1000) % 10
    taken = np.concatenate([balanced_subset(labels, 100, seed) for seed in range(100)])

    # Mean of 10,000 draws from 0 to 999: 499.5, standard deviation 288.7 / 100.
    assert abs(taken.mean() - 499.5) < 4 * 2.9


def numbered(count: int) -> ImageSplit:
    """Return images that bear their own number, and labels that follow from it."""
    number = torch.arange(count)
    images = number.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous()
    return ImageSplit(images, number % 3, ["a", "b", "c"], number + 1000)


@given(count=st.integers(1, 60), seed=st.integers(0, 99), total=st.integers(1, 50))
@settings(deadline=None)
def test_subset_keeps_images_labels_and_positions_together(
    count: int, seed: int, total: int
) -> None:
    part = numbered(total).subset(count, seed)

    number = part.images[:, 0, 0, 0].long()
    assert len(part) == min(count, total)
    assert torch.equal(part.labels, number % 3)
    assert torch.equal(part.index, number + 1000)


def test_subset_of_everything_is_the_split_itself() -> None:
    split = numbered(9)

    assert split.subset(None, 0) is split
    assert split.subset(9, 0) is split


def test_loaded_subset_names_where_each_image_came_from(tmp_path: Path) -> None:
    images = [picture(n) for n in range(12)]
    path = saved(tmp_path, table(images, [n % 2 for n in range(12)]), good())

    train, _ = load(path, max_train_samples=6, subset_seed=3)
    assert sorted(Counter(train.labels.tolist()).values()) == [3, 3]
    assert train.index.tolist() == sorted(train.index.tolist())
    for image, label, index in zip(train.images, train.labels, train.index.tolist(), strict=True):
        assert torch.equal(image, as_tensor(images[index]))
        assert int(label) == index % 2
    assert load(path, max_train_samples=6, subset_seed=4)[0].index.tolist() != train.index.tolist()


# --- colours and sizes ---


def stack(
    images: Sequence[Image.Image], size: int, how: str = "bilinear"
) -> tuple[torch.Tensor, list[str]]:
    """Decode images named a, b, c …; return their pixels and what was said of them."""
    kinds = ["TIFF" if image.mode == "CMYK" else "PNG" for image in images]
    entries = [encoded(*pair) for pair in zip(images, kinds, strict=True)]

    def name(position: int, _: Any) -> str:
        return "abcdefgh"[position]

    content = EncodedImages(
        lambda start, stop: entries[start:stop], len(entries), name, name, size, how
    )
    parts = list(content.parts())
    assert np.concatenate(parts).shape == content.shape
    return torch.from_numpy(np.concatenate(parts)), content.notes


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_other_colour_modes_become_rgb_with_a_note(mode: str) -> None:
    images = [picture(0), picture(1, mode=mode), picture(2, mode=mode)]

    tensor, notes = stack(images, 16)
    assert torch.equal(tensor, torch.stack([as_tensor(image) for image in images]))
    assert notes == ["2 of 3 images are not RGB and were converted; the first is b."]


def test_sixteen_bit_grey_keeps_its_shades_or_is_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    images = [encoded(Image.fromarray(ramp))] * 2

    try:
        train, _ = load(saved(tmp_path, table(images, [0, 1]), good()))
    except DataError as error:
        assert "train image 0" in str(error)  # noqa: PT017 - either of the two will do
    else:
        assert train.images[0, 0].view(-1).diff().min() >= 0
        assert len(train.images[0, 0].unique()) > 40


def test_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    image = encoded(picture(0, mode="P"), transparency=bytes(range(256)))

    train, _ = load(saved(tmp_path, table([image] * 2, [0, 1]), good()))
    assert len(train) == 2


def test_few_odd_sizes_make_all_be_resized_once_to_the_models_input() -> None:
    images = [picture(0), picture(1, size=(40, 9)), picture(2)]

    tensor, notes = stack(images, 16)
    assert tensor.shape == (3, 3, 16, 16)
    for found, image in zip(tensor, images, strict=True):
        straight = F.resize(as_tensor(image), [16, 16], InterpolationMode.BILINEAR, antialias=True)
        assert torch.equal(found, straight)
    assert notes == [
        "3 of 3 images were resized to 16 x 16, the model's input, since sizes are mixed; the "
        "first is a."
    ]


def test_sizes_without_a_majority_are_resized_to_the_model() -> None:
    images = [picture(0), picture(1, size=(9, 9)), picture(2), picture(3, size=(16, 16))]

    tensor, notes = stack(images, 16)
    assert tensor.shape == (4, 3, 16, 16)
    assert torch.equal(tensor[3], as_tensor(images[3]))
    assert notes == [
        "3 of 4 images were resized to 16 x 16, the model's input, since sizes are mixed; the "
        "first is a."
    ]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_every_interpolation_of_a_processor_resizes(interpolation: str) -> None:
    images = [picture(0), picture(1, size=(9, 9))]

    assert stack(images, 5, interpolation)[0].shape == (2, 3, 5, 5)


def test_notes_name_the_split_and_the_image(tmp_path: Path) -> None:
    images = [picture(0), picture(1), picture(2, mode="L"), picture(3, size=(3, 4))]
    train, test = load(saved(tmp_path, table(images, [0, 1, 0, 1]), good()))

    assert train.notes == [
        "1 of 4 images are not RGB and were converted; the first is train image 2.",
        "4 of 4 images were resized to 16 x 16, the model's input, since sizes are mixed; the "
        "first is train image 0.",
    ]
    assert test.notes == []


def test_rotation_in_the_metadata_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = picture(0)
    rows = [encoded(image, exif=exif), encoded(image)]

    train, _ = load(saved(tmp_path, table(rows, [0, 1]), good()))
    assert torch.equal(train.images[0], train.images[1].flip(-1, -2))


# --- images and labels that cannot be used ---


def test_damaged_images_are_named_all_at_once(tmp_path: Path) -> None:
    cut = {"bytes": encoded(picture(1))["bytes"][:60], "path": "photos/y.png"}
    junk = {"bytes": b"junk", "path": None}
    images = [picture(0), cut, None, *[junk] * 5]

    lines = load_error(saved(tmp_path, table(images, [0, 1] * 4), good())).splitlines()
    assert "images cannot be used" in lines[0]
    assert lines[1].startswith("  train image 1 (y.png): ")
    assert lines[2] == "  train image 2: there is no image"
    assert lines[3].startswith("  train image 3: ")
    assert lines[-1] == "  … and 2 more"
    assert len(lines) == 7


def test_count_of_damaged_images_is_right(tmp_path: Path) -> None:
    junk = {"bytes": b"junk", "path": None}

    message = load_error(saved(tmp_path, table([junk] * 8, [0, 1] * 4), good()))
    assert "8 " in message.splitlines()[0].removeprefix(str(tmp_path))


def test_message_about_a_damaged_image_is_the_same_each_time(tmp_path: Path) -> None:
    junk = {"bytes": b"junk", "path": None}
    path = saved(tmp_path, table([junk, picture(1)], [0, 1]), good())

    assert " object at 0x" not in load_error(path)  # an address in memory tells nobody anything


def test_only_chosen_images_are_decoded(tmp_path: Path) -> None:
    images: list[Any] = [picture(n) for n in range(8)]
    chosen = balanced_subset(np.arange(8) % 2, 4, 0).tolist()
    left_out = next(n for n in range(8) if n not in chosen)
    images[left_out] = {"bytes": b"junk", "path": None}

    train, _ = load(
        saved(tmp_path, table(images, [n % 2 for n in range(8)]), good()), max_train_samples=4
    )
    assert train.index.tolist() == chosen


def test_damaged_image_is_named_by_its_place_in_the_whole_split(tmp_path: Path) -> None:
    images: list[Any] = [picture(n) for n in range(8)]
    last = int(balanced_subset(np.arange(8) % 2, 4, 0)[-1])
    images[last] = {"bytes": b"junk", "path": None}
    path = saved(tmp_path, table(images, [n % 2 for n in range(8)]), good())

    assert f"train image {last}: " in load_error(path, max_train_samples=4)


@pytest.mark.parametrize(
    ("labels", "feature", "said"),
    [
        ([0, None, None, 1], CLASSES, "2 of 4 images have no label, the first is number 1."),
        ([0, 1, -1, 1], CLASSES, "the first is -1 of image 2; expected 0 to 1."),
        ([0, 1, -1, 1], datasets.Value("int64"), "the first is -1 of image 2; expected 0 to 1."),
        ([0.0, 1.0, 0.5, 1.0], datasets.Value("float32"), "expected class numbers or names"),
        ([True, False] * 2, datasets.Value("bool"), "expected class numbers or names"),
        (
            [[0], [1], [0, 1], []],
            datasets.List(datasets.Value("int64")),
            "expected class numbers or names",
        ),
    ],
)
def test_label_that_is_no_class_is_refused(
    tmp_path: Path, labels: list[Any], feature: Any, said: str
) -> None:
    path = saved(tmp_path, table([picture(0)] * 4, labels, feature), good())

    message = load_error(path)
    assert message.startswith(f"{path}: train.label")
    assert said in message


def test_names_as_labels_become_classes_in_alphabetical_order(tmp_path: Path) -> None:
    text = datasets.Value("string")
    images = [picture(n) for n in range(3)]
    train, test = load(
        saved(
            tmp_path,
            table(images, ["dog", "cat", "dog"], text),
            table(images, ["owl", "dog", "cat"], text),
        )
    )

    assert train.label_names == test.label_names == ["cat", "dog", "owl"]
    assert train.labels.tolist() == [1, 0, 1]
    assert test.labels.tolist() == [2, 1, 0]


def test_numbers_without_names_become_the_classes_that_either_split_has(
    tmp_path: Path,
) -> None:
    whole = datasets.Value("int32")
    train, test = load(
        saved(
            tmp_path,
            table([picture(0)] * 2, [0, 2], whole),
            table([picture(0)] * 2, [3, 0], whole),
        )
    )

    assert train.label_names == test.label_names == ["0", "2", "3"]
    assert train.labels.tolist() == [0, 1]
    assert test.labels.tolist() == [2, 0]


@pytest.mark.parametrize("names", [["cat", "owl"], ["dog", "cat"], ["cat", "dog", "owl"]])
def test_splits_with_different_classes_are_refused(tmp_path: Path, names: list[str]) -> None:
    other = table([picture(0)] * 2, [0, 1], datasets.ClassLabel(names=names))

    message = load_error(saved(tmp_path, good(), other))
    assert 'train and test name different classes: "cat" and "dog" against' in message


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (("int64", [0, 1]), ("string", ["cat", "dog"])),
        (("string", ["cat", "dog"]), ("int64", [0, 1])),
    ],
)
def test_splits_with_different_kinds_of_labels_are_refused(
    tmp_path: Path, train: tuple[str, list[Any]], test: tuple[str, list[Any]]
) -> None:
    tables = (table([picture(0)] * 2, v, datasets.Value(k)) for k, v in (train, test))

    assert "label" in load_error(saved(tmp_path, *tables))


def test_names_in_one_split_and_class_numbers_in_the_other_are_refused(tmp_path: Path) -> None:
    names = table([picture(0)] * 2, ["cat", "dog"], datasets.Value("string"))

    assert "label" in load_error(saved(tmp_path, good(), names))


# --- splits and columns ---


def test_wrong_splits_and_columns_are_named_all_at_once_with_the_nearest(tmp_path: Path) -> None:
    path = saved(tmp_path, good(), good())

    assert load_error(
        path, train_split="trian", eval_split="tset", image_column="imge", label_column="zzz"
    ).splitlines() == [
        f"{path} has 4 problems:",
        f'  dataset.train_split: "trian" is not a split of {path}; it has "train" and "test"; '
        "did you mean train?",
        f'  dataset.eval_split: "tset" is not a split of {path}; it has "train" and "test"; '
        "did you mean test?",
        f'  dataset.image_column: "imge" is not a column of {path}; it has "image" and "label"; '
        "did you mean image?",
        f'  dataset.label_column: "zzz" is not a column of {path}; it has "image" and "label". '
        "Set, for instance, dataset.label_column=label",
    ]


def test_column_that_only_one_split_has_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, good(), table([picture(0)], [0], column="fine"))

    assert "label" in load_error(path)


def test_swapped_columns_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, good(), good())

    message = load_error(path, image_column="label", label_column="image")
    assert "image holds Image" in message


def test_column_without_images_is_refused(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Value("int64"), "label": CLASSES})
    numbers = datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]}, features=features)

    message = load_error(saved(tmp_path, numbers, numbers))
    assert "dataset.image_column: image of " in message
    assert "no images." in message


# It divides by the number of rows when it writes.
writes_no_rows = pytest.mark.skipif(
    datasets.__version__.startswith("5.0"), reason="datasets 5.0 cannot write a split without rows"
)


@writes_no_rows
@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_split_is_refused(tmp_path: Path, split: str) -> None:
    for name in ("train", "test"):
        rows = good().select([]) if name == split else good()
        rows.to_parquet(str(tmp_path / f"{name}-00000-of-00001.parquet"))

    message = load_error(tmp_path)
    assert split in message
    assert "empty" in message


@writes_no_rows
def test_empty_split_saved_to_disk_is_refused_in_words(tmp_path: Path) -> None:
    message = load_error(saved(tmp_path, good(), good().select([])))

    assert "index out of range" not in message


def test_data_set_dictionary_without_splits_is_refused(tmp_path: Path) -> None:
    datasets.DatasetDict({}).save_to_disk(str(tmp_path / "saved"))

    assert "split" in load_error(tmp_path / "saved")


def test_data_set_without_splits_says_what_to_save(tmp_path: Path) -> None:
    good().save_to_disk(str(tmp_path / "saved"))

    assert load_error(tmp_path / "saved").endswith(
        'is one data set without splits; save a DatasetDict with "train" and "test".'
    )


def test_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("image,label\n")

    message = load_error(path)
    assert str(path) in message
    assert "expected a folder" in message


def test_folder_without_data_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} cannot be loaded as a data set: " in load_error(tmp_path)


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"junk")

    assert f"{tmp_path} cannot be loaded as a data set: Parquet" in load_error(tmp_path)


@pytest.mark.parametrize("name", ["nobody/no-such-data", "cifar-10"])
def test_missing_data_offline_says_what_works(name: str) -> None:
    with pytest.raises(HubError) as caught:
        load(name)

    message = str(caught.value)
    assert f"there is no folder {name} in {Path.cwd()}" in message
    assert "dataset.name_or_path=digits" in message


def test_commit_of_a_data_set_on_the_hub_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    splits = {}
    for name, rows in (("train", good()), ("test", good(2))):
        cache = tmp_path / name / commit  # as the cache of the real Hub names its folders
        rows.save_to_disk(cache)
        splits[name] = datasets.load_from_disk(cache)
    loaded = datasets.DatasetDict(splits)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)

    assert [split.revision for split in load("someone/pets")] == [commit, commit]


def test_data_set_on_disk_has_no_commit(tmp_path: Path) -> None:
    assert load(saved(tmp_path, good(), good()))[0].revision is None


# --- fingerprints ---


@given(place=st.integers(0, 5 * 3 * 2 * 2 - 1), change=st.integers(1, 255))
@settings(deadline=None)
def test_fingerprint_changes_with_one_pixel(place: int, change: int) -> None:
    split, other = numbered(5), numbered(5)
    pixel = other.images.view(-1)[place : place + 1]
    pixel.add_(change)

    assert other.fingerprint() != split.fingerprint()


def test_fingerprint_changes_with_one_label_and_with_the_order() -> None:
    split = numbered(5)
    relabelled, swapped = numbered(5), numbered(5)
    relabelled.labels[2] = 0
    order = torch.tensor([0, 1, 2, 4, 3])
    swapped = ImageSplit(
        swapped.images[order], swapped.labels[order], swapped.label_names, swapped.index
    )

    assert len({split.fingerprint(), relabelled.fingerprint(), swapped.fingerprint()}) == 3


def test_fingerprint_tells_shapes_apart() -> None:
    flat = ImageSplit(
        numbered(5).images.view(5, 3, 1, 4), numbered(5).labels, ["a"], torch.arange(5)
    )

    assert flat.fingerprint() != numbered(5).fingerprint()


def test_fingerprint_is_that_of_the_content_and_not_of_its_layout() -> None:
    split = numbered(5)
    strided = ImageSplit(
        split.images.to(memory_format=torch.channels_last), split.labels, ["x"], torch.zeros(5)
    )

    assert strided.fingerprint() == split.fingerprint()


def test_same_data_have_one_fingerprint_however_they_are_stored(tmp_path: Path) -> None:
    from_disk = load(saved(tmp_path, good(), good(2)))
    for name, rows in (("train", good()), ("test", good(2))):
        rows.to_parquet(str(tmp_path / f"{name}-00000-of-00001.parquet"))
    (tmp_path / "saved").rename(tmp_path.parent / f"{tmp_path.name}-saved")

    assert [s.fingerprint() for s in load(tmp_path)] == [s.fingerprint() for s in from_disk]


# --- batches ---


def batches(location: str, augment: bool, augmentation: Sequence[str] = ()) -> ImageBatches:
    preprocessing = Preprocessing(
        Normalization(2, "bilinear", (0.5,) * 3, (0.25,) * 3), augmentation, seed=0
    )
    return ImageBatches(numbered(5), preprocessing, location, augment)


def test_sample_number_is_epoch_times_length_plus_index() -> None:
    served = batches("device", augment=True)
    batch = served.__getitems__([3, 5 + 3, 10 + 1, 2**40 * 5 + 4])

    assert batch["labels"].tolist() == [0, 0, 1, 1]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [3, 3, 1, 4]
    assert batch["sample"].tolist() == [3, 8, 11, 2**40 * 5 + 4]
    assert batch["pixel_values"].dtype == torch.uint8


def test_test_batches_on_the_device_carry_no_sample_number() -> None:
    assert set(batches("device", augment=False).__getitems__([0, 1])) == {"pixel_values", "labels"}


def test_batches_on_the_host_are_normalised() -> None:
    batch = batches("host", augment=True).__getitems__([4, 0])

    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].dtype == torch.float32
    expected = torch.tensor([(4 / 255 - 0.5) / 0.25, -2.0])
    assert torch.allclose(batch["pixel_values"][:, 1, 0, 0], expected)


def test_one_sample_is_its_place_in_a_batch() -> None:
    served = batches("host", augment=True, augmentation=["horizontal_flip"])
    one = served[7]

    assert len(served) == 5
    assert one["pixel_values"].shape == (3, 2, 2)
    assert torch.equal(one["pixel_values"], served.__getitems__([1, 7])["pixel_values"][1])
    assert int(one["labels"]) == 2


def test_mixed_batches_bring_their_partners() -> None:
    served = batches("device", augment=True, augmentation=["mixup"])
    batch = served.__getitems__([10 + 3, 10 + 4])
    partner = batch["partner_sample"]

    assert ((partner >= 10) & (partner < 15)).all()
    assert torch.equal(batch["partner_pixel_values"][:, 0, 0, 0], (partner - 10).to(torch.uint8))
    own = batch["mixed_labels"].gather(1, batch["labels"][:, None])
    assert batch["labels"].tolist() == [0, 1]
    assert batch["labels"].dtype == torch.int64
    torch.testing.assert_close(batch["mixed_labels"].sum(1), torch.ones(2))
    assert ((own > 0) | (partner[:, None] % 3 == batch["labels"][:, None])).all()
    assert set(batches("device", False, ["mixup"]).__getitems__([0])) == {"pixel_values", "labels"}


def test_partner_does_not_depend_on_the_rest_of_the_batch() -> None:
    served = batches("host", augment=True, augmentation=["mixup", "cutmix"])
    whole = served.__getitems__([4, 0, 9, 2])

    for place, sample in enumerate([4, 0, 9, 2]):
        for name, value in served.__getitems__([sample]).items():
            assert torch.equal(value[0], whole[name][place])


@pytest.mark.parametrize("augment", [True, False])
def test_of_resident_images_a_batch_is_one_tensor_of_numbers(augment: bool) -> None:
    preprocessing = Preprocessing(
        Normalization(2, "bilinear", (0.5,) * 3, (0.25,) * 3), ["mixup", "cutmix"], seed=0
    )
    samples = [5 + 3, 1] if augment else [3, 1]
    there = torch.device("cpu")
    served = ImageBatches(numbered(5), preprocessing, "device", augment, there)
    elsewhere = ImageBatches(numbered(5), preprocessing, "device", augment).__getitems__(samples)

    (numbers,) = served.__getitems__(samples).values()
    assert numbers.tolist() == samples
    gathered = served.gather(numbers, preprocessing)
    assert gathered.keys() == elsewhere.keys()
    for name, value in elsewhere.items():
        assert torch.equal(gathered[name], value)


@pytest.mark.parametrize("augmentation", [[], ["mixup", "cutmix"]])
def test_batch_is_put_together_on_the_device_without_waiting_for_it(
    augmentation: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # On the meta device nothing is computed: a value that is asked for is an error.
    split, device = numbered(5), torch.device("meta")
    monkeypatch.setattr("hfbench.data.images._free_memory", lambda device: 10**6)
    normalization = Normalization(2, "bilinear", (0.5,) * 3, (0.25,) * 3)
    preprocessing = Preprocessing(normalization, augmentation, seed=0)
    served = ImageBatches(split, preprocessing, "device", True, device)

    (numbers,) = served.__getitems__([5 + 3, 1]).values()
    batch = served.gather(numbers.to(device), preprocessing.to(device))
    assert {value.device for value in batch.values()} == {device}
    assert split.labels_on(device) is split.labels_on(device)
    assert pickle.loads(pickle.dumps(split))._label_copies == {}


def test_images_that_do_not_fit_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    split, device = numbered(5), torch.device("meta")
    assert split.images.nbytes == 60

    monkeypatch.setattr("hfbench.data.images._free_memory", lambda device: 239)
    assert split.images_on(device) is None
    monkeypatch.setattr("hfbench.data.images._free_memory", lambda device: 240)
    copied = split.images_on(device)
    assert copied is not None
    assert copied.device == device
    assert split.images_on(device) is copied  # for the train accuracy, too
    assert pickle.loads(pickle.dumps(split))._copies == {}
    assert split.subset(3, 0)._copies == {}


# --- real data ---


@pytest.mark.parametrize(
    ("name", "label", "classes"),
    [("cifar10", "label", 10), ("cifar100", "fine_label", 100), ("cifar100", "coarse_label", 20)],
)
def test_real_subset_is_balanced_and_has_the_pixels_that_datasets_decodes(
    shared: Path, name: str, label: str, classes: int
) -> None:
    folder = shared / "data" / name
    columns = {"image_column": "img", "label_column": label}

    _, test = load(folder, **columns, max_train_samples=classes, max_eval_samples=200)
    assert set(Counter(test.labels.tolist()).values()) == {200 // classes}
    assert test.images.shape == (200, 3, 32, 32)
    assert test.notes == []

    rows = datasets.load_dataset(str(folder), split="test")
    assert test.label_names == rows.features[label].names
    for image, number, row in zip(
        test.images, test.labels, rows.select(test.index.tolist()), strict=True
    ):
        assert torch.equal(image, as_tensor(row["img"]))
        assert int(number) == row[label]


def test_real_data_with_the_default_columns_say_which_to_set(shared: Path) -> None:
    message = load_error(shared / "data" / "cifar100")

    assert 'dataset.image_column: "image" is not a column' in message
    assert "did you mean fine_label?" in message or "dataset.label_column=" in message


def test_memory_that_torch_holds_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def mem_get_info(device: torch.device) -> tuple[int, int]:
            return 100, 1000  # after training the driver has little left

        @staticmethod
        def memory_reserved(device: torch.device) -> int:
            return 800

        @staticmethod
        def memory_allocated(device: torch.device) -> int:
            return 300

    monkeypatch.setattr("torch.get_device_module", lambda device: Module)
    assert hfbench.data.images._free_memory(torch.device("cuda")) == 600

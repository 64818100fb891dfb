"""Small checkpoints and data sets in the layout that the Hub's own repositories have.

They stand in for the repositories that the shipped recipes name: the same files, keys and columns,
with random weights and made-up images. The heavy libraries are imported where they are used.
"""

import io
import json
from pathlib import Path
from typing import Literal, NamedTuple

from tests.hub_server import HubServer

CifarName = Literal["cifar10", "cifar100"]

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""
_CIFAR100_COARSE = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
household_furniture insects large_carnivores large_man-made_outdoor_things
large_natural_outdoor_scenes large_omnivores_and_herbivores medium_mammals
non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
"""
CIFAR10_NAMES = _CIFAR10.split()
CIFAR100_FINE_NAMES = _CIFAR100_FINE.split()
CIFAR100_COARSE_NAMES = _CIFAR100_COARSE.split()
# The coarse class of each fine class, in the order of the fine names.
CIFAR100_COARSE_OF_FINE = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11),
    *(6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5),
    *(5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17),
    *(10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13),
    *(16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)


class _CifarLayout(NamedTuple):
    """What tells the two repositories apart: the configuration's name and the label columns."""

    config: str
    labels: dict[str, list[str]]


_CIFAR: dict[CifarName, _CifarLayout] = {
    "cifar10": _CifarLayout("plain_text", {"label": CIFAR10_NAMES}),
    "cifar100": _CifarLayout(
        "cifar100", {"fine_label": CIFAR100_FINE_NAMES, "coarse_label": CIFAR100_COARSE_NAMES}
    ),
}


def write_vit_checkpoint(
    folder: Path, *, image_size: int = 224, patch_size: int = 16, hidden_size: int = 32
) -> None:
    """Write a two-layer ViT as `google/vit-base-patch16-224-in21k` is laid out: no classifier.

    Args:
        folder: Where to write config.json, model.safetensors and preprocessor_config.json.
        image_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch, in pixels.
        hidden_size: Width of the model; a multiple of 4, its number of attention heads.
    """
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    ViTModel(config).save_pretrained(folder)
    processor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "ViTImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
    }
    _write_json(folder / "preprocessor_config.json", processor)


def write_timm_checkpoint(
    folder: Path, architecture: str = "test_resnet", *, image_size: int = 224
) -> None:
    """Write a timm model with 1000 classes as timm's own Hub repositories are laid out.

    Unlike a folder that transformers saves, config.json has no `model_type`, and the keys in
    model.safetensors no `timm_model.` before timm's own names.

    Args:
        folder: Where to write config.json and model.safetensors.
        architecture: Name of a convolutional model that `timm.create_model` knows; those that
            begin with `test_` are tiny (0.4 million parameters).
        image_size: Height and width that the checkpoint says it was trained on, in pixels.
    """
    import timm
    import torch
    from safetensors.torch import save_file
    from timm.models import PretrainedCfg

    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=1000)
    sizes = {"input_size": (3, image_size, image_size), "test_input_size": None, "pool_size": None}
    described = PretrainedCfg(**model.pretrained_cfg).to_dict(remove_source=True) | sizes
    config = {
        "architecture": described.pop("architecture"),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {key: value for key, value in described.items() if value is not None},
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def write_cifar_parquet(folder: Path, dataset: CifarName, train: int, test: int) -> None:
    """Write made-up 32 x 32 images as `uoft-cs/cifar10` or `uoft-cs/cifar100` is laid out.

    Labels take turns, so 10 (or 100) images have every class, and each class has a colour of its
    own under the noise, so that a model can learn it. Test images differ from training images.

    Args:
        folder: Where to write README.md and a folder of Parquet files with the configuration's
            name.
        dataset: Which of the two.
        train: Number of training images.
        test: Number of test images.
    """
    import numpy
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PillowImage

    layout, generator = _CIFAR[dataset], numpy.random.default_rng(0)
    names = {column: ClassLabel(names=classes) for column, classes in layout.labels.items()}
    features = Features({"img": Image(), **names})
    class_count = len(next(iter(layout.labels.values())))
    colours = generator.integers(48, 208, (class_count, 1, 1, 3))
    splits: dict[str, tuple[int, int]] = {}
    (folder / layout.config).mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        labels = [index % class_count for index in range(count)]
        images = []
        for label in labels:
            pixels = colours[label] + generator.integers(-48, 48, (32, 32, 3))
            buffer = io.BytesIO()
            PillowImage.fromarray(pixels.astype("uint8")).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        columns = dict(
            zip(layout.labels, (labels, [CIFAR100_COARSE_OF_FINE[i] for i in labels]), strict=False)
        )
        rows = Dataset.from_dict({"img": images, **columns}, features=features)
        rows.to_parquet(folder / layout.config / f"{split}-00000-of-00001.parquet")
        splits[split] = (count, rows.data.nbytes)
    (folder / "README.md").write_text(_write_card(layout, splits), encoding="utf-8")


def add_recipe_repos(server: HubServer, folder: Path, *, train: int = 200, test: int = 100) -> None:
    """Write and serve all five repositories that the shipped recipes name.

    Args:
        server: Where to add them.
        folder: Folder to write them in, one folder a repository.
        train: Number of training images of each data set.
        test: Number of test images of each data set.
    """
    write_timm_checkpoint(folder / "resnet", "test_resnet")
    server.add_repo("timm/resnet50.a1_in1k", "model", folder / "resnet")
    write_timm_checkpoint(folder / "efficientnet", "test_efficientnet")
    server.add_repo("timm/efficientnet_b0.ra_in1k", "model", folder / "efficientnet")
    write_vit_checkpoint(folder / "vit")
    server.add_repo("google/vit-base-patch16-224-in21k", "model", folder / "vit")
    for name in _CIFAR:
        write_cifar_parquet(folder / name, name, train, test)
        server.add_repo(f"uoft-cs/{name}", "dataset", folder / name)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_card(layout: _CifarLayout, splits: dict[str, tuple[int, int]]) -> str:
    """Return the README.md whose YAML head gives columns, splits (rows, bytes) and files."""
    lines = ["---", "dataset_info:", f"  config_name: {layout.config}", "  features:"]
    lines += ["  - name: img", "    dtype: image"]
    for column, classes in layout.labels.items():
        lines += [f"  - name: {column}", "    dtype:", "      class_label:", "        names:"]
        lines += [f"          '{index}': {name}" for index, name in enumerate(classes)]
    lines.append("  splits:")
    for split, (count, size) in splits.items():
        lines += [f"  - name: {split}", f"    num_bytes: {size}", f"    num_examples: {count}"]
    size = sum(size for _, size in splits.values())
    lines += [f"  download_size: {size}", f"  dataset_size: {size}"]
    lines += ["configs:", f"- config_name: {layout.config}", "  data_files:"]
    for split in splits:
        lines += [f"  - split: {split}", f"    path: {layout.config}/{split}-*"]
    return "\n".join([*lines, "  default: true", "---", "", "Made-up images for tests.", ""])

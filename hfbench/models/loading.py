"""From a recipe's model to a `PreTrainedModel` and its image processor: one Auto path for all."""

from __future__ import annotations

import copy
import logging
import pickle
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from hfbench.data.transforms import Normalization, Preprocessing
from hfbench.errors import ModelError, first_line
from hfbench.machine.bounds import require_memory
from hfbench.machine.connection import explain_hub_failure
from hfbench.models.configs import (
    CHECKPOINTING,
    find_commit,
    is_known_without_checkpoint,
    load_config,
    refuse_spelling,
    without_checkpointing,
)
from hfbench.models.processors import build_image_processor, read_normalization
from hfbench.models.sizes import check_size, find_failure, fit_to_size, state_size
from hfbench.recipe.schema import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfbench.recipe.schema import ModelSection, Recipe

logger = logging.getLogger(__name__)

# Both resize uint8 with torchvision, bit for bit; what is left is float rounding in the
# normalisation, about 1e-6.
_PROCESSOR_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, before its weights are read.

    Attributes:
        config: Without label names yet.
        image_processor: Set to what training does: a plain resize to the recipe's size.
        normalization: The same, for `Preprocessing`.
        path: What `from_pretrained` is given.
        revision: Commit on the Hub; ``None`` for a folder or an architecture known without one.
    """

    config: PreTrainedConfig
    image_processor: Any
    normalization: Normalization
    path: str
    revision: str | None


def open_model(recipe: Recipe) -> ModelSource:
    """Read a model's configuration and image processor, but no weights.

    Raises:
        ModelError: If there is no such model, or it is no image classifier.
        HubError: If the Hub cannot be reached and the model is not in the cache.
    """
    name = recipe.model.name_or_path
    local = local_path(name)
    if local.exists() and not (local / "config.json").is_file():
        raise ModelError(
            f"model.name_or_path: {name} holds no config.json; give a folder written by "
            f"save_pretrained."
        )
    if not local.exists() and not is_known_without_checkpoint(recipe):
        refuse_spelling(name)
    path = str(local) if local.exists() else name
    revision = None if local.exists() else recipe.model.revision
    try:
        config = load_config(recipe, path, revision)
        normalization = read_normalization(recipe, config, path, revision)
    except ModelError:
        raise
    except Exception as error:  # each library raises its own kinds
        if local.exists():
            raise ModelError(f"model {name} cannot be loaded: {first_line(error)}") from error
        raise explain_hub_failure("model", name, error) from error
    processor = build_image_processor(normalization)
    commit = (
        None
        if local.exists() or is_known_without_checkpoint(recipe)
        else find_commit(path, revision)
    )
    return ModelSource(config, processor, normalization, path, commit)


def load_model(
    recipe: Recipe, source: ModelSource, label_names: Sequence[str]
) -> tuple[PreTrainedModel, str]:
    """Build the classifier with a head for these classes.

    Draws from torch's global generator: seed it first.

    Args:
        recipe: Says whether weights are pretrained.
        source: From `open_model`.
        label_names: Name of each class.

    Returns:
        The model in float32, and how its weights were initialised.

    Raises:
        ModelError: If weights are missing or the model does not take images of the recipe's size.
    """
    config = source.config
    # A former head's, or `pipeline` would apply what the file says rather than a softmax.
    config.problem_type = "single_label_classification"
    if hasattr(config, "function_to_apply"):
        del config.function_to_apply
    config.output_hidden_states = config.output_attentions = False  # logits are all that is read
    config.num_labels = len(label_names)  # first: setting it afterwards would overwrite the names
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: number for number, name in enumerate(label_names)}
    size = recipe.preprocessing.image_size
    if not is_known_without_checkpoint(recipe):
        _check_memory(recipe, config)
    try:
        if recipe.model.pretrained:
            model = _load_pretrained(recipe, source)
            initialization = "pretrained"
        else:
            model, initialization = _build_fresh(config, size)
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"model {recipe.model.name_or_path}: its weights are a pickle that holds more than "
            f"tensors, or is damaged; hfbench does not run it. Use model.safetensors."
        ) from error
    except Exception as error:
        if Path(source.path).exists():
            raise ModelError(
                f"model {recipe.model.name_or_path} cannot be loaded: {first_line(error)}"
            ) from error
        raise explain_hub_failure("model", recipe.model.name_or_path, error) from error
    model = model.float()
    if recipe.model.pretrained:
        model = fit_to_size(model, size, recipe.model.name_or_path)
    _check_checkpointing(model, recipe)
    check_size(model, size, recipe.model.name_or_path, recipe.model.pretrained)
    _check_logits(model, size, len(label_names), recipe.model.name_or_path)
    return model, initialization


def set_implementation(model: PreTrainedModel, section: ModelSection) -> None:
    """Choose how a model computes what it computes: memory format and attention.

    Raises:
        ModelError: If the model has no such attention.
    """
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    nn.Module.to(model, memory_format=formats[section.memory_format])
    attention = section.attn_implementation
    if attention is None:
        return
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise ModelError(
            f'model.attn_implementation: "{attention}" is refused for {section.name_or_path}: '
            f"{first_line(error)}"
        ) from error
    if model.config._attn_implementation != attention:
        raise ModelError(
            f'model.attn_implementation: "{attention}" has no effect on {section.name_or_path}, '
            f'which keeps "{model.config._attn_implementation}"; leave it out.'
        )


def check_saved_processor(
    model: PreTrainedModel, image_processor: Any, preprocessing: Preprocessing, images: Tensor
) -> None:
    """Prove that the processor, once saved and loaded, gives the pixels of training and testing.

    Args:
        model: Its configuration is saved beside the processor, as both decide what is loaded.
        image_processor: As it will be saved with the model.
        preprocessing: Of the run.
        images: uint8, (N, 3, H, W), a few real ones.

    Raises:
        ModelError: If they differ.
    """
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory() as folder:
        _save_processor(model, image_processor, Path(folder))
        model.config.save_pretrained(folder)
        loaded = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    check_image_processor(loaded, preprocessing, images)


def check_image_processor(
    image_processor: Any, preprocessing: Preprocessing, images: Tensor
) -> None:
    """Prove that a processor gives the pixels that training and testing use.

    Args:
        image_processor: As `pipeline` would use it.
        preprocessing: Of the run.
        images: uint8, (N, 3, H, W), a few real ones.

    Raises:
        ModelError: If they differ; accuracy in `pipeline` would not be the one that was measured.
    """
    pictures = [F.to_pil_image(image) for image in images]
    theirs = image_processor(pictures, return_tensors="pt")["pixel_values"]
    ours = preprocessing(images)
    if theirs.shape != ours.shape:
        difference = f"shapes {tuple(theirs.shape[1:])} and {tuple(ours.shape[1:])}"
    else:
        largest = (theirs - ours).abs().max().item()
        if largest <= _PROCESSOR_TOLERANCE:
            return
        difference = f"values that differ by up to {largest:.3g}"
    raise ModelError(
        f"{type(image_processor).__name__} does more than resize, rescale and normalise: it and "
        f"hfbench give {difference}. This model is not supported."
    )


def check_single_image(model: PreTrainedModel, size: int, images: int, batch: int) -> None:
    """Refuse batches of one image, also a last one, if the model cannot train on it.

    Batch normalisation over a map of one pixel has no variance then.

    Args:
        model: Left as it is.
        size: Height and width of its input.
        images: Number of training images.
        batch: Images in a batch.

    Raises:
        ModelError: If the model fails on one image.
    """
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(pixel_values=torch.zeros(1, 3, size, size))
    except ValueError as error:
        name, said = "training_args.per_device_train_batch_size", first_line(error)
        raise ModelError(
            f"{name}: this model cannot train on a single image ({said}). Make it 2 or more."
            if batch == 1
            else f"{name}: {images} training images in batches of {batch} leave one over, on which "
            f"this model cannot train ({said}). Set training_args.dataloader_drop_last=true, or "
            f"another batch size."
        ) from None


def save_model(model: PreTrainedModel, image_processor: Any, folder: Path) -> None:
    """Write weights, configuration and image processor, as `pipeline` loads them.

    Args:
        model: A classifier.
        image_processor: Its own.
        folder: Made anew; what an attempt that was killed left in it is removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    _save_processor(model, image_processor, folder)
    with quiet_progress():
        model.save_pretrained(folder)
    # safetensors makes its files for their owner alone.
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _save_processor(model: PreTrainedModel, image_processor: Any, folder: Path) -> None:
    image_processor.save_pretrained(folder)
    if model.config.model_type == "timm_wrapper":
        # In a folder with a timm configuration, AutoImageProcessor reads config.json alone.
        for name, value in image_processor.to_dict().items():
            setattr(model.config, name, value)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Keep transformers from drawing a bar for each file it writes amid training's own bar."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _load_pretrained(recipe: Recipe, source: ModelSource) -> PreTrainedModel:
    from transformers import AutoModelForImageClassification

    model, loading = AutoModelForImageClassification.from_pretrained(
        source.path,
        config=source.config,
        revision=None if Path(source.path).exists() else recipe.model.revision,
        ignore_mismatched_sizes=True,  # the head of another number of classes is replaced
        output_loading_info=True,
        trust_remote_code=False,
        weights_only=True,  # of a .bin: a pickle must not run anything
    )
    _check_loading(model, loading, recipe.model.name_or_path)
    return model  # type: ignore[no-any-return]


def _check_loading(model: PreTrainedModel, loading: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint that leaves more than the classifier's head at random values."""
    tensors = model.state_dict()
    mismatched = {
        entry[0] if isinstance(entry, tuple | list) else entry
        for entry in loading["mismatched_keys"]
    }
    fresh = (set(loading["missing_keys"]) | mismatched) & set(tensors)
    head = _head_keys(model)
    body = sorted(key for key in fresh - head if not key.endswith("num_batches_tracked"))
    if body:
        lost = sum(tensors[key].numel() for key in body)
        whole = sum(tensors[key].numel() for key in tensors.keys() - head)
        raise ModelError(
            f"model {name}: the checkpoint has no weights for {len(body)} of {len(tensors)} "
            f"tensors besides the head ({lost / whole:.1%} of its values), the first is {body[0]}. "
            f"Use a complete checkpoint, or model.pretrained=false."
        )


def _head_keys(model: PreTrainedModel) -> set[str]:
    """Return the names of the classifier's own tensors, which a new set of classes replaces.

    A body without its head is what most checkpoints on the Hub are, so what lies outside of it may
    be missing. Not every architecture keeps its body in the attribute `base_model_prefix`: in those
    that do not, the head is what changes its shape with the number of classes.
    """
    if model.config.model_type == "timm_wrapper":
        heads: Any = cast("Any", model.timm_model).get_classifier()
        modules = heads if isinstance(heads, tuple) else (heads,)
        ids = {id(parameter) for module in modules for parameter in module.parameters()}
        return {name for name, parameter in model.named_parameters() if id(parameter) in ids}
    tensors = model.state_dict()
    prefix = model.base_model_prefix
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return {key for key in tensors if not key.startswith(f"{prefix}.")}
    config = copy.deepcopy(model.config)
    config.num_labels = 1 + int(config.num_labels or 0)
    with torch.device("meta"):
        other = type(model)(config).state_dict()
    heads = {key.partition(".")[0] for key in tensors if tensors[key].shape != other[key].shape}
    return {key for key in tensors if key.partition(".")[0] in heads}


def _build_fresh(config: Any, size: int) -> tuple[PreTrainedModel, str]:
    import timm
    from transformers import AutoModelForImageClassification

    if config.model_type != "timm_wrapper":
        state_size(config, size)
        fresh = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        return fresh, "transformers"
    model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    if find_failure(model, size) is not None:
        model = _build_timm_for(config, size) or model
    # The wrapper overwrites timm's initialisation with N(0, 0.02) for every weight: put timm's
    # back.
    original = timm.create_model(
        config.architecture,
        num_classes=config.num_labels,
        **(model.config.model_args or {}),
    )
    model.timm_model.load_state_dict(original.state_dict())
    return model, "timm"


def _build_timm_for(config: Any, size: int) -> PreTrainedModel | None:
    """Build one of timm's models for a size, ``None`` if it cannot be."""
    from transformers import AutoModelForImageClassification

    sized = copy.deepcopy(config)
    state_size(sized, size)
    try:
        model = AutoModelForImageClassification.from_config(sized, trust_remote_code=False)
    except Exception:  # it does not know the argument, or refuses the size in a way of its own
        return None
    return model if find_failure(model, size) is None else None


def _check_memory(recipe: Recipe, config: Any) -> None:
    """Refuse a configuration of a model that cannot be built here, before it takes memory."""
    name, config = recipe.model.name_or_path, copy.deepcopy(config)
    if not recipe.model.pretrained and config.model_type != "timm_wrapper":
        state_size(config, recipe.preprocessing.image_size)
    from transformers import AutoModelForImageClassification

    try:
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except Exception:  # what is wrong with it is said when it is built
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    require_memory(
        4 * parameters,
        f"model {name}: {parameters:,} parameters",
        "use a smaller model",
        ModelError,
    )


def _check_checkpointing(model: PreTrainedModel, recipe: Recipe) -> None:
    """Refuse gradient checkpointing for a model in which nothing would be recomputed."""
    asked = [name for name in CHECKPOINTING if recipe.training_args.get(name)]
    if not asked:
        return
    try:
        _switch_checkpointing(model, "enable")
        flags = ("gradient_checkpointing", "grad_checkpointing")  # transformers', timm's
        works = any(getattr(part, flag, False) for part in model.modules() for flag in flags)
        _switch_checkpointing(model, "disable")
    except (ValueError, AttributeError, AssertionError, NotImplementedError):
        works = False
    if not works:
        raise ModelError(without_checkpointing(asked[0], recipe.model.name_or_path))


def _switch_checkpointing(model: PreTrainedModel, way: str) -> None:
    newer = getattr(model, f"activation_checkpointing_{way}", None)
    (newer or getattr(model, f"gradient_checkpointing_{way}"))()


def _check_logits(model: PreTrainedModel, size: int, classes: int, name: str) -> None:
    with torch.no_grad():
        logits = getattr(model(pixel_values=torch.zeros(1, 3, size, size)), "logits", None)
    if logits is None:
        raise ModelError(
            f"model {name} is a {type(model).__name__}, which gives no logits, so that neither "
            f"Trainer nor pipeline can use it. Use another architecture."
        )
    if tuple(logits.shape) != (1, classes):
        raise ModelError(
            f"model {name} gives logits of shape {tuple(logits.shape)}, expected (1, {classes})."
        )

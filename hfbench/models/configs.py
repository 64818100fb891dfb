"""What a checkpoint says of itself, before its weights are read: its architecture."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfbench.errors import ModelError, first_line
from hfbench.recipe.arguments import suggest
from hfbench.recipe.schema import local_path

if TYPE_CHECKING:
    from hfbench.recipe.schema import Recipe

logger = logging.getLogger(__name__)

# Arguments of `timm.create_model` that load something else, in older versions a pickle.
_FOREIGN_FILES = (
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_custom_load",
    "pretrained_strict",
)
# Two names of one training argument, the older one last.
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
# Names of configurations for how many layers there are; each takes time to build.
_LAYERS = re.compile(r"(layers|depths?|blocks|stages)$")
_MOST_LAYERS = 2000
_MOST_CLASSES = 1_000_000
_LARGEST_SIDE = 4096  # pixels
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_LARGEST_CONFIGURATION = 32 * 2**20  # bytes; 21,843 classes with names take 2 MiB


def is_known_without_checkpoint(recipe: Recipe) -> bool:
    """Tell whether a model of fresh weights can be built without the Hub."""
    name = recipe.model.name_or_path
    return not recipe.model.pretrained and (name.startswith("timm/") or name in known_configs())


def load_config(recipe: Recipe, path: str, revision: str | None) -> Any:
    """Read a model's configuration, or know it without a checkpoint.

    Args:
        recipe: Says whether the weights will be fresh.
        path: Folder or name on the Hub.
        revision: On the Hub.

    Raises:
        ModelError: If timm does not know the name, or the normalisation is not given.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    if is_known_without_checkpoint(recipe) and not Path(path).exists():
        if revision:
            logger.warning(f"model.revision={revision} is not used: fresh weights have none.")
        if path.startswith("timm/"):
            return _known_timm_config(path.removeprefix("timm/"))
        return known_configs()[path]()
    refuse_large_files(path, "model.name_or_path")
    arguments = _read_model_args(path)
    refuse_foreign_code(recipe.model.name_or_path, path, revision)
    config = AutoConfig.from_pretrained(
        path, revision=revision, trust_remote_code=False, **arguments
    )
    if config.model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise ModelError(
            f"model.name_or_path: {path} is a {config.model_type}, no image classifier."
        )
    config.architectures = config.architectures or []  # where there are two, the first is taken
    if config.model_type == "timm_wrapper" and not getattr(config, "pretrained_cfg", None):
        raise ModelError(
            f"model {path}: config.json has no pretrained_cfg, so mean and deviation are unknown."
        )
    return config


def refuse_spelling(name: str) -> None:
    """Refuse timm's own ways to write a model's name, with the one that is read here.

    Args:
        name: As the recipe has it; no folder.

    Raises:
        ModelError: If it is one.
    """
    if found := re.fullmatch(r"(hf[-_]hub|local-dir):(.+?)(?:@(.+))?", name):
        kind, rest, revision = found.groups()
        also = f" and model.revision={revision}" if revision else ""
        raise ModelError(
            f"model.name_or_path: {name} is how timm writes it; hfbench takes folders and names on "
            f"the Hub without {kind}: in front. Write model.name_or_path={rest}{also}"
        )
    bare = "/" not in name
    if not bare and not (name.startswith("timm/") and "." not in name):
        return
    architecture, _, tag = name.removeprefix("timm/").partition(".")
    import timm

    if not timm.is_model(architecture):
        return
    known = timm.get_pretrained_cfg(architecture)
    tag = tag or str((known and known.tag) or "")
    full = f"timm/{architecture}.{tag}" if tag else f"timm/{architecture}"
    if full != name:
        raise ModelError(
            f"model.name_or_path: {name} is the name of an architecture in timm; its weights are "
            f"{full} on the Hub. Write model.name_or_path={full}"
        )


def check_local_model(recipe: Recipe) -> None:
    """Check a model in a folder as far as its configuration goes, without building it.

    Raises:
        ModelError: If it brings code of its own, is no image classifier, or has no gradient
            checkpointing although the recipe asks for it.
    """
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    name = recipe.model.name_or_path
    folder = local_path(name)
    if not (folder / "config.json").is_file():
        return  # on the Hub, or said when it is opened
    try:
        refuse_foreign_code(name, str(folder))
        refuse_foreign_processor(name, str(folder))
        content, _ = PreTrainedConfig.get_config_dict(str(folder))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model {name} cannot be loaded: {first_line(error)}") from None
    kind = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(str(content.get("model_type")))
    asked = [name for name in CHECKPOINTING if recipe.training_args.get(name)]
    if isinstance(kind, str) and kind != "TimmWrapperForImageClassification" and asked:
        import transformers

        if not getattr(transformers, kind).supports_gradient_checkpointing:
            raise ModelError(without_checkpointing(asked[0], name))


def without_checkpointing(argument: str, name: str) -> str:
    """Say that a model has no gradient checkpointing."""
    return (
        f"training_args.{argument}: {name} does not support it, so that it would have no effect; "
        f"leave it out."
    )


def refuse_foreign_code(
    name: str, path: str, revision: str | None = None, where: str = "model.name_or_path"
) -> None:
    """Refuse a model that brings code of its own, or asks for more to be loaded than its weights.

    transformers would ask on stdin whether it may run, and run it after a "y".

    Args:
        name: As the user gave it.
        path: Folder or name on the Hub.
        revision: On the Hub.
        where: What the name was given as.

    Raises:
        ModelError: If it does.
    """
    from transformers import PreTrainedConfig

    refuse_large_files(path, where)
    content, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    _refuse_giants(content, name, where)
    for key in ("auto_map", "custom_pipelines"):
        _refuse_key(content, key, name, "config.json", where)
    asked = content.get("attn_implementation") or content.get("_attn_implementation")
    if isinstance(asked, str) and is_foreign_kernel(asked):
        raise ModelError(
            f"{where}: {name} asks for {asked}, code from elsewhere, as its attention "
            f"(attn_implementation in config.json). hfbench runs no code that comes with a model."
        )
    arguments = content.get("model_args")
    for key in _FOREIGN_FILES:
        if isinstance(arguments, dict) and arguments.get(key):
            raise ModelError(
                f"{where}: {name} wants another file or model to be loaded (model_args.{key} in "
                f"config.json). hfbench loads the model's own weights only; remove that entry."
            )
    architecture = content.get("architecture")
    if isinstance(architecture, str) and ":" in architecture:
        raise ModelError(
            f'{where}: {name} names the architecture "{architecture}", which lies elsewhere; '
            f"expected one that timm knows."
        )


def refuse_large_files(path: str, where: str) -> None:
    """Refuse a folder whose configuration is too large to be one, before it is read.

    Raises:
        ModelError: If it is.
    """
    for name in ("config.json", *PROCESSOR_FILES):
        file = Path(path) / name
        if file.is_file() and file.stat().st_size > _LARGEST_CONFIGURATION:
            raise ModelError(
                f"{where}: {file} has {file.stat().st_size / 2**20:.0f} MiB; a configuration has "
                f"at most {_LARGEST_CONFIGURATION // 2**20} MiB."
            )


def refuse_foreign_processor(
    name: str, path: str, revision: str | None = None, where: str = "model.name_or_path"
) -> None:
    """Refuse an image processor that brings code of its own, as `refuse_foreign_code` does a model.

    Raises:
        ModelError: If it does.
    """
    from transformers import ImageProcessingMixin

    try:
        content, _ = ImageProcessingMixin.get_image_processor_dict(path, revision=revision)
    except OSError:  # there is none; a timm model keeps it in config.json
        return
    _refuse_key(content, "auto_map", name, "the image processor's configuration", where)
    for key in ("size", "crop_size", "pad_size"):
        size = content.get(key)
        for length in size.values() if isinstance(size, dict) else [size]:
            if isinstance(length, int | float) and length > _LARGEST_SIDE:
                raise ModelError(
                    f"{where}: the image processor of {name} makes images of {length:,} pixels a "
                    f"side ({key}); expected at most {_LARGEST_SIDE:,}."
                )


def _refuse_giants(content: dict[str, Any], name: str, where: str) -> None:
    """Refuse counts that transformers would count up to before anything can be said of them."""
    for section in (content, *content.values()):
        for key, value in section.items() if isinstance(section, dict) else ():
            numbers = value if isinstance(value, list | tuple) else [value]
            count = sum(number for number in numbers if isinstance(number, int))
            most = _MOST_CLASSES if key == "num_labels" else _MOST_LAYERS
            if (key == "num_labels" or _LAYERS.search(str(key))) and count > most:
                raise ModelError(
                    f"{where}: config.json of {name} says {key}={count:,}; expected at most "
                    f"{most:,}."
                )


def is_foreign_kernel(attention: str) -> bool:
    """Tell whether an attention is code that transformers would fetch from the Hub and run."""
    return "/" in attention or ":" in attention


def _refuse_key(content: dict[str, Any], key: str, name: str, file: str, where: str) -> None:
    if content.get(key):
        raise ModelError(
            f"{where}: {name} comes with code of its own ({key} in {file}). Models with code of "
            f"their own are not supported: hfbench never runs it. Use a model whose classes are in "
            f"transformers or timm; if this one's are, remove {key} from the file."
        )


def find_commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a model on the Hub, after which the cache names its folder."""
    from transformers.utils import cached_file

    file = cached_file(name, "config.json", revision=revision)
    folder = Path(file).parent.name if file else ""
    return folder if re.fullmatch("[0-9a-f]{40}", folder) else None


def known_configs() -> dict[str, Any]:
    """Return architectures known without a checkpoint; ViTConfig's defaults are ViT-B/16."""
    from transformers import ViTConfig

    return {"google/vit-base-patch16-224-in21k": ViTConfig}


def _read_model_args(path: str) -> dict[str, Any]:
    """Drop `model_args.num_classes`, written by timm's `save_for_hf`, else passed twice."""
    file = Path(path) / "config.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    arguments = content.get("model_args") if isinstance(content, dict) else None
    if not isinstance(arguments, dict) or "num_classes" not in arguments:
        return {}
    return {
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"}
        or None
    }


def _known_timm_config(name: str) -> Any:
    import timm
    from transformers import TimmWrapperConfig

    architecture = name.partition(".")[0]
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError:  # the architecture is right, the tag is not
        known = None
    if known is None:
        tags = timm.list_pretrained(f"{architecture}.*")
        near = f"; it has {', '.join(tags)}." if tags else suggest(architecture, timm.list_models())
        raise ModelError(
            f"model.name_or_path: timm {timm.__version__} does not know {name}{near or '.'}"
        )
    settings = {key: value for key, value in known.to_dict().items() if value is not None}
    config = TimmWrapperConfig(architecture=architecture)
    config.pretrained_cfg = settings  # an extra key, as in timm's own files
    return config

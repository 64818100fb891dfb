"""Whether a model takes images of a recipe's size, and what is done so that it does.

A position table ties a model to a size, not what its configuration calls `image_size`: one made of
convolutions takes any. So images are sent through it.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfbench.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_STEPS = (8, 14, 16, 28, 32)  # of sizes that are tried: patches, and windows of them
_MOST_TRIED = 24
_SIZES = (int, list, tuple)
_MOST_SPECIAL = 8  # tokens of a position table that have no place: class, distillation, registers


def state_size(config: Any, size: int) -> None:
    """Make a configuration state another size, wherever and however it states one.

    Args:
        config: Of a model; of timm's, the argument of its function is set.
        size: Height and width.
    """
    if config.model_type == "timm_wrapper":
        config.model_args = (config.model_args or {}) | {"img_size": size}
        return
    for part in _stating(config):
        old = part.image_size
        part.image_size = size if isinstance(old, int) else type(old)([size] * len(old))


def _stating(config: Any) -> list[Any]:
    """Return the parts of a configuration that state a size, as a number or a pair."""
    parts = (config, getattr(config, "vision_config", None))
    return [part for part in parts if isinstance(getattr(part, "image_size", None), _SIZES)]


def find_failure(model: PreTrainedModel, size: int) -> Exception | None:
    """Send one black image through a model and return what it raised, if anything."""
    model.eval()
    try:
        with torch.no_grad():
            model(pixel_values=torch.zeros(1, 3, size, size, device=model.device))
    except Exception as error:  # a model may fail in any way on a size that it was not made for
        return error
    return None


def fit_to_size(model: PreTrainedModel, size: int, name: str) -> PreTrainedModel:
    """Interpolate a model's position tables once, where it does not take a size as it is.

    Bicubically, as `interpolate_pos_encoding` would at each step.

    Args:
        model: With pretrained weights, in float32.
        size: Height and width of the images.
        name: As the recipe has it.

    Returns:
        The model itself if it takes the size, or if nothing can be done.
    """
    if find_failure(model, size) is None:
        return model
    config = copy.deepcopy(model.config)
    state_size(config, size)
    try:
        tables = _resized_tables(model, config)
        resized = type(model)(config)
        resized.load_state_dict(model.state_dict() | tables, strict=True)
    except Exception:  # each architecture refuses sizes in its own way; the check says so
        return model
    if find_failure(resized, size) is not None:
        return model
    if tables:
        logger.info(f"The position table of {name} was interpolated to {size} px.")
    return resized


def check_size(model: PreTrainedModel, size: int, name: str, pretrained: bool) -> None:
    """Refuse a size on which a model fails, or of which it would not see the last pixels.

    Args:
        model: Left as it is.
        size: Height and width of the images.
        name: As the recipe has it.
        pretrained: Whether tables that cannot be interpolated must stay as they are.

    Raises:
        ModelError: If it does; sizes near it that work are named.
    """
    failure, lost = _try_size(model, size)
    if failure is None and not lost:
        _warn_of_windows(model.config, size, name)
        return
    others = _sizes_near(model, size, pretrained)
    advice = f"; set preprocessing.image_size={' or '.join(map(str, others))}" if others else ""
    if failure is not None:
        raise ModelError(
            f"model {name} does not take RGB images of {size} x {size}: "
            f"{first_line(failure)}{advice}"
        ) from failure
    raise ModelError(
        f"preprocessing.image_size: {size} is no multiple of {name}'s patches, which would leave "
        f"out the last {lost} pixels of each row and column{advice}"
    )


def _try_size(model: PreTrainedModel, size: int) -> tuple[Exception | None, int]:
    """Return what a model raises on a size, and the pixels its first convolution leaves out."""
    lost: list[int] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if lost or not isinstance(module, nn.Conv2d) or isinstance(module.padding, str):
            return
        kernel = module.dilation[0] * (module.kernel_size[0] - 1) + 1
        padding, length = module.padding[0], inputs[0].shape[-1]
        left = (length + 2 * padding - kernel) % module.stride[0]
        lost.append(max(0, left - padding) if length == size else 0)

    hooks = [module.register_forward_pre_hook(look) for module in model.modules()]
    failure = find_failure(model, size)
    for hook in hooks:
        hook.remove()
    return failure, lost[0] if lost else 0


def _resized_tables(model: PreTrainedModel, config: Any) -> dict[str, Tensor]:
    """Return the position tables that another configuration makes larger or smaller.

    Raises:
        ValueError: If another tensor changes its shape as well.
    """
    with torch.device("meta"):
        other = type(model)(config).state_dict()
    state = model.state_dict()
    return {
        key: _resize_table(key, state[key], other[key].shape)
        for key in state
        if state[key].shape != other[key].shape
    }


def _resize_table(key: str, table: Tensor, shape: torch.Size) -> Tensor:
    if "bias" in key or table.ndim not in (2, 3) or table.ndim != len(shape):
        raise ValueError(f"{key} is no table of positions")
    old, new = table.shape[-2], shape[-2]
    if (*table.shape[:-2], *table.shape[-1:]) != (*shape[:-2], *shape[-1:]):
        raise ValueError(f"{key} is no table of positions")
    for special in range(_MOST_SPECIAL + 1):  # tokens without a place come first
        before, after = math.isqrt(max(0, old - special)), math.isqrt(max(0, new - special))
        if before and after and (before**2, after**2) == (old - special, new - special):
            break
    else:
        raise ValueError(f"{key} is no square of positions")
    rows = table.reshape(old, -1).float()
    grid = rows[special:].T.reshape(1, -1, before, before)
    if not table.is_meta:
        grid = nn.functional.interpolate(grid, (after, after), mode="bicubic", align_corners=False)
    else:
        grid = grid.new_empty(1, grid.shape[1], after, after)
    resized = torch.cat([rows[:special], grid.flatten(2)[0].T])
    return resized.reshape(shape).detach().to(table.dtype)


def _sizes_near(model: PreTrainedModel, size: int, pretrained: bool) -> list[int]:
    """Return the nearest sizes below and above that a model takes, as far as can be told.

    Without memory or time for computing: the model is made anew of shapes alone.
    """
    tried = {n * step for step in _STEPS for n in range(1, 2 * size // step + 1)}
    near = sorted(tried - {size}, key=lambda other: abs(other - size))[:_MOST_TRIED]
    near += sorted(_own_sizes(model) - {size})
    below: list[int] = []
    above: list[int] = []
    for other in near:
        side = below if other < size else above
        if not side and _takes(model, other, pretrained):
            side.append(other)
        if below and above:
            break
    return below + above


def _own_sizes(model: PreTrainedModel) -> set[int]:
    """Return the sizes that a model's configuration, or timm for its architecture, states."""
    if model.config.model_type == "timm_wrapper":
        timm_model: Any = model.timm_model
        stated = [timm_model.default_cfg["input_size"][-1]]
        return {*stated, (model.config.model_args or {}).get("img_size", stated[0])}
    sizes = [part.image_size for part in _stating(model.config)]
    return {length for own in sizes for length in ([own] if isinstance(own, int) else own)}


def _takes(model: PreTrainedModel, size: int, pretrained: bool) -> bool:
    sized = copy.deepcopy(model.config)
    state_size(sized, size)
    for config in (model.config, sized):
        try:
            with torch.device("meta"):
                other = type(model)(copy.deepcopy(config))
            if pretrained and config is sized:
                _resized_tables(model, config)
        except Exception:  # each architecture refuses sizes in its own way
            continue
        if _try_size(other, size) == (None, 0):
            return True
    return False


def _warn_of_windows(config: Any, size: int, name: str) -> None:
    """Say if windows do not divide what a model looks at: then it looks at zeros as well."""
    window, patch = getattr(config, "window_size", None), getattr(config, "patch_size", None)
    stages = len(getattr(config, "depths", None) or ())
    if not isinstance(window, int) or not isinstance(patch, int) or not stages:
        return

    def padded(length: int) -> bool:
        sides = [math.ceil(math.ceil(length / patch) / 2**stage) for stage in range(stages)]
        return any(side > window and side % window for side in sides)

    if not padded(size):
        return
    step = patch * window * 2 ** (stages - 1)
    logger.warning(
        f"preprocessing.image_size: windows of {window} patches of {patch} px do not divide "
        f"{size} px at each stage of {name}; it pads with zeros. Multiples of {step} need none."
    )

"""What a checkpoint's image processor does to pixels, and the processor that is saved in its place.

Mean and deviation alone do not say it: a processor may also change the order of channels, normalise
twice, shift or quantise. So colours are sent through it, and what comes out decides.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from PIL import Image
from torch import Tensor

from hfbench.data.transforms import Normalization
from hfbench.errors import ModelError, first_line
from hfbench.models.configs import PROCESSOR_FILES, known_configs, refuse_foreign_processor

if TYPE_CHECKING:
    from hfbench.recipe.schema import Recipe

logger = logging.getLogger(__name__)

# Both name an interpolation; transformers by PIL's number, timm and torchvision by word.
_PIL_INTERPOLATION = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_FALLBACK_INTERPOLATION = "bicubic"  # for lanczos, which torch has not, box and hamming
# The size that a timm configuration states for testing would change what `pipeline` sees; only
# these keys are kept.
_TIMM_KEYS = (
    "mean",
    "std",
    "interpolation",
    "first_conv",
    "classifier",
    "pool_size",
    "fixed_input_size",
)
# Black and white first; then no two channels alike, nor in line.
_COLOURS = (
    (0, 0, 0),
    (255, 255, 255),
    (30, 120, 220),
    (220, 30, 120),
    (120, 220, 30),
    (64, 64, 64),
    (200, 128, 5),
    (1, 2, 254),
)
_TOLERANCE = 1e-4  # of float32 values up to about 10
_SWITCHES = ("rescale_offset", "include_top", "keep_aspect_ratio")
# What becomes one plain resize, is in mean and deviation, or changes no pixel of an RGB picture.
_ORDINARY = (
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "do_reduce_labels",
)


def read_normalization(
    recipe: Recipe, config: Any, path: str, revision: str | None
) -> Normalization:
    """Read interpolation, mean and deviation from where the checkpoint's library keeps them."""
    size = recipe.preprocessing.image_size
    if config.model_type == "timm_wrapper":
        from timm.data import resolve_data_config

        resolved = resolve_data_config(config.pretrained_cfg, verbose=False)
        found = Normalization(
            size,
            _supported(resolved["interpolation"]),
            tuple(resolved["mean"]),
            tuple(resolved["std"]),
        )
        _check_normalization(found, path)
        config.pretrained_cfg = _plain_resize(config.pretrained_cfg, found)
        return found
    processor = _load_processor(recipe, config, path, revision)
    try:
        interpolation = _supported(_PIL_INTERPOLATION.get(int(processor.resample)))
        if not getattr(processor, "do_rescale", True) or not math.isclose(
            getattr(processor, "rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3
        ):
            raise ValueError("it does not scale pixels to [0, 1] (do_rescale, rescale_factor)")
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        if not getattr(processor, "do_normalize", True):
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        declared = Normalization(size, interpolation, mean, std)
        _check_normalization(declared, path)
        found = _observe(processor, declared)
        _check_normalization(found, path)
        if _cuts_sides_off(processor):
            logger.info(
                f"The image processor of {recipe.model.name_or_path} cuts the sides off; training, "
                f"testing and the saved model resize the whole image to {size} x {size} instead."
            )
        return found
    except ModelError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"model {recipe.model.name_or_path}: its image processor is not supported: "
            f"{first_line(error)}"
        ) from None


def _observe(processor: Any, declared: Normalization) -> Normalization:
    """Send colours through a processor and return the normalisation that explains the result.

    Args:
        processor: The checkpoint's own.
        declared: Without the steps that mean and deviation do not show.

    Raises:
        ValueError: If none does, or the processor asks for a step that its class does not have.
    """
    steps = _further_steps(processor)
    known = get_type_hints(processor.valid_kwargs) if hasattr(processor, "valid_kwargs") else None
    if known is not None and (unknown := [step for step in steps if step not in known]):
        raise ValueError(
            f"it asks for {', '.join(unknown)}, which {type(processor).__name__} does not do, so "
            f"that neither training nor the saved model would; remove that entry if nothing is lost"
        )
    named = f" ({', '.join(steps)})" if steps else ""
    values = _send_colours(processor, steps)
    colours = torch.tensor(_COLOURS, dtype=torch.float64) / 255
    candidates = [declared]
    black, white = values[0], values[1]
    if ((white - black).abs() > 1e-6).all():
        # The same steps twice, as EfficientNet's include_top, are one of another deviation.
        std = 1 / (white - black)
        mean = -black * std
        means = tuple(round(value, 6) for value in mean.tolist())
        stds = tuple(round(value, 6) for value in std.tolist())
        if all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(means, stds, strict=True)):
            candidates.append(replace(declared, mean=means, std=stds))
    candidates += [replace(found, bgr=True) for found in candidates]
    for found in candidates:
        ordered = colours.flip(1) if found.bgr else colours
        expected = (ordered - torch.tensor(found.mean)) / torch.tensor(found.std)
        if (expected - values).abs().max() <= _TOLERANCE:
            return found
    raise ValueError(
        f"it does to colours what training would not do{named}: more than to scale them to [0, 1], "
        f"subtract a mean, divide by a deviation and turn RGB into BGR"
    )


def _further_steps(processor: Any) -> list[str]:
    """Return what a processor is asked to do beyond what most do, as its file names it."""
    return sorted(
        key
        for key, value in processor.to_dict().items()
        if value is True and (key.startswith("do_") or key in _SWITCHES) and key not in _ORDINARY
    )


def _send_colours(processor: Any, steps: list[str]) -> Tensor:
    """Return what a processor makes of pictures of one colour each, float64, (colours, 3).

    Raises:
        ValueError: If what comes out is no picture of one colour.
    """
    found = []
    for colour in _COLOURS:
        values = _process(processor, _wide_picture(processor, colour))
        if values.ndim != 4 or values.shape[:2] != (1, 3):
            raise ValueError(f"it gives {tuple(values.shape)}, no pictures of three channels")
        flat = values[0].flatten(1)
        if (flat.amax(1) - flat.amin(1)).max() > _TOLERANCE:
            if getattr(processor, "do_center_crop", False):
                steps = [*steps, "do_center_crop to more than the size"]
            raise ValueError(
                f"it puts a border around the picture ({', '.join(steps) or 'size'}), which "
                f"training would not do"
            )
        found.append(flat[:, 0])
    return torch.stack(found)


def _wide_picture(processor: Any, colour: tuple[int, int, int]) -> Image.Image:
    # Larger than any picture that comes out, so that a crop of the centre needs no border; and
    # wider than high, so that a square is padded if it is.
    sizes = [getattr(processor, name, None) for name in ("size", "crop_size", "pad_size")]
    lengths = [v for size in sizes if size for v in dict(size).values() if isinstance(v, int)]
    height = max([32, *lengths])
    return Image.new("RGB", (height + height // 4, height), colour)


def _process(processor: Any, picture: Image.Image) -> Tensor:
    # One colour stays that whatever the interpolation, of which torch has not all.
    values: Tensor = processor(picture, resample=2, return_tensors="pt")["pixel_values"]
    return values.double()


def _cuts_sides_off(processor: Any) -> bool:
    """Tell whether the left edge of a wide picture is lost."""
    black = _wide_picture(processor, (0, 0, 0))
    picture = black.copy()
    picture.paste((255, 255, 255), (0, 0, picture.width // 16, picture.height))
    return torch.equal(*(_process(processor, each)[..., 0] for each in (black, picture)))


def _check_normalization(found: Normalization, path: str) -> None:
    """Refuse means and deviations that pixels in [0, 1] cannot have."""
    for name, values, low in (("mean", found.mean, 0.0), ("std", found.std, 1e-6)):
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(values) != 3 or len(numbers) != 3 or not all(low <= v <= 1 for v in numbers):
            raise ModelError(
                f"model.name_or_path: {path} normalises with {name} {list(values)}; expected three "
                f"numbers for pixels in [0, 1]."
            )


def _supported(interpolation: str | None) -> str:
    if interpolation in _PIL_INTERPOLATION.values():
        return str(interpolation)
    logger.info(f"Images are resized {_FALLBACK_INTERPOLATION}, not as the checkpoint was trained.")
    return _FALLBACK_INTERPOLATION


def _plain_resize(pretrained_cfg: dict[str, Any], normalization: Normalization) -> dict[str, Any]:
    """Make a timm configuration say what training does, for those who use timm itself."""
    kept = {key: pretrained_cfg[key] for key in _TIMM_KEYS if key in pretrained_cfg}
    return kept | {
        "input_size": [3, normalization.image_size, normalization.image_size],
        "interpolation": normalization.interpolation,
        "mean": list(normalization.mean),
        "std": list(normalization.std),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }


def build_image_processor(normalization: Normalization) -> Any:
    """Build the processor that is saved: resize, rescale, normalise, and nothing else.

    One class for every model that takes RGB, a timm model too: timm's own resizes with PIL, which
    differs from torchvision, on which training relies, by up to two grey levels (in 0.1 % of the
    pixels at 32 to 224 bicubic, 7 % at 32 to 112 bilinear).
    """
    from transformers import PPLCNetImageProcessor, ViTImageProcessor

    size = normalization.image_size
    numbers = {word: number for number, word in _PIL_INTERPOLATION.items()}
    if normalization.bgr:
        shape: dict[str, Any] = {"size": {"height": size, "width": size}, "resize_short": None}
        return PPLCNetImageProcessor(  # the only one that normalises as well
            **shape,
            do_center_crop=False,
            resample=numbers[normalization.interpolation],
            image_mean=list(normalization.mean[::-1]),  # it turns the order around at last
            image_std=list(normalization.std[::-1]),
        )
    return ViTImageProcessor(
        size={"height": size, "width": size},
        resample=numbers[normalization.interpolation],
        image_mean=list(normalization.mean),
        image_std=list(normalization.std),
    )


def _load_processor(recipe: Recipe, config: Any, path: str, revision: str | None) -> Any:
    from transformers import AutoImageProcessor, ViTImageProcessor

    local = Path(path).exists()
    has_file = any((Path(path) / file).is_file() for file in PROCESSOR_FILES)
    if not recipe.model.pretrained and not has_file and (local or path in known_configs()):
        # Fresh weights have no normalisation of their own; ViT's, 0.5 and 0.5, is the family's.
        return ViTImageProcessor()
    if local and not has_file:
        raise ModelError(
            f"model.name_or_path: {path} holds no preprocessor_config.json; save the image "
            f"processor there."
        )
    refuse_foreign_processor(recipe.model.name_or_path, path, revision)
    return AutoImageProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)

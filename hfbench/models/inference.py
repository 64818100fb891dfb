"""Classify image files with a fine-tuned model, from a run's folder or the Hub."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from hfbench.errors import DataError, ModelError
from hfbench.machine.connection import explain_hub_failure, use_cache_if_unreachable
from hfbench.machine.settings import restored_if_idle
from hfbench.models.configs import refuse_foreign_code, refuse_foreign_processor
from hfbench.recipe.schema import local_path
from hfbench.results.schema import RESULT_FILE


@restored_if_idle()
def predict(
    model: str, images: Sequence[str | os.PathLike[str]], top_k: int = 5
) -> list[list[dict[str, Any]]]:
    """Classify image files with transformers' own pipeline.

    Args:
        model: ``model/`` of a run, the run's folder, ``runs/<recipe name>`` (its newest finished
            run), or a model on the Hub.
        images: Files.
        top_k: How many classes to return for each.

    Returns:
        For each image its most probable classes, ``{"label": …, "score": …}``, best first.

    Raises:
        DataError: If files are missing or are no images; all are listed.
        ModelError: If there is no such model, or its outputs are no numbers.
        HubError: If the Hub cannot be reached and the model is not in the cache.
    """
    pictures = _open_images(images)
    path = local_path(model)
    finished = sorted(path.glob(f"*/{RESULT_FILE}"))
    if finished:  # runs/<recipe name>: its newest finished run
        path = finished[-1].parent
    if (path / "model" / "config.json").is_file():
        path = path / "model"
    local = path.exists()
    if local and not (path / "config.json").is_file():
        raise ModelError(f"{model} holds no config.json; give the model/ folder of a finished run.")
    if not local:
        use_cache_if_unreachable()
    from transformers import pipeline

    try:
        place = str(path) if local else model
        refuse_foreign_code(model, place, where="MODEL")
        refuse_foreign_processor(model, place, where="MODEL")
        classify = pipeline("image-classification", model=place, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # each library raises its own kinds
        if local:
            raise ModelError(f"{model} cannot be loaded: {error}") from error
        raise explain_hub_failure("model", model, error, option="MODEL") from error
    classes = int(classify.model.config.num_labels or top_k)
    found = [classify(picture, top_k=min(top_k, classes)) for picture in pictures]
    if any(not math.isfinite(item["score"]) for picture in found for item in picture):
        raise ModelError(
            f"{model} gives no probabilities: what it computes is infinite or no number, as after "
            "a training that diverged. Train it again, with a smaller learning rate."
        )
    return found


def _open_images(files: Sequence[str | os.PathLike[str]]) -> list[Any]:
    from PIL import Image, ImageOps

    pictures, problems = [], []
    for file in files:
        try:
            place = local_path(file)
            if place.exists() and not place.is_file() and not place.is_dir():
                problems.append(f"{file} is no file.")  # a pipe would be waited for
                continue
            with Image.open(place) as picture:
                if picture.mode[0] in "IF":
                    problems.append(f"{file} has more than 8 bits a channel; convert it to 8 bits.")
                    continue
                pictures.append(ImageOps.exif_transpose(picture).convert("RGB"))
        except FileNotFoundError:
            problems.append(f"{file} does not exist.")
        except IsADirectoryError:
            problems.append(f"{file} is a folder; give image files.")
        except Exception as error:  # PIL raises whatever the damaged bytes lead to
            problems.append(f"{file} cannot be read as an image: {error}")
    if problems:
        raise DataError.from_problems("The list of images", problems)
    return pictures

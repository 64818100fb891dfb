"""Which techniques can make a recipe faster on a machine, and which cannot, with the reason.

A bound is Amdahl's: a technique cannot save more than the time of the part that it acts on.
"""

from __future__ import annotations

from dataclasses import dataclass

from hfbench.recipe import techniques
from hfbench.recipe.schema import Recipe
from hfbench.recipe.techniques import Technique, Use
from hfbench.studies.doctor.advice_model import advise_memory_format
from hfbench.studies.doctor.limits import milliseconds as _ms
from hfbench.studies.doctor.schema import Advice, Helps, Machine, Step

_NOTICEABLE = 1.02  # a bound below it is no reason to try
_SHOWN = 1.05  # a measured gain below it is within the noise of half a minute
_ORDER = {"yes": 0, "perhaps": 1, "no": 2}


@dataclass(frozen=True)
class Evidence:
    """What the sentences are made of; seconds are those of one measured batch.

    Attributes:
        recipe: As written.
        device_type: ``cpu``, ``cuda``, …
        step: Where the time of a batch goes.
        machine: What it has.
        precision: Mixed precision as this recipe has it, or could have it.
        model_seconds: The model alone, in the recipe's precision.
        other_model_seconds: The model alone with mixed precision turned on, where the recipe has
            none, or off, where it has; ``None`` if that could not be run.
        fused_optimizer_seconds: As `Step.optimizer_seconds`, of torch's fused AdamW; ``None`` where
            the recipe has it, or another kind of optimizer.
        pageable_copy_seconds: Copy of a batch; ``None`` on a CPU.
        pinned_copy_seconds: The same from pinned memory; ``None`` where there is none.
    """

    recipe: Recipe
    device_type: str
    step: Step
    machine: Machine
    precision: Use
    model_seconds: float
    other_model_seconds: float | None
    fused_optimizer_seconds: float | None
    pageable_copy_seconds: float | None
    pinned_copy_seconds: float | None


def advise(evidence: Evidence) -> list[Advice]:
    """Say of each technique whether it can help, most helpful first."""
    found = [
        _mixed_precision(evidence),
        _pinned_memory(evidence),
        _accumulation(evidence),
        _compile(evidence),
        _device_preprocessing(evidence),
        _workers(evidence),
        _optimizer(evidence),
        _tf32(evidence),
        advise_memory_format(evidence.recipe),
    ]
    return sorted(
        found, key=lambda a: (_ORDER[a.helps], -(a.speedup_measured or a.speedup_at_most or 1))
    )


def _mixed_precision(evidence: Evidence) -> Advice:
    step, use, other = evidence.step, evidence.precision, evidence.other_model_seconds
    ratio = evidence.machine.ratio(use.detail)
    products = (
        f"{use.detail} matrix products run {ratio:.1f}× as fast as fp32's on this machine. "
        if ratio
        else ""
    )
    if use.no_effect:
        sentence = f"{products}No effect here: {use.no_effect}."
        return _say(techniques.MIXED_PRECISION, "no", 1.0, sentence, on=use.in_recipe)
    if other is None:
        return _say(
            techniques.MIXED_PRECISION,
            "perhaps" if not use.in_recipe and (ratio or 0) > _SHOWN else "no",
            None,
            f"{products}The model could not be measured in the other precision.",
            on=use.in_recipe,
        )
    # Noise between model alone and model in training cancels in the ratio.
    ours = evidence.model_seconds
    scaled = step.model_seconds * other / ours
    if use.in_recipe:
        gain = (step.batch_seconds - step.model_seconds + scaled) / step.batch_seconds
        sentence = (
            f"{products}It is on: in fp32 this model alone takes {other / ours:.2f}× as long, so "
            f"that a step gains {gain:.2f}×."
        )
    else:
        gain = step.speedup_without(step.model_seconds - scaled)
        sentence = (
            f"{products}This model alone, measured, runs {ours / other:.2f}× as fast in "
            f"{use.detail}; a whole step would gain {gain:.2f}×."
        )
    helps: Helps = "yes" if gain >= _SHOWN else "no"
    return _say(techniques.MIXED_PRECISION, helps, None, sentence, on=use.in_recipe, measured=gain)


def _pinned_memory(evidence: Evidence) -> Advice:
    technique, step = techniques.PINNED_MEMORY, evidence.step
    pageable, pinned = evidence.pageable_copy_seconds, evidence.pinned_copy_seconds
    if pageable is None:
        return _say(technique, "no", 1.0, "Nothing is copied on a CPU.")
    if pinned is None:
        return _say(technique, "no", 1.0, "Host and device share their memory.")
    speeds = f"The copy takes {_ms(pageable)} from pageable memory, {_ms(pinned)} from pinned"
    if evidence.recipe.argument("dataloader_pin_memory"):
        gain = (step.batch_seconds + max(pageable - pinned, 0.0)) / step.batch_seconds
        return _say(
            technique,
            "yes" if gain >= _NOTICEABLE else "no",
            gain,
            f"It is on. {speeds}: it gains at most {gain:.2f}×.",
            on=True,
        )
    bound = step.speedup_without(pageable)
    return _say(
        technique,
        "perhaps" if bound >= _NOTICEABLE else "no",
        bound,
        f"{speeds}; a step takes {_ms(step.batch_seconds)}, so that it gains at most {bound:.2f}×, "
        "with non-blocking copies.",
    )


def _accumulation(evidence: Evidence) -> Advice:
    technique, step = techniques.ACCUMULATION, evidence.step
    k = int(evidence.recipe.argument("gradient_accumulation_steps"))
    optimizer = step.optimizer_seconds
    same = "At the same effective batch it cannot be faster: it only saves memory."
    if k > 1:
        gain = (step.batch_seconds + (k - 1) * optimizer) / step.batch_seconds
        return _say(
            technique,
            "yes" if gain >= _SHOWN else "no",
            gain,
            f"It is on: the optimizer steps once in {k} batches, which gains {gain:.2f}×; so many "
            f"fewer updates may cost accuracy. {same}",
            on=True,
        )
    bound = step.speedup_without(optimizer)
    return _say(
        technique,
        "perhaps" if bound >= _SHOWN else "no",
        bound,
        f"{same} A larger effective batch saves optimizer steps: the optimizer takes "
        f"{_share(optimizer, step)} of a step, so that it gains at most {bound:.2f}×, with fewer "
        "updates in as many epochs.",
    )


def _compile(evidence: Evidence) -> Advice:
    technique, step = techniques.COMPILE, evidence.step
    if techniques.is_compiled(evidence.recipe):
        return _say(
            technique,
            "perhaps",
            None,
            "It is on; hfbench ablate measures what it gains, compiling aside.",
            on=True,
        )
    if evidence.machine.compiler is None:
        return _say(technique, "no", 1.0, "It needs a compiler, and this machine has none.")
    acts_on = step.model_seconds - step.optimizer_seconds
    bound = step.speedup_without(acts_on)
    return _say(
        technique,
        "perhaps" if bound >= _SHOWN else "no",
        None if bound >= _SHOWN else bound,  # it never saves all of what it acts on
        f"It acts on forward and backward pass, {_share(acts_on, step)} of a step; how much of "
        "that it saves was not measured (hfbench ablate does), and compiling takes a minute or "
        "two.",
    )


def _device_preprocessing(evidence: Evidence) -> Advice:
    technique, step = techniques.DEVICE_PREPROCESSING, evidence.step
    if evidence.recipe.preprocessing.location == "device":
        return _say(technique, "no", None, "It is on: the loader only picks images.", on=True)
    if evidence.device_type == "cpu":
        return _say(
            technique,
            "no",
            1.0,
            "The device is this CPU: the same work would move from the loader into the step.",
        )
    workers = max(int(evidence.recipe.argument("dataloader_num_workers")), 1)
    saved = min(step.loader_seconds, step.preprocessing_seconds / workers)
    bound = step.speedup_without(saved)
    return _say(
        technique,
        "perhaps" if bound >= _NOTICEABLE else "no",
        bound,
        f"Preparing a batch takes {_ms(step.preprocessing_seconds)} of the host; training waits "
        f"{_ms(step.loader_seconds)}: at most {bound:.2f}× by preprocessing.location=device.",
    )


def _workers(evidence: Evidence) -> Advice:
    technique, step = techniques.WORKERS, evidence.step
    count = int(evidence.recipe.argument("dataloader_num_workers"))
    bound = step.speedup_without(step.loader_seconds)
    waits = f"Training waits for the loader {_share(step.loader_seconds, step)} of a step"
    if count:
        return _say(
            technique,
            "perhaps" if bound >= _SHOWN else "no",
            bound,
            f"{count} {'is' if count == 1 else 'are'} on. {waits}; more of them gain at most "
            f"{bound:.2f}×.",
            on=True,
        )
    shared = ""
    if (
        evidence.device_type == "cpu"
        and evidence.machine.threads >= evidence.machine.physical_cores
    ):
        shared = " It will be less: they would share the cores with the model."
    return _say(
        technique,
        "perhaps" if bound >= _NOTICEABLE else "no",
        bound,
        f"{waits}, so that they gain at most {bound:.2f}×.{shared if bound >= _NOTICEABLE else ''}",
    )


def _optimizer(evidence: Evidence) -> Advice:
    technique, step = techniques.OPTIMIZER, evidence.step
    name = evidence.recipe.argument("optim")
    name = str(getattr(name, "value", name))
    bound = step.speedup_without(step.optimizer_seconds)
    takes = f"The optimizer ({name}) takes {_share(step.optimizer_seconds, step)} of a step"
    if "fused" in name:
        return _say(technique, "no", bound, f"The fused one is on already. {takes}.", on=True)
    fused = evidence.fused_optimizer_seconds
    if fused is not None:
        gain = step.speedup_without(step.optimizer_seconds - fused)
        return _say(
            technique,
            "yes" if gain >= _SHOWN else "no",
            bound,
            f"{takes}; torch's fused one (adamw_torch_fused), measured, takes {_ms(fused)} a batch "
            f"instead of {_ms(step.optimizer_seconds)}: a step would gain {gain:.2f}×.",
            measured=gain,
        )
    return _say(
        technique,
        "perhaps" if bound >= _NOTICEABLE else "no",
        bound,
        f"{takes}, so that another implementation (adamw_torch_fused) gains at most {bound:.2f}×.",
    )


def _tf32(evidence: Evidence) -> Advice:
    technique, step, ratio = techniques.TF32, evidence.step, evidence.machine.ratio("tf32")
    if ratio is None:
        return _say(technique, "no", 1.0, "This device has none: NVIDIA's Ampere and newer have.")
    if evidence.precision.in_recipe:
        return _say(technique, "no", 1.0, f"{evidence.precision.detail} is on, which replaces it.")
    if evidence.recipe.argument("tf32"):
        return _say(technique, "no", None, f"It is on; matrix products gain {ratio:.1f}×.", on=True)
    acts_on = step.model_seconds - step.optimizer_seconds
    bound = step.speedup_without(acts_on * (1 - 1 / ratio)) if ratio > 1 else 1.0
    return _say(
        technique,
        "perhaps" if bound >= _SHOWN else "no",
        bound,
        f"TF32 matrix products run {ratio:.1f}× as fast as fp32's here, and forward and backward "
        f"take {_share(acts_on, step)} of a step: it gains at most {bound:.2f}×.",
    )


def _say(
    technique: Technique,
    helps: Helps,
    at_most: float | None,
    sentence: str,
    *,
    on: bool = False,
    measured: float | None = None,
) -> Advice:
    return Advice(
        technique=technique.name,
        in_recipe=on,
        helps=helps,
        speedup_at_most=at_most,
        speedup_measured=measured,
        sentence=sentence,
    )


def _share(seconds: float, step: Step) -> str:
    return f"{100 * seconds / step.batch_seconds:.0f} %"

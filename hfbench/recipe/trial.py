"""Try a recipe's optimizer and schedule on four numbers, before anything is loaded.

Both take options that nothing checks before the first step, or the last. Here they are built as
`Trainer` builds them and make three steps.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from hfbench.errors import first_line

_STEPS = 1000  # of a run whose number of steps only its data will tell
_MOST_CYCLES = 1_000_000  # where the number of steps is not known
# What may be the cause of a failure, the most particular first.
_OF_OPTIMIZER = (
    "optim_args",
    "optim_target_modules",
    "adam_epsilon",
    "adam_beta1",
    "adam_beta2",
    "weight_decay",
    "learning_rate",
    "gradient_accumulation_steps",
    "optim",
)
_OF_SCHEDULE = (
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
)
_MISSING_PACKAGE = re.compile(r"install|failed to import", re.IGNORECASE)
# Schedules that transformers gives neither options nor a warm-up.
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
# Option of an optimizer -> the training arguments that set it.
_ADAM = {"betas": ("adam_beta1", "adam_beta2"), "eps": ("adam_epsilon",)}


def try_optimizer_and_schedule(values: Mapping[str, Any]) -> list[str]:
    """Make the first two steps and the last with a recipe's optimizer and schedule.

    Args:
        values: `training_args`, names, types and ranges checked already.

    Returns:
        One sentence a problem, each starting with the argument that causes it. That a package is
        missing is no problem of the recipe: see `missing_optimizer`.
    """
    names = {*_OF_OPTIMIZER, *_OF_SCHEDULE}
    given = {name: values[name] for name in sorted(names) if values.get(name) is not None}
    return list(_try(json.dumps(given)))


@functools.lru_cache(maxsize=1024)
def _try(given: str) -> tuple[str, ...]:
    values = json.loads(given)
    return (
        *_without_effect(values),
        *_explain(values, _name(values, "optim"), _OF_OPTIMIZER, _step_optimizer),
        *_explain(values, _schedule_name(values), _OF_SCHEDULE, _step_schedule),
    )


def missing_optimizer(values: Mapping[str, Any]) -> str | None:
    """Say which package this machine lacks for a recipe's optimizer, ``None`` if none."""
    try:
        _build_optimizer(values)
    except (ImportError, ValueError) as error:
        if _is_missing(error):
            return (
                f'training_args.optim: "{values.get("optim")}" needs a package that is not '
                f"installed: {first_line(error).rstrip('.')}. Or use another: "
                f"training_args.optim=adamw_torch"
            )
    except Exception:  # a problem of the recipe, which was said when it was checked
        return None
    return None


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, ImportError) or bool(_MISSING_PACKAGE.search(str(error)))


def _explain(
    values: Mapping[str, Any],
    what: str,
    suspects: tuple[str, ...],
    attempt: Callable[[Any], None],
) -> list[str]:
    """Name the argument without which an attempt succeeds."""
    error = _failure(values, attempt)
    if error is None or _is_missing(error):
        return []
    text = re.sub(r"^\w+(\.__init__)?\(\) ", "", first_line(error)).rstrip(".")
    given = [name for name in suspects if name in values] or list(suspects[-1:])
    causes = [name for name in given if _failure(_without(values, name), attempt) is None]
    return [f"training_args.{(causes or given)[0]}: {what} fails with it: {text}."]


def _without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in values.items() if other != name}


def _failure(values: Mapping[str, Any], attempt: Callable[[Any], None]) -> BaseException | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            attempt(values)
    except Exception as error:  # each optimizer and schedule raises its own kinds
        return error
    return None


def _step_optimizer(values: Mapping[str, Any]) -> None:
    optimizer, _, _ = _build_optimizer(values)
    _step(optimizer)
    _step(optimizer)


def _step_schedule(values: Mapping[str, Any]) -> None:
    import torch
    from transformers import get_scheduler

    args = _arguments(values)
    optimizer: Any = torch.optim.SGD([_parameter()], lr=args.learning_rate)
    last = args.max_steps if args.max_steps > 0 else _STEPS
    schedule: Any = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=_warmup_steps(args, last),
        num_training_steps=last,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    metric = "metrics" in inspect.signature(schedule.step).parameters
    for step in (0, 1, last // 2, last):
        if step:
            schedule.last_epoch = step - 1
            schedule.step(*([1.0] if metric else []))
        rate = float(optimizer.param_groups[0]["lr"])
        if not math.isfinite(rate) or rate < 0:
            raise ValueError(f"the learning rate of step {step} would be {rate}")
        _step(optimizer)


def _warmup_steps(args: Any, steps: int) -> int:
    from transformers import TrainingArguments

    return int(TrainingArguments.get_warmup_steps(args, steps))


def _step(optimizer: Any) -> None:
    import torch

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError("a step makes weights that are no finite numbers")


def _parameter() -> Any:
    import torch

    return torch.nn.Parameter(torch.full((2, 2), 0.5, dtype=torch.float32))


def _build_optimizer(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any], set[str]]:
    """Build an optimizer as `Trainer` does.

    Returns:
        The optimizer, its options, and those of `optim_args` that nothing asked for.
    """
    from torch import nn
    from transformers.trainer_optimizer import (
        _OPTIMIZER_HANDLERS,
        OptimizerContext,
        _parse_optim_args,
        is_optimizer_factory,
    )

    args = _arguments(values)
    model: Any = nn.Sequential(nn.utils.skip_init(nn.Linear, 2, 2))  # draws no random numbers
    model[0].weight, model[0].bias = _parameter(), nn.Parameter(_parameter()[0].detach().clone())
    asked = _Asked(_parse_optim_args(args.optim_args))
    context = OptimizerContext(
        args=args,
        model=model,
        optimizer_kwargs={"lr": args.learning_rate},
        adam_kwargs={"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon},
        optim_args=asked,
    )
    kind, options = _OPTIMIZER_HANDLERS[args.optim](context)
    unused = set(asked) - asked.seen
    taken = dict(options)
    if is_optimizer_factory(kind):
        return kind()(model, **options), taken, unused
    groups: Any = [
        {"params": [model[0].weight], "weight_decay": args.weight_decay},
        {"params": [model[0].bias], "weight_decay": 0.0},
    ]
    for name in ("params", "model", "optimizer_dict"):  # as `Trainer.create_optimizer`
        groups = options.pop(name, groups)
    return kind(groups, **options), taken, unused


class _Asked(dict[str, str]):
    """Options of `optim_args`; remembers which an optimizer asks for."""

    def __init__(self, content: Mapping[str, str]) -> None:
        super().__init__(content)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self.seen.add(name)
        return super().pop(name, *default)

    def keys(self) -> Any:  # by which another dict takes all
        self.seen.update(self)
        return super().keys()


def _arguments(values: Mapping[str, Any]) -> Any:
    """Return what optimizers read of `TrainingArguments`; building one would start the device."""
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames, ParallelMode

    from hfbench.recipe.arguments import takes_number, training_argument_fields

    fields = training_argument_fields()
    found = {name: field.default for name, field in fields.items()} | dict(values)
    numbers = {n: float(v) for n, v in found.items() if takes_number(n) and isinstance(v, int)}
    return SimpleNamespace(
        **found
        | numbers
        | {
            "optim": OptimizerNames(found["optim"]),
            "lr_scheduler_type": SchedulerType(found["lr_scheduler_type"]),
            "parallel_mode": ParallelMode.NOT_DISTRIBUTED,
        }
    )


def _without_effect(values: Mapping[str, Any]) -> list[str]:
    """Find options that the optimizer or the schedule does not heed."""
    optim, schedule = _name(values, "optim"), _name(values, "lr_scheduler_type")
    problems = []
    cycles = (values.get("lr_scheduler_kwargs") or {}).get("num_cycles")
    steps = values.get("max_steps", -1)
    most = steps if steps > 0 else _MOST_CYCLES
    if isinstance(cycles, int | float) and cycles > most:
        problems.append(
            f"training_args.lr_scheduler_kwargs: num_cycles={cycles:g} is more than there are "
            f"optimizer steps ({most:,} at most)."
        )
    if values.get("lr_scheduler_kwargs") and schedule in _WITHOUT_OPTIONS:
        problems.append(
            f"training_args.lr_scheduler_kwargs: the schedule {schedule} takes none; leave it out."
        )
    if values.get("warmup_steps") and schedule in _WITHOUT_WARMUP:
        problems.append(
            f"training_args.warmup_steps: the schedule {schedule} has no warm-up; leave it out, or "
            f"use constant_with_warmup."
        )
    try:
        _, options, unused = _build_optimizer(values)
    except Exception:  # said where it is stepped
        return problems
    if unused:
        problems.append(
            f"training_args.optim_args: {optim} does not take {', '.join(sorted(unused))}; leave "
            f"it out."
        )
    from hfbench.recipe.arguments import training_argument_fields

    fields = training_argument_fields()
    problems += [
        f"training_args.{name}: {optim} does not take it; leave it out."
        for option, names in _ADAM.items()
        for name in names
        if option not in options and values.get(name, fields[name].default) != fields[name].default
    ]
    if values.get("optim_target_modules") and "params" not in options:
        problems.append(
            f"training_args.optim_target_modules: {optim} does not take it; leave it out."
        )
    return problems


def _schedule_name(values: Mapping[str, Any]) -> str:
    return f"the schedule {_name(values, 'lr_scheduler_type')}"


def _name(values: Mapping[str, Any], name: str) -> str:
    from hfbench.recipe.arguments import training_argument_fields

    value = values.get(name, training_argument_fields()[name].default)
    return str(getattr(value, "value", value))

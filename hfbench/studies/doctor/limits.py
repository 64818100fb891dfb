"""What limits a recipe, and the verdict in a few sentences."""

from __future__ import annotations

from hfbench.results.formats import duration
from hfbench.studies.doctor.schema import AccumulationCheck, Advice, Forecast, Limit, Step


def find_limit(step: Step) -> Limit:
    """Return the part whose end would make training fastest."""
    parts: tuple[Limit, ...] = ("model", "loader", "copy", "rest")
    return max(parts, key=step.seconds)


_SLOWER = 0.95  # a measured gain below it is a loss

_NAMES: dict[Limit, str] = {
    "model": "the model",
    "loader": "the loader",
    "copy": "the copy to the device",
    "rest": "Trainer's own work",
}


def milliseconds(seconds: float) -> str:
    """Write the time of a batch with three digits."""
    return duration(seconds) if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def say_verdict(
    name: str,
    limit: Limit,
    step: Step,
    forecast: Forecast,
    advice: list[Advice],
    check: AccumulationCheck | None,
) -> str:
    """Say the most important things in a few sentences."""
    shares = {part: 100 * step.seconds(part) / step.batch_seconds for part in _NAMES}
    others = [
        f"{_NAMES[part]} {share:.0f} %"
        for part, share in shares.items()
        if part != limit and share >= 0.5
    ]
    takes = f"takes {shares[limit]:.0f} % of the {milliseconds(step.batch_seconds)} of a batch" + (
        f" ({', '.join(others)})" if others else ""
    )
    if limit == "rest":
        first = (
            f"Neither loader nor model limits {name} on this machine: Trainer's own work {takes}. "
            "Larger batches would help."
        )
    else:
        which = _NAMES[limit]
        first = f"{which[0].upper()}{which[1:]} limits {name} on this machine: it {takes}"
        side: Limit = "loader" if limit == "model" else "model"
        bound = step.speedup_without(step.seconds(side))
        first += f"; {_NAMES[side]} in no time would make it only {bound:.2f}× as fast."
    run = (
        f"The whole run will take about {duration(forecast.execution_seconds)} "
        f"({duration(forecast.lowest_execution_seconds)} to "
        f"{duration(forecast.highest_execution_seconds)}), training at "
        f"{forecast.samples_per_second:.4g} images/s."
    )
    sentences = [first, run, _say_techniques(advice)]
    if check is not None and not check.passed:
        sentences.insert(0, check.sentence)
    return " ".join(sentences)


def _say_techniques(advice: list[Advice]) -> str:
    has = [item for item in advice if item.in_recipe and item.helps == "yes"]
    could = [
        item
        for item in advice
        if not item.in_recipe and item.helps != "no" and _gain(item) is not None
    ]
    sentences = []
    if has:
        gains = [f"{item.technique} gains {_gain(item)}" for item in has]
        sentences.append(f"Of what it has, {' and '.join(gains)}.")
    sentences += [
        f"It has {item.technique}, which makes it slower: {_gain(item)}."
        for item in advice
        if item.in_recipe and (item.speedup_measured or 1) < _SLOWER
    ]
    measured = [item for item in could if item.helps == "yes"]
    if measured:
        gains = [f"{item.technique} would gain {_gain(item)}" for item in measured]
        sentences.append(f"Tried here, {' and '.join(gains)}.")
    elif could:
        gains = [f"{item.technique} at most {_gain(item)}" for item in could]
        sentences.append(f"There is room for {', '.join(gains)}.")
    elif any(item.helps == "perhaps" for item in advice):
        tried = [item.technique for item in advice if item.helps == "perhaps"]
        sentences.append(f"What might help was not tried: {' and '.join(tried)}.")
    else:
        sentences.append("No other technique can make it noticeably faster here.")
    return " ".join(sentences)


def _gain(item: Advice) -> str | None:
    gain = item.speedup_measured or item.speedup_at_most
    return f"{gain:.2f}×" if gain else None

"""How many times as fast each configuration of an ablation is, and which of that is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from hfbench.comparison.intervals import LEVEL, Interval, exponential, holm, mean_interval
from hfbench.comparison.ratio import Ratio
from hfbench.studies.ablation.plan import ALL, NONE, Attribution, Plan
from hfbench.studies.ablation.schema import Contribution, Measured

Speeds = Mapping[tuple[int, str], float]  # of each round and configuration, more is faster
_Contrast = tuple[tuple[str, int], ...]  # configurations and the powers that they are taken to

# Bartlett's test says that configurations scatter differently below this p-value. It is set high,
# since pooling what differs costs false claims and not pooling costs only power.
_SAME_SCATTER = 0.2
_NOTHING = 1e-9  # logarithms of ratios that differ by less are rounding


def speeds_of(windows: Sequence[Measured]) -> Speeds:
    """Return the images per second of each window."""
    return {(item.round, item.configuration): item.window.samples_per_second for item in windows}


class Gains:
    """Every ratio of speeds that an ablation speaks of, judged as one family.

    The logarithm of a speed is taken as an effect of the round + one of the configuration + noise.
    The noise is estimated from all windows together: the residuals of this two-way layout have
    (R - 1)(C - 1) degrees of freedom for R rounds and C configurations, where a ratio by itself
    leaves R - 1 (Scheffé, The Analysis of Variance, 1959, chapter 4). Where configurations scatter
    differently (Bartlett, Properties of sufficiency and statistical tests, Proc. Royal Society A
    1937) each ratio is judged by its own scatter. Intervals are of one ratio each, at 95 %;
    p-values are adjusted after Holm over all ratios, so that in an ablation without any effect one
    claim or more is made in 5 % of cases.

    Attributes:
        rows: Speed over ``none`` by configuration; ``None`` where no round has both.
    """

    def __init__(self, plan: Plan, speeds: Speeds) -> None:
        """Judge all ratios.

        Args:
            plan: What was to be measured.
            speeds: What was.
        """
        self._plan = plan
        self._everything = next(
            item.name for item in plan.configurations if ALL in (item.name, *item.also)
        )
        logs = {place: math.log(speed) for place, speed in speeds.items()}
        self._scatter = _Scatter(logs)
        rows = {item.name: _contrast([item.name], [NONE]) for item in plan.configurations}
        wanted = {*rows.values()}
        for item in plan.attributions:
            wanted |= {self._with_others(item) or (), self._interaction(item) or ()}
        self._ratios = self._judge(sorted(wanted - {()}), logs)
        self.rows = {
            name: self._of(contrast) if contrast else _nothing(logs)
            for name, contrast in rows.items()
        }

    def contributions(self) -> list[Contribution]:
        """Return what each technique contributes alone, with all others, and how these differ."""
        return [
            Contribution(
                technique=item.technique,
                detail=item.detail,
                alone=self.rows[item.alone],
                with_others=self._of(self._with_others(item)),
                interaction=self._of(self._interaction(item)),
            )
            for item in self._plan.attributions
        ]

    def _with_others(self, item: Attribution) -> _Contrast | None:
        return None if item.all_but is None else _contrast([self._everything], [item.all_but])

    def _interaction(self, item: Attribution) -> _Contrast | None:
        if item.all_but is None or item.alone == self._everything:  # a single technique
            return None
        return _contrast([self._everything, NONE], [item.all_but, item.alone])

    def _of(self, contrast: _Contrast | None) -> Ratio | None:
        return None if contrast is None else self._ratios.get(contrast)

    def _judge(
        self, contrasts: Sequence[_Contrast], logs: Mapping[tuple[int, str], float]
    ) -> dict[_Contrast, Ratio]:
        values = {contrast: _by_round(contrast, logs) for contrast in contrasts}
        found = {
            contrast: self._scatter.judge(contrast, numbers)
            for contrast, numbers in values.items()
            if numbers
        }
        known = {contrast: p for contrast, (_, p) in found.items() if p is not None}
        adjusted = dict(zip(known, holm(list(known.values())), strict=True))
        return {
            contrast: Ratio(
                value=interval.value,
                low=interval.low,
                high=interval.high,
                rounds=len(values[contrast]),
                p=adjusted.get(contrast),
            )
            for contrast, (interval, _) in found.items()
        }


class _Scatter:
    """How logarithms of speeds scatter within configurations once rounds are taken out."""

    def __init__(self, logs: Mapping[tuple[int, str], float]) -> None:
        table = _whole_table(logs)
        rounds, configurations = table.shape
        self._degrees = max(0, rounds - 1) * max(0, configurations - 1)
        self._pooled = None
        if not self._degrees:
            return
        rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
        if rounds == 2 or _scatter_alike(rest):
            self._pooled = float((rest**2).sum()) / self._degrees

    def judge(self, contrast: _Contrast, numbers: Sequence[float]) -> tuple[Interval, float | None]:
        """Return ratio and interval, and the p-value of no difference; neither from one round."""
        values = np.asarray(numbers)
        mean, rounds = float(values.mean()), len(values)
        if rounds < 2:
            return exponential(Interval(mean, None, None)), None
        if self._pooled is None:
            interval, degrees = mean_interval(values), rounds - 1
            error = float(values.std(ddof=1)) / math.sqrt(rounds)
        else:
            degrees = self._degrees
            weight = sum(power**2 for _, power in contrast)
            error = math.sqrt(self._pooled * weight / rounds)
            half = float(stats.t.ppf((1 + LEVEL) / 2, degrees)) * error
            interval = Interval(mean, mean - half, mean + half)
        if error < _NOTHING:
            return exponential(interval), float(abs(mean) < _NOTHING)
        return exponential(interval), float(2 * stats.t.sf(abs(mean) / error, degrees))


def _scatter_alike(rest: np.ndarray) -> bool:
    """Return whether the columns of residuals, (R, C), may have one variance."""
    if np.any(rest.std(axis=0) < _NOTHING):
        return bool(np.all(rest.std(axis=0) < _NOTHING))
    return bool(stats.bartlett(*rest.T).pvalue > _SAME_SCATTER)


def _whole_table(logs: Mapping[tuple[int, str], float]) -> np.ndarray:
    """Return the logarithms, (R, C), of rounds that have all configurations with most windows."""
    names = sorted({name for _, name in logs})
    counts = {name: sum(own == name for _, own in logs) for name in names}
    often = [name for name in names if counts[name] == max(counts.values())]
    rounds = sorted({number for number, _ in logs})
    whole = [
        [logs[number, name] for name in often]
        for number in rounds
        if all((number, name) in logs for name in often)
    ]
    return np.array(whole).reshape(len(whole), len(often))


def _contrast(above: Sequence[str], below: Sequence[str]) -> _Contrast:
    """Return a product of speeds over a product of speeds; sorted, so that equal ones are one."""
    powers = dict.fromkeys(sorted({*above, *below}), 0)
    for name in above:
        powers[name] += 1
    for name in below:
        powers[name] -= 1
    return tuple((name, power) for name, power in powers.items() if power)


def _by_round(contrast: _Contrast, logs: Mapping[tuple[int, str], float]) -> list[float]:
    """Return the logarithm of the ratio in each round that has all its configurations."""
    return [
        math.fsum(power * logs[number, name] for name, power in contrast)
        for number in sorted({number for number, _ in logs})
        if all((number, name) in logs for name, _ in contrast)
    ]


def _nothing(logs: Mapping[tuple[int, str], float]) -> Ratio | None:
    """Return the ratio of ``none`` to itself."""
    rounds = sum(name == NONE for _, name in logs)
    ends = 1.0 if rounds > 1 else None
    return Ratio(value=1.0, low=ends, high=ends, rounds=rounds) if rounds else None

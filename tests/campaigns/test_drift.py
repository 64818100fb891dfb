"""How often a suite calls a candidate faster or slower that is not, over kinds of noise."""

from __future__ import annotations

import os

import pytest

from tests.drifting import NOISES
from tests.suites_on_a_drifting_machine import run_suites

pytestmark = pytest.mark.campaign

EXPERIMENTS = int(os.environ.get("HFBENCH_EXPERIMENTS", "1000"))


def most(share: float) -> float:
    """Return the share that one campaign in two hundred exceeds if this one is true."""
    return share + 2.6 * (share * (1 - share) / EXPERIMENTS) ** 0.5


@pytest.mark.parametrize("pairs", [3, 5, 10])
@pytest.mark.parametrize("noise", NOISES)
def test_one_candidate_without_effect(noise: str, pairs: int) -> None:
    said = run_suites(NOISES[noise], pairs=pairs, candidates=1, experiments=EXPERIMENTS)
    shares = {name: said[name] / EXPERIMENTS for name in ("faster", "slower", "order")}
    print(f"\n{noise}, {pairs} pairs: {shares}")
    assert max(shares["faster"], shares["slower"]) <= most(0.03)


@pytest.mark.parametrize("pairs", [3, 5])
@pytest.mark.parametrize("candidates", [4, 12])
@pytest.mark.parametrize("noise", ["independent", "drift +1.0%", "heavy tails"])
def test_families_without_effect(noise: str, candidates: int, pairs: int) -> None:
    experiments = EXPERIMENTS // 4
    said = run_suites(NOISES[noise], pairs=pairs, candidates=candidates, experiments=experiments)
    share = said["any"] / experiments
    print(f"\n{noise}, {candidates} candidates, {pairs} pairs: any false claim in {share:.1%}")
    assert share <= 0.06 + 2.6 * (0.06 * 0.94 / experiments) ** 0.5


def test_a_real_gain_is_seen() -> None:
    for pairs in (3, 5, 10):
        said = run_suites(
            NOISES["independent"], pairs=pairs, candidates=1, experiments=EXPERIMENTS, gain=0.1
        )
        print(f"\n10 % at 2 % scatter seen in {said['first'] / EXPERIMENTS:.1%} with {pairs} pairs")
        assert said["first"] > (0.5 if pairs == 3 else 0.9) * EXPERIMENTS

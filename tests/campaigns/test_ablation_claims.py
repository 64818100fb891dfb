"""How often an ablation claims what is not so, over kinds of noise and numbers of rounds."""

from __future__ import annotations

import os

import pytest

from hfbench.studies.ablation.plan import plan_ablation
from tests.ablation_experiments import count_claims
from tests.builders import tiny_recipe
from tests.drifting import NOISES

pytestmark = pytest.mark.campaign

EXPERIMENTS = int(os.environ.get("HFBENCH_EXPERIMENTS", "1000"))


@pytest.mark.parametrize("rounds", [3, 5, 8])
@pytest.mark.parametrize("noise", NOISES)
def test_claims_without_an_effect_are_rare(noise: str, rounds: int) -> None:
    plan = plan_ablation(tiny_recipe(bf16=True, gradient_accumulation_steps=2))
    said = count_claims(plan, NOISES[noise], rounds=rounds, experiments=EXPERIMENTS, effects={})
    shares = {name: round(said[name] / EXPERIMENTS, 4) for name in ("most", "row", "any")}
    print(f"\n{noise}, {rounds} rounds: {shares}")
    chance = 2.6 * (0.06 * 0.94 / EXPERIMENTS) ** 0.5
    assert shares["most"] <= 0.03 + chance
    assert shares["any"] <= 0.06 + chance


@pytest.mark.parametrize("rounds", [3, 5, 8])
def test_a_gain_of_five_per_cent_is_seen(rounds: int) -> None:
    plan = plan_ablation(tiny_recipe(bf16=True, gradient_accumulation_steps=2))
    said = count_claims(
        plan,
        NOISES["independent"],
        rounds=rounds,
        experiments=EXPERIMENTS,
        effects={"mixed-precision": 0.049},
    )
    print(f"\n5 % seen in {said['mixed-precision'] / EXPERIMENTS:.1%} with {rounds} rounds")
    assert said["mixed-precision"] >= (0.0 if rounds == 3 else 0.5) * EXPERIMENTS

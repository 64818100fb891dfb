"""What an ablation claims on a machine where nothing has an effect, and where something has."""

from __future__ import annotations

import pytest

from hfbench.studies.ablation.plan import Plan, plan_ablation
from tests.ablation_experiments import count_claims
from tests.builders import tiny_recipe
from tests.drifting import NOISES

EXPERIMENTS = 150


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Return none, five techniques alone and all."""
    return plan_ablation(tiny_recipe(bf16=True, gradient_accumulation_steps=2))


@pytest.mark.parametrize("noise", ["drift +0.5%", "drift -2.0%", "heavy tails"])
def test_drift_names_no_technique_that_gains_most(plan: Plan, noise: str) -> None:
    said = count_claims(plan, NOISES[noise], rounds=5, experiments=EXPERIMENTS, effects={})
    # Expected at most 3 % and 6 %; one in a hundred such tests would see more than this by chance.
    assert said["most"] <= 0.07 * EXPERIMENTS
    assert said["any"] <= 0.11 * EXPERIMENTS


def test_a_real_gain_is_seen_all_the_same(plan: Plan) -> None:
    said = count_claims(
        plan,
        NOISES["independent"],
        rounds=5,
        experiments=EXPERIMENTS,
        effects={"mixed-precision": 0.049},
    )
    assert said["mixed-precision"] >= 0.5 * EXPERIMENTS

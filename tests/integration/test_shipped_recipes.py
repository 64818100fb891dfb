"""All eighteen CIFAR recipes run as shipped, but for two steps: from the Hub, then from the cache.

The local Hub has the five repositories under their real names: tiny models with random weights, and
few made-up images a split. Where a recipe cannot run on a CPU, the overrides are those that its own
error message gives.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_content import CIFAR10_NAMES, CIFAR100_FINE_NAMES, add_recipe_repos
from tests.hub_server import HubServer
from tests.integration.commands import (
    Done,
    WarmCommand,
    build_environment,
    find_free_port,
    only_run,
    read_result,
    run_fresh,
)

RECIPES = [
    f"{model}_{dataset}_{variant}"
    for model in ("resnet50", "efficientnet_b0", "vit")
    for dataset in ("cifar10", "cifar100")
    for variant in ("untuned", "tuned", "fast")
]
ADVICE = {
    "tuned": [
        "training_args.bf16=true",
        "training_args.fp16=false",
        "training_args.use_cpu=true",
    ],
    "fast": ["training_args.use_cpu=true"],
}
# One data set is enough for a default run of the tests; the other half has the marker.
SOME = [
    name if "_cifar100_" in name else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES
]
FEW = [
    name
    if name in ("efficientnet_b0_cifar100_untuned", "vit_cifar100_untuned")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in RECIPES
]
TWO_STEPS = "training_args.max_steps=2"
TRAIN, TEST = 72, 16  # two batches of 64 or 70, the second a ragged one


class Hub:
    """A served Hub, commands that share one cache of it, and the results of the runs so far."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "home"
        self.server = HubServer(root / "hub")
        self.results: dict[str, dict[str, Any]] = {}

    def command(self, offline: bool) -> WarmCommand:
        """Return a command with the cache of this Hub."""
        variables = self.server.env() | {"HF_HUB_OFFLINE": "1" if offline else "0"}
        return WarmCommand(build_environment(self.home, **variables))

    def commit(self, repo_type: str, name: str) -> str:
        """Return the commit that ``main`` of a repository is at."""
        repo = self.server._store.repos[repo_type, name]  # type: ignore[index]
        commit = repo.find("main")
        assert commit
        return commit.oid


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Serve the repositories while the module runs."""
    hub = Hub(tmp_path_factory.mktemp("shipped"))
    with hub.server:
        add_recipe_repos(hub.server, hub.root / "content", train=TRAIN, test=TEST)
        yield hub


@pytest.fixture(scope="module")
def online(hub: Hub) -> Iterator[WarmCommand]:
    """Return a command that sees the Hub."""
    with hub.command(offline=False) as command:
        yield command


@pytest.fixture(scope="module")
def offline(hub: Hub) -> Iterator[WarmCommand]:
    """Return a command that has the cache alone."""
    with hub.command(offline=True) as command:
        yield command


def run_as_advised(command: WarmCommand, name: str, folder: Path) -> Done:
    """Run a recipe for two steps; if it is refused, with what the message advises."""
    arguments = ["recipe", name, TWO_STEPS]
    done = command.run(arguments, folder, timeout=120)
    variant = name.rpartition("_")[2]
    if variant in ADVICE:
        advice = re.findall(r"training_args\.\w+=\w+", done.refused())
        assert sorted(advice) == ADVICE[variant]
        done = command.run([*arguments, *advice], folder, timeout=120)
    return done.check()


@pytest.mark.parametrize("name", SOME)
def test_recipe_runs_from_the_hub(hub: Hub, online: WarmCommand, tmp_path: Path, name: str) -> None:
    done = run_as_advised(online, name, tmp_path)
    result = hub.results[name] = read_result(only_run(tmp_path / "runs"))
    recipe = result["recipe"]
    assert result["training"]["optimizer_steps"] == 2
    assert result["data"]["train_samples"] == TRAIN
    assert result["metrics"]["test"]["samples"] == TEST
    names = CIFAR10_NAMES if "_cifar10_" in name else CIFAR100_FINE_NAMES
    assert result["data"]["label_names"] == names
    assert (result["metrics"]["test"]["top5_accuracy"] is None) == (len(names) == 10)
    assert result["model"]["initialization"] == "pretrained"
    batch, steps = (
        recipe["training_args"][key]
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    assert result["training"]["effective_batch_size"] == batch * steps
    variant = name.rpartition("_")[2]
    assert steps == (4 if variant == "tuned" else 1)
    assert batch == (64 if "vit" not in name else 70) * (4 if variant == "fast" else 1)
    faster = variant != "untuned"
    assert result["switches"]["precision"]["applied"] == ("bf16" if faster else "fp32")
    for switch in ("memory_format", "optim"):
        assert result["switches"][switch]["reason"] is None
    assert bool(re.search(r"this run ┃ +reference ┃", done.stdout)) == faster


@pytest.mark.parametrize("name", SOME)
def test_result_records_the_commits_of_model_and_data(hub: Hub, name: str) -> None:
    if name not in hub.results:
        pytest.skip("needs test_recipe_runs_from_the_hub of the same recipe")
    result = hub.results[name]
    model, dataset = (result["recipe"][part]["name_or_path"] for part in ("model", "dataset"))
    revisions = {part: result[part]["revision"] for part in ("model", "data")}
    assert revisions == {
        "model": hub.commit("model", model),
        "data": hub.commit("dataset", dataset),
    }


@pytest.mark.parametrize("name", FEW)
def test_recipe_runs_again_offline_from_the_cache(
    hub: Hub, offline: WarmCommand, tmp_path: Path, name: str
) -> None:
    if name not in hub.results:
        pytest.skip("needs test_recipe_runs_from_the_hub of the same recipe")
    requests = len(hub.server.requests)
    run_as_advised(offline, name, tmp_path)
    assert len(hub.server.requests) == requests
    result = read_result(only_run(tmp_path / "runs"))
    for part in ("metrics", "data", "model", "recipe_sha256"):
        assert result[part] == hub.results[name][part]


def test_unreachable_hub_and_empty_cache_end_quickly_with_what_works(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{find_free_port()}"
    home = tmp_path / "home"
    variables = build_environment(home, HF_ENDPOINT=nobody, HF_HUB_OFFLINE="0", NO_PROXY="*")
    start = time.monotonic()
    done = run_fresh(["recipe", "resnet50_cifar10_untuned"], tmp_path, environment=variables)
    assert time.monotonic() - start < 60  # the clients alone would retry for 70 s
    said = done.refused()
    assert "resnet50_cifar10_untuned has 2 problems:" in said
    for part in (
        "model.name_or_path: there is no folder timm/resnet50.a1_in1k",
        "model.pretrained=false",
        "dataset.name_or_path: there is no folder uoft-cs/cifar10",
        "dataset.name_or_path=digits",
        nobody,
    ):
        assert part in said
    assert not (tmp_path / "runs").exists()

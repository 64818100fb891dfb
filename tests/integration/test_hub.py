"""A run is pushed whole, once, and without secrets; obstacles are found before training."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub_api import Refusal
from tests.hub_server import HubServer
from tests.integration.commands import (
    SHORT,
    Done,
    WarmCommand,
    build_environment,
    only_run,
    read_result,
    run_fresh,
)

RECIPE = ("recipe", "quickstart_untuned", *SHORT)
PUSH = "training_args.push_to_hub=true"

PULL_SCRIPT = """
import json
import sys
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

name, picture = sys.argv[1], Image.open(sys.argv[2]).convert("RGB")
model = AutoModelForImageClassification.from_pretrained(name).eval()
inputs = AutoImageProcessor.from_pretrained(name)(picture, return_tensors="pt")
score = model(**inputs).logits.softmax(-1).max().item()
found = pipeline("image-classification", model=name)(picture, top_k=1)
print(json.dumps({"score": score, "names": len(model.config.id2label), "found": found}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """Serve an empty Hub."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def environment(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the variables of a process that sees that Hub and has no token."""
    home = tmp_path_factory.mktemp("home")
    return build_environment(home, **server.env(), HF_HUB_OFFLINE="0")


@pytest.fixture(scope="module")
def online(environment: dict[str, str]) -> Iterator[WarmCommand]:
    """Return a command that sees that Hub."""
    with WarmCommand(environment) as command:
        yield command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run that is pushed."""
    return tmp_path_factory.mktemp("pushed")


@pytest.fixture(scope="module")
def pushed(online: WarmCommand, server: HubServer, folder: Path) -> Done:
    """Run and push."""
    return online.run([*RECIPE, PUSH], folder, HF_TOKEN=server.token).check()


def read_metadata(card: bytes) -> Any:
    """Return the YAML header of a model card."""
    return yaml.safe_load(card.decode().split("---\n")[1])


def commits(server: HubServer) -> int:
    """Return how many commits clients have made."""
    return sum("/commit/" in path and status == 200 for _, path, status in server.requests)


def assert_not_trained(folder: Path) -> None:
    """Assert that a command gave up before it made a run."""
    assert not (folder / "runs").exists()


def test_everything_that_is_needed_is_pushed_in_one_commit(
    server: HubServer, folder: Path, pushed: Done
) -> None:
    assert f"Pushed to {server.url}/tester/quickstart_untuned" in pushed.stdout
    files = server.files("tester/quickstart_untuned")
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "confusion.png",
        "curves.png",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.json",
        "result.json",
    }
    assert commits(server) == 1
    run = only_run(folder / "runs")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert files[name] == (run / "model" / name).read_bytes()
    result, ours = json.loads(files["result.json"]), read_result(run)
    assert ours["hub"]["repo_id"] == "tester/quickstart_untuned"
    assert len(ours["hub"]["commit"]) == 40
    assert result == ours | {"hub": None}
    assert json.loads(files["recipe.json"]) == result["recipe"]


def test_model_card_carries_the_measured_numbers(
    server: HubServer, folder: Path, pushed: Done
) -> None:
    metrics = read_result(only_run(folder / "runs"))["metrics"]["test"]
    metadata = read_metadata(server.files("tester/quickstart_untuned")["README.md"])
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["library_name"] == "transformers"
    (entry,) = metadata["model-index"]
    (result,) = entry["results"]
    assert result["task"]["type"] == "image-classification"
    assert result["dataset"]["split"] == "test"
    values = {(item["type"], item["name"]): item["value"] for item in result["metrics"]}
    assert values["accuracy", "Accuracy"] == metrics["accuracy"]
    assert values["f1", "F1 (macro)"] == metrics["f1_macro"]
    assert values["f1", "F1 (weighted)"] == metrics["f1_weighted"]


def test_token_and_local_paths_stay_at_home(server: HubServer, folder: Path, pushed: Done) -> None:
    written = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    sent = server.files("tester/quickstart_untuned")
    for name, content in (written | sent).items():
        assert server.token.encode() not in content, name
        assert str(folder).encode() not in content, name
    assert server.token not in pushed.stdout + pushed.stderr
    assert not [name for name in written | sent if "training_args" in name]


def test_pushed_model_is_pulled_and_classifies(
    online: WarmCommand,
    server: HubServer,
    environment: dict[str, str],
    folder: Path,
    pushed: Done,
    tmp_path: Path,
) -> None:
    picture = only_run(folder / "runs") / "curves.png"
    name = "tester/quickstart_untuned"
    command = (sys.executable, "-c", PULL_SCRIPT)
    done = run_fresh([name, picture], tmp_path, command=command, environment=environment).check()
    pulled = json.loads(done.stdout.splitlines()[-1])
    assert pulled["names"] == 10
    assert pulled["found"][0]["score"] == pytest.approx(pulled["score"], abs=1e-5)

    done = online.run(["predict", name, picture, "--json", "--top-k", "1"], tmp_path).check()
    assert json.loads(done.stdout) == {str(picture): pulled["found"]}


def test_same_command_again_neither_trains_nor_pushes(
    online: WarmCommand, server: HubServer, folder: Path, pushed: Done
) -> None:
    before = commits(server)
    again = online.run([*RECIPE, PUSH], folder, HF_TOKEN=server.token).check()
    assert "Already finished" in again.stderr
    assert f"Pushed to {server.url}/tester/quickstart_untuned" in again.stdout
    assert commits(server) == before
    only_run(folder / "runs")


def test_finished_run_is_only_pushed(
    online: WarmCommand, server: HubServer, tmp_path: Path
) -> None:
    online.run(RECIPE, tmp_path).check()
    run = only_run(tmp_path / "runs")
    before = read_result(run)
    assert before["hub"] is None
    target = "training_args.hub_model_id=later"
    done = online.run([*RECIPE, PUSH, target], tmp_path, HF_TOKEN=server.token).check()
    assert "Already finished" in done.stderr
    assert only_run(tmp_path / "runs") == run
    after = read_result(run)
    assert after.pop("hub")["repo_id"] == "tester/later"
    assert after == {key: value for key, value in before.items() if key != "hub"}
    assert "model.safetensors" in server.files("tester/later")
    # A second place is another push, of the same run.
    target = "training_args.hub_model_id=tester/elsewhere"
    online.run([*RECIPE, PUSH, target], tmp_path, HF_TOKEN=server.token).check()
    assert "model.safetensors" in server.files("tester/elsewhere")


def test_failed_push_keeps_the_run_and_the_same_command_tries_again(
    online: WarmCommand, server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*RECIPE, PUSH, "training_args.hub_model_id=retried"]

    def refuse(*_: object, **__: object) -> None:
        raise Refusal(403, "Your storage is full")

    with monkeypatch.context() as patch:
        patch.setattr(server._api, "commit", refuse)
        done = online.run(command, tmp_path, HF_TOKEN=server.token)
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr
    assert "The run is finished, but pushing" in done.stderr
    assert "403" in done.stderr
    assert "Your storage is full" in done.stderr
    assert "Try again with the same command; nothing is trained anew." in done.stderr
    run = only_run(tmp_path / "runs")
    assert read_result(run)["hub"] is None

    again = online.run(command, tmp_path, HF_TOKEN=server.token).check()
    assert "Already finished" in again.stderr
    assert only_run(tmp_path / "runs") == run
    assert "model.safetensors" in server.files("tester/retried")


@pytest.mark.parametrize(
    ("token", "overrides", "messages"),
    [
        ("", [], ["no Hub token was found", "hf auth login", "push_to_hub=false"]),
        ("hf_wrong", [], ["the login cannot be checked", "Invalid user token", "hf auth login"]),
        (
            "hf_test_token",
            ["training_args.hub_model_id=somebody/model"],
            ['belongs to tester, not to "somebody"', "training_args.hub_model_id=tester/model"],
        ),
        (
            "hf_test_token",
            ["training_args.hub_model_id=tester/not a name"],
            ['"tester/not a name" is no repository name'],
        ),
        (
            "hf_test_token",
            ["training_args.hub_model_id=a/b/c"],
            ['"a/b/c" is no repository name'],
        ),
    ],
    ids=["no token", "wrong token", "foreign namespace", "invalid name", "two slashes"],
)
def test_push_that_cannot_work_is_refused_before_training(
    online: WarmCommand, tmp_path: Path, token: str, overrides: list[str], messages: list[str]
) -> None:
    said = online.run([*RECIPE, PUSH, *overrides], tmp_path, HF_TOKEN=token).refused()
    for message in messages:
        assert message in said
    assert "hf_wrong" not in said
    assert_not_trained(tmp_path)


def test_push_without_a_network_is_refused_before_training(
    warm: WarmCommand, server: HubServer, tmp_path: Path
) -> None:
    said = warm.run([*RECIPE, PUSH], tmp_path, HF_TOKEN=server.token).refused()
    assert "push_to_hub" in said
    assert_not_trained(tmp_path)


def test_name_that_the_hub_does_not_have_is_no_traceback(
    online: WarmCommand, tmp_path: Path
) -> None:
    data = ["dataset.name_or_path=nobody/images"]
    said = online.run([*RECIPE, *data], tmp_path).refused()
    assert "no dataset of that name on the Hub" in said
    model = ["model.name_or_path=nobody/model", "model.pretrained=true"]
    said = online.run([*RECIPE, *model], tmp_path).refused()
    assert "no model of that name on the Hub" in said
    assert_not_trained(tmp_path)

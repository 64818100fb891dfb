"""Every command says what it can do; a user's mistake ends in one message and exit code 2."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from hfbench.cli.options import print_json
from hfbench.results.schema import Metrics, save_result
from tests.builders import make_result, save_run
from tests.integration.commands import (
    MODULE,
    SHORT,
    WarmCommand,
    build_environment,
    read_result,
    run_fresh,
)
from tests.integration.conftest import Pair

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.json"))
FRESH = "model.pretrained=false"
COMMANDS = ("recipe", "compare", "list", "validate", "env", "predict", "schema")


@pytest.fixture
def quickstart() -> dict[str, Any]:
    """Return the content of a shipped recipe, to be broken."""
    content: dict[str, Any] = json.loads((ROOT / "recipes/quickstart_tuned.json").read_text())
    return content


def write_recipe(folder: Path, content: object) -> str:
    """Write a recipe file and return its name."""
    (folder / "mine.json").write_text(json.dumps(content), encoding="utf-8")
    return "mine.json"


def test_help_names_every_command_without_importing_anything_heavy(tmp_path: Path) -> None:
    command = (sys.executable, "-X", "importtime", "-m", "hfbench")
    done = run_fresh(["--help"], tmp_path, command=command).check()
    for name in (*COMMANDS, "--version", "accelerate launch", "quickstart_tuned"):
        assert name in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hfbench.cli.app" in imported
    packages = {name.partition(".")[0] for name in imported}
    assert not packages & {"torch", "transformers", "pydantic", "numpy", "datasets", "timm"}


def test_console_script_and_module_are_the_same_command(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("hfbench")
    if not script.exists():
        pytest.skip("hfbench is on the path, but not installed")
    for command in ((str(script),), MODULE):
        done = run_fresh(["--version"], tmp_path, command=command).check()
        assert done.stdout == f"hfbench {version('hfbench')}\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("recipe", ["--output-dir", "--resume", "--rerun", "--json", "NAME=VALUE", "push_to_hub"]),
        ("compare", ["baseline", "candidate", "--margin", "--price-per-hour", "--json", "suite"]),
        ("list", ["--output-dir", "--recipes"]),
        ("validate", ["recipes", "without running"]),
        ("env", ["--json", "machine"]),
        ("predict", ["IMAGE", "--top-k", "--json", "Hub"]),
        ("schema", ["JSON Schema"]),
    ],
)
def test_help_of_each_command_lists_its_options(
    warm: WarmCommand, tmp_path: Path, command: str, words: list[str]
) -> None:
    shown = warm.run([command, "--help"], tmp_path).check().stdout
    unwrapped = " ".join(shown.replace("│", " ").split())
    for word in [*words, "--help"]:
        assert word in unwrapped
    assert warm.run([command, "-h"], tmp_path).check().stdout == shown


def test_no_command_shows_the_help(warm: WarmCommand, tmp_path: Path) -> None:
    done = warm.run([], tmp_path)
    assert done.exit_code in (0, 2)  # click 8.2 changed it
    for name in COMMANDS:
        assert name in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recpie"], "No such command"),
        (["recipe"], "Missing argument 'RECIPE'"),
        (["recipe", "quickstart_tuned", "--fast"], "No such option"),
        (["compare", "one"], "Missing argument"),
        (["predict", "model"], "Missing argument"),
        (["predict", "model", "a.png", "--top-k", "0"], "--top-k"),
        (["validate"], "Missing argument"),
    ],
)
def test_wrong_usage_exits_with_2(
    warm: WarmCommand, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in warm.run(arguments, tmp_path).refused()


def test_shipped_recipes_are_valid_and_say_what_this_machine_lacks(
    warm: WarmCommand, tmp_path: Path
) -> None:
    shown = warm.run(["validate", *RECIPES], tmp_path).check().stdout
    for name in RECIPES:
        assert f"{name}: valid\n" in shown
    assert shown.count("fp16: needs a CUDA device") == 6


def test_validate_reports_every_problem_of_every_recipe_at_once(
    warm: WarmCommand, tmp_path: Path, quickstart: dict[str, Any]
) -> None:
    quickstart["training_args"] |= {
        "learning_ratee": 1e-3,
        "learning_rate": "1e-4",
        "warmup_ratio": 0.1,
        "output_dir": "here",
        "fp16": True,
        "seed": -1,
    }
    quickstart["dataset"] |= {"name_or_path": "./nowhere", "evalsplit": "test"}
    quickstart["preprocessing"]["augmentation"] = ["random_crop", "vertical_flip"]
    quickstart["variant"] = "tunned"
    del quickstart["model"]
    name = write_recipe(tmp_path, quickstart)
    (tmp_path / "broken.json").write_text('{"name": ')
    done = warm.run(["validate", name, "quickstart_untuned", "broken.json", "none"], tmp_path)
    assert (done.exit_code, done.stdout) == (2, "quickstart_untuned: valid\n")
    assert "Traceback" not in done.stderr
    for problem in (
        "mine.json has 12 problems:",
        "model: missing",
        "learning_ratee: unknown; did you mean learning_rate?",
        'found "1e-4", expected a number; write 1e-4 without quotes',
        "warmup_ratio: removed in transformers 5; write warmup_steps",
        "output_dir: hfbench sets this itself; use --output-dir",
        "fp16 and bf16 exclude each other",
        "seed: -1",
        '"./nowhere" does not exist',
        "evalsplit: unknown; did you mean eval_split?",
        "augmentation.1",
        'variant: found "tunned"',
        "broken.json is not valid JSON",
        "No recipe none",
        "3 of 4 recipes are not valid.",
    ):
        assert problem in done.stderr


def test_env_names_machine_and_versions(warm: WarmCommand, tmp_path: Path) -> None:
    table = run_fresh(["env"], tmp_path).check().stdout
    content = json.loads(warm.run(["env", "--json"], tmp_path).check().stdout)
    assert content["device_type"] == "cpu"
    assert content["memory_mib"] > 0
    assert content["torch_threads"] == 1
    for package in ("torch", "transformers", "timm"):
        assert content["packages"][package] == version(package)
        assert f"{package} {version(package)}" in table
    assert "No accelerator is visible" in table


def test_list_shows_runs_and_shipped_recipes(warm: WarmCommand, tmp_path: Path, pair: Pair) -> None:
    assert "No runs in runs." in warm.run(["list"], tmp_path).check().stdout
    shown = warm.run(["list"], pair.folder).check().stdout
    for run in pair.runs:
        accuracy = read_result(run)["metrics"]["test"]["accuracy"]
        (line,) = (line for line in shown.splitlines() if run.name in line)
        for part in (run.parent.name, "finished", f"{100 * accuracy:.2f} %"):
            assert part in line
    shipped = warm.run(["list", "--recipes"], tmp_path).check().stdout
    assert [line.split()[0] for line in shipped.splitlines()] == RECIPES


def test_schema_is_the_one_in_docs(warm: WarmCommand, tmp_path: Path) -> None:
    printed = json.loads(warm.run(["schema"], tmp_path).check().stdout)
    stored = json.loads((ROOT / "docs/recipe.schema.json").read_text("utf-8"))
    arguments = [schema["properties"].pop("training_args") for schema in (printed, stored)]
    if f"transformers {version('transformers')};" in arguments[1]["$comment"]:
        assert arguments[0] == arguments[1]  # names and help texts change with the version
    assert arguments[0]["properties"]["learning_rate"]["description"]
    assert printed == stored


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["training_args.learning_ratee=1"], ["did you mean learning_rate?"]),
        (["trainingargs.seed=1"], ["trainingargs is unknown in a recipe", "training_args"]),
        (["name"], ['"name": expected name=value']),
        (["model=x"], ["model is a whole section"]),
        (["dataset.max_train_samples=0"], ["max_train_samples: found 0, expected greater"]),
        (["preprocessing.image_size=tiny"], ['image_size: found "tiny"']),
        (["name=../../elsewhere"], ["name: "]),
        (["training_args.optim=adamv"], ["optim: ", "is no choice"]),
        (["training_args.hub_token=abc"], ["a token would end up in files"]),
        (["training_args.max_steps=0"], ["max_steps: 0 is no number of steps"]),
        (["training_args.report_to=nonsense"], ["report_to: ", "is no tracker"]),
        (
            ["dataset.eval_split=tset", "dataset.image_column=img"],
            ["digits has 2 problems", "did you mean test?", "did you mean image?"],
        ),
        (["dataset.eval_split=train"], ['train_split and eval_split are both "train"']),
        (["dataset.name_or_path=./nowhere"], ['"./nowhere" does not exist (looked in ']),
        (["dataset.name_or_path=./empty"], ["./empty cannot be loaded as a data set"]),
        (["dataset.name_or_path=./garbage"], ["./garbage cannot be loaded as a data set"]),
        (
            ["model.name_or_path=./empty", "model.pretrained=false"],
            ["./empty holds no config.json"],
        ),
        (
            ["model.name_or_path=./garbage", "model.pretrained=false"],
            ["./garbage cannot be loaded"],
        ),
        (
            ["model.name_or_path=timm/resnt10t", "model.pretrained=false"],
            ["did you mean resnet10t"],
        ),
        (["training_args.optim=adamw_bnb_8bit"], ["bitsandbytes"]),
        (["training_args.seed=1", "--output-dir", "garbage/file"], ["garbage/file"]),
    ],
    ids=lambda value: value[0] if value[0].isascii() and "=" in value[0] else "",
)
def test_recipe_refuses_what_cannot_run_and_leaves_nothing(
    warm: WarmCommand, tmp_path: Path, overrides: list[str], messages: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").mkdir()
    for name in ("train.parquet", "test.parquet", "config.json", "file"):
        (tmp_path / "garbage" / name).write_text("{")
    before = sorted(tmp_path.rglob("*"))
    message = warm.run(["recipe", "quickstart_tuned", *SHORT, *overrides], tmp_path).refused()
    for part in messages:
        assert part in message
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"name": "a",}', "line 1, column"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"name": "a", "name": "b"}', "name stands twice in one object"),
        (b'{"learning_rate": NaN}', "NaN is not JSON"),
        (b"\xff\xfe{", "cannot be read"),
    ],
)
def test_broken_recipe_files_are_named(
    warm: WarmCommand, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    said = warm.run(["recipe", "mine.json"], tmp_path).refused()
    assert said.startswith("Error: mine.json")
    assert message in said


def test_unknown_recipe_names_the_nearest(warm: WarmCommand, tmp_path: Path) -> None:
    said = warm.run(["recipe", "quickstart_tund"], tmp_path).refused()
    assert said == "Error: No recipe quickstart_tund; did you mean quickstart_tuned?\n"
    assert all(name in warm.run(["recipe", "x"], tmp_path).refused() for name in RECIPES)


def test_one_image_in_a_batch_norm_batch_is_explained(warm: WarmCommand, tmp_path: Path) -> None:
    arguments = ["dataset.max_train_samples=33", "training_args.num_train_epochs=1"]
    done = warm.run(["recipe", "quickstart_untuned", *arguments], tmp_path)
    assert "per_device_train_batch_size" in done.refused()


def test_fp16_without_a_gpu_is_refused_and_the_advice_runs(
    warm: WarmCommand, tmp_path: Path
) -> None:
    arguments = ["recipe", "quickstart_tuned", "-o", "out", *SHORT]
    arguments += ["training_args.fp16=true", "training_args.bf16=false"]
    arguments += ["training_args.use_cpu=false"]
    said = warm.run(arguments, tmp_path).refused()
    assert "would silently run in fp32" in said
    assert not (tmp_path / "out").exists()
    advice = re.findall(r"training_args\.\w+=\w+", said)
    assert len(advice) == 3
    shown = warm.run([*arguments, *advice], tmp_path).check().stdout
    assert re.search(r"precision, as seen\W+(bf16|fp32)", shown)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["compare", "one", "two"], ["one does not exist", "two does not exist"]),
        (["compare", ".", "."], ["holds no result.json"]),
        (["compare", "no.png", "no.png"], ["no.png cannot be read"]),
        (["predict", "model", "none.png", "no.png"], ["none.png does not exist", "no.png cannot"]),
    ],
    ids=["two missing runs", "a folder without runs", "no result", "two bad images"],
)
def test_reading_commands_name_everything_that_is_missing(
    warm: WarmCommand, tmp_path: Path, arguments: list[str], messages: list[str]
) -> None:
    (tmp_path / "no.png").write_bytes(b"no image")
    said = warm.run(arguments, tmp_path).refused()
    for message in messages:
        assert message in said


def test_predict_says_which_model_is_missing(warm: WarmCommand, tmp_path: Path, pair: Pair) -> None:
    image = pair.runs[0] / "curves.png"
    assert "holds no config.json" in warm.run(["predict", ".", image], tmp_path).refused()
    said = warm.run(["predict", "tester/none", image], tmp_path).refused()
    assert "no folder tester/none" in said
    assert "not in the cache" in said
    assert "pretrained=false" not in said  # predicting has no such setting


def test_output_that_cannot_take_every_letter_is_no_reason_to_fail(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "runs", "tiny", "1")
    unknown = Metrics(test=None, train=None)
    save_result(make_result(run_id="1", metrics=unknown), folder)
    environment = build_environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    done = run_fresh(["list"], tmp_path, environment=environment).check()
    assert "| ? | ? |" in " ".join(done.stdout.split())  # instead of a dash


def test_json_is_escaped_where_its_output_cannot_take_every_letter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii"))
    print_json({"speed-up": "1.10×"})
    sys.stdout.flush()
    assert json.loads(written.getvalue().decode("ascii")) == {"speed-up": "1.10×"}


def test_compare_leaves_out_a_run_that_cannot_be_read_and_says_so(
    warm: WarmCommand, pair: Pair, tmp_path: Path
) -> None:
    shutil.copytree(pair.folder / "runs", tmp_path / "runs")
    (run,) = (tmp_path / "runs" / "quickstart_tuned").glob("*/")
    broken = run.with_name(f"2{run.name}")
    shutil.copytree(run, broken)
    (broken / "result.json").write_text("{", "utf-8")
    arguments = ["compare", "runs/quickstart_untuned", "runs/quickstart_tuned"]
    done = warm.run(arguments, tmp_path).check()
    assert (
        f"Left out: runs/quickstart_tuned/{broken.name}/result.json cannot be read" in done.stdout
    )
    shutil.rmtree(run)  # now nothing else is there
    assert "cannot be read" in warm.run(arguments, tmp_path).refused()

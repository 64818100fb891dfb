"""The Hub: check before training that a push will work, write the model card, push at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfbench.errors import HubError, first_line
from hfbench.errors.harmless import (
    fenced,
    for_json,
    for_markdown,
    for_terminal,
    without_credentials,
)
from hfbench.machine.answers import say_answer
from hfbench.recipe.schema import EMBEDDED_DATASETS, local_path
from hfbench.results.schema import CONFUSION_FILE, CURVES_FILE, HubInfo, Result
from hfbench.results.sharing import say_shared

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from hfbench.recipe.schema import Recipe


@dataclass(frozen=True)
class PushTarget:
    """Where a model goes.

    Attributes:
        repo_id: ``owner/name``.
        private: ``None`` leaves it to the owner's default.
        revision: Branch; ``None`` means main.
    """

    repo_id: str
    private: bool | None
    revision: str | None


def check_push(recipe: Recipe) -> PushTarget | None:
    """Check login and repository name before training, if the recipe pushes at all.

    Returns:
        Where to push, ``None`` if the recipe does not.

    Raises:
        HubError: If there is no valid login, the login may not write there, or the name is not
            allowed.
    """
    args = recipe.training_args
    if not args.get("push_to_hub"):
        return None
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    instead = "or pass training_args.push_to_hub=false"
    token = huggingface_hub.get_token()
    if not token:
        raise HubError(
            'training_args.push_to_hub: it is true, but no Hub token was found. Log in with "hf '
            'auth login" or set '
            f"HF_TOKEN, {instead}."
        )
    try:
        account: dict[str, Any] = huggingface_hub.HfApi().whoami(token=token)
    except Exception as error:  # http, connection and validation errors of several libraries
        # Of a wrong token the library itself says it best.
        known = "Invalid user token" in str(error)
        said = first_line(error) if known else _say(error, "the login")
        raise HubError(
            f"training_args.push_to_hub: the login cannot be checked: {said} "
            f'Log in again with "hf auth login", {instead}.'
        ) from None
    name = args.get("hub_model_id") or recipe.name
    repo_id = name if "/" in name else f"{account['name']}/{name}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f'training_args.hub_model_id: "{repo_id}" is no repository name: {error}'
        ) from None
    owners = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if repo_id.split("/")[0] not in owners:
        raise HubError(
            f"training_args.hub_model_id: the login belongs to {' and '.join(owners)}, not to "
            f'"{repo_id.split("/")[0]}"; '
            f"set training_args.hub_model_id={owners[0]}/{repo_id.split('/')[1]}"
        )
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"training_args.push_to_hub: the token may only read; make one that may write, "
            f"{instead}."
        )
    return PushTarget(repo_id, args.get("hub_private_repo"), args.get("hub_revision"))


def push(result: Result, folder: Path, target: PushTarget) -> HubInfo:
    """Push weights, processor, model card, recipe and result of a finished run in one commit.

    Raises:
        HubError: If the Hub refuses; the run stays as it is, and the same command tries again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    files: dict[str, Path | bytes] = {
        path.name: path
        for path in sorted((folder / "model").iterdir())
        if path.suffix in (".json", ".safetensors") and not path.name.startswith(".")
    }
    for name in (CURVES_FILE, CONFUSION_FILE):
        if (folder / name).is_file():
            files[name] = folder / name
    files["README.md"] = model_card(result).encode()
    files["recipe.json"] = _to_json(public_recipe(result.recipe).as_json())
    files["result.json"] = _to_json(
        result.model_copy(update={"recipe": public_recipe(result.recipe)}).model_dump(
            mode="json", by_alias=True
        )
    )
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in files.items()
    ]
    try:
        repo_id = api.create_repo(target.repo_id, private=target.private, exist_ok=True).repo_id
        if target.revision:
            api.create_branch(repo_id, branch=target.revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=f"Add {result.recipe.name}, run {result.run_id}",
            revision=target.revision,
        )
    except Exception as error:  # http and connection errors of several libraries
        raise HubError(
            f"The run is finished, but pushing {folder} to {target.repo_id} failed: "
            f"{_say(error, target.repo_id)} Try again with the same command; nothing is trained "
            "anew."
        ) from error
    return HubInfo(
        repo_id=repo_id,
        revision=target.revision,
        url=without_credentials(f"{api.endpoint}/{repo_id}"),
        commit=commit.oid,
    )


def _say(error: BaseException, name: str) -> str:
    return say_answer(error, name) or first_line(error)


def public_recipe(recipe: Recipe) -> Recipe:
    """Return a recipe whose local paths are cut to their last part, fit to be published."""

    def shorten(name: str) -> str:
        path = local_path(name)
        return path.resolve().name if path.exists() else name

    name = shorten(recipe.model.name_or_path)
    model = recipe.model.model_copy(
        update={"name_or_path": name, "pretrained": recipe.model.pretrained}
    )
    dataset = recipe.dataset.model_copy(
        update={"name_or_path": shorten(recipe.dataset.name_or_path)}
    )
    return recipe.model_copy(update={"model": model, "dataset": dataset})


def model_card(result: Result) -> str:
    """Write the model card: a full model-index, the numbers, the hardware, the recipe.

    Returns:
        Markdown with a YAML header.
    """
    from huggingface_hub import ModelCardData

    recipe = public_recipe(result.recipe)
    on_hub = _is_on_hub(result.recipe.dataset.name_or_path)
    data = ModelCardData(
        model_name=recipe.name,
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=recipe.model.name_or_path
        if recipe.model.pretrained and _is_on_hub(result.recipe.model.name_or_path)
        else None,
        datasets=[recipe.dataset.name_or_path] if on_hub else None,
        metrics=["accuracy", "f1"],
        tags=["hfbench", "image-classification", recipe.variant],
        eval_results=_eval_results(result, recipe),
    )
    version = for_markdown(str(result.environment.packages.get("hfbench")))
    lines = ["---", for_terminal(data.to_yaml()), "---", "", f"# {for_markdown(recipe.name)}", ""]
    lines += [for_markdown(recipe.description), ""]
    lines += [f"Fine-tuned and measured by hfbench {version}.", ""]
    lines += _metric_table(result)
    if result.data.notes:
        lines += [*(f"- {for_markdown(note)}" for note in result.data.notes), ""]
    lines += [f"![Loss and accuracy over epochs]({CURVES_FILE})", ""]
    if result.metrics.test:
        lines += [f"![Confusion matrix of the test images]({CONFUSION_FILE})", ""]
    lines += _time_table(result) + _hardware(result)
    lines += ["## Use", "", "```python", "from transformers import pipeline", ""]
    lines += ['classify = pipeline("image-classification", model="<this repository or folder>")']
    lines += ['classify("image.png")', "```", ""]
    lines += ["## Recipe", "", "`hfbench recipe recipe.json` with", ""]
    lines += [*fenced(for_json(recipe.as_json()), "json"), ""]
    return without_credentials("\n".join(lines))


def _eval_results(result: Result, recipe: Recipe) -> list[EvalResult] | None:
    from huggingface_hub import EvalResult

    if result.metrics.test is None:
        return None
    dataset = recipe.dataset
    rows = [
        ("accuracy", "Accuracy", result.metrics.test.accuracy, None),
        ("f1", "F1 (macro)", result.metrics.test.f1_macro, {"average": "macro"}),
        ("f1", "F1 (weighted)", result.metrics.test.f1_weighted, {"average": "weighted"}),
    ]
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=dataset.name_or_path,
            dataset_name=dataset.name_or_path.split("/")[-1],
            dataset_config=dataset.config_name,
            dataset_split=dataset.eval_split,
            dataset_revision=result.data.revision or dataset.revision,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
            metric_args=arguments,
        )
        for kind, name, value, arguments in rows
    ]


def _metric_table(result: Result) -> list[str]:
    lines = ["## Accuracy", ""]
    if result.metrics.test is None:
        return [
            *lines,
            "The data set is synthetic: its labels mean nothing, and no accuracy is reported.",
            "",
        ]
    lines += [
        "| split | images | accuracy | F1 macro | F1 weighted | top-5 | cross entropy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in (("test", result.metrics.test), ("train", result.metrics.train)):
        if found:
            cells = [found.accuracy, found.f1_macro, found.f1_weighted, found.top5_accuracy]
            shown = " | ".join("–" if cell is None else f"{cell:.2%}" for cell in cells)
            loss = "–" if found.loss is None else f"{found.loss:.4f}"
            lines.append(f"| {name} | {found.samples} | {shown} | {loss} |")
    return [*lines, ""]


def _time_table(result: Result) -> list[str]:
    speed = result.throughput.samples_per_second
    rows = [
        ("execution time", f"{result.times.execution_seconds:.1f} s"),
        ("of it training", f"{result.times.train_seconds:.1f} s"),
        ("steady-state training", "–" if speed is None else f"{speed:.1f} images/s"),
        ("optimizer steps", str(result.training.optimizer_steps)),
        ("effective batch size", str(result.training.effective_batch_size)),
        ("precision of training and evaluation", str(result.switches["precision"].applied)),
        ("peak memory of the process", f"{result.memory.peak_process_memory_mib:.0f} MiB"),
    ]
    if result.memory.peak_device_memory_mib is not None:
        rows.append(
            ("peak memory on the device", f"{result.memory.peak_device_memory_mib:.0f} MiB")
        )
    return [
        "## Time and memory",
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {for_markdown(a)} | {for_markdown(b)} |" for a, b in rows),
        "",
        *([for_markdown(shared), ""] if (shared := say_shared([result])) else []),
    ]


def _hardware(result: Result) -> list[str]:
    machine = result.environment
    versions = ", ".join(
        f"{name} {machine.packages[name]}"
        for name in ("torch", "transformers", "timm")
        if name in machine.packages
    )
    return [
        "## Hardware and software",
        "",
        for_markdown(
            f"{result.training.world_size} x {machine.device_name}; {machine.cpu_cores} CPU cores "
            f"({machine.cpu}), {machine.memory_mib / 1024:.0f} GiB; Python {machine.python}, "
            f"{versions}; {machine.platform}."
        ),
        "",
    ]


def _is_on_hub(name: str) -> bool:
    return name not in EMBEDDED_DATASETS and not local_path(name).exists()


def _to_json(content: Any) -> bytes:
    return (without_credentials(for_json(content)) + "\n").encode()

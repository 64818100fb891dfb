"""The documentation: links lead somewhere, commands parse, generated pages are current."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import transformers
import typer

from hfbench.cli.app import app
from hfbench.recipe.schema import load_recipe, recipe_json_schema, shipped_recipes

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = ROOT / "docs" / "example"
PAGES.append(EXAMPLE / "README.md")
SCHEMA = ROOT / "docs" / "recipe.schema.json"


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def commands(page: Path) -> list[str]:
    lines = [line for block in code_blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if re.search(r"\bhfbench (?!schema)[a-z]+ ", f"{line} ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M)
            slugs = [
                re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in headings
            ]
            assert anchor in slugs, f"{page.name} links to {target}"


@pytest.mark.parametrize(
    ("page", "command"),
    [
        pytest.param(page, command, id=f"{page.name}: {command}")
        for page in PAGES
        if page.name != "cli.md"
        for command in commands(page)
    ],
)
def test_documented_commands_parse(page: Path, command: str) -> None:
    words = shlex.split(command.replace("<run id>", "run"), comments=True)
    words = words[words.index("hfbench") + 1 :]
    group = typer.main.get_command(app)
    name, *rest = words
    context = group.commands[name].make_context(name, list(rest))  # type: ignore[attr-defined]
    if name == "recipe" and context.params["recipe"] != "recipe.json":
        assert Path(context.params["recipe"]).stem in shipped_recipes()
        overrides = [o for o in context.params["overrides"] or [] if "=/" not in o]
        load_recipe(context.params["recipe"], overrides)


def test_schema_is_current() -> None:
    written, current = json.loads(SCHEMA.read_text("utf-8")), recipe_json_schema()
    named = written["properties"]["training_args"]["$comment"]
    if f"transformers {transformers.__version__};" not in named:  # its arguments differ
        for schema in (written, current):
            del schema["properties"]["training_args"]
    assert written == current, "run: make docs"


def test_every_recipe_points_to_the_schema() -> None:
    for path in (ROOT / "recipes").glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        assert (path.parent / content["$schema"]).resolve() == SCHEMA


def test_command_reference_names_every_command_and_option() -> None:
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")  # its layout depends on typer's version
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        section = page.partition(f"## `hfbench {name}`")[2].partition("\n## ")[0]
        options = [option for parameter in command.params for option in parameter.opts]
        missing = [option for option in options if option.startswith("-") and option not in section]
        assert section, f"{name} is missing; run: make docs"
        assert not missing, f"{name} has {missing}; run: make docs"


def test_recipe_in_the_documentation_is_valid() -> None:
    (block,) = code_blocks(ROOT / "docs" / "recipes.md", "json")
    shown, shipped = json.loads(block), shipped_recipes()["vit_cifar100_tuned"]
    actual = json.loads(shipped.read_text("utf-8"))
    for section in ("model", "dataset", "training_args", "preprocessing"):
        assert shown[section].items() <= actual[section].items()

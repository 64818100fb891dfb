"""The report's page in a real browser: headless Chromium, driven by Playwright."""

from __future__ import annotations

import csv
import io
import re
import shutil
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfbench.report import write_report
from hfbench.results.formats import percent
from hfbench.results.schema import Result
from tests.made_up import CLASSES, save_repeats

pytest.importorskip("playwright", reason="needs Playwright, of the test extra")

from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return headless Chromium, the system's: Playwright's own would have to be downloaded."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"needs Chromium on the PATH, as one of {', '.join(names)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Result]], Path]:
    """Return made-up runs of three recipes, one with a long name, and their page."""
    root = tmp_path_factory.mktemp("reported")
    generator = np.random.default_rng(0)
    runs = {}
    for name, seconds, changes in (
        ("plain", 100.0, {}),
        ("tuned", 50.0, {"variant": "tuned", "baseline": "plain"}),
        ("a_recipe_with_a_very_long_name_" + "x" * 60, 9.0, {"variant": "fast"}),
    ):
        right = generator.random((2, IMAGES)) < 0.8
        runs[name] = save_repeats(
            root / "runs", name, [seconds, 1.1 * seconds], right, recipe=changes
        )
    write_report(root / "runs", root / "report")
    return runs, root / "report" / "index.html"


Reported = tuple[dict[str, list[Result]], Path]


@pytest.fixture
def page(browser: Browser, reported: Reported) -> Iterator[Page]:
    """Return the page on a desktop; whatever it logs or asks the network for fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    logged: list[str] = []
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("request", lambda request: logged.append(request.url) if _is_remote(request) else None)
    page.goto(reported[1].as_uri())
    yield page
    context.close()
    assert logged == []


def _is_remote(request: Any) -> bool:
    return not request.url.startswith(("file:", "data:"))


def column(page: Page, heading: str) -> list[str]:
    """Return the texts of a column of the table of all recipes, from top to bottom."""
    return page.evaluate(
        """heading => {
            const table = document.querySelector("#recipes table");
            const headings = [...table.tHead.rows[0].cells].map(cell => cell.textContent);
            const place = headings.indexOf(heading);
            return [...table.tBodies[0].rows].map(row => row.cells[place].textContent);
        }""",
        heading,
    )


def test_page_renders_every_section_and_figure(page: Page) -> None:
    assert page.title()
    assert page.locator("h1").count() == 1
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href") or "").is_visible()
    figures = page.locator("figure svg")
    assert figures.count() >= 8
    for figure in figures.all():
        box = figure.bounding_box()
        assert box
        assert box["width"] > 200
        assert box["height"] > 80
    # Text stays text, so that it can be searched and read aloud.
    assert page.locator("figure svg text", has_text="speed-up over the baseline").count() == 1


def test_numbers_on_the_page_are_those_of_the_results(page: Page, reported: Reported) -> None:
    runs = reported[0]
    for name, accuracy, time in zip(
        column(page, "recipe"),
        column(page, "test accuracy"),
        column(page, "execution time"),
        strict=True,
    ):
        shares = [run.metrics.test.accuracy for run in runs[name] if run.metrics.test]
        assert accuracy.startswith(percent(sum(shares) / len(shares)))
        expected = np.exp(np.mean([np.log(run.times.execution_seconds) for run in runs[name]]))
        minutes, seconds = re.match(r"(?:(\d+) min )?([\d.]+) s", time).groups()  # type: ignore[union-attr]
        assert 60 * int(minutes or 0) + float(seconds) == pytest.approx(expected, abs=0.5)


def test_downloaded_data_are_those_of_the_figure(page: Page, reported: Reported) -> None:
    link = page.locator("figure a[download='confusion_plain.csv']")
    content = b64decode((link.get_attribute("href") or "").partition("base64,")[2]).decode()
    rows = list(csv.DictReader(io.StringIO(content)))
    right = sum(int(row["count"]) for row in rows if row["true"] == row["predicted"])
    shares = [run.metrics.test.accuracy for run in reported[0]["plain"] if run.metrics.test]
    assert right == round(sum(shares) * IMAGES)
    assert {row["true"] for row in rows} == {f"class {number}" for number in range(CLASSES)}
    with page.expect_download() as download:
        link.click()
    assert download.value.path().read_text("utf-8") == content


def test_table_sorts_by_number_with_a_click(page: Page) -> None:
    before = column(page, "recipe")
    heading = page.locator("#recipes thead th", has_text="execution time")
    assert heading.get_attribute("aria-sort") == "none"
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    # 9.4 s, 52.4 s, 1 min 45 s: by value, not by what is written.
    assert [text[:3] for text in column(page, "execution time")] == ["9.4", "52.", "1 m"]
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(page, "recipe")[0] == "plain"
    assert sorted(column(page, "recipe")) == sorted(before)


def test_table_sorts_by_keyboard(page: Page) -> None:
    button = page.locator("#recipes thead th", has_text="recipe").get_by_role("button")
    button.focus()
    page.keyboard.press("Enter")
    names = column(page, "recipe")
    assert names == sorted(names)
    page.keyboard.press("Space")
    assert column(page, "recipe") == names[::-1]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "model"
    page.keyboard.press("Enter")
    sort = page.locator("#recipes thead th[aria-sort]:not([aria-sort=none])")
    assert sort.all_text_contents() == ["model"]


def test_words_stand_last_whichever_way_numbers_are_sorted(page: Page) -> None:
    table = page.locator("#reference table").first
    button = table.locator("thead th", has_text="accuracy, reference").get_by_role("button")
    for first in ("92.00 %", "97.00 %"):
        button.click()
        texts = table.locator("tbody tr td:nth-child(3)").all_text_contents()
        assert texts[0] == first
        assert texts[-1] == "not given"


def test_first_key_skips_to_the_report_and_scrolled_regions_take_keys(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    region = page.locator("#recipes .scroll")
    region.focus()
    assert region.evaluate("node => node.scrollLeft") == 0
    page.keyboard.press("ArrowRight")
    for _ in range(100):  # not wait_for_function, whose eval the page's policy forbids
        if region.evaluate("node => node.scrollLeft") > 0:
            break
        page.wait_for_timeout(50)
    assert region.evaluate("node => node.scrollLeft") > 0


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_page_does_not_overflow(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """width => [...document.querySelectorAll("body *")]
            .filter(node => !node.closest(".scroll") && !node.closest(".skip"))
            .filter(node => node.getBoundingClientRect().right > width + 1)
            .map(node => node.outerHTML.slice(0, 80))""",
        width,
    )
    assert outside == []


def test_dark_mode_changes_page_and_figures(page: Page) -> None:
    look = """() => {
        const color = (selector, property) =>
            getComputedStyle(document.querySelector(selector))[property];
        return [color("body", "backgroundColor"), color("body", "color"),
                color("figure svg text", "fill"), color("a", "color")];
    }"""
    light = page.evaluate(look)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(look)
    assert light[0] == "rgb(255, 255, 255)"
    assert all(one != two for one, two in zip(light, dark, strict=True))
    # What stands in a figure has the colour of the page's text, and nothing is left unresolved.
    for theme in (light, dark):
        assert theme[2] == theme[1]
    assert page.evaluate("document.documentElement.outerHTML.includes('#fe0')") is False


def test_print_is_light_and_cuts_nothing(page: Page) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 1030, "height": 700})  # about A4 within its margins
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    cut = page.evaluate(
        """() => [...document.querySelectorAll(".scroll")]
            .filter(node => node.scrollWidth > node.clientWidth + 1)
            .map(node => node.getAttribute("aria-labelledby"))"""
    )
    assert cut == []
    broken = page.evaluate(
        """() => [...document.querySelectorAll("td.number")].filter(cell => {
            const number = document.createRange();
            number.selectNode(cell.firstChild);
            return number.getClientRects().length > 1;
        }).map(cell => cell.textContent)"""
    )
    assert broken == []


def test_policy_of_the_page_lets_nothing_else_run(browser: Browser, reported: Reported) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(reported[1].as_uri())
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            const image = "<img src=x: onerror='window.ran = true'>";
            document.body.insertAdjacentHTML("beforeend", image);
        }"""
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    assert page.evaluate("getComputedStyle(document.body).margin") is not None
    context.close()

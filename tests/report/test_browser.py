"""The report page in a real browser: what it shows, how it reacts, that nothing is fetched and no foreign text runs."""

from __future__ import annotations

import copy
import io
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import own_models
import pytest
import torch
from PIL import Image

import quantflow as qf
from quantflow.report.html import html

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `test`)")

#: The flags let it run as root, in a container, and keep it from calling home.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "</title></script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>\"'><b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """Results of a real run, beside itself as the baseline."""
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    model = qf.quantize(own_models.net(), batches, benchmark=True, gates={"min_sqnr_db": 5.0}, layers={"head": "float"})
    return {**model.results, "baseline": {"artifact": "outputs/before", **copy.deepcopy(model.results)}}


class Opened:
    """A page with everything it logged and asked for."""

    def __init__(self, context: Any, folder: Path, results: dict[str, Any]) -> None:
        self.log: list[str] = []
        self.page = context.new_page()
        self.page.on("console", lambda message: self.log.append(message.text))
        self.page.on("pageerror", lambda error: self.log.append(str(error)))
        self.page.on("dialog", lambda dialog: self.log.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self._requested(request.url))
        file = folder / "report.html"
        file.write_text(html(results), encoding="utf-8")
        self.page.goto(file.as_uri())

    def _requested(self, url: str) -> None:
        if not url.startswith(("file:", "data:")) or not url.split("#")[0].endswith(("report.html", "data:,")):
            self.log.append(f"asked for {url}")

    def column(self, index: int) -> list[str]:
        return [
            text.strip()
            for text in self.page.locator(f"#layers-table tbody tr > :nth-child({index + 1})").all_inner_texts()
        ]

    def heading(self, text: str) -> Any:
        return self.page.locator("#layers-table thead th", has_text=text)


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context
    context.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["real", "sample"])
def test_it_renders(
    browser: Any, tmp_path: Path, real: dict[str, Any], results: dict[str, Any], width: int, scheme: str, which: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed (extra `test`)")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        opened = Opened(context, tmp_path, real if which == "real" else results)
        found = axe.Axe().run(opened.page).response["violations"]
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []
        assert opened.page.evaluate("document.documentElement.scrollWidth") == width
        picture = Image.open(io.BytesIO(opened.page.screenshot())).convert("L")
        corner = picture.getpixel((2, 890))
        assert corner < 40 if scheme == "dark" else corner > 215
        assert len(picture.getcolors(256)) > 50
        assert opened.log == []
    finally:
        context.close()


def test_questions_are_answered_in_their_order(context: Any, tmp_path: Path, real: dict[str, Any]) -> None:
    page = Opened(context, tmp_path, real).page
    assert page.locator("h1").all_inner_texts() == ["quantize"]
    assert page.locator("h2").all_inner_texts() == [
        "Passed", "How accurate and how fast", "Did int8 really run, and where not", "Which layers cost accuracy",
        "Which layers cost time", "All layers", "What exactly was run",
    ]  # fmt: skip
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map((h) => Number(h.tagName[1]))")
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_layer_table_sorts_by_click_and_key(context: Any, tmp_path: Path, results: dict[str, Any]) -> None:
    opened = Opened(context, tmp_path, results)
    original = opened.column(1)
    heading = opened.heading("Time, ms")
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert [t for t in opened.column(7) if t != "-"] == ["0.7500", "0.2500", "0.0500"]
    assert set(opened.column(7)[3:]) == {"-"}
    heading.locator("button").focus()
    opened.page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert opened.column(7)[:4] == ["0.0500", "0.2500", "0.7500", "-"]
    assert opened.page.locator("#layers-table th[aria-sort]").count() == 1
    opened.page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") is None
    assert opened.heading("#").get_attribute("aria-sort") == "ascending"
    assert opened.column(1) == original
    opened.heading("Layer").locator("button").press("Space")
    assert opened.column(1) == sorted(original)
    opened.heading("#").locator("button").click()
    assert opened.column(1) == original
    assert opened.log == []


def test_the_layer_table_filters(context: Any, tmp_path: Path, results: dict[str, Any]) -> None:
    page = Opened(context, tmp_path, results).page
    tools = page.locator("[data-filter='layers-table']")
    rows = page.locator("#layers-table tbody tr:visible")
    everything = rows.count()
    assert tools.locator(".count").inner_text() == f"{everything} of {everything} rows"
    tools.locator("input").fill("layer1 CONV1")
    assert 0 < rows.count() < everything
    tools.locator("select").select_option("float")
    assert rows.count() == 0
    assert tools.locator(".count").inner_text() == f"0 of {everything} rows"
    tools.locator("input").fill("")
    assert rows.all_inner_texts()[0].split()[1] == "softmax"
    tools.locator("input").press("Escape")
    assert rows.count() == everything


def test_the_graph_zooms_and_moves(context: Any, tmp_path: Path, real: dict[str, Any]) -> None:
    opened = Opened(context, tmp_path, real)
    page = opened.page
    canvas, picture = page.locator(".canvas"), page.locator(".canvas svg")

    def width() -> float:
        return float(picture.get_attribute("width") or 0)

    start = width()
    page.get_by_role("button", name="Zoom in").click()
    assert width() == pytest.approx(1.4 * start)
    canvas.focus()
    page.keyboard.press("-")
    assert width() == pytest.approx(1.12 * start)
    before = width()
    canvas.hover()
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    page.wait_for_function(f"Number(document.querySelector('.canvas svg').getAttribute('width')) > {before * 1.5}")
    page.mouse.down()
    page.mouse.move(400, 100)
    page.mouse.up()
    page.get_by_role("button", name="Whole graph").click()
    assert picture.bounding_box()["height"] <= canvas.bounding_box()["height"] + 1
    fill = "getComputedStyle(document.querySelector('.picture .p-int8 rect')).fill"
    by_precision = page.evaluate(fill)
    page.get_by_label("Colour by").select_option("error")
    assert page.evaluate(fill) != by_precision
    assert page.locator("[data-legend='error']").is_visible()
    assert not page.locator("[data-legend='precision']").is_visible()
    assert opened.log == []


def test_light_and_dark_change_places(context: Any, tmp_path: Path, results: dict[str, Any]) -> None:
    page = Opened(context, tmp_path, results).page
    background = "getComputedStyle(document.body).backgroundColor"
    light, button = page.evaluate(background), page.locator("#theme")
    assert button.inner_text() == "Dark"
    button.focus()
    page.keyboard.press("Enter")
    assert page.evaluate(background) != light
    assert button.inner_text() == "Light"
    button.click()
    assert page.evaluate(background) == light


def strings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, str):
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from strings(item, (*path, key))


def test_text_of_others_stays_text(context: Any, tmp_path: Path, results: dict[str, Any]) -> None:
    kept = {("verdict",), *(("plan", i, "precision") for i in range(len(results["plan"])))}
    for path in list(strings(results)):
        section: Any = results
        for key in path[:-1]:
            section = section[key]
        if path not in kept:
            section[path[-1]] = HOSTILE
    opened = Opened(context, tmp_path, results)
    assert opened.page.evaluate("window.pwned") is None
    assert opened.page.locator("img").count() == 0
    assert opened.page.evaluate("document.querySelector('h1').textContent") == HOSTILE
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 1280
    assert opened.log == []


def test_the_policy_stops_a_script_that_got_through(context: Any, tmp_path: Path, results: dict[str, Any]) -> None:
    opened = Opened(context, tmp_path, results)
    file = tmp_path / "report.html"
    file.write_text(file.read_text().replace("<main", "<script>window.pwned=1</script><main", 1))
    opened.page.goto(file.as_uri())
    assert opened.page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in line for line in opened.log)


def test_it_is_complete_without_a_script(browser: Any, tmp_path: Path, results: dict[str, Any]) -> None:
    context = browser.new_context(java_script_enabled=False)
    try:
        page = Opened(context, tmp_path, results).page
        assert page.locator("#layers-table tbody tr").count() > 8
        assert page.locator(".canvas svg g g").count() == 5
        assert page.locator(".tools:visible").count() == 0
    finally:
        context.close()

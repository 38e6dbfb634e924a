"""The report in a real browser: phone and desk, light and dark. Needs Chromium (``apt-get install chromium``).

Run: uv run pytest tests/reporting/test_report_browser.py      (seconds; screenshots go to $REPORT_SCREENSHOTS if that is set)

Without Chromium it is skipped, unless REQUIRE_CHROMIUM is set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.browser import Browser, chromium
from support.run_folders import RunFolderSpec, attempt, write_run

from agent.report import main

# Everything folded out, so that what is hidden at first is measured too.
OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"

OUTSIDE = """[...document.querySelectorAll('svg:not(.key)')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text, path, circle')].filter(shape => {
    const at = shape.getBoundingClientRect();
    return at.left < box.left - 1 || at.right > box.right + 1 || at.top < box.top - 1 || at.bottom > box.bottom + 1;
  }).map(shape => svg.getAttribute('aria-label').slice(0, 60) + ': ' + shape.outerHTML.slice(0, 120));
})"""

OVERLAPS = """[...document.querySelectorAll('svg:not(.key)')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(text => [text, text.getBoundingClientRect()]);
  return texts.flatMap(([text, a], number) => texts.slice(number + 1)
    .filter(([other, b]) => a.left < b.right && b.left < a.right && a.top < b.bottom - 3 && b.top < a.bottom - 3)
    .map(([other, b]) => svg.getAttribute('aria-label').slice(0, 60) + ': ' + text.textContent + ' over ' + other.textContent));
})"""

FLAT = """[...document.querySelectorAll('svg:not(.key)')].filter(svg => {
  const lines = [...svg.querySelectorAll('path.line')];
  return lines.some(line => line.getTotalLength() <= 0 || getComputedStyle(line).stroke === 'none')
    || (lines.length && !lines.some(line => line.getTotalLength() > 30));
}).map(svg => svg.getAttribute('aria-label').slice(0, 80))"""

# WCAG's contrast of every text with the ground behind it: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
FAINT = """(() => {
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => numbers(colour).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = new Set();
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || parent.closest('title, style')) continue;
    const style = getComputedStyle(parent);
    const pair = [light(parent.closest('svg') ? style.fill : style.color), light(ground(parent))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) found.add(ratio.toFixed(2) + ' ' + parent.tagName + ' ' + walker.currentNode.data.slice(0, 40));
  }
  return [...found];
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    restarts = [attempt(0, 900, 1000.0, state="running"), attempt(800, 2000, 2000.0, environment={"cpu": "x" * 90})]
    long = [f"left_arm_joint_{place}.position" for place in range(14)]
    usual = write_run(folder / "usual", RunFolderSpec(updates=2000, ema=True, attempts=restarts))
    large = write_run(
        folder / "large", RunFolderSpec(updates=30_000, log_every=1, names=long, horizon=50, name="n" * 150)
    )
    small = write_run(folder / "small", RunFolderSpec(updates=2, log_every=1, evaluations=0, reason="word " * 60))
    for name in ("status.json", "config.yaml"):
        (small / name).unlink()
    arms = [
        f"{arm}_arm_{joint}.pos" for arm in ("left", "right") for joint in ("shoulder_pan_joint", "gripper_opening")
    ]
    lines = {step: {"loss": 0.0123 + 1e-6 * step, "grad_norm": 123_456.0 + step} for step in range(2, 41, 2)}
    odd = write_run(folder / "odd", RunFolderSpec(names=arms, name="a_long_name_" * 9, ema=True, changed_lines=lines))
    path = odd / "validation" / "step_00000040.json"
    content = json.loads(path.read_text())
    for block in (content, content["ema"]):
        for chunk, key in ((chunk, key) for chunk in block["chunks"] for key in ("recorded", "predicted")):
            chunk[key] = [[value / 500 - 0.03 for value in row] for row in chunk[key]]
    path.write_text(json.dumps(content))
    made = {run.name: run / "report.html" for run in (usual, large, small, odd)}
    made["compared"] = folder / "compared.html"
    assert [main([str(run)]) for run in (usual, large, small, odd)] == [0] * 4
    assert main([*map(str, (usual, large, odd)), "--out", str(made["compared"])]) == 0
    return made


@pytest.mark.parametrize("kind", ["390 light", "390 dark", "1280 light", "1280 dark"])
def test_the_curves_can_be_seen(browser: Browser, pages: dict[str, Path], kind: str, tmp_path: Path) -> None:
    picture = Image.open(open_page(browser, pages, "usual", kind, tmp_path)).convert("RGB")
    ground = picture.getpixel((2, 2))
    assert isinstance(ground, tuple) and (sum(ground) < 150) == ("dark" in kind)
    places = browser.evaluate(
        "[...document.querySelectorAll('#training svg, #validation figure svg:not(.key)')].map(svg => {"
        "const box = svg.getBoundingClientRect(), line = svg.querySelector('path.line, circle.dot');"
        "return [box.left + scrollX, box.top + scrollY, box.right + scrollX, box.bottom + scrollY,"
        "getComputedStyle(line).stroke.match(/\\d+/g).map(Number)]})"
    )
    assert len(places) == 6 + 3 + 2
    for left, top, right, bottom, colour in places:
        chart = picture.crop((round(left), round(top), round(right), round(bottom)))
        strongest = colour.index(max(colour))
        # Of the curve's hue, even where its edge is mixed with the ground; the ground, the grid and the text are grey.
        drawn = sum(
            max(pixel) - min(pixel) > 60 and pixel.index(max(pixel)) == strongest
            for pixel in chart.get_flattened_data()
        )
        assert drawn > 60, (left, top, colour)
    reads_well(browser, pages["usual"], kind)


@pytest.mark.parametrize("kind", ["390 dark", "1280 light"])
@pytest.mark.parametrize("name", ["large", "small", "odd", "compared"])
def test_it_reads_well(browser: Browser, pages: dict[str, Path], name: str, kind: str, tmp_path: Path) -> None:
    open_page(browser, pages, name, kind, tmp_path)
    reads_well(browser, pages[name], kind)


def open_page(browser: Browser, pages: dict[str, Path], name: str, kind: str, tmp_path: Path) -> Path:
    """Loads it; returns a picture of it."""
    width, scheme = kind.split()
    browser.open(pages[name], width=int(width), dark=scheme == "dark")
    picture = Path(os.environ.get("REPORT_SCREENSHOTS", tmp_path)) / f"{name}_{width}_{scheme}.png"
    browser.screenshot(picture)
    return picture


def reads_well(browser: Browser, page: Path, kind: str) -> None:
    """Nothing is out of place, too faint, broken or asked for from elsewhere."""
    width = int(kind.split()[0])
    browser.evaluate(OPEN)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OUTSIDE) == []
    assert browser.evaluate(OVERLAPS) == []
    assert browser.evaluate(FLAT) == []
    assert browser.evaluate(FAINT) == []
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]


def test_a_wide_table_scrolls_in_itself_and_by_the_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["usual"], width=390, dark=False)
    found = browser.evaluate(
        "[...document.querySelectorAll('#restarts .scroll')].map(e => [e.scrollWidth > e.clientWidth, e.tabIndex])"
    )
    assert found == [[True, 0]]


def test_a_hover_shows_the_values(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["usual"], width=1280, dark=False)
    said = browser.evaluate(
        "(() => { const strips = document.querySelectorAll('#training svg .strip'), strip = strips[strips.length - 1];"
        "const box = strip.getBoundingClientRect(); scrollTo(0, box.top - 100); const at = strip.getBoundingClientRect();"
        "return document.elementFromPoint((at.left + at.right) / 2, (at.top + at.bottom) / 2)"
        ".querySelector('title').textContent })()"
    )
    assert said.startswith("update ") and "Peak memory of a process: 1.5" in said

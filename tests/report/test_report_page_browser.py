"""The page at a phone's and a desk's width, by day and by night: it fits, it can be read, and the
axis under its curves can be changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures.webpage import click, open_page, point_at, texts, visible
from patchmine.report.page import write_report

MakeRun = Callable[..., Path]
SCHEMES = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]

# Of every element with letters of its own: contrast with the first background behind it that is
# not transparent, by WCAG 2; colours are read off a canvas, which knows every notation.
CONTRASTS = """
const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const read = (colour) => {
  context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
};
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
const over = (top, below) => top.slice(0, 3).map((c, k) => (c * top[3] + below[k] * (255 - top[3])) / 255);
const behind = (element) => {
  if (!element) return [255, 255, 255];
  const own = read(getComputedStyle(element).backgroundColor);
  return own[3] === 255 ? own.slice(0, 3) : over(own, behind(element.parentElement));
};
const worst = {};
for (const element of document.body.querySelectorAll("*")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.checkVisibility() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
  const value = ratio(read(getComputedStyle(element).color), behind(element));
  const name = `${element.tagName}.${element.getAttribute("class") ?? ""}`;
  worst[name] = Math.min(worst[name] ?? 99, value);
}
for (const path of document.querySelectorAll("path.line, path.points")) {
  if (!path.checkVisibility()) continue;
  const value = ratio(read(getComputedStyle(path).stroke), behind(path.closest("div")));
  worst[`line ${path.getAttribute("class")}`] = value;
}
return worst;
"""


def rich_run(make_run: MakeRun, name: str, **options: Any) -> Path:
    """A run with everything that a page can show of one."""
    folder = make_run(name, samples=2, over_fitted=True, **options)
    result = {
        "top1": 85.4,
        "top5": 99.0,
        "images": {"how": "test/ of data", "test_read": 900},
        "baselines": {"random_init": {"top1": 76.4}, "raw_pixels": {"top1": 40.9}},
        "notes": ["A note."],
    }
    (folder / "eval/knn.json").write_text(json.dumps(result))
    classes = ["cat", "dog", "x" * 40]
    confusion = [[50, 0, 3], [1, 40, 2], [0, 0, 9]]
    table = {key: {"top1": 81.0, "precision": 90.0, "count": 53} for key in classes}
    test = {"map": 40.0, "per_class": table, "classes": classes, "confusion": confusion}
    (folder / "eval/test.json").write_text(json.dumps(test))
    made = {
        "command": f"patchmine pretrain data={'photos/' * 12} out=runs/x",
        "device": "2 x NVIDIA H200",
        "patchmine": "0.1.0",
        "images": 3150,
    }
    (folder / "origin.jsonl").write_text(json.dumps(made) + "\n")
    (folder / "bad_files.txt").write_text("a.png\tbroken\n")
    return folder


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    def show(*runs: Path) -> Any:
        browser.get_log("browser")
        open_page(browser, write_report(runs, tmp_path / "report.html").as_uri())
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        return browser

    yield show
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def look(page: Any, width: int, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == 390}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)


def test_letters_and_curves_can_be_read_and_nothing_overflows(
    opened: Callable[..., Any], make_run: MakeRun
) -> None:
    first = rich_run(make_run, "hpm-with-a-rather-long-name-" * 2)
    many = [make_run(f"run-{k}", method="mae", lines=5, seed=k) for k in range(7)]
    for runs in ([first], [first, *many]):
        page = opened(*runs)
        for width, scheme in SCHEMES:
            look(page, width, scheme)
            found = page.execute_script(CONTRASTS)
            low = {name: value for name, value in found.items() if value < 4.5}
            assert not low, (width, scheme, low)
            assert len(found) > 20
            assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert page.get_log("browser") == []
    assert page.current_url.startswith("file://")


def test_the_verdict_and_how_it_was_made_are_at_the_top(
    opened: Callable[..., Any], make_run: MakeRun
) -> None:
    page = opened(rich_run(make_run, "hpm"))
    assert texts(page, ".headline") == [
        "kNN 85.4 % (95 % interval 82.9 to 87.6), random init 76.4 %, raw pixels 40.9 %, on 900 "
        "test images: it learned."
    ]
    made = " ".join(" ".join(texts(page, ".made div")).split())
    for text in ("2 x NVIDIA H200", "patchmine 0.1.0", "images 3,150", "left out 1"):
        assert text in made
    assert texts(page, ".made code")[0].startswith("patchmine pretrain data=photos/photos/")


def test_tables_fold_on_a_phone(opened: Callable[..., Any], make_run: MakeRun) -> None:
    page = opened(rich_run(make_run, "hpm"), make_run("mae", method="mae"))
    look(page, 1280, "light")
    assert visible(page, ".comparison thead") == visible(page, "#eval-knn thead") == 1
    look(page, 390, "light")
    assert visible(page, ".comparison thead") == visible(page, "#eval-knn thead") == 0
    for table in page.find_elements("css selector", "table.stack"):
        assert table.rect["x"] + table.rect["width"] <= 390
    script = "return getComputedStyle(arguments[0], '::before').content"
    cells = page.find_elements("css selector", ".comparison tbody tr:first-child td")
    assert [page.execute_script(script, cell) for cell in cells[:2]] == ['"progress"', '"loss"']


def path_of(page: Any, run: int) -> list[tuple[float, float]]:
    selector = (
        f"#chart-loss .linear .faint[data-run='{run}'], #chart-loss .linear .line[data-run='{run}']"
    )
    text = page.find_element("css selector", selector).get_attribute("d")
    pairs = [pair.split() for pair in text.removeprefix("M").split("L")]
    return [(float(x), float(y)) for x, y in pairs]


def test_curves_are_drawn_over_images_epochs_and_time(
    opened: Callable[..., Any], make_run: MakeRun
) -> None:
    large, small = make_run("large", steps=100, lines=50), make_run("small", steps=100, lines=50)
    text = (small / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in text]
    for line in lines:  # a quarter of the batch, at the same speed
        if "samples" in line:
            line["samples"] //= 4
            line["epoch"] /= 4
    (small / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = opened(large, small)
    before = [path_of(page, run) for run in (0, 1)]
    assert [path[-1][0] for path in before] == [1000, 1000]
    assert texts(page, "#chart-loss .unit:not(.off)") == ["step"]
    for key, unit in (("images", "images"), ("epoch", "epoch"), ("time", "s")):
        click(page, f"[data-across='{key}']")
        after = [path_of(page, run) for run in (0, 1)]
        assert after[0][-1][0] == pytest.approx(1000, abs=0.2)
        assert after[1][-1][0] == pytest.approx(250, rel=0.05)
        assert [y for _, y in after[1]] == [y for _, y in before[1]]
        assert texts(page, "#chart-loss .unit:not(.off)") == [unit]
        assert texts(page, "[data-across][aria-pressed='true']") == [
            {"epoch": "epochs"}.get(key, key)
        ]
    click(page, "[data-across='images']")
    ticks = texts(page, "#chart-loss .tick.x:not(.off)")
    assert ticks[:2] == ["0", "5,000"]
    point_at(page, "loss", 0.5)
    (at,) = texts(page, "#chart-loss .at")
    assert at == "6,400 images"
    # The small run ended at 3,200.
    assert texts(page, "#chart-loss .readout b")[1] == "\N{EN DASH}"
    click(page, "[data-across='step']")
    assert [path_of(page, run) for run in (0, 1)] == before


def test_an_axis_that_a_run_does_not_know_is_not_offered(
    opened: Callable[..., Any], make_run: MakeRun
) -> None:
    folder = make_run("old", evals=False)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 9, "loss": 1.0}\n')
    page = opened(folder)
    assert texts(page, "[data-across]") == []
    page = opened(make_run("new"))
    assert texts(page, "[data-across]") == ["steps", "epochs", "images", "time"]


def test_without_scripts_the_page_is_whole(
    opened: Callable[..., Any], browser: Any, make_run: MakeRun
) -> None:
    folder = rich_run(make_run, "hpm")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page = opened(folder)
    assert visible(page, ".headline") == 1
    assert visible(page, ".across") == 0
    assert visible(page, "#chart-loss .linear .line") == 1
    assert texts(page, "#chart-loss .unit:not(.off)") == ["step"]
    assert visible(page, ".frames img") == 2


def test_of_one_run_changed_settings_stand_first(
    opened: Callable[..., Any], make_run: MakeRun
) -> None:
    folder = make_run("run", blr=3e-4)
    page = opened(folder)
    open_page(page, page.current_url)  # with details closed
    shown = [text for text in texts(page, "#settings dl div") if text]
    assert "blr\n0.0003" in shown
    assert not any(text.startswith("seed") for text in shown)
    click(page, "#settings details summary")
    assert any(text.startswith("seed") for text in texts(page, "#settings dl div"))

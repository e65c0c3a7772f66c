"""What a reader sees: the report in a headless Chromium, read back through WebDriver."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fixtures.webpage import click, heights, open_page, point_at, texts, visible
from patchmine.report.page import write_report

MakeRun = Callable[..., Path]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Callable[..., Any]:
    """``opened(run, run)`` shows the report of these run folders."""

    def show(*runs: Path) -> Any:
        browser.get_log("browser")
        browser.get_log("performance")
        open_page(browser, write_report(runs, tmp_path / "report.html").as_uri())
        return browser

    return show


def value_at(folder: Path, step: int, key: str) -> float:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next(float(line[key]) for line in lines if line["step"] == step and key in line)


def test_two_runs_are_compared_in_a_table(opened: Callable[..., Any], make_run: MakeRun) -> None:
    page = opened(make_run("hpm"), make_run("mae", method="mae", made=1300, seed=1))
    rows = texts(page, ".comparison tbody tr")
    assert rows[0].startswith("hpm")
    assert "step 2,000 of 2,000" in rows[0]
    assert "45.7 %" in rows[0]
    assert "step 1,300 of 2,000" in rows[1]
    assert "65 % done" in rows[1]
    assert "45.7 %" in texts(page, ".comparison .best")
    assert texts(page, "#eval-knn tbody .main") == ["45.7 %", "42.6 %"]
    assert "+13.3 points" in texts(page, "#eval-knn tbody tr")[0]


def test_each_run_has_one_curve_and_its_switch_hides_it(
    opened: Callable[..., Any], make_run: MakeRun
) -> None:
    page = opened(make_run("hpm"), make_run("mae", method="mae"))
    curve = "#chart-loss .linear .line[data-run='{}']"
    assert [visible(page, curve.format(run)) for run in (0, 1)] == [1, 1]
    assert visible(page, "#chart-loss-rank .linear .line") == 1
    click(page, "[data-toggle='1']")
    assert [visible(page, curve.format(run)) for run in (0, 1)] == [1, 0]
    assert visible(page, "[data-run='1'] svg path, path[data-run='1']") == 0
    assert texts(page, "#chart-loss .readout .name") == ["hpm", ""]
    click(page, "[data-toggle='1']")
    assert [visible(page, curve.format(run)) for run in (0, 1)] == [1, 1]


def test_pointing_reads_the_value_at_that_step(
    opened: Callable[..., Any], make_run: MakeRun
) -> None:
    folder = make_run("hpm", steps=100, lines=100)
    page = opened(folder)
    newest = texts(page, "#chart-loss .readout b")
    assert newest == [f"{value_at(folder, 100, 'loss'):.4f}"]
    assert texts(page, "#chart-loss .at") == ["last"]
    point_at(page, "loss", 0.30)
    assert texts(page, "#chart-loss .at") == ["step 30"]
    assert texts(page, "#chart-loss .readout b") == [f"{value_at(folder, 30, 'loss'):.4f}"]
    assert texts(page, "#chart-hard-share .readout b") == ["0.1500"]  # the other charts follow
    assert visible(page, "#chart-loss .dot") == visible(page, "#chart-loss .cross") == 1
    point_at(page, "loss", 0.60)
    assert texts(page, "#chart-loss .at") == ["step 60"]
    click(page, "h1")
    assert texts(page, "#chart-loss .readout b") == newest
    assert visible(page, ".dot") == 0


def test_arrow_keys_read_values_too(opened: Callable[..., Any], make_run: MakeRun) -> None:
    page = opened(make_run("hpm", steps=100, lines=100))
    plot = page.find_element("css selector", "#chart-loss .plot")
    plot.send_keys("\ue014")  # right arrow
    assert texts(page, "#chart-loss .at") == ["step 1"]
    plot.send_keys("\ue014\ue014\ue012")  # right, right, left
    assert texts(page, "#chart-loss .at") == ["step 2"]


def test_the_log_scale_replaces_curves_and_labels(
    opened: Callable[..., Any], make_run: MakeRun
) -> None:
    page = opened(make_run("hpm"))
    linear = heights(page, "#chart-loss .tick.y.linear")
    assert [a - b for a, b in pairwise(linear)] == pytest.approx(
        [linear[0] - linear[1]] * 3, abs=1.5
    )  # even gaps
    click(page, "#chart-loss button.log")
    assert visible(page, "#chart-loss .linear") == 0
    assert visible(page, "#chart-loss .log .line") == 1
    gaps = [a - b for a, b in pairwise(heights(page, "#chart-loss .tick.y.log"))]
    assert gaps[0] > 1.5 * gaps[-1]  # from 0.4 to 0.6 is further than from 0.8 to 1.0
    point_at(page, "loss", 0.5)
    dot = page.find_element("css selector", "#chart-loss .dot")
    centre = dot.location["y"] + dot.size["height"] / 2
    path = page.find_element("css selector", "#chart-loss .log .faint").rect
    assert path["y"] <= centre <= path["y"] + path["height"]
    click(page, "#chart-loss button.log")
    assert visible(page, "#chart-loss .linear .line") == 1


def test_the_slider_goes_through_the_pictures(
    opened: Callable[..., Any], make_run: MakeRun
) -> None:
    page = opened(make_run("hpm", samples=3))
    assert visible(page, ".frames img") == 1
    assert texts(page, ".slider output") == ["step 2,000"]
    page.find_element("css selector", ".slider input").send_keys("\ue012")
    assert texts(page, ".slider output") == ["step 1,000"]
    assert visible(page, ".frames img") == 1
    shown = next(
        image for image in page.find_elements("css selector", ".frames img") if image.is_displayed()
    )
    assert page.execute_script("return arguments[0].naturalWidth", shown) == 60
    assert shown.accessible_name.endswith("at step 1,000")


def test_settings_show_the_differences_first(opened: Callable[..., Any], make_run: MakeRun) -> None:
    page = opened(make_run("hpm"), make_run("mae", method="mae", blr=3e-4))
    shown = [text for text in texts(page, "table.settings tbody tr") if text]
    assert shown == ["method.name hpm mae", "blr 0.00015 0.0003"]
    click(page, "#settings details summary")
    assert "batch_size 128 128" in texts(page, "table.settings tbody tr")


def test_nothing_is_fetched_and_nothing_complains(
    opened: Callable[..., Any], make_run: MakeRun
) -> None:
    page = opened(make_run("<b>x", samples=2), make_run("mae", method="mae", data="</script>"))
    point_at(page, "loss", 0.5)
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [page.current_url]
    assert texts(page, ".legend button") == ["<b>x", "mae"]


def test_monitors_have_curves_and_a_sentence_above_them(
    opened: Callable[..., Any], make_run: MakeRun
) -> None:
    page = opened(make_run("ill", over_fitted=True), make_run("well", over_fitted=False))
    (told,) = texts(page, ".health li")
    assert told.startswith("ill: The run over-fits since epoch 2.6: the held-out loss rises (0.4")
    assert heights(page, ".health")[0] < heights(page, "#curves")[0]
    titles = texts(page, "#curves h3")
    assert {"RankMe", "Deviation of features", "Neighbours kept", "Held-out loss"} <= set(titles)
    assert titles.index("kNN top-1") < titles.index("RankMe")
    for chart in ("rankme", "feature-std", "neighbours-kept", "held-out-loss"):
        assert visible(page, f"#chart-monitor-{chart} .linear .line") == 2
        assert texts(page, f"#chart-monitor-{chart} .note")[0].endswith(".")
    assert texts(page, "#chart-monitor-neighbours-kept .readout b") == ["5.0 %", "5.0 %"]
    for width in (390, 1280):
        sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == 390}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert page.get_log("browser") == []


def test_it_fits_the_window_in_both_schemes(opened: Callable[..., Any], make_run: MakeRun) -> None:
    page = opened(make_run("hpm"), make_run("a-run-with-a-rather-long-name-" * 3, method="mae"))
    for scheme in ("light", "dark"):
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        script = "return getComputedStyle(document.body).{}.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)"
        ink, paper = (
            page.execute_script(script.format(name)) for name in ("color", "backgroundColor")
        )
        assert (ink < 150 and paper > 600) if scheme == "light" else (ink > 600 and paper < 150)
    for width in (900, 1400):
        page.set_window_size(width, 1000)
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_a_verdict_stands_above_runs_whose_charts_still_answer(
    opened: Callable[..., Any], make_run: MakeRun, tmp_path: Path
) -> None:
    entries = [
        {"start": start, "share": share, "images": 9, "steps": 3, "top1": top1, "std": 2.0}
        for start, top1s in {"pretrained": (40, 80), "random_init": (20, 60)}.items()
        for share, top1 in zip((0.01, 1), top1s, strict=True)
    ]
    compared = tmp_path / "verdict"
    (compared / "eval").mkdir(parents=True)
    (compared / "eval/shares.json").write_text(json.dumps({"entries": entries}))
    page = opened(compared, make_run("hpm", steps=100, lines=100))
    assert texts(page, ".headline")[0].startswith("With 1 % of the labels, pre-trained weights")
    assert texts(page, ".shares tbody tr")[0] == "1 % 9 3 40.0 ± 2.0 20.0 ± 2.0"
    tops = heights(page, ".headline, .still, #overview, #curves")
    assert tops == sorted(tops)
    assert texts(page, ".still .tick.x") == ["1 %", "100 %"]
    plot = page.find_element("css selector", ".still").rect
    for points in page.find_elements("css selector", ".still .points"):
        assert plot["x"] <= points.rect["x"]
        assert points.rect["x"] + points.rect["width"] <= plot["x"] + plot["width"]
    point_at(page, "loss", 0.30)
    assert texts(page, "#chart-loss .at") == ["step 30"]
    assert not page.get_log("browser")


def test_scores_of_objects_fit_a_phone(opened: Callable[..., Any], make_run: MakeRun) -> None:
    names = ("map", "map50", "map75", "map_small", "map_medium", "map_large", "mar100")
    scores = {f"{kind}{name}": 41.25 for kind in ("", "mask_") for name in names}
    by_class = {name: {"ap": 40.0, "mask_ap": 3.0, "objects": 1130} for name in ("cell", "x" * 60)}
    folder = make_run("found", evals=False, knn=False)
    (folder / "eval").mkdir()
    (folder / "eval" / "test.json").write_text(json.dumps({**scores, "per_class": by_class}))
    page = opened(folder)
    for width in (390, 1280):
        sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == 390}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        rows = texts(page, "#eval-test tbody tr")
        assert rows == [f"found, {kind}" + " 41.2 %" * 7 for kind in ("boxes", "masks")]
        assert texts(page, ".classes tbody tr")[0] == "cell 40.0 % 3.0 % 1,130"
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert page.get_log("browser") == []

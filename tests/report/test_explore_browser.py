"""The page of `patchmine explore` as a person uses it, in a headless Chromium."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fixtures.webpage import open_page
from patchmine.report.explore import explore
from patchmine.report.settings import ExploreSettings

RIGHT, LEFT, HOME, END, ENTER = "\ue014", "\ue012", "\ue011", "\ue010", "\ue007"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, hpm_run: Path, image_folder: Path) -> Path:
    """The page about 37 images, of which two are one, that shows 20 of them."""
    root = tmp_path_factory.mktemp("explored")
    shutil.copytree(image_folder, root / "images")
    name = "<b>'the' \"copy\" & more.jpg"
    shutil.copy(root / "images" / "circle" / "0000.jpg", root / "images" / name)
    out = root / "page.html"
    data = str(root / "images")
    settings = dict(target=str(hpm_run), data=data, out=str(out), workers=0, device="cpu")
    explore(ExploreSettings(**settings, shown=20, clusters=3))
    return out


@pytest.fixture
def page(browser: Any, written: Path) -> Any:
    """The page, freshly opened."""
    browser.get_log("browser")
    browser.get_log("performance")
    browser.set_window_size(1300, 1000)
    open_page(browser, written.as_uri())
    return browser


@pytest.fixture(scope="module")
def nearest(written: Path) -> dict[str, tuple[str, str]]:
    """Name -> its nearest neighbour and the cosine, of the table."""
    root = f"{written.parent / 'images'}/"
    with written.with_suffix(".csv").open(encoding="utf-8", newline="") as handle:
        return {
            row["file"].removeprefix(root): (
                row["nearest"].removeprefix(root),
                f"{float(row['similarity']):.4f}",
            )
            for row in csv.DictReader(handle)
        }


def one(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def all_of(page: Any, selector: str) -> list[Any]:
    return page.find_elements("css selector", selector)


def name_of(tile: Any) -> str:
    return tile.get_attribute("aria-label").rsplit(", ", 1)[0]


def press(page: Any, tile: Any) -> None:
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", tile)
    tile.click()


def test_every_tile_has_its_picture(page: Any) -> None:
    script = (
        "return [...document.querySelectorAll('.tile, #chosen-picture')].map(t => [t.dataset.item,"
        " t.querySelector('img').src.length, t.querySelector('img').src.slice(0, 15)])"
    )
    tiles = page.execute_script(script)
    assert len(tiles) > 40
    assert all(length > 100 and kind == "data:image/webp" for _, length, kind in tiles)
    one(page, "#all .tile:last-child")
    assert page.execute_script(
        "const i = document.querySelector('#duplicates img'); return i.complete && i.naturalWidth"
    )


def test_clicking_shows_the_neighbours(page: Any, nearest: dict[str, tuple[str, str]]) -> None:
    for tile in all_of(page, "#outliers .tile")[:3]:
        press(page, tile)
        name = name_of(tile)
        assert one(page, "#chosen-name").text == name
        assert tile.get_attribute("aria-current") == "true"
        first = one(page, "#chosen-near li")
        other, cosine = nearest[name]
        shown = all_of(first, "button")
        told = shown[0].get_attribute("aria-label") if shown else first.text
        assert told.startswith(other)
        assert cosine in told
    assert len(all_of(page, "#chosen-near li")) == 10


def test_neighbours_lead_on_and_back(page: Any) -> None:
    start = one(page, "#chosen-name").text
    assert not one(page, "#back").is_enabled()
    neighbour = one(page, "#chosen-near .tile")
    name = neighbour.get_attribute("aria-label").rsplit(", ", 1)[0]
    press(page, neighbour)
    assert one(page, "#chosen-name").text == name != start
    assert page.switch_to.active_element.get_attribute("id") == "chosen-name"
    one(page, "#back").click()
    assert one(page, "#chosen-name").text == start
    assert not one(page, "#back").is_enabled()


def test_the_keyboard_does_what_the_mouse_does(page: Any) -> None:
    tiles = all_of(page, "#clusters .tile")
    script = "return [...document.querySelectorAll('main .tiles')].map(l => l.querySelectorAll('[tabindex=\"0\"]').length)"
    assert set(page.execute_script(script)) == {1}
    page.execute_script("arguments[0].focus()", tiles[0])
    tiles[0].send_keys(RIGHT)
    focused = page.switch_to.active_element
    assert focused == tiles[1]
    focused.send_keys(ENTER)
    assert one(page, "#chosen-name").text == name_of(tiles[1])
    assert one(page, "#spoken").get_attribute("textContent").startswith(name_of(tiles[1]))
    page.switch_to.active_element.send_keys(HOME)
    assert page.switch_to.active_element == tiles[0]
    assert set(page.execute_script(script)) == {1}


def test_the_filter_leaves_the_names_that_fit(page: Any) -> None:
    field = one(page, "#filter")
    field.send_keys("CIRCLE/")
    left = [tile for tile in all_of(page, "#all .tile") if tile.is_displayed()]
    assert 0 < len(left) < 20
    assert all("circle/" in tile.get_attribute("aria-label") for tile in left)
    assert one(page, "#found").text == f"{len(left)} found"


def test_odd_names_are_text_and_nothing_is_fetched(page: Any) -> None:
    copy = next(tile for tile in all_of(page, "#duplicates .tile") if "copy" in name_of(tile))
    press(page, copy)
    assert one(page, "#chosen-name").text == "<b>'the' \"copy\" & more.jpg"
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [page.current_url]


def test_it_fits_the_window_in_both_schemes(page: Any) -> None:
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        script = "return getComputedStyle(document.getElementById('chosen')).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0)"
        assert (page.execute_script(script) > 600) == (scheme == "light")
    for width in (500, 900, 1400):
        page.set_window_size(width, 1000)
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert one(page, "#chosen").is_displayed()

"""What a reader of the documentation sees: the site in a headless Chromium, wide and narrow."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fixtures.webpage import open_page

WIDE, NARROW = 1280, 390
OVERFLOW = "return document.documentElement.scrollWidth - innerWidth"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The folder of the built documentation."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (pip install patchmine[dev])")
    folder = tmp_path_factory.mktemp("docs") / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        words, cwd=repository, env=environment, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served on this machine: its search asks for a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def resize(browser: Any, width: int) -> None:
    """A window of this width, whose bars of scrolling lie above the page."""
    sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)


def shown(browser: Any, page: str, width: int) -> Any:
    resize(browser, width)
    open_page(browser, page)
    return browser


def places(page: Any, selector: str) -> list[dict[str, float]]:
    return [element.rect for element in page.find_elements("css selector", selector)]


def test_the_menu_of_a_wide_window_is_one_line_of_few_groups(browser: Any, address: str) -> None:
    page = shown(browser, f"{address}data/", WIDE)
    entries = places(page, ".navbar .navbar-nav > li")
    assert 4 < len(places(page, ".navbar .navbar-nav:first-of-type > li")) <= 7
    assert len({round(entry["y"]) for entry in entries}) == 1
    ends = [entry["x"] + entry["width"] for entry in entries]
    assert all(end <= WIDE for end in ends)
    assert page.find_element("css selector", ".navbar").rect["height"] < 70


def test_every_entry_is_reached_on_a_telephone(browser: Any, address: str) -> None:
    page = shown(browser, address, NARROW)
    menu = page.find_element("css selector", "#navbar-collapse")
    assert not menu.is_displayed()
    page.find_element("css selector", ".navbar-toggler").click()
    page.implicitly_wait(2)
    page.find_element("css selector", "#navbar-collapse.show")  # opened, not opening
    page.implicitly_wait(0)
    for group in page.find_elements("css selector", "#navbar-collapse .dropdown"):
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", group)
        group.find_element("css selector", ".dropdown-toggle").click()
        links = group.find_elements("css selector", ".dropdown-item")
        assert links
        for link in links:
            page.execute_script("arguments[0].scrollIntoView({block: 'center'})", link)
            seen = "const box = arguments[0].getBoundingClientRect();"
            seen += "const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];"
            seen += "return arguments[0].contains(document.elementFromPoint(x, y))"
            assert page.execute_script(seen, link), f"{link.text} cannot be touched"
            assert page.execute_script(OVERFLOW) <= 0


def test_no_page_is_wider_than_the_window(browser: Any, site: Path, address: str) -> None:
    pages = [page.parent.relative_to(site).as_posix() for page in site.rglob("index.html")]
    assert len(pages) > 25
    too_wide = []
    for page in pages:
        open_page(browser, f"{address}{page}/")
        for width in (NARROW, WIDE):
            resize(browser, width)
            if browser.execute_script(OVERFLOW) > 0:
                too_wide.append(f"{page} at {width}")
    assert not too_wide


def test_the_colours_are_those_of_the_system_and_nothing_comes_from_elsewhere(
    browser: Any, address: str
) -> None:
    browser.get_log("browser")
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        page = shown(browser, f"{address}api/", WIDE)
        script = "return getComputedStyle(arguments[0]).color.match(/\\d+/g).slice(0, 3)"
        for selector in ("body", "pre .n"):
            element = page.find_element("css selector", selector)
            brightness = sum(map(float, page.execute_script(script, element)))
            assert (brightness < 400) == (scheme == "light"), selector
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    addresses = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert all(name.startswith(address) for name in browser.execute_script(addresses))
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]

"""What every test may ask for: a folder of images, the shared data where it is at hand, one thread
per process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

from patchmine.runs.folder import RunFolder
from patchmine.train.checkpoint import list_checkpoints

# Tiny tensors gain nothing from threads, and processes that a test starts inherit this; results
# must not depend on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")

settings.register_profile("patchmine", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("patchmine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _unsettled() -> Iterator[None]:
    """Nothing waits for a disk: no test cuts the power, and what a process wrote outlives it.

    Processes that tests start settle their files as always.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared(repository: Path) -> Path:
    """The folder of shared data: PATCHMINE_SHARED, or `../shared` beside the repository."""
    folder = Path(os.environ.get("PATCHMINE_SHARED") or repository.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"the shared data folder {folder} is missing; set PATCHMINE_SHARED")
    return folder


@pytest.fixture(scope="session")
def weights() -> Callable[[Path | RunFolder], dict[str, Tensor]]:
    """Reads the newest checkpoint of a run.  Copied, because safetensors maps the file and some
    tests damage it.
    """

    def read(run: Path | RunFolder) -> dict[str, Tensor]:
        folder = run.path if isinstance(run, RunFolder) else run
        newest = list_checkpoints(folder / "checkpoints")[-1]
        return {name: tensor.clone() for name, tensor in load_file(newest).items()}

    return read


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images of 40x48 in `circle/`, `square/`, `stripes/`, half PNG, half JPEG.  Read only: all
    tests share it.
    """
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for shape in ("circle", "square", "stripes"):
        (root / shape).mkdir()
        for number in range(12):
            suffix = "png" if number % 2 else "jpg"
            _draw(shape, generator).save(root / shape / f"{number:04d}.{suffix}")
    return root


def _draw(shape: str, generator: np.random.Generator) -> Image.Image:
    noise = generator.integers(0, 90, (40, 48, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    pen = ImageDraw.Draw(image)
    colour = tuple(int(c) for c in generator.integers(120, 255, 3))
    left, top = (int(v) for v in generator.integers(2, 16, 2))
    if shape == "stripes":
        for row in range(top % 5, 40, 5):
            pen.line([(0, row), (47, row)], fill=colour)
    else:
        draw = pen.ellipse if shape == "circle" else pen.rectangle
        draw([left, top, left + 22, top + 20], fill=colour)
    return image


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium, driven through WebDriver."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver on the path (Debian: chromium-driver)")
    selenium = pytest.importorskip(
        "selenium", reason="selenium is not installed (pip install patchmine[dev])"
    )
    assert selenium is not None
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,1000",
    ):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={profile}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to start its sandbox as root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()

"""The wheel, built and installed by pip alone, used outside of the clone: `make test-wheel`."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "patchmine"
# Endings of files that the package reads while it works, each of which some room of it has
READ = {".py", ".typed", ".yaml", ".html", ".css", ".js"}


def run(*words: str | Path, cwd: Path) -> str:
    """What a command prints; an AssertionError with it where the command fails."""
    # PYTHONPATH and the like would let the clone in by the back door
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, (
        f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("patchmine-*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a fresh environment that holds the wheel, and borrows what it depends on."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    programs = folder / "bin"
    run(programs / "python", "-m", "pip", "install", "--no-deps", wheel, cwd=folder)
    # A line of a .pth file is a place to import from; an editable patchmine there stays unknown,
    # since .pth files of that place are not read in turn.
    (own,) = (folder / "lib").glob("python3*/site-packages")
    (own / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return programs


def test_the_wheel_holds_all_that_the_package_reads(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in PACKAGE.rglob("*") if path.suffix in READ]
    assert {path.suffix for path in files} == READ
    assert {path.relative_to(PACKAGE.parent).as_posix() for path in files} <= held
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in held)
    assert not [name for name in held if name.startswith(("tests/", "docs/"))]


def test_a_run_and_its_report_outside_of_the_clone(programs: Path, tmp_path: Path) -> None:
    patchmine = programs / "patchmine"
    place = run(
        programs / "python", "-c", "import patchmine; print(patchmine.__file__)", cwd=tmp_path
    )
    assert Path(place.strip()).is_relative_to(programs.parent)
    assert "pretrain" in run(patchmine, "--help", cwd=tmp_path)
    assert "photos-demo" in run(patchmine, "list", "recipes", cwd=tmp_path)
    words = ("steps=2", "batch_size=8", "warmup_epochs=0", "eval_every=0", "workers=0", "out=run")
    run(patchmine, "pretrain", "photos-demo", *words, cwd=tmp_path)
    run(patchmine, "report", "run", "out=report.html", cwd=tmp_path)
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    page = (tmp_path / "report.html").read_text()
    assert "<style>" in page
    assert "<script" in page

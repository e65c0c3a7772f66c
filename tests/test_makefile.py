"""`make install`: which PyTorch it asks pip for, and what it says of a choice that cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile, and in .venv a Python that only tells what it is asked for."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "asked: $*"\n')
    python.chmod(0o755)
    return tmp_path


def make(clone: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Without what a `make` around this test hands down
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "-C", clone, *words], env=clean, capture_output=True, text=True, timeout=60
    )


def asked(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("asked: ")]


def test_pip_shows_its_progress_to_users_and_what_is_fetched_is_said_before(clone: Path) -> None:
    done = make(clone, "install")
    (install,) = asked(done)
    assert "--quiet" not in install
    assert "--constraint constraints.txt" in install
    assert install.endswith("--editable .[demo]")
    before = done.stdout.partition("asked: ")[0]
    assert "GB" in before
    assert "TORCH=cpu" in before


def test_torch_of_another_place_comes_with_its_torchvision_before_the_rest(clone: Path) -> None:
    torch, rest = asked(make(clone, "install", "TORCH=cpu", "TORCH_INDEX=file:///wheels"))
    assert torch.endswith("--no-deps --index-url file:///wheels torch torchvision")
    assert "--constraint constraints.txt" in torch
    assert "--index-url" not in rest


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["TORCH=cpu"], "TORCH=cpu needs TORCH_INDEX=ADDRESS too"),
        (["TORCH=cuda"], "TORCH=cuda is not known: give TORCH=cpu"),
        (["TORCH_INDEX=x"], "TORCH_INDEX=x is read with TORCH=cpu alone"),
    ],
)
def test_a_choice_that_cannot_be_is_told_and_nothing_installed(
    clone: Path, words: list[str], sentence: str
) -> None:
    done = make(clone, "install", *words)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "asked:" not in done.stdout
    assert not (clone / ".venv" / ".ready-user").exists()


def test_torch_that_is_there_is_not_exchanged_unseen(clone: Path) -> None:
    make(clone, "install")
    done = make(clone, "install", "TORCH=cpu", "TORCH_INDEX=file:///wheels")
    assert asked(done) == []
    assert "to exchange it, `make clean` first" in done.stdout

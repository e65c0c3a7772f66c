"""Twenty steps of every method's small recipe give the losses that are kept in losses.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import KEPT, ROWS, STEPS, lines_of, train

import patchmine.methods

TOLERANCE = 1e-4  # between instruction sets 1e-5 was seen; `make losses BASE=main` compares bits
ACCEPT = (
    "If the change is meant: see with `make losses BASE=main` what it moves, accept the new losses"
    " by `.venv/bin/python tests/losses/small.py`, commit tests/losses/losses.json, and say in the"
    " commit and in CHANGELOG.md why they moved"
)
LOSSES: dict[str, list[float]] = json.loads(KEPT.read_text(encoding="utf-8"))


def test_every_method_has_a_row_and_losses() -> None:
    assert set(patchmine.methods.METHODS) <= set(ROWS), "add a row to tests/losses/small.py"
    assert list(LOSSES) == list(ROWS), ACCEPT


@pytest.mark.parametrize("name", ROWS)
def test_twenty_steps_give_the_kept_losses(name: str, tmp_path: Path) -> None:
    found = [line["loss"] for line in lines_of(train(name, tmp_path))]
    assert len(found) == STEPS
    for step, (loss, kept) in enumerate(zip(found, LOSSES[name], strict=True), start=1):
        assert loss == pytest.approx(kept, rel=TOLERANCE), f"{name}, step {step}. {ACCEPT}"

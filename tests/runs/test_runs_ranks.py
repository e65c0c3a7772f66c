"""Processes of a run that do not belong together: one sentence, soon, and nothing is lost."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from drawn import draw_images

from fixtures.ranks import finish, start_ranks
from fixtures.small_runs import DECODER, SMALL, VIT

pytestmark = pytest.mark.slow

SECONDS = 200.0  # far more than it takes, and far less than a collective would wait


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images") / "all", 16, ("cat", "dog"))


def words(data: Path, out: Path, **settings: object) -> list[str]:
    given = SMALL | VIT | DECODER | {"steps": 2, "data": data, "out": out} | settings
    return [f"{name}={value}" for name, value in given.items() if name != "say"]


def ended(programs: list[list[str]], own: list[dict[str, str]] | None = None) -> list[str]:
    """What processes said that all end with code 2, without a traceback, the first one for all."""
    processes = start_ranks([["-m", "patchmine", *each] for each in programs], own=own or [])
    said = finish(processes, SECONDS)
    assert [process.returncode for process in processes] == [2] * len(programs), "\n".join(said)
    assert not any("Traceback" in text for text in said), said
    return [" ".join(text.split()) for text in said]


DIFFERENT: dict[str, tuple[dict[str, object], str]] = {
    "sharding": ({"sharding": "fsdp"}, "sharding is ddp on HOST (rank 0) and fsdp on"),
    "resume": ({"resume": "auto"}, "resume is never on HOST (rank 0) and auto on"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_other_settings_of_one_rank_end_all(case: str, images: Path, tmp_path: Path) -> None:
    change, sentence = DIFFERENT[case]
    out = tmp_path / "run"
    said = ended([["pretrain", *words(images, out)], ["pretrain", *words(images, out, **change)]])
    assert sentence.replace("HOST", socket.gethostname()) in said[0]
    assert said[0].endswith("give all of them the same")
    assert not out.exists()

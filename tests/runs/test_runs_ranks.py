"""Processes of a run that do not belong together: one sentence, soon, and nothing is lost."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from drawn import draw_images

import patchmine
from fixtures.ranks import finish, start_ranks
from fixtures.small_runs import DECODER, SMALL, VIT

pytestmark = pytest.mark.slow

SECONDS = 500.0  # far more than it takes, and far less than a collective would wait


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


def other_code(top: Path) -> dict[str, str]:
    """An environment in which patchmine is a copy of which one file has a line more."""
    shutil.copytree(Path(patchmine.__file__).parent, top / "other/patchmine")
    with (top / "other/patchmine/ops/losses.py").open("a") as file:
        file.write("# edited\n")
    return {"PYTHONPATH": str(top / "other")}


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


def test_other_code_and_another_command_of_one_rank_end_all(images: Path, tmp_path: Path) -> None:
    given = ["pretrain", *words(images, tmp_path / "run")]
    said = ended([given, given], [{}, other_code(tmp_path)])
    assert "differ: the code of patchmine (its fingerprint) is" in said[0]
    tuned = dict(image_size=16, steps=2, device="cpu", workers=0, out=tmp_path / "run", data=images)
    other = ["finetune", VIT["model"], *(f"{name}={value}" for name, value in tuned.items())]
    assert "the processes of this run differ: " in ended([given, other])[0]
    assert not (tmp_path / "run").exists()


def test_other_or_missing_data_of_one_rank_end_all(images: Path, tmp_path: Path) -> None:
    def pretrain(data: Path) -> list[str]:
        return ["pretrain", *words(data, tmp_path / "run", sharding="fsdp")]

    fewer = draw_images(tmp_path / "fewer", 12, ("cat", "dog"))
    said = ended([pretrain(images), pretrain(fewer)])
    assert "differ: data is 16 items with fingerprint" in said[0]
    empty = tmp_path / "empty"
    empty.mkdir()
    said = ended([pretrain(images), pretrain(empty)])
    assert f"rank 1 on {socket.gethostname()}: " in said[0]
    assert "empty" in said[0]
    said = ended([pretrain(images), pretrain(tmp_path / "gone")])  # one that never comes
    assert "rank 1 of 2 did not come within 60 seconds: see what they said" in said[0]
    assert "gone" in said[1]
    assert not (tmp_path / "run").exists()


def test_processes_that_a_batch_cannot_be_shared_out_to(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    patchmine.pretrain(data=images, out=out, **SMALL, **VIT, **DECODER, steps=2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    said = ended([["resume", str(out), "sharding=fsdp"]] * 3)
    assert (
        "batch_size=8 cannot be shared out to 3 processes x accumulate=1: start 2 or 4" in said[0]
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

"""Checkpoints in parts: joined, damaged, written over and cut off at any file call; blocks that are
computed again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from torch import Tensor

from patchmine.errors import UserError
from patchmine.train import checkpoint
from patchmine.train.background import Beside
from patchmine.train.checkpoint import DamagedCheckpointError, list_checkpoints, load, load_newest
from patchmine.train.engine import Engine
from patchmine.train.pieces import Piece
from patchmine.train.saving import PartsSaver
from patchmine.train.settings import TrainSettings
from patchmine.train.step import Stepper
from patchmine.types import Progress

WEIGHT, COUNT = torch.arange(12.0).view(6, 2), torch.tensor(7)
FACTS = {"identity": {"data": "abc"}}


def write_parts(folder: Path, step: int) -> Path:
    """A checkpoint of two processes, of which the second holds the last two rows."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    for number, rows in enumerate((slice(0, 4), slice(4, 6))):
        tensors = {"model": {"w": WEIGHT[rows]}, "optimizer": {"w.exp_avg": -WEIGHT[rows]}}
        if number == 0:
            tensors["model"]["count"] = COUNT
        starts = dict.fromkeys(("model.w", "optimizer.w.exp_avg"), (rows.start, 6))
        piece = Piece(number, 2, "first", starts)
        checkpoint.write_file(path / piece.file, step, tensors, FACTS, piece)
    return path


def save(engine: Engine, folder: Path, step: int, **given: Any) -> None:
    model = given.pop("model", {"w": WEIGHT, "count": COUNT})
    how = {"facts": FACTS, "keep": 2} | given
    PartsSaver(engine, folder, step, **how).save(model, {"w.exp_avg": -WEIGHT})


def test_what_processes_wrote_apart_is_read_whole(tmp_path: Path) -> None:
    path = write_parts(tmp_path, 5)
    checkpoint.point(path, "last")
    found = load(tmp_path / "last")
    assert (found.step, found.facts, list_checkpoints(tmp_path)) == (5, FACTS, [path])
    assert torch.equal(found.model["w"], WEIGHT)
    assert torch.equal(found.model["count"], COUNT)
    assert torch.equal(found.optimizer["w.exp_avg"], -WEIGHT)
    assert load(path, parts=("model",)).optimizer == {}
    with pytest.raises(DamagedCheckpointError, match="a part of a checkpoint, which is its folder"):
        load(path / Piece(0, 2, "").file)


def remove(second: Path) -> None:
    second.unlink()


def alter(second: Path) -> None:
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)


def cut(second: Path) -> None:
    second.write_bytes(second.read_bytes()[:-8])


def mix(second: Path) -> None:
    piece = Piece(1, 2, "another", {"model.w": (4, 6)})
    checkpoint.write_file(second, 5, {"model": {"w": WEIGHT[4:]}, "optimizer": {}}, FACTS, piece)


def shorten(second: Path) -> None:
    piece = Piece(1, 2, "first", {"model.w": (4, 6)})
    checkpoint.write_file(second, 5, {"model": {"w": WEIGHT[4:5]}, "optimizer": {}}, FACTS, piece)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (remove, "its file part-00002-of-00002.safetensors is missing"),
        (alter, "checksum of .* differs in part-00002-of-00002.safetensors"),
        (cut, "incomplete|offset|buffer|header"),
        (mix, "its part 2 belongs to another checkpoint"),
        (shorten, "rows of its tensor w are missing"),
    ],
)
def test_a_damaged_part_is_passed_over_with_its_checkpoint(
    tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    earlier = checkpoint.save(tmp_path, 4, {"w": WEIGHT}, {}, FACTS, keep=3)
    path = write_parts(tmp_path, 5)
    spoil(path / Piece(1, 2, "").file)
    with pytest.raises(DamagedCheckpointError, match=said):
        load(path)
    told: list[str] = []
    assert load_newest(tmp_path, told.append).path == earlier
    assert str(path) in told[0]
    assert str(earlier) in told[0]


def test_both_kinds_are_kept_counted_and_written_over(engine: Engine, tmp_path: Path) -> None:
    for step in (1, 2):
        save(engine, tmp_path, step)
    checkpoint.save(tmp_path, 3, {"w": WEIGHT}, {}, FACTS, keep=2)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-00000002", "step-00000003.safetensors"]
    save(engine, tmp_path, 3, best=2)  # the one that is there was passed over
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    save(engine, tmp_path, 3, best=2, model={"w": WEIGHT + 1})
    save(engine, tmp_path, 4, best=2)
    save(engine, tmp_path, 5, best=2)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-00000002", "step-00000004", "step-00000005"]
    assert (tmp_path / "best").resolve().name == "step-00000002"
    assert load(tmp_path / "last").step == 5
    assert not [*tmp_path.glob(".*")]


def test_a_state_that_is_not_finite_is_not_written_in_parts(engine: Engine, tmp_path: Path) -> None:
    save(engine, tmp_path, 1)
    with pytest.raises(UserError, match=r"after step 2 model\.w holds .*the last good state is"):
        save(engine, tmp_path, 2, model={"w": WEIGHT / 0})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]


class Killed(BaseException):
    """What a signal does that no process can refuse."""


def save_file(_: Engine, folder: Path, step: int) -> None:
    state = {"w": WEIGHT, "count": COUNT}
    checkpoint.save(folder, step, state, {"w.exp_avg": -WEIGHT}, FACTS, keep=2)


def beside(write: Callable[..., None], *given: Any) -> None:
    """The same in a thread."""
    work = Beside()
    work.begin(lambda: write(*given))
    work.wait()


@pytest.mark.parametrize(
    ("end", "write"),
    [
        ("", save),
        ("", partial(beside, save)),
        (".safetensors", save_file),
        (".safetensors", partial(beside, save_file)),
    ],
)
def test_a_kill_at_any_file_call_loses_no_checkpoint(
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    write: Callable[..., None],
) -> None:
    calls = ("rename", "replace", "mkdir", "symlink", "fsync", "unlink", "rmdir")
    left = 0

    def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:  # and nothing is done any more
                raise Killed
            return real(*args, **keywords)

        return call

    for number in range(100):
        folder = tmp_path / str(number)
        write(engine, folder, 1)
        write(engine, folder, 2)
        left = number
        with monkeypatch.context() as patched:
            for name in calls:
                patched.setattr(os, name, mortal(getattr(os, name)))
            patched.setattr(checkpoint, "save_file", mortal(checkpoint.save_file))
            try:
                write(engine, folder, 3)
                lived = True
            except Killed:
                lived = False
        newest = load_newest(folder, pytest.fail)
        assert newest.step in (2, 3)
        assert torch.equal(newest.model["w"], WEIGHT)
        if lived:
            break
        write(engine, folder, 3)
        names = [path.name for path in list_checkpoints(folder)]
        assert names == [f"step-00000002{end}", f"step-00000003{end}"]
        assert not [*folder.glob(".*")]
    assert number > 8


def test_compiled_blocks_are_neither_divided_nor_computed_again() -> None:
    for given in ({"sharding": "fsdp"}, {"remat": "blocks"}):
        with pytest.raises(ValueError, match="compiled blocks do not go with: set compile=false"):
            TrainSettings(compile=True, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["hpm", "mokd"])
def test_blocks_that_are_computed_again_keep_less_and_change_no_bit(
    engine: Engine, name: str
) -> None:
    kept, weights = dict[str, int](), dict[str, dict[str, Tensor]]()
    for remat in ("none", "blocks"):
        method = sharded.build(name)
        settings = TrainSettings(batch_size=sharded.IMAGES, blr=0.1, remat=remat)  # type: ignore[arg-type]
        stepper = Stepper(method, engine, settings)
        method.train()
        seen: dict[int, int] = {}

        def note(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        batches = sharded.micro_batches(engine, name, 0, 1)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            stepper.make(Progress(0, 4, 2), batches)
        stepper.make(Progress(1, 4, 2), batches)
        kept[remat], weights[remat] = sum(seen.values()), method.state_dict()
    assert kept["blocks"] < 0.8 * kept["none"]
    for key, value in weights["none"].items():
        assert torch.equal(weights["blocks"][key], value), key

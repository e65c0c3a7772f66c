"""Checkpoints under trouble: kill, full disk, damage, shared tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patchmine.errors import UserError
from patchmine.train import checkpoint as checkpoints
from patchmine.train.checkpoint import (
    DamagedCheckpointError,
    list_checkpoints,
    load,
    load_newest,
    refuse_shared,
    save,
)

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(7), "half": torch.ones(3).bfloat16()}
MOMENTS = {"a.weight.exp_avg": torch.full((2, 3), 0.5), "a.weight.step": torch.tensor(3.0)}


def write(folder: Path, step: int, keep: int = 3) -> Path:
    return save(folder, step, STATE, MOMENTS, {"identity": {"data": "abc"}}, keep=keep)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path, 12)
    assert path.name == "step-00000012.safetensors"
    assert (tmp_path / "last").readlink() == Path(path.name)
    found = load(tmp_path / "last")
    assert found.step == 12
    assert found.facts == {"identity": {"data": "abc"}}
    for want, got in ((STATE, found.model), (MOMENTS, found.optimizer)):
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) and want[name].dtype == got[name].dtype for name in want)
    assert load(path, parts=("model",)).optimizer == {}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert write(tmp_path, 1).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000003.safetensors",
        "step-00000004.safetensors",
    ]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_newest_falls_back_and_names_both(tmp_path: Path, damage) -> None:
    for step in (5, 10):
        write(tmp_path, step)
    newest = tmp_path / "step-00000010.safetensors"
    damage(newest)
    said: list[str] = []
    assert load_newest(tmp_path, said.append).step == 5
    assert len(said) == 1
    assert str(newest) in said[0]
    assert "step-00000005.safetensors" in said[0]
    # Going on from 5, the damaged file of a step that was not reached yet must not outlive the new ones.
    write(tmp_path, 7, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000007.safetensors"]


def test_no_usable_checkpoint_is_the_users_to_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in"):
        load_newest(tmp_path, print)
    truncate(write(tmp_path, 5))
    with pytest.raises(UserError, match=r"step-00000005\.safetensors"):
        load_newest(tmp_path, print)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.safetensors"
    torch.save({"model": STATE}, path)
    with pytest.raises(DamagedCheckpointError):
        load(path)


def test_a_full_disk_leaves_earlier_checkpoints_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 5)

    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*patchmine resume.*earlier checkpoints are intact"):
        write(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000005.safetensors"]
    assert load(tmp_path / "last").step == 5


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from patchmine.errors import UserError
from patchmine.train.checkpoint import save
folder = Path(sys.argv[1])
save(folder, 1, {"w": torch.ones(10)}, {}, {}, keep=3)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save(folder, 2, {"w": torch.ones(10_000)}, {}, {}, keep=3)
except UserError as error:
    sys.exit(f"UserError: {error}")
"""


def test_the_operating_system_refusing_to_write_is_the_users_to_know(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "UserError: checkpoint" in done.stderr
    assert "File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000001.safetensors"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from patchmine.train.checkpoint import load, load_newest, save
torch.set_num_threads(1)
folder = Path(sys.argv[1])
def refuse(text):
    raise AssertionError(text)
random.seed(0)
reached = 0
for trial in range(12):
    child = os.fork()
    if child == 0:
        while True:
            reached += 1
            save(folder, reached, {"w": torch.full((200_000,), float(reached))}, {}, {}, keep=2)
    time.sleep(0.02 + 0.1 * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = load_newest(folder, refuse)
    assert (found.model["w"] == found.step).all()
    # A kill between the two renames leaves `last` one behind, never dangling.
    assert load(folder / "last").step in (found.step, found.step - 1)
    assert found.step >= reached
    reached = found.step
assert reached > 12
save(folder, reached + 1, {"w": torch.zeros(1)}, {}, {}, keep=2)
assert not (folder / ".writing").exists()
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 0)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_tensor_under_two_names_is_refused_early() -> None:
    shared = torch.ones(3)
    with pytest.raises(ValueError, match="'x' and 'y' are one tensor"):
        refuse_shared({"x": shared, "y": shared.view(3)})
    refuse_shared({"x": shared, "z": torch.ones(3), "empty": torch.ones(0), "empty2": torch.ones(0)})

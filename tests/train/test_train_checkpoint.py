"""Checkpoints under trouble: kill, full disk, damage, shared tensors."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file

from patchmine.errors import UserError
from patchmine.train import checkpoint as checkpoints
from patchmine.train.checkpoint import (
    DamagedCheckpointError,
    list_checkpoints,
    load,
    load_newest,
    newest_finite,
    point,
    point_again,
    refuse_shared,
    save,
)

STATE = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "count": torch.tensor(7),
    "half": torch.ones(3).bfloat16(),
}
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
        assert all(
            torch.equal(want[name], got[name]) and want[name].dtype == got[name].dtype
            for name in want
        )
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


def turn_into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def turn_into_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def turn_into_a_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def take_the_older_one(path: Path) -> None:
    path.write_bytes(path.with_name("step-00000005.safetensors").read_bytes())


def name_the_older_one(path: Path) -> None:
    path.write_text("step-00000005.safetensors\n")


DAMAGES = [
    *(truncate, flip_a_bit, empty, turn_into_a_folder, turn_into_a_pipe, turn_into_a_broken_link),
    *(take_the_older_one, name_the_older_one),
]


@pytest.mark.parametrize("damage", DAMAGES)
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
    # Going on from 5, the damaged file of a step that was not reached yet must not outlive the new
    # ones.
    write(tmp_path, 7, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path) if path.is_file()] == [
        "step-00000007.safetensors"
    ]
    write(tmp_path, 10)  # whatever stood there before
    assert load(newest).step == 10


def test_no_usable_checkpoint_is_the_users_to_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in"):
        load_newest(tmp_path, print)
    truncate(write(tmp_path, 5))
    with pytest.raises(UserError, match=r"step-00000005\.safetensors"):
        load_newest(tmp_path, print)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], *, sealed: bool) -> None:
    """Change the head of a checkpoint; ``sealed`` puts the right checksum over the changed one."""
    with safe_open(path, framework="pt") as file:
        kept = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    head = json.loads(kept["patchmine"])
    change(head)
    kept["patchmine"] = json.dumps(head)
    if sealed:
        kept["crc32"] = f"{zlib.crc32(kept['patchmine'].encode()):08x}"
    save_file(tensors, path, metadata=kept)


@pytest.mark.parametrize("key", ["format", "step", "versions", "crc32", "facts"])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}])
def test_a_head_that_was_changed_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = write(tmp_path, 12)
    rewrite(path, lambda head: head.update({key: value}), sealed=False)
    with pytest.raises(DamagedCheckpointError, match="checksum of its head differs"):
        load(path)


@pytest.mark.parametrize("key", ["format", "step", "versions", "crc32", "facts"])
def test_a_head_that_lacks_something_is_damaged(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, 12)
    rewrite(path, lambda head: head.pop(key), sealed=True)
    with pytest.raises(DamagedCheckpointError):
        load(path)


def test_a_newer_format_asks_for_a_newer_patchmine(tmp_path: Path) -> None:
    path = write(tmp_path, 12)
    rewrite(path, lambda head: head.update(format=checkpoints.FORMAT + 1), sealed=True)
    with pytest.raises(UserError, match="newer patchmine"):
        load_newest(tmp_path, print)


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = write(tmp_path, 12)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    right = load(path)
    for at in [*range(header), *range(header, len(whole), 7), len(whole) - 1]:
        changed = bytearray(whole)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(bytes(changed))
        try:
            found = load(path)
        except DamagedCheckpointError:
            continue
        assert (found.step, found.facts) == (12, right.facts), at
        assert found.model.keys() == STATE.keys(), at
        assert all(torch.equal(found.model[name], STATE[name]) for name in STATE), at
        assert all(torch.equal(found.optimizer[name], MOMENTS[name]) for name in MOMENTS), at


def write_format_1(path: Path, step: int, state: dict[str, torch.Tensor]) -> None:
    """As version 0.2 wrote it."""
    crc32 = {"model": checkpoints.checksum(state, 1), "optimizer": 0}
    head = {
        "format": 1,
        "step": step,
        "versions": {},
        "crc32": crc32,
        "facts": {"identity": {"data": "abc"}},
    }
    save_file(
        {f"model.{name}": t for name, t in state.items()},
        path,
        metadata={"patchmine": json.dumps(head)},
    )


def test_files_of_earlier_versions_are_read_and_their_step_is_compared_with_the_name(
    tmp_path: Path,
) -> None:
    path = tmp_path / "step-00000400.safetensors"
    write_format_1(path, 400, STATE)
    assert load(path).step == 400
    write_format_1(path, 33, STATE)
    with pytest.raises(DamagedCheckpointError, match="holds step 33"):
        load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_state_that_is_not_finite_replaces_nothing(
    tmp_path: Path, part: str, value: float
) -> None:
    good = write(tmp_path, 5)
    write_format_1(
        tmp_path / "step-00000007.safetensors", 7, {"w": torch.tensor([1.0, float("nan")])}
    )
    states = {"model": dict(STATE), "optimizer": dict(MOMENTS)}
    states[part]["teacher.w"] = torch.tensor([0.0, value])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError) as told:
        save(tmp_path, 8, states["model"], states["optimizer"], {}, keep=1)
    for expected in (
        f"{part}.teacher.w",
        "after step 8",
        "1 of 6 tensors",
        f"last good state is {good}",
    ):
        assert expected in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_states_that_are_not_finite_are_passed_over_by_name(tmp_path: Path) -> None:
    good = write(tmp_path, 5)
    write_format_1(
        tmp_path / "step-00000007.safetensors", 7, {"w": torch.tensor([1.0, float("inf")])}
    )
    said: list[str] = []
    assert load_newest(tmp_path, said.append, finite=True).step == 5
    assert "step-00000007.safetensors holds values that are not finite (in model.w)" in said[0]
    assert str(good) in said[0]
    assert load_newest(tmp_path, said.append).step == 7
    assert newest_finite(tmp_path) == good
    good.unlink()
    with pytest.raises(UserError, match=r"no usable checkpoint.*not finite \(in model\.w\)"):
        load_newest(tmp_path, said.append, finite=True)
    assert newest_finite(tmp_path) is None


def test_links_that_a_kill_left_behind_are_put_right(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, STATE, MOMENTS, {"best": {"step": step}}, keep=3, best=step)
    older, newest = list_checkpoints(tmp_path)
    for name in ("last", "best"):  # as before the newest one had its links
        point(older, name)
    point_again(load(newest))
    assert {(tmp_path / name).readlink().name for name in ("last", "best")} == {newest.name}
    newest.unlink()
    point_again(load(older))
    assert (tmp_path / "best").readlink().name == older.name


def test_links_that_lead_to_each_other_are_a_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "last").symlink_to("best")
    (tmp_path / "best").symlink_to("last")
    with pytest.raises(DamagedCheckpointError):
        load(tmp_path / "best")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_without_symbolic_links_last_is_a_small_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for step in (1, 2):
        write(tmp_path, step)
    assert (tmp_path / "last").read_text() == "step-00000002.safetensors\n"
    assert load(tmp_path / "last").step == 2
    assert load_newest(tmp_path, print).step == 2
    (tmp_path / "last").unlink()
    (tmp_path / "last").mkdir()  # and where it cannot be written at all
    write(tmp_path, 3)
    assert load_newest(tmp_path, print).step == 3


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_file_systems_that_flush_no_folders_and_know_no_modes_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    assert load(write(tmp_path, 4)).step == 4


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.safetensors"
    torch.save({"model": STATE}, path)
    with pytest.raises(DamagedCheckpointError):
        load(path)


def test_a_full_disk_leaves_earlier_checkpoints_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 5)

    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"begun")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        UserError,
        match=r"No space left.*make room there.*patchmine resume.*earlier checkpoints are intact",
    ):
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


@pytest.mark.slow
def test_the_operating_system_refusing_to_write_is_the_users_to_know(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "UserError: checkpoint" in done.stderr
    assert "File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-00000001.safetensors"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from patchmine.train.checkpoint import list_checkpoints, load, load_newest, save
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
    while list_checkpoints(folder)[-1].name <= f"step-{reached:08d}.safetensors":
        time.sleep(0.001)
    time.sleep(0.05 * random.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = load_newest(folder, refuse)
    assert (found.model["w"] == found.step).all()
    # A kill between the two renames leaves `last` one behind, never dangling.
    assert load(folder / "last").step in (found.step, found.step - 1)
    assert found.step >= reached
    reached = found.step
assert reached >= 12
save(folder, reached + 1, {"w": torch.zeros(1)}, {}, {}, keep=2)
left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
assert left == [], left
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 0)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_one_tensor_under_two_names_is_refused_early() -> None:
    shared = torch.ones(3)
    with pytest.raises(ValueError, match="'x' and 'y' are one tensor"):
        refuse_shared({"x": shared, "y": shared.view(3)})
    refuse_shared(
        {"x": shared, "z": torch.ones(3), "empty": torch.ones(0), "empty2": torch.ones(0)}
    )


@pytest.mark.parametrize(
    "text",
    ["I/O error: No space left on device (os error 28)", "Os { code: 28, kind: StorageFull }"],
)
def test_the_remedy_for_a_full_disk_also_when_safetensors_tells_it(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError(f"Error while serializing: {text}")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match=r"\(No space left on device\); make room there, then"):
        checkpoints.save(tmp_path, 1, {"a": torch.zeros(1)}, {}, {}, keep=1)

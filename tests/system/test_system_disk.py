"""Files that others may read, folders that stay, and files that are whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from patchmine.system.disk import remedy, replacing, settle, sweep


def test_files_obey_the_umask_and_folders_are_left_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    mode = tmp_path.stat().st_mode
    before = os.umask(0o027)
    try:
        settle(path)
        settle(tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert tmp_path.stat().st_mode == mode


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as new:  # noqa: PT012
        new.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with replacing(path) as new:
        new.write_text("whole")
        assert path.read_text() == "old"
    assert path.read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with replacing(tmp_path / "export") as new:
        new.mkdir()
        (new / "config.json").write_text("{}")
    assert (tmp_path / "export" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.ENOSPC, "room"),
        (errno.EROFS, "read-only"),
        (errno.EISDIR, "folder"),
        (999, "written"),
    ],
)
def test_advice_follows_the_errno(number: int, word: str) -> None:
    assert word in remedy(OSError(number, "x"))


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    ours = (
        ".config.47.new.yaml",
        ".last.12.new",
        ".metrics.7.new.jsonl",
        ".export.new-33",
        ".export.old-33",
        ".writing",
    )
    others = (
        "config.yaml",
        ".lock",
        ".lock.owner",
        ".gitignore",
        ".new",
        "a.12.new.yaml",
        ".notes.new.txt",
    )
    for name in (*ours, *others):
        (tmp_path / name).mkdir() if name.startswith(".export") else (tmp_path / name).write_text(
            "x"
        )
    (tmp_path / ".export.new-33" / "README.md").write_text("x")
    sweep(tmp_path)
    sweep(tmp_path / "absent")
    assert {path.name for path in tmp_path.iterdir()} == set(others)

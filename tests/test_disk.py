"""Files that others may read, folders that stay."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from patchmine.disk import settle


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

"""``python tests/losses/compare.py BASE``: twenty steps of every row of `small`, here and at BASE.

BASE is what git knows: a branch, a tag, a commit.  It is checked out into a folder for the moment,
and both sides train what *this* checkout's small.py describes.  What metrics.jsonl says of each
step, but for times, and the exported weights must be equal bit for bit; each row prints a line.
The code is 0 if all are, 1 if one is not, 2 where BASE cannot be had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MEASURE = "--measure"  # what the two processes are started with that this script starts

Side = dict[str, dict[str, Any]]


def main(base: str) -> int:
    """Compare this checkout with ``base``."""
    with tempfile.TemporaryDirectory() as room:
        there = Path(room) / "base"
        worktree = ["git", "-C", str(REPOSITORY), "worktree"]
        add = [*worktree, "add", "--quiet", "--detach", str(there), base]
        if subprocess.run(add, check=False).returncode:
            return 2
        try:
            before = _measured(there, Path(room) / "before.json")
            after = _measured(REPOSITORY, Path(room) / "after.json")
        finally:
            subprocess.run([*worktree, "remove", "--force", str(there)], check=True)
    verdicts = {name: verdict(before[name], after[name]) for name in after}
    for name, text in verdicts.items():
        print(f"{name:<22}{text or 'equal'}")
    return int(any(verdicts.values()))


def _measured(checkout: Path, file: Path) -> Side:
    """What the rows give with the sources of ``checkout``."""
    settings = {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, MEASURE, str(checkout), str(file)]
    subprocess.run(command, check=True, env=os.environ | settings)
    found: Side = json.loads(file.read_text(encoding="utf-8"))
    return found


def measure(checkout: str, file: str) -> None:
    """Train all rows in this process, with the sources of ``checkout``; write what they give."""
    import small  # which says where `pinned` is
    import torch
    from pinned import digest_of, numbers_of

    import patchmine

    used = Path(patchmine.__file__)
    if not used.is_relative_to(Path(checkout).resolve()):
        raise SystemExit(f"{used} was imported, which is not of {checkout}")
    torch.set_num_threads(1)
    found: Side = {}
    with tempfile.TemporaryDirectory() as room:
        for name in small.ROWS:
            try:
                run = small.train(name, Path(room))
                weights = {place.name: digest_of(place) for place in sorted(run.glob("export*"))}
                digests = {place: digest["sha256"] for place, digest in weights.items()}
                found[name] = {"numbers": numbers_of(run), "weights": digests}
            except Exception as error:  # noqa: BLE001, a row that fails is what the line then says
                found[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    Path(file).write_text(json.dumps(found), encoding="utf-8")


def verdict(before: dict[str, Any], after: dict[str, Any]) -> str:
    """In which the sides differ first, in words; nothing where they are equal."""
    for side, found in (("at BASE", before), ("here", after)):
        if "failed" in found:
            return f"fails {side}: {found['failed'][:300]}"
    for step, old in before["numbers"].items():
        new = after["numbers"].get(step, {})
        for name in sorted(old.keys() | new.keys(), key=lambda name: (name != "loss", name)):
            if old.get(name) != new.get(name):
                return f"differs from step {step} on: {name} {old.get(name)!r} -> {new.get(name)!r}"
    places = before["weights"].keys() | after["weights"].keys()
    unequal = sorted(p for p in places if before["weights"].get(p) != after["weights"].get(p))
    return f"differs in the weights after the last step: {', '.join(unequal)}" if unequal else ""


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == MEASURE:
        measure(*sys.argv[2:])
    elif len(sys.argv) == 2:
        sys.exit(main(sys.argv[1]))
    else:
        sys.exit(__doc__)

"""A run that learned labels and a comparison of such runs, and how their damaged files are read."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from run_readers import digest
from scene import WAIT, Child, Ended, make_images

_LEARNING: dict[str, Any] = {
    "epochs": 1,
    "warmup_epochs": 0,
    "batch_size": 4,
    "val_share": 0.25,
    "checkpoint_every": 2,
    "tensorboard": False,
    "device": "cpu",
    "workers": 0,
}
_SHARES = "50%,100%"

LEARNS = " ".join(
    [
        "finetune ROOM/whole-mae data=ROOM/labelled",
        *(f"{name}={value}" for name, value in _LEARNING.items()),
    ]
)
COMPARES = f"{LEARNS} shares={_SHARES} out=BASE/compared"


def run_in(base: Path, words: Sequence[str], prepare: Callable[[], None] = lambda: None) -> Ended:
    """A command whose words name the folder BASE and the ROOM that it stands in.

    What is in ROOM has the same path in every copy of BASE, as settings of a run need it.
    """
    log = base.with_suffix(".log")
    log.unlink(missing_ok=True)
    places = {"BASE": str(base), "ROOM": str(base.parent)}
    given = [re.sub("BASE|ROOM", lambda found: places[found[0]], word) for word in words]
    return Child(given, log, prepare=prepare).wait(WAIT)


def make(base: Path, line: str, prepare: Callable[[], None] = lambda: None, code: int = 0) -> None:
    """A run that other commands work on.  RuntimeError where it ends with another code."""
    ended = run_in(base, line.split(), prepare)
    if ended.code != code:
        raise RuntimeError(f"{line} ended with {ended.code}: {ended.output[-1500:]}")


def make_tuned(base: Path) -> None:
    """In the folder ``base`` the run ``tuned`` and the comparison ``compared``."""
    for label in "ab":
        make_images(base.parent / "labelled" / label)
    make(base, f"{LEARNS} out=BASE/tuned")
    make(base, COMPARES)


def read_shares(data: bytes, folder: Path) -> object:
    """The page about a comparison, which leaves out what cannot be read."""
    from patchmine.report.page import write_report

    place = folder / "compared" / "eval" / "shares.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    return "</html>" in write_report([folder / "compared"], folder / "x.html").read_text("utf-8")


def compare_again(compared: Path, name: str, data: bytes, folder: Path) -> object:
    """The same comparison once more, which takes the results of its runs from their files."""
    import patchmine

    copy, room = _copied(compared, folder, name, data), compared.parent.parent
    result = patchmine.compare_shares(
        room / "whole-mae",
        data=str(room / "labelled"),
        shares=_SHARES.split(","),
        baselines=False,
        out=str(copy),
        say=lambda _: None,
        **_LEARNING,
    )
    return len(result["entries"])


def predict_by(whole: Path, name: str, data: bytes, folder: Path) -> object:
    """A table of what a damaged run, or export, says of images."""
    from patchmine.evaluate.settings import PredictSettings
    from patchmine.report.predictions import predict

    run, images = _copied(whole, folder, name, data), make_images(folder / "images")
    given = {"run": str(run), "data": str(images), "out": str(folder / "told.csv")}
    told = predict(PredictSettings(**given, workers=0, top=2)).read_text(encoding="utf-8")
    for row in csv.DictReader(io.StringIO(told)):
        if not 0 <= float(row.get("probability", 0)) <= 1:
            raise AssertionError(f"a probability of {row['probability']} comes out")
    return told


def classify_by(tuned: Path, name: str, data: bytes, folder: Path) -> object:
    """The weights that a run chose as its best."""
    from patchmine.runs.folder import RunFolder

    return digest(RunFolder(_copied(tuned, folder, name, data)).classifier().state_dict())


def _copied(whole: Path, folder: Path, name: str, data: bytes) -> Path:
    """A copy of a run with a damaged file; of the copy only that file changes."""
    copy = folder / whole.name
    if not copy.exists():
        shutil.copytree(whole, copy, symlinks=True)
    (copy / name).unlink()
    (copy / name).write_bytes(data)
    return copy


TABLES = {
    "ce": "file,label\n00.png,caf\u00e9\n01.png,tea\n02.png,caf\u00e9\n",
    "bce": 'file;label\n00.png;r\u00f4t|round\n01.png;""\n02.png;round\n',
    "mse": 'file\tlabel\n"00.png"\t1.5\n01.png\t-2e3\n02.png\t0\n',
}
"""Labels of three images, by what is learned of them."""


def read_labels(loss: Any, picture: bytes, data: bytes, folder: Path) -> object:
    """What a table says of three images."""
    from patchmine.data.sources.source import open_source
    from patchmine.data.sources.targets import read_targets

    (folder / "images").mkdir(exist_ok=True)
    for number in range(3):
        (folder / "images" / f"{number:02d}.png").write_bytes(picture)
    table = folder / "table.csv"
    table.write_bytes(data)
    found = read_targets(table, open_source(folder / "images"), column=None, loss=loss)
    if not found.values.dtype.kind == "i" and not abs(found.values).max() < float("inf"):
        raise AssertionError("numbers that are not finite come out of a table")
    return found.values.shape, [name.encode("utf-8") for name in found.names]

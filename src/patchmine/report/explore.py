"""``patchmine explore``: a data set as a model sees it, as a page and as a table to act on."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.data.items import CLIP
from patchmine.data.sources.contract import Source
from patchmine.errors import Say, UserError, shown_name, silent, whole_name
from patchmine.evaluate.evaluated import Evaluated
from patchmine.evaluate.features import FeatureLoop, Reader, device_of
from patchmine.evaluate.labelled import Part
from patchmine.evaluate.measure import opened
from patchmine.evaluate.structure import structure_of
from patchmine.models.onednn import fast_linear
from patchmine.report.findings import Findings, render
from patchmine.report.settings import ExploreSettings
from patchmine.runs.folder import RunFolder
from patchmine.system.disk import output
from patchmine.task import Method

COLUMNS = ("file", "cluster", "outlier", "nearest", "similarity", "duplicate_group", "difficulty")
"""Of the table."""

_FEWEST = 3


def explore(settings: ExploreSettings, say: Say = silent) -> Path:
    """Write a page and a table about a data set: duplicates, outliers, clusters, difficulty.

    Each file appears complete or not at all.  Memory beside the features, which are held once, is
    bounded, whatever the number of images.

    Args:
        settings: the model, the data, what is looked for, and the files to write.
        say: hears about the progress.

    Returns:
        The page.

    Raises:
        UserError: nothing can be read, too few items, or a file that cannot be written.
    """
    out = Path(settings.out)
    table = out.with_suffix(".csv") if settings.csv is None else Path(settings.csv)
    with output(out) as new_page:
        new_page.touch()  # a place that cannot be written is told before an hour of work
        with output(table, "csv") as new_table:
            new_table.touch()
            findings = _look(settings, say)
            _write_table(findings, new_table)
        page = render(findings, settings, shown_name(table.name))
        new_page.write_bytes(page.encode("utf-8", "backslashreplace"))
    many = f"{len(findings.index):,} {findings.evaluated.item.noun}s"
    say(f"{many} in {shown_name(table)}, the most telling in {shown_name(out)}")
    return out


class _DifficultyReader(Reader):
    """One column, how hard a method finds each image, read in the same pass as the features."""

    def __init__(self, evaluated: Evaluated, method: Method) -> None:
        # In place of the encoder: whoever reads moves it to the device and sets its mode.
        whole: Any = method
        super().__init__(replace(evaluated, encoder=whole))
        self.method = method

    def __call__(self, images: Tensor) -> Tensor:
        found = self.method.difficulty(images)
        assert found is not None, "a method that predicts none has no such reader"
        return found.float()[:, None, None]  # (B, 1, 1)


def _look(settings: ExploreSettings, say: Say) -> Findings:
    evaluated = opened(settings)
    if evaluated.told:
        say(evaluated.told)
    source = evaluated.item.open(settings.data, remote_gb=settings.remote_gb)
    index, x, difficulty = _read(settings, evaluated, source, say)
    _refuse_few(settings, evaluated, len(index))
    with fast_linear():
        structure = structure_of(
            x.to(device_of(settings)),
            neighbours=settings.neighbours,
            clusters=settings.clusters,
            threshold=settings.similarity,
            seed=settings.seed,
            say=say,
        )
    return Findings(evaluated, source, index, structure, difficulty)


def _read(
    settings: ExploreSettings, evaluated: Evaluated, source: Source, say: Say
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which items can be read (N,), features of length one (N, D), difficulty (N,) if there is."""
    part = Part(source, np.arange(len(source)), None)  # classes are not asked for
    reader = Reader(evaluated)
    pooling = reader.choose(settings.pooling)
    readers, judge = {"": reader}, _judge(evaluated, say)
    if judge is not None:
        readers["difficulty"] = judge
    loop = FeatureLoop(readers, settings, device_of(settings), say)
    index, difficulty, x = torch.empty(len(part)).long(), torch.empty(len(part)), torch.empty(0)
    done = 0
    with fast_linear():
        for places, columns in loop.batches(part, "features"):
            features = F.normalize(reader.pooled(columns[""], pooling), dim=1)  # (B, D)
            if not done:  # made once, at full size
                x = torch.empty(len(part), features.shape[1])
            rows = slice(done, done + len(places))
            x[rows], index[rows] = features, places
            if judge is not None:
                difficulty[rows] = columns["difficulty"].flatten()
            done += len(places)
    loop.judge_broken(part, done, "features")
    return index[:done], x[:done], None if judge is None else difficulty[:done]


def _judge(evaluated: Evaluated, say: Say) -> _DifficultyReader | None:
    """What reads difficulty: of a run whose method predicts it, at the size of its training."""
    if evaluated.folder is None:
        return None
    run, took = RunFolder(evaluated.folder), evaluated.input
    if not run.checkpoints or took.image_size != run.config.image_size:
        return None
    try:
        method = run.method()
    except UserError as error:  # files of a foreign teacher, say, which features do not need
        say(f"difficulty is left out: {error}")
        return None
    frames = (took.clip.frames,) if evaluated.item is CLIP else ()
    grey = torch.zeros(1, took.channels, *frames, *took.image_size)
    return None if method.difficulty(grey) is None else _DifficultyReader(evaluated, method)


def _refuse_few(settings: ExploreSettings, evaluated: Evaluated, count: int) -> None:
    noun = evaluated.item.noun
    if count < _FEWEST:
        found = f"data={shown_name(str(settings.data))} has {count} {noun}s that can be read"
        raise UserError(f"{found}: they are compared with each other, give {_FEWEST} or more")
    if settings.clusters is not None and settings.clusters > count:
        found = f"clusters={settings.clusters}, but there are {count} {noun}s that can be read"
        raise UserError(f"{found}: ask for at most so many, or leave the setting out")


def _write_table(findings: Findings, path: Path) -> None:
    """A row for every item, in the order of the source."""
    found, hard = findings.structure, findings.difficulty
    columns = zip(
        (found.cluster + 1).tolist(),
        found.outlier.tolist(),
        found.neighbours[:, 0].tolist(),
        found.similarity[:, 0].tolist(),
        (found.group + 1).tolist(),
        [None] * len(findings.index) if hard is None else hard.tolist(),
        strict=True,
    )
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        for row, (cluster, outlier, nearest, cosine, group, difficulty) in enumerate(columns):
            file, near = (whole_name(findings.path(each)) for each in (row, nearest))
            difficulty = "" if difficulty is None else f"{difficulty:.6g}"
            told = (cluster, f"{outlier:.4f}", near, f"{cosine:.6f}", group or "", difficulty)
            writer.writerow([file, *told])

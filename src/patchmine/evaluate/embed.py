"""Features of every item in one file, for search, clustering and whatever comes after."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from patchmine.disk import output
from patchmine.errors import Say, shown_name, silent, whole_name
from patchmine.evaluate.features import FeatureLoop, Reader, device_of
from patchmine.evaluate.labelled import everything
from patchmine.evaluate.measure import opened
from patchmine.evaluate.settings import EmbedSettings
from patchmine.models.onednn import fast_linear


def embed(settings: EmbedSettings, say: Say = silent) -> Path:
    """Write a file with a row for every readable image: path, index, class and embedding.

    Of a run on videos the rows are videos.  The file appears complete or not at all.

    Args:
        settings: what is read, and the file to write, whose ending decides the format.
        say: hears about the progress.

    Returns:
        The file; ``embedding`` is (D,) float32, ``label`` the class's name where there are classes.

    Raises:
        UserError: nothing can be read, features are not finite, or the file cannot be written.
    """
    out, done = Path(settings.out), 0
    with output(out) as new:  # a place that cannot be written is told before an hour of work
        evaluated = opened(settings)
        if evaluated.note:
            say(evaluated.note)
        source = evaluated.item.open(settings.data)
        part, labels, reader = everything(source), source.labels(), Reader(evaluated)
        pooling = reader.choose(settings.pooling)
        loop = FeatureLoop({"": reader}, settings, device_of(settings), say)
        with fast_linear(), _TABLES[out.suffix.lower()](new) as add:
            for index, columns in loop.batches(part, "embeddings"):
                places = index.tolist()
                rows: Rows = {"path": [whole_name(source.path(i)) for i in places]}
                rows["index"] = index.numpy()
                if labels is not None:
                    rows["label"] = [whole_name(labels.names[labels.ids[i]]) for i in places]
                rows["embedding"] = reader.pooled(columns[""], pooling).numpy()  # (B, D)
                add(rows)
                done += len(places)
            loop.judge_broken(part, done, "embeddings")
    say(f"{done:,} embeddings of {len(source):,} {evaluated.item.noun}s in {shown_name(out)}")
    return out


Rows = dict[str, Any]
"""Columns of a table by name, the last of them ``embedding`` (B, D) float32."""


@contextmanager
def _parquet(path: Path) -> Iterator[Callable[[Rows], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None

    def add(rows: Rows) -> None:
        nonlocal writer
        x = rows["embedding"]
        lists = pa.FixedSizeListArray.from_arrays(np.ravel(x), x.shape[1])
        table = pa.table(rows | {"embedding": lists})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield add
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _csv(path: Path) -> Iterator[Callable[[Rows], None]]:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer, started = csv.writer(handle), False

        def add(rows: Rows) -> None:
            nonlocal started
            if not started:
                width = rows["embedding"].shape[1]
                writer.writerow([*list(rows)[:-1], *(f"f{i}" for i in range(width))])
                started = True
            # str() of a NumPy float32 is the shortest text that reads back as the same number.
            for *head, x in zip(*rows.values(), strict=True):
                writer.writerow([*head, *map(str, x)])

        yield add


@contextmanager
def _npz(path: Path) -> Iterator[Callable[[Rows], None]]:
    parts: list[Rows] = []
    with path.open("wb") as handle:  # now, so that it fails early; savez would also add an ending
        yield parts.append
        rows: Rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        np.savez(handle, **rows)


_TABLES = {".parquet": _parquet, ".csv": _csv, ".npz": _npz}  # one batch in memory, npz: all rows

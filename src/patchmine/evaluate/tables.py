"""Tables of embeddings, written batch by batch: parquet, CSV, or NumPy's npz."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rows:
    """``paths``, ``index`` (B,) int64, ``labels`` (names of classes, or None) and ``x`` (B, D)
    float32.
    """

    paths: Sequence[str]
    index: NDArray[np.int64]
    labels: Sequence[str] | None
    x: NDArray[np.float32]


Add = Callable[[Rows], None]


@contextmanager
def open_table(path: Path, ending: str) -> Iterator[Add]:
    """Yields what adds rows to the file ``path``, in the format that ``ending``, one of `TABLE_ENDINGS`,
    stands for.

    The columns are path, index, label (where there are labels) and embedding: one list column in
    parquet, one array in npz, and ``f0``, ``f1`` ... in CSV.  A parquet file and a CSV hold one
    batch in memory, an npz file all rows.
    """
    with {".parquet": _parquet, ".csv": _csv, ".npz": _npz}[ending](path) as add:
        yield add


@contextmanager
def _parquet(path: Path) -> Iterator[Add]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None

    def add(rows: Rows) -> None:
        nonlocal writer
        columns: dict[str, Any] = {
            "path": pa.array(rows.paths, pa.string()),
            "index": pa.array(rows.index, pa.int64()),
        }
        if rows.labels is not None:
            columns["label"] = pa.array(rows.labels, pa.string())
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(
            pa.array(np.ravel(rows.x)), rows.x.shape[1]
        )
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield add
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _csv(path: Path) -> Iterator[Add]:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        started = False

        def add(rows: Rows) -> None:
            nonlocal started
            if not started:
                names = ["path", "index", *(["label"] if rows.labels is not None else [])]
                writer.writerow([*names, *(f"f{i}" for i in range(rows.x.shape[1]))])
                started = True
            heads = zip(
                *(part for part in (rows.paths, rows.index, rows.labels) if part is not None),
                strict=True,
            )
            # str() of a NumPy float32 is the shortest text that reads back as the same number.
            writer.writerows([*head, *map(str, x)] for head, x in zip(heads, rows.x, strict=True))

        yield add


@contextmanager
def _npz(path: Path) -> Iterator[Add]:
    parts: list[Rows] = []
    with path.open(
        "wb"
    ) as handle:  # now, so that it fails early; savez would also add an ending to a name
        yield parts.append
        arrays: dict[str, Any] = {
            "path": np.array([name for part in parts for name in part.paths]),
            "index": np.concatenate([part.index for part in parts]),
            "embedding": np.concatenate([part.x for part in parts]),
        }
        if parts[0].labels is not None:
            arrays["label"] = np.array([name for part in parts for name in part.labels or ()])
        np.savez(handle, **arrays)

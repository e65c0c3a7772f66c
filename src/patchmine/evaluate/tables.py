"""Tables for other programs, written batch by batch: parquet and CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

Rows = Mapping[str, Any]
"""Columns by name: lists or arrays (B,); or vectors (B, D), which CSV has as ``f0``, ``f1``, ..."""
Add = Callable[[Rows], None]


@contextmanager
def parquet_table(path: Path) -> Iterator[Add]:
    """A parquet file; each call of what is yielded adds a group of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None

    def add(rows: Rows) -> None:
        nonlocal writer
        table = pa.table(
            {
                name: pa.FixedSizeListArray.from_arrays(np.ravel(column), column.shape[1])
                if np.ndim(column) == 2
                else column
                for name, column in rows.items()
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield add
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def csv_table(path: Path) -> Iterator[Add]:
    """A CSV file; each call of what is yielded adds rows."""
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer, started = csv.writer(handle), False

        def add(rows: Rows) -> None:
            nonlocal started
            flat: dict[str, Any] = {}
            for name, column in rows.items():
                vectors = np.ndim(column) == 2
                flat |= {f"f{i}": x for i, x in enumerate(column.T)} if vectors else {name: column}
            if not started:
                writer.writerow(flat)
                started = True
            # str() of a NumPy float32 is the shortest text that reads back as the same number.
            writer.writerows(zip(*flat.values(), strict=True))

        yield add


TABLES = {".parquet": parquet_table, ".csv": csv_table}
"""By the ending of the file; one batch is in memory at a time."""

"""Features of every image, or video, in one parquet file, for search, clustering and whatever comes after."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from patchmine.data.loader import BadFiles
from patchmine.errors import UserError
from patchmine.evaluate.features import Reader, stream
from patchmine.evaluate.labelled import everything, open_items
from patchmine.evaluate.measure import ReadSettings
from patchmine.evaluate.progress import Say, progress, silent
from patchmine.ops.linear import fast_linear


class EmbedSettings(ReadSettings):
    """Settings of `patchmine embed`."""

    out: str = Field(description="parquet file to write")
    pooling: str = Field("cls", description="cls, mean or cls+mean; without a class token cls means mean")


def embed(settings: EmbedSettings, say: Say = silent) -> Path:
    """Write ``path``, ``index``, ``label`` (the class's name, where there are classes) and ``embedding`` (float32,
    fixed-size list).

    One row group per batch, so memory does not grow with the number of images.  Broken images have no row.  Of a video
    run the rows are videos, one clip from the middle of each.  The file appears complete or not at all.  Raises
    UserError where nothing can be read or the file cannot be written.
    """
    target = settings.open()
    if target.note:
        say(target.note)
    source = open_items(settings.data, video=target.clip is not None)
    out = Path(settings.out)
    if out.is_dir():
        raise UserError(f"out={out} is a folder: give the name of a file, for example out={out / 'embeddings.parquet'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f".{out.name}.new-{os.getpid()}")
    try:
        rows = _write(new, Reader(target), source, settings, say)
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
    say(f"{rows:,} embeddings of {len(source):,} {target.kind}s in {out}")
    return out


def _write(path: Path, reader: Reader, source: Any, settings: EmbedSettings, say: Say) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = everything(source)
    labels = source.labels()
    columns = reader.poolings[reader.choose(settings.pooling)]
    writer: Any = None
    rows = 0
    try:
        with fast_linear(), progress("embeddings", len(part), say) as tick:
            for index, found in stream({"": reader}, part, settings.reading(), BadFiles(None, settings.max_bad_share)):
                x = found[""][:, columns].flatten(1).numpy()  # (B, D)
                table: dict[str, Any] = {
                    "path": pa.array([source.path(i) for i in index.tolist()], pa.string()),
                    "index": pa.array(index.numpy(), pa.int64()),
                }
                if labels is not None:
                    table["label"] = pa.array([labels.names[labels.ids[i]] for i in index.tolist()], pa.string())
                table["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(x)), x.shape[1])
                batch = pa.table(table)
                writer = writer or pq.ParquetWriter(path, batch.schema)
                writer.write_table(batch)
                rows += len(index)
                tick(len(index))
    finally:
        if writer is not None:
            writer.close()
    if rows == 0:
        raise UserError(f"{source.name} has no {reader.target.kind} that can be read")
    return rows

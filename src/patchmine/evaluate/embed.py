"""Features of every item in one file, for search, clustering and whatever comes after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from patchmine.errors import Say, shown_name, silent, whole_name
from patchmine.evaluate.features import FeatureLoop, Reader, device_of
from patchmine.evaluate.labelled import everything
from patchmine.evaluate.measure import opened
from patchmine.evaluate.settings import EmbedSettings
from patchmine.evaluate.tables import TABLES, Add, Rows
from patchmine.models.onednn import fast_linear
from patchmine.system.disk import output


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
        if evaluated.told:
            say(evaluated.told)
        source = evaluated.item.open(settings.data, remote_gb=settings.remote_gb)
        part, labels, reader = everything(source), source.labels(), Reader(evaluated)
        pooling = reader.choose(settings.pooling)
        loop = FeatureLoop({"": reader}, settings, device_of(settings), say)
        with fast_linear(), _TABLES[out.suffix.lower()](new) as add:
            for index, columns in loop.batches(part, "embeddings"):
                places = index.tolist()
                rows: dict[str, Any] = {"path": [whole_name(source.path(i)) for i in places]}
                rows["index"] = index.numpy()
                if labels is not None:
                    rows["label"] = [whole_name(labels.names[labels.ids[i]]) for i in places]
                rows["embedding"] = reader.pooled(columns[""], pooling).numpy()  # (B, D)
                add(rows)
                done += len(places)
            loop.judge_broken(part, done, "embeddings")
    say(f"{done:,} embeddings of {len(source):,} {evaluated.item.noun}s in {shown_name(out)}")
    return out


@contextmanager
def _npz(path: Path) -> Iterator[Add]:
    parts: list[Rows] = []
    with path.open("wb") as handle:  # now, so that it fails early; savez would also add an ending
        yield parts.append
        rows: dict[str, Any] = {
            name: np.concatenate([part[name] for part in parts]) for name in parts[0]
        }
        np.savez(handle, **rows)


_TABLES = TABLES | {".npz": _npz}  # which has all rows in memory

"""Features of every image, or video, in one file, for search, clustering and whatever comes after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patchmine.data.badfiles import BadFiles
from patchmine.disk import output
from patchmine.errors import shown_name, whole_name
from patchmine.evaluate.features import Reader, judge_broken, stream
from patchmine.evaluate.labelled import everything, open_items
from patchmine.evaluate.measure import opened, reading_of
from patchmine.evaluate.progress import Say, progress, silent
from patchmine.evaluate.settings import EmbedSettings
from patchmine.evaluate.tables import Rows, open_table
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
    out = Path(settings.out)
    with output(out) as new:  # a place that cannot be written is told before an hour of work
        target = opened(settings)
        if target.note:
            say(target.note)
        source = open_items(settings.data, video=target.clip is not None)
        rows = _write(new, out.suffix.lower(), Reader(target), source, settings, say)
    say(f"{rows:,} embeddings of {len(source):,} {target.kind}s in {shown_name(out)}")
    return out


def _write(
    path: Path, ending: str, reader: Reader, source: Any, settings: EmbedSettings, say: Say
) -> int:
    part, labels, reading, title = (
        everything(source),
        source.labels(),
        reading_of(settings),
        "embeddings",
    )
    columns = reader.poolings[reader.choose(settings.pooling)]
    done = 0
    with fast_linear(), progress(title, len(part), say) as tick, open_table(path, ending) as add:
        # The share of broken items is judged at the end: they come in order, so broken ones may
        # come in a row.
        for index, found in stream({"": reader}, part, reading, BadFiles(None, 1.0)):
            places = index.tolist()
            names = (
                None
                if labels is None
                else [whole_name(labels.names[labels.ids[i]]) for i in places]
            )
            x = found[""][:, columns].flatten(1).numpy()  # (B, D)
            add(Rows([whole_name(source.path(i)) for i in places], index.numpy(), names, x))
            done += len(places)
            tick(len(places))
        judge_broken(part, done, reading, title, reader.target.kind, say)
    return done

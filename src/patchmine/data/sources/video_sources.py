"""From what the user typed after ``data=`` to a source of videos."""

from __future__ import annotations

from pathlib import Path

from patchmine.data.decoding.video import VIDEOS, backend_name
from patchmine.data.sources.combine import Joined
from patchmine.data.sources.contract import Source
from patchmine.data.sources.folder import FileSource
from patchmine.data.sources.shards import ShardSource
from patchmine.data.sources.source import Spec, open_source


def open_videos(spec: Spec | Source, *, cache_dir: Path | None = None) -> Source:
    """The videos of a folder, list, tar shards, folders of frames, ``embedded:moving-photos`` or
    torch Dataset.

    Several of these count as one.  ``cache_dir``: as for images.  UserError when there is nothing
    of that name, nothing in it, or nothing that could decode it.
    """
    source = open_source(spec, cache_dir=cache_dir, kind=VIDEOS)
    decoder_of(source)  # whose absence is better told now than by the first worker
    return source


def decoder_of(source: Source) -> str | None:
    """What decodes the videos, with its version; None for single frames and arrays.  UserError
    where nothing does.
    """
    parts = source.parts if isinstance(source, Joined) else [source]
    return backend_name() if any(map(_is_encoded, parts)) else None


def _is_encoded(part: Source) -> bool:
    return isinstance(part, ShardSource) or (
        isinstance(part, FileSource) and Path(part.path(0)).is_file()
    )

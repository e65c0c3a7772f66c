"""The items that a trained network is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patchmine.data.items import Item
from patchmine.data.sources.contract import Kind, Source
from patchmine.data.sources.listfile import open_files
from patchmine.data.sources.source import KINDS


def open_asked(data: str | list[str], item: Item) -> Source:
    """What ``item.open`` takes, or the files of single items, as a shell writes out ``*.jpg``."""
    files, kind = [data] if isinstance(data, str) else data, KINDS[item.noun]
    return open_files(files, kind) if are_files(files, kind) else item.open(data)


def are_files(names: Sequence[str], kind: Kind) -> bool:
    """Whether all names are of single items."""
    single = (Path(name).suffix.lower() in kind.suffixes and Path(name).is_file() for name in names)
    return bool(names) and all(single)

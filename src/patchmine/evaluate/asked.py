"""The items that a network is asked about, and whether enough of them could be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patchmine.data.items import Item
from patchmine.data.sources.contract import Kind, Source
from patchmine.data.sources.listfile import open_files
from patchmine.data.sources.source import KINDS
from patchmine.errors import Say, UserError, shown_name


def open_asked(data: str | list[str], item: Item) -> Source:
    """What ``item.open`` takes, or the files of single items, as a shell writes out ``*.jpg``."""
    files, kind = [data] if isinstance(data, str) else data, KINDS[item.noun]
    return open_files(files, kind) if are_files(files, kind) else item.open(data)


def are_files(names: Sequence[str], kind: Kind) -> bool:
    """Whether all names are of single items."""
    single = (Path(name).suffix.lower() in kind.suffixes and Path(name).is_file() for name in names)
    return bool(names) and all(single)


def judge_broken(
    source: Source, asked: int, done: int, noun: str, limit: float, title: str, say: Say
) -> None:
    """Whether enough of the items that were asked for could be read.

    Args:
        source: they are of.
        asked: how many were wanted.
        done: how many could be read.
        noun: what an item is called.
        limit: share of broken ones above which to stop.
        title: of what is made of them.
        say: hears of broken ones.

    Raises:
        UserError: none could be read, or more than ``limit`` are broken.
    """
    name = shown_name(source.name)
    if done == 0:
        raise UserError(f"{name} has no {noun} that can be read")
    if broken := asked - done:
        found = f"{broken:,} of {asked:,} {noun}s of {name} are broken"
        if broken > limit * asked:
            raise UserError(f"{found}, more than max_bad_share={limit}: mend them, or raise it")
        say(f"{title}: {found} and were skipped")

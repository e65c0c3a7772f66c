"""What a name may stand for: ``{first..last}``, ``{train,val}``, and the words behind ``::``."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from itertools import product

from patchmine.data.sources.contract import IMAGES, Kind, data_error
from patchmine.errors import shown_name

MOST_SHARDS = 100_000
"""Shards that a pattern may stand for."""
_MOST_DIGITS = 12  # of a number in a pattern

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def has_braces(text: str) -> bool:
    """Whether a pattern names what it stands for, whether that is there or not."""
    return _BRACES.search(text) is not None


def spellings(text: str, name: str) -> list[str]:
    """Every text that the braces in one stand for; itself without any.

    Args:
        text: the pattern.
        name: what the user typed, for messages.

    Raises:
        UserError: a range runs backwards, or they are too many.
    """
    choices = [_choices(name, *found.groups()) for found in _BRACES.finditer(text)]
    if math.prod(map(len, choices)) > MOST_SHARDS:
        what = f"the pattern stands for more than {MOST_SHARDS:,} shards, the most that it may name"
        raise data_error(name, f"{what}; name those that there are, or give their folder")
    texts = _BRACES.split(text)[:: _BRACES.groups + 1]  # between the braces
    return [
        texts[0] + "".join(map("".join, zip(choice, texts[1:], strict=True)))
        for choice in product(*choices)
    ]


def _choices(name: str, first: str | None, last: str | None, listed: str | None) -> list[str]:
    """What a pair of braces stands for: words, or numbers with the zeros of the first."""
    if first is None or last is None:
        return str(listed).split(",")
    if max(len(first), len(last)) > _MOST_DIGITS:
        return [""] * (MOST_SHARDS + 1)  # which is refused
    if int(last) < int(first):
        what = f"the range {{{first}..{last}}} runs backwards"
        raise data_error(name, f"{what}; write {{{last}..{first}}}")
    numbers = range(int(first), int(last) + 1)[: MOST_SHARDS + 1]
    return [f"{number:0{len(first)}d}" for number in numbers]


def split(name: str) -> tuple[str, list[str]]:
    """``photos/`` and the words behind it of ``photos/::jpg,left.png``, where there are such."""
    place, separator, behind = name.rpartition("::")
    if separator and place and "/" not in behind and not os.path.lexists(name):
        return place, [word.strip() for word in behind.split(",")]
    return name, []


def are_endings(words: Sequence[str], kind: Kind) -> bool:
    """Whether words are such as files of this kind end in."""
    return all(_as_ending(word).endswith(_known(kind)) for word in words)


def endings_of(words: Sequence[str], name: str, kind: Kind) -> tuple[str, ...]:
    """The endings that a user chose; UserError where a word is none."""
    stranger = next((word for word in words if not are_endings([word], kind)), None)
    if stranger is not None:
        what = f"{shown_name(_as_ending(stranger))} is no ending of {kind.name}s"
        rule = "behind :: stand the endings that count, with commas between them: of"
        raise data_error(name, f"{what}; {rule} {', '.join(_known(kind))}, also as in left.png")
    return tuple(map(_as_ending, words))


def _known(kind: Kind) -> tuple[str, ...]:
    return (*kind.suffixes, *(IMAGES.suffixes if kind.folders else ()))


def _as_ending(word: str) -> str:
    return "." + word.lower().lstrip(".")

"""Label masks among photographs: told by their pixels, left out by what their names have in common.

Names alone would not do: photographs of people in masks lie in a folder ``masks`` too.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from patchmine.data.inspecting.findings import Findings
from patchmine.data.sources.combine import Joined
from patchmine.data.sources.contract import Source
from patchmine.data.sources.members import ending_of
from patchmine.errors import shown_name

_AGREED = 0.9  # share of the masks that a rule must take, and of what it takes that must be masks
_WORD = re.compile(r"[_\-. ]([a-z]+)$")


class Masks(NamedTuple):
    """A sentence about them, and ``data=`` without them, "" where that is not known."""

    advice: str
    data: str = ""


def masks_of(source: Source, chosen: Sequence[int], findings: Findings) -> Masks | None:
    """How many of the items read are drawn, and how to leave them out; None without."""
    drawn = findings.drawn
    if not drawn:
        return None
    found = f"{len(drawn):,} of {len(chosen):,} images are of few values in flat areas"
    one = f"as {shown_name(source.path(min(drawn)))}"
    if not findings.among_pictures:
        rest = "if they are label masks, name the folder of the photographs instead"
        return Masks(f"{found}, {one}: {rest}")
    found += ", like label masks or drawings"
    masks = {*drawn, *findings.blank}
    keys = {index: source.key(index).lower() for index in chosen}
    ending = _rule(drawn, keys, masks, lambda key: [ending_of(key)])
    others = {ending_of(key) for index, key in keys.items() if index not in masks} - {""}
    if ending and ending not in others and not isinstance(source, Joined):
        data = f"{source.name.partition('::')[0]}::{','.join(sorted(others)).replace('.', '')}"
        advice = f"{found}, all that end in {ending}: leave them out with data={data}"
        return Masks(advice, data)
    for parts_of, where, tests in _KINDS:
        part = _rule(drawn, keys, masks, parts_of)
        if part and os.path.isdir(source.name):  # noqa: PTH112, a setting
            folder = source.name.rstrip("/")
            given = (shlex.quote(test.format(folder=folder, part=part)) for test in tests)
            find = f"find {shlex.quote(folder)} -type f" + "".join(
                f" -not -ipath {t}" for t in given
            )
            rest = f"`{find} > images.txt` lists the others, for data=images.txt"
            return Masks(f"{found}, {where.format(part)}: {rest}", "images.txt")
        if part:
            return Masks(f"{found}, {where.format(part)}: leave them out of data={source.name}")
    return Masks(f"{found}, {one}: if they are label masks, move them to a folder of their own")


def _rule(
    drawn: Sequence[int],
    keys: dict[int, str],
    masks: set[int],
    parts_of: Callable[[str], list[str]],
) -> str | None:
    """The part of names that nearly all masks have, and nearly no other image."""
    counts = Counter(part for index in drawn for part in parts_of(keys[index]) if part)
    for part, number in counts.most_common(3):
        taken = [index for index, key in keys.items() if part in parts_of(key)]
        right = sum(index in masks for index in taken)
        if number >= _AGREED * len(drawn) and right >= _AGREED * len(taken):
            return part
    return None


def _folders(key: str) -> list[str]:
    return key.split("/")[:-1]


def _last_word(key: str) -> list[str]:
    """``_mask`` of ``7_mask.png``."""
    stem = os.path.splitext(os.path.basename(key))[0]  # noqa: PTH119, PTH122, once per image
    found = _WORD.search(stem)
    return [found[0]] if found else []


_KINDS: tuple[tuple[Callable[[str], list[str]], str, tuple[str, ...]], ...] = (
    (_folders, "those in folders {}/", ("{folder}/{part}/*", "{folder}/*/{part}/*")),
    (_last_word, "those named *{}.*", ("{folder}/*{part}.*",)),
)
"""Parts of a name that masks may have in common, in words, and as patterns of ``find``."""

"""Which names of a folder, a list, a tar archive or a folder of frames count as items: one rule for
all of them.

A name counts unless it is hidden or the system's own, or does not end as the kind's files do.  A
file without an ending counts when its first bytes are those of the kind.  What does not count is
counted by reason and told.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from functools import cache

from patchmine.data.sources.contract import Kind, open_regular
from patchmine.errors import shown_name

Facts = list[tuple[str, int, str]]
"""Of what was passed over: reason, how many, one name."""

HIDDEN = "hidden or of the system"
NO_LINK = "link that leads nowhere"
NO_FILE = "no regular file (pipe, socket or device)"
NOT_OPENED = "that may not be read"

HEAD = 192
"""Bytes of a file without an ending that are looked at."""

# Beside these, every name with a dot in front is hidden (.DS_Store, AppleDouble's ._x.jpg).
_SYSTEM = {
    *(
        ".ipynb_checkpoints",
        ".appledouble",
        ".trash",
        ".trashes",
        ".thumbnails",
        ".spotlight-v100",
        ".fseventsd",
    ),
    *("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "#recycle"),
    *("thumbs.db", "desktop.ini", "ehthumbs.db", "__pycache__"),
}
_BACKUP = re.compile(r"~\$.*|.+~|#.+#", re.DOTALL)  # by which editors keep what they changed
_HEIF = (".heic", ".heif", ".hif")
_ENDING = re.compile(
    r"\.([a-z0-9_+-]*[a-z][a-z0-9_+-]*)$"
)  # `scan.0001` and `2024.06.01` have none
_REASONS_SHOWN = 8
_INSIDE = " inside"

# Where in a file, which bytes, what ending such files have, which kinds they are of.
_MAGIC = (
    (0, b"\xff\xd8\xff", ".jpg", ("image",)),
    (0, b"\x89PNG\r\n\x1a\n", ".png", ("image",)),
    (0, b"GIF8", ".gif", ("image", "video")),
    (8, b"WEBP", ".webp", ("image",)),
    (0, b"II*\0", ".tif", ("image",)),
    (0, b"MM\0*", ".tif", ("image",)),
    (0, b"II+\0", ".tif", ("image",)),
    (0, b"MM\0+", ".tif", ("image",)),
    (0, b"\x93NUMPY", ".npy", ("image",)),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", ".jp2", ("image",)),
    (0, b"\xff\x4f\xff\x51", ".j2k", ("image",)),
    (4, b"ftypavif", ".avif", ("image",)),
    (4, b"ftypavis", ".avif", ("image",)),
    *(
        (16, brand, ".avif", ("image",)) for brand in (b"avif", b"avis")
    ),  # named by a file of brand mif1
    *(
        (4, b"ftyp" + brand, ".heic", ("image",))
        for brand in (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")
    ),
    (4, b"ftyp", ".mp4", ("video",)),
    (4, b"moov", ".mov", ("video",)),
    (8, b"AVI ", ".avi", ("video",)),
    (0, b"\x1a\x45\xdf\xa3", ".mkv", ("video",)),
    (0, b"OggS", ".ogv", ("video",)),
    (0, b"FLV\x01", ".flv", ("video",)),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", ".wmv", ("video",)),
    (0, b"\0\0\x01\xba", ".mpg", ("video",)),
    (0, b"\0\0\x01\xb3", ".mpg", ("video",)),
)


class PassedOver:
    """Counts names that are passed over, by reason, with the first name of each."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, name: str) -> None:
        """One more name."""
        count, first = self._found.get(reason, (0, name))
        self._found[reason] = count + 1, first

    def is_final(self) -> bool:
        """Whether no such name may come to count by itself."""
        return not any(map(may_change, self._found))

    def facts(self) -> Facts:
        """The counts, largest first."""
        found = [
            (reason, count, shown_name(first)) for reason, (count, first) in self._found.items()
        ]
        return sorted(found, key=lambda fact: (-fact[1], fact[0]))


def passed_over_note(name: str, facts: Sequence[Sequence[object]]) -> tuple[str, ...]:
    """One sentence about what was passed over in the source that the user calls ``name``; none
    about nothing.
    """
    total = sum(int(str(count)) for _, count, _ in facts)
    if not total:
        return ()
    parts = [f"{reason}: {count:,}, as {first}" for reason, count, first in facts[:_REASONS_SHOWN]]
    if len(facts) > _REASONS_SHOWN:
        parts.append(f"and {len(facts) - _REASONS_SHOWN:,} more reasons")
    names = f"{total:,} names are" if total > 1 else "1 name is"
    return (f"data={shown_name(name)}: {names} passed over ({'; '.join(parts)}).",)


def reason_against(
    name: str, kind: Kind, head: Callable[[], bytes], *, listed: bool = False
) -> str | None:
    """Why a file does not count as an item; None where it does.

    Args:
        name: the path below the folder, the list's folder or the archive's root; its parts are
        judged too.
        kind: what the source is of.
        head: gives the file's first ``HEAD`` bytes, asked for only where the name does not tell.
        listed: a person named this very file, so an ending that says nothing is no reason.
    """
    if is_hidden(name):
        return HIDDEN
    lower = name.lower()
    if lower.endswith(kind.suffixes):
        return _codec_missing(lower)
    ending = ending_of(lower)
    if kind.chosen or (ending and not listed):
        return f"ending {ending}" if ending else "no ending"
    try:
        found, kinds = _told_by(head())
    except OSError:
        return NOT_OPENED
    if kind.name in kinds:
        return _codec_missing(found)
    return f"{f'ending {ending}' if ending else 'no ending'}, and no {kind.name}{_INSIDE}"


def may_change(reason: str) -> bool:
    """Whether a name that was passed over may come to count while its folder, or the list, stays as
    it is.
    """
    return reason in (NO_LINK, NO_FILE, NOT_OPENED) or reason.endswith(_INSIDE)


def is_hidden(path: str) -> bool:
    """Whether a part of a path is hidden or one that an operating system, a viewer or an editor
    made for itself.
    """
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return any(
        part.startswith(".") or part.lower() in _SYSTEM or _BACKUP.fullmatch(part) for part in parts
    )


def outside_of_root(path: str) -> str:
    """What `is_hidden` should judge of a path that a list gives outside of its own folder.

    There a folder with a dot in front may be where a person keeps the data; the system's own
    folders still count.
    """
    *folders, last = path.split("/")
    return "/".join([*(folder for folder in folders if folder.lower() in _SYSTEM), last])


def ending_of(name: str) -> str:
    """The ending of a name in lower case, with its dot; "" where there is none.  Digits alone are
    none.
    """
    found = _ENDING.search(os.path.basename(name.lower()))  # noqa: PTH119, once per name
    return f".{found[1]}" if found and found.start() else ""


def ending_told_by(head: bytes) -> str:
    """The ending that a file's first bytes stand for; "" where they tell nothing."""
    return _told_by(head)[0]


def head_of(path: str | bytes) -> bytes:
    """The first bytes of a file.  OSError as of `open_regular`."""
    with open_regular(os.fsdecode(path)) as handle:
        return handle.read(HEAD)


def rule_of(kind: Kind) -> str:
    """Changes when a listing that was made before would come out differently by this rule."""
    names = (sorted(_SYSTEM), _BACKUP.pattern)
    facts = (
        kind.name,
        kind.suffixes,
        kind.chosen,
        has_heif(),
        names,
        [magic[:3] for magic in _MAGIC],
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@cache
def has_heif() -> bool:
    """Whether HEIC images can be read here."""
    return importlib.util.find_spec("pillow_heif") is not None


def _codec_missing(name: str) -> str | None:
    if name.endswith(_HEIF) and not has_heif():
        return f"ending {ending_of(name) or name}, read once pillow-heif is there (pip install pillow-heif)"
    return None


def _told_by(head: bytes) -> tuple[str, tuple[str, ...]]:
    for place, magic, ending, kinds in _MAGIC:
        if head.startswith(magic, place) and (place != 8 or head.startswith(b"RIFF")):
            return ending, kinds
    if re.match(rb"P[1-6fF]\s", head):
        return ".ppm", ("image",)
    if head.startswith(b"BM") and head[14:18] in (
        b"\x0c\0\0\0",
        b"\x28\0\0\0",
        b"\x6c\0\0\0",
        b"\x7c\0\0\0",
    ):
        return ".bmp", ("image",)
    if head[:1] == b"G" and head[188:189] == b"G":
        return ".ts", ("video",)
    return "", ()

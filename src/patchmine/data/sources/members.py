"""Which names of a folder, a list, a tar archive or a folder of frames count as items: one rule.

A name counts unless it is hidden or the system's own, or does not end as the kind's files do.  A
file without an ending counts when its first bytes are those of the kind.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache

from patchmine.data.decoding import zarrs
from patchmine.data.decoding.bounds import DecodeError
from patchmine.data.decoding.domains import DOMAINS, domain_named
from patchmine.data.decoding.reading import open_regular
from patchmine.data.sources.contract import Kind
from patchmine.errors import shown_name

HIDDEN = "hidden or of the system"
NO_LINK = "link that leads nowhere"
NO_FILE = "no regular file (pipe, socket or device)"
NOT_OPENED = "that may not be read"
OTHER_SERIES = "images of another series than the frames'"

HEAD = 192
"""Bytes of a file without an ending that are looked at."""

# Beside these, every name with a dot in front is hidden (.DS_Store, AppleDouble's ._x.jpg).
_SYSTEM = re.compile(
    r"\.(ipynb_checkpoints|appledouble|trash|trashes|thumbnails|spotlight-v100|fseventsd)"
    r"|__macosx|@eadir|\$recycle\.bin|system volume information|lost\+found|#recycle|__pycache__"
    r"|thumbs\.db|desktop\.ini|ehthumbs\.db|dicomdir",
    re.IGNORECASE,
)
_BACKUP = re.compile(r"~\$.*|.+~|#.+#", re.DOTALL)  # by which editors keep what they changed
_HEIF = (".heic", ".heif", ".hif")
_ENDING = re.compile(r"\.([a-z0-9_+-]*[a-z][a-z0-9_+-]*)$")  # `scan.0001`, `2024.06.01` have none
_REASONS_SHOWN = 8
_INSIDE = " inside"
NO_IMAGE = f"file with no image{_INSIDE}"

# Where in a file, which bytes, what ending such files have, which kinds they are of.
_MAGIC = (
    (0, rb"\xff\xd8\xff", ".jpg", "image"),
    (0, rb"\x89PNG\r\n\x1a\n", ".png", "image"),
    (0, rb"GIF8", ".gif", "image video"),
    (0, rb"RIFF....WEBP", ".webp", "image"),
    (0, rb"II[*+]\0|MM\0[*+]", ".tif", "image"),
    (0, rb"\x93NUMPY", ".npy", "image"),
    (128, rb"DICM", ".dcm", "image"),
    (0, rb"SIMPLE  =", ".fits", "image"),
    (0, rb"\x89HDF\r\n\x1a\n", ".h5", "image"),
    (0, rb"\0\0\0\x0cjP  \r\n\x87\n", ".jp2", "image"),
    (0, rb"\xff\x4f\xff\x51", ".j2k", "image"),
    (4, rb"ftypavi[fs]|ftyp.{8}avi[fs]", ".avif", "image"),  # the latter in files of brand mif1
    (4, rb"ftyp(hei[cxms]|mif1|msf1)", ".heic", "image"),
    (4, rb"ftyp", ".mp4", "video"),
    (4, rb"moov", ".mov", "video"),
    (0, rb"RIFF....AVI ", ".avi", "video"),
    (0, rb"\x1a\x45\xdf\xa3", ".mkv", "video"),
    (0, rb"OggS", ".ogv", "video"),
    (0, rb"FLV\x01", ".flv", "video"),
    (0, rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", ".wmv", "video"),
    (0, rb"\0\0\x01[\xba\xb3]", ".mpg", "video"),
    (0, rb"P[1-6fF]\s", ".ppm", "image"),
    (0, rb"BM.{12}[\x0c\x28\x6c\x7c]\0\0\0", ".bmp", "image"),
    (0, rb"G.{187}G", ".ts", "video"),
)
_MAGIC_RULES = [
    (place, re.compile(magic, re.DOTALL), ending, kinds) for place, magic, ending, kinds in _MAGIC
]

# Words in the name of a series of images that was worked out from the frames of a video.
_AUXILIARY = re.compile(
    r"(^|[^a-z])(flows?|flow[xy]|optflow|tvl|depths?|disp|disparity|normals?|masks?|matte|alpha"
    r"|segm?|segmentation|labels?|annotation|gt|edges?|pose|keypoints|heat|heatmap|thumbs?"
    r"|thumbnail|preview)($|[^a-z])"
)
_CAMERA = re.compile(r"((?:cam|camera|view|sensor|lens)[ _-]?)(\d+)")
_NUMBER = re.compile(r"\d+")
_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")


class PassedOver:
    """Counts names that are passed over, by reason, with the first name of each."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, name: str) -> None:
        """One more name."""
        count, first = self.found.get(reason, (0, name))
        self.found[reason] = count + 1, first

    def update(self, other: Mapping[str, tuple[int, str]]) -> None:
        """What another one found as well."""
        for reason, (more, name) in other.items():
            count, first = self.found.get(reason, (0, name))
            self.found[reason] = count + more, first

    def facts(self) -> list[str]:
        """Reason, count and the first name of each, the largest count first."""
        found = sorted((-count, reason, name) for reason, (count, name) in self.found.items())
        return [f"{reason}: {-count:,}, as {shown_name(name)}" for count, reason, name in found]

    def note(self) -> list[str]:
        """One sentence about all of them; none about nothing."""
        total = sum(count for count, _ in self.found.values())
        facts = self.facts()
        if len(facts) > _REASONS_SHOWN:
            more = f"and {len(facts) - _REASONS_SHOWN:,} more reasons"
            facts = [*facts[:_REASONS_SHOWN], more]
        names = f"{total:,} names are" if total > 1 else "1 name is"
        return [f"{names} passed over ({'; '.join(facts)})."] if facts else []


def reason_against(
    name: str, kind: Kind, head: Callable[[], bytes], *, listed: bool = False
) -> str | None:
    """Why a file does not count as an item; None where it does.

    Args:
        name: the path below the folder, the list's folder or the archive's root, judged in whole.
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
    told = f"ending {ending}" if ending else "no ending"
    if kind.chosen or (ending and not listed):
        return told
    try:
        found, kinds = _told_by(head())
    except OSError:
        return NOT_OPENED
    return _codec_missing(found) if kind.name in kinds else f"{told}, and no {kind.name}{_INSIDE}"


def is_array_folder(name: str, kind: Kind) -> bool:
    """Whether a folder of that name is one array of images (zarr), and its files are none."""
    return kind.name == "image" and name.lower().endswith(zarrs.SUFFIXES)


def may_change(reason: str) -> bool:
    """Whether what was passed over may come to count while its folder, or the list, stays."""
    return reason in (NO_LINK, NO_FILE, NOT_OPENED) or reason.endswith(_INSIDE)


def is_hidden(path: str) -> bool:
    """Whether a part of a path is hidden, or made by a system, viewer or editor for itself."""
    return any(
        part.startswith(".") or _SYSTEM.fullmatch(part) or _BACKUP.fullmatch(part)
        for part in path.split("/")
        if part not in ("", ".", "..")
    )


def outside_of_root(path: str) -> str:
    """What `is_hidden` judges of a path outside of its list's folder, where dots do no harm."""
    *folders, last = path.split("/")
    return "/".join([*filter(_SYSTEM.fullmatch, folders), last])


def ending_of(name: str) -> str:
    """The ending of a name in lower case, with its dot; "" where there is none, or only digits."""
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
    rules = (_SYSTEM.pattern, _BACKUP.pattern, _MAGIC)
    installed = tuple(domain.installed for domain in DOMAINS)
    facts = (kind.name, kind.suffixes, kind.chosen, has_heif(), installed, rules)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@cache
def has_heif() -> bool:
    """Whether HEIC images can be read here."""
    return importlib.util.find_spec("pillow_heif") is not None


def _codec_missing(name: str) -> str | None:
    domain = domain_named(name)
    if domain is not None and not domain.installed:
        ending = ending_of(name) or name
        return f"ending {ending}, read once {domain.module} is there ({domain.command})"
    if name.endswith(_HEIF) and not has_heif():
        ending = ending_of(name) or name
        return f"ending {ending}, read once pillow-heif is there (pip install pillow-heif)"
    return None


def _told_by(head: bytes) -> tuple[str, str]:
    for place, magic, ending, kinds in _MAGIC_RULES:
        if magic.match(head, place):
            return ending, kinds
    return "", ""


def frames_of(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of the images in a folder the names of the frames of its video, and those of other series.

    Names that differ in their numbers alone are one series, beside which names without a number do
    not count.  Several series are one video as long as no number comes twice.  Else the series
    without an auxiliary word (flow, depth, mask, ...) in its name is the video.

    Raises:
        DecodeError: where that leaves several series, or none.
    """
    series: dict[str, list[str]] = {}
    numbers: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        pattern, number = _pattern(name)
        series.setdefault(pattern, []).append(name)
        numbers.setdefault(pattern, set()).add(number)
    if any(pattern and len(found) > 1 for pattern, found in numbers.items()):
        numbers.pop("", None)  # beside numbered frames, a name without a number is a cover
    chosen = list(numbers)
    if _collide(numbers.values()):
        chosen = [pattern for pattern in numbers if not _AUXILIARY.search(pattern)]
    if (numbers and not chosen) or _collide([numbers[pattern] for pattern in chosen]):
        found = sorted(chosen or numbers)
        shown = ", ".join(found[:4]) + (f" and {len(found) - 4:,} more" if len(found) > 4 else "")
        raise DecodeError(
            f"holds several series of frames ({shown}): keep those of one video in a folder"
        )
    kept = {name for pattern in chosen for name in series[pattern]}
    return [name for name in names if name in kept], [name for name in names if name not in kept]


def _pattern(name: str) -> tuple[str, tuple[int, ...]]:
    """A name with ``#`` for its numbers, and these; without numbers it is a frame of its own."""
    lower = os.path.basename(name.lower())  # noqa: PTH119, once per frame
    stem, ending = os.path.splitext(lower)  # noqa: PTH122, the 2 of `.jp2` is none
    # The number of a camera belongs to the name of its series.
    stem = _CAMERA.sub(lambda found: found[1] + found[2].translate(_LETTERS), stem)
    numbers = tuple(int(number[-18:]) for number in _NUMBER.findall(stem))
    return (_NUMBER.sub("#", stem) + ending, numbers) if numbers else ("", (hash(lower),))


def _collide(numbers: Collection[set[tuple[int, ...]]]) -> bool:
    return len(set().union(*numbers)) < sum(map(len, numbers))

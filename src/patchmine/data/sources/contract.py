"""What a source of images or videos is, and how the names of its classes become numbers."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmine.data.decoding.domains import DOMAINS
from patchmine.data.decoding.reading import open_regular
from patchmine.errors import UserError, shown_name

PLAIN_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".tif", ".tiff", ".npy"),
    *(".bmp", ".dib", ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".avifs", ".heic", ".heif", ".hif"),
)
"""Endings of formats of which a file is one image."""
IMAGE_SUFFIXES = (*PLAIN_SUFFIXES, *(suffix for domain in DOMAINS for suffix in domain.suffixes))
"""Endings (in any case) by which a file counts as an image; `data.sources.members` has the rule."""

LARGEST = 4 << 30  # bytes of a file that is read as one image

# First folders below a root that divide a data set instead of naming classes.
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "val", "validation", "valid", "testing")


class Source(ABC):
    """A numbered collection of raw items: picklable, cheap to send to a worker, safe after a fork.

    Attributes:
        name: what the user typed, for messages.
        fingerprint: changes when the list of items changes; a run resumes with an equal one.
        notes: sentences about what is wrong with the source although it can be used.
        repeatable: whether an item is the same each time it is read.
        encoded: whether items are files that a decoder opens, rather than frames or arrays.
        passed_over: why names do not count as items -> how many, and the first; a note says it too.
    """

    repeatable, encoded = True, False
    passed_over: Mapping[str, tuple[int, str]] = MappingProxyType({})

    def __init__(self, name: str, fingerprint: str, notes: Iterable[str] = ()) -> None:
        self.name, self.fingerprint, self.notes = name, fingerprint, tuple(notes)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Any:
        """The raw item: encoded bytes, an array, a tensor, a PIL image, or a video.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def path(self, index: int) -> str:
        """A name for people."""

    def key(self, index: int) -> str:
        """The item's name inside its source (``cat/7.jpg``)."""
        return self.path(index)

    def identity(self, index: int) -> bytes | None:
        """What tells this state of a stored item from any other; None where nothing does.

        It is another one once the item was written anew, and costs no reading of it.
        """
        return None

    def labels(self) -> Labels | None:
        """The classes, worked out when asked; None when there are none.

        Raises:
            UserError: some items have a class and some have none, or classes cannot be read.
        """
        return None

    @cached_property
    def _known_labels(self) -> Labels | None:
        return self.labels()

    def target(self, index: int) -> Any:
        """What is learnt of one item: its class, a place in ``labels().names``; (K,) numbers, a
        mask, `Objects`, in sources that have them.  None where there is nothing.
        """
        known = self._known_labels
        return None if known is None else int(known.ids[index])

    @property
    def target_digest(self) -> str | None:
        """Changes when an item's target or the list of classes does; None without targets."""
        known = self._known_labels
        if known is None:
            return None
        names = "\0".join(known.names).encode("utf-8", "surrogateescape")
        return fingerprint_of([names, known.ids.astype("<i8")])


@dataclass(frozen=True)
class Kind:
    """What a source is of, images or videos.

    Attributes:
        name: "image" or "video", for messages and for the names of kept indices.
        suffixes: endings (in any case) by which a file counts.
        read: from a file's path to the raw item.
        folders: looks at a folder that a list names as one item, and tells reason and name of what
            it passes over there; None where a folder is no item.
        chosen: whether the user named the endings, so that a file without one does not count.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[str], Any]
    folders: Callable[[str, Callable[[str, str], None]], Any] | None = None
    chosen: bool = False


def contents(path: str) -> bytes:
    """All bytes of a file of one image; OSError as of `open_regular`, and where it is too large."""
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > LARGEST:
            raise OSError(f"it has {size / 1e9:,.1f} GB, more than a file of one image may have")
        return handle.read()


IMAGES = Kind("image", IMAGE_SUFFIXES, contents)


def data_error(name: str | os.PathLike[str], what: str) -> UserError:
    """What is wrong with the source that the user calls ``name``."""
    return UserError(f"data={shown_name(name)}: {what}")


def fingerprint_of(parts: Iterable[bytes | NDArray[Any]]) -> str:
    """32 hexadecimal digits that stand for the parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
        digest.update(b"|")
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Labels:
    """The class of every item: ``ids`` (N,) int64 are places in ``names``, which are in order.

    Two sets of the same classes number them alike; of sets that may lack a class, use
    :meth:`numbered_as`.
    """

    ids: NDArray[np.int64]
    names: list[str]

    def numbered_as(self, names: list[str]) -> NDArray[np.int64]:
        """(N,) int64: the same classes as places in ``names``; UserError when it lacks one."""
        place = {name: number for number, name in enumerate(names)}
        strangers = [name for name in self.names if name not in place]
        if strangers:
            raise UserError(
                f"the class {strangers[0]!r} ({len(strangers)} such) is not among the {len(names)} "
                f"known ones, as {names[0]!r}: give two data sets that name their classes alike"
            )
        return np.array([place[name] for name in self.names], np.int64)[self.ids]


class ClassNames:
    """Collects one class name per item, in 4 bytes each."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self._ids = array("i")

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, name: str) -> None:
        """The next item's class."""
        self._ids.append(self.numbers.setdefault(name, len(self.numbers)))

    def finish(self) -> Labels:
        """Classes numbered in the order of their names, or as numbers where all names are such."""
        as_numbers = all(name.isdecimal() for name in self.numbers)
        names = sorted(self.numbers, key=int if as_numbers else None)
        rank = {name: number for number, name in enumerate(names)}
        renumber = np.array([rank[name] for name in self.numbers], np.int64)
        ids = np.frombuffer(self._ids, np.int32)
        return Labels(renumber[ids] if names else np.zeros(0, np.int64), names)


def plain_spelling(name: str) -> str:
    """What spellings of a name have in common that differ in case, blanks or Unicode form only."""
    plain = " ".join(unicodedata.normalize("NFKC", name).split())
    # Of single letters case may be all that tells two classes apart: handwritten a and A.
    return plain.casefold() if len(plain) > 1 else plain


def folder_classes(paths: Iterable[str]) -> Labels | None:
    """The classes by first folders, or second ones where those divide the set; None without."""
    first, second, count = ClassNames(), ClassNames(), 0
    for count, path in enumerate(paths, 1):  # noqa: B007
        parts = path.split("/", 2)
        if len(parts) > 1:
            first.add(parts[0])
        if len(parts) > 2 and _divides(parts[0]):
            second.add(parts[1])
    classes = second if is_divided(first.numbers) else first
    return classes.finish() if count and len(classes) == count else None


def is_divided(folders: Collection[str]) -> bool:
    """Whether the first folders of a data set are its parts: train and test, or only such names."""
    names = {name.lower() for name in folders}
    if names & {*TRAIN_FOLDERS} and names & {*TEST_FOLDERS}:
        return True
    return bool(names) and all(map(_divides, names))


def division_of(folders: Collection[str]) -> tuple[str, str] | None:
    """Of such first folders those to learn from and to be tested on; None where one is missing."""
    by_name = {name.lower(): name for name in sorted(folders, reverse=True)}
    train = [by_name[name] for name in TRAIN_FOLDERS if name in by_name]
    test = [by_name[name] for name in TEST_FOLDERS if name in by_name]
    return (train[0], test[0]) if train and test else None


def _divides(folder: str) -> bool:
    return folder.lower() in (*TRAIN_FOLDERS, *TEST_FOLDERS)

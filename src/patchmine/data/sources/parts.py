"""Images of which several lie in one file: frames, slices, planes of an array."""

from __future__ import annotations

import os
from array import array
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchmine.data.decoding.bounds import DecodeError
from patchmine.data.decoding.domains import Part, domain_named, domain_of_head
from patchmine.data.sources.contract import Kind, Labels, Source, fingerprint_of
from patchmine.data.sources.index import IndexedSource, Marks, stat_of
from patchmine.data.sources.members import NO_IMAGE, PassedOver, ending_of
from patchmine.errors import shown_name

COLUMN = "images"


class Counts:
    """How many images each listed file holds; for ``marks`` and ``passed_over`` of the listing."""

    def __init__(self, kind: Kind, marks: Marks, passed_over: PassedOver) -> None:
        self.kind, self.marks, self.passed_over = kind, marks, passed_over
        self._counts = array("i")

    def add(self, path: str, place: str) -> bool:
        """Whether the file at ``place``, listed as ``path``, holds an image; counts these."""
        count = 1
        if self.kind.name == "image":
            with suppress(OSError, DecodeError):  # which reading it will tell
                count = images_in(place)
        if count != 1:
            self.marks.note(path, stat_of(place))
        if count:
            self._counts.append(count)
        else:
            self.passed_over.add(NO_IMAGE, path)
        return count > 0

    def columns(self) -> dict[str, NDArray[Any]]:
        """What an index keeps of them; nothing where every file holds one image."""
        counts = np.array(self._counts, np.int32)
        return {COLUMN: counts} if bool((counts != 1).any()) else {}


def images_in(path: str) -> int:
    """How many images a file holds: 1 also of other formats, 0 where it is made for something else.

    DecodeError of what is damaged, or is none of these; OSError of what cannot be read.
    """
    name = path.lower()
    domain = domain_named(name) if ending_of(name) else domain_of_head(path)
    return 1 if domain is None or not domain.installed else domain.reader.count(path)


def with_parts(files: IndexedSource) -> Source:
    """A source of all images in files of which some hold several; else the files as they are."""
    return PartSource(files) if COLUMN in files.index.columns else files


class PartSource(Source):
    """The images in some files, one after the other; the class of each is its file's."""

    encoded = True

    def __init__(self, files: IndexedSource) -> None:
        self.files = files
        counts = files.index.columns[COLUMN]
        self._ends = np.cumsum(counts, dtype=np.int64)
        own = fingerprint_of([files.fingerprint.encode(), counts.astype("<i4")])
        many = f"{len(self._ends):,} file{'s' * (len(self._ends) > 1)}"
        note = f"{int(self._ends[-1]):,} images lie in {many}, each of which is an item"
        super().__init__(files.name, own, (*files.notes, f"data={shown_name(files.name)}: {note}."))
        self.passed_over = files.passed_over

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[int, int, int]:
        """The number of a file, of an image in it, and how many it holds."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, "right"))
        first = int(self._ends[file - 1]) if file else 0
        return file, index - first, int(self._ends[file]) - first

    def read(self, index: int) -> Any:
        file, number, count = self._place(index)
        return self.files.read(file) if count == 1 else Part(self.files.path(file), number)

    def _name(self, name: str, number: int, count: int) -> str:
        return name if count == 1 else f"{name}#{number:0{len(str(count - 1))}d}"

    def identity(self, index: int) -> bytes | None:
        file, number, _ = self._place(index)
        if os.path.isdir(self.files.path(file)):  # noqa: PTH112, once per image
            return None  # of a folder that is one array, nothing tells its state
        identity = self.files.identity(file)
        return None if identity is None else b"%b\0%d" % (identity, number)

    def path(self, index: int) -> str:
        file, number, count = self._place(index)
        return self._name(self.files.path(file), number, count)

    def key(self, index: int) -> str:
        file, number, count = self._place(index)
        return self._name(self.files.key(file), number, count)

    def labels(self) -> Labels | None:
        labels = self.files.labels()
        if labels is None:
            return None
        return Labels(np.repeat(labels.ids, self.files.index.columns[COLUMN]), labels.names)

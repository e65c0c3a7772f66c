"""Images with COCO annotations as label maps: 0 is background, the categories are 1 to K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchmine.data.decoding.classmap import ClassMap
from patchmine.data.sources.coco import CocoSource, check_categories, faults_of_part
from patchmine.data.sources.coco_masks import class_map
from patchmine.data.sources.coco_parts import WHOLE, Part, find_parts
from patchmine.data.sources.contract import fingerprint_of
from patchmine.data.sources.pairs import MapSource
from patchmine.errors import UserError, shown_name

BACKGROUND = "background"


class CocoMaps(MapSource):
    """Images ``places`` of a COCO file, in that order.

    Args:
        source: of objects with masks; of two on one pixel the later one counts.
        ignored: the class number of pixels that only a crowd covers.
        places: which images; None: all.
    """

    def __init__(
        self, source: CocoSource, ignored: int, places: NDArray[np.int64] | None = None
    ) -> None:
        every = np.arange(len(source))
        self.source, self.ignored = source, ignored
        self.places = every if places is None else places
        own = fingerprint_of([source.fingerprint.encode(), self.places.astype("<i8")])
        super().__init__(source.name, source.fingerprint if places is None else own, source.notes)
        first = BACKGROUND if BACKGROUND not in source.names else "nothing"
        self.names = [first, *source.names]
        if ignored < len(self.names):
            raise UserError(
                f"ignore_index={ignored} is the number of a class: "
                f"{shown_name(source.part.annotations)} has {len(source.names)} categories, "
                f"numbered from 1: give ignore_index={max(255, len(self.names))}"
            )

    def __len__(self) -> int:
        return len(self.places)

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.places[index]))

    def path(self, index: int) -> str:
        return self.source.path(int(self.places[index]))

    def key(self, index: int) -> str:
        return self.source.key(int(self.places[index]))

    def target(self, index: int) -> ClassMap:
        objects = self.source.target(int(self.places[index]))
        labels = class_map(objects, len(self.source.names), self.ignored)
        return labels.numpy().astype(np.int32)

    def target_name(self, index: int) -> str:
        entry = self.source.image(int(self.places[index]))
        return f"{shown_name(self.source.part.annotations)} (image {entry.id})"

    @property
    def target_digest(self) -> str:
        """Changes when an object or a category does."""
        facts = f"{self.source.target_digest} {self.ignored}".encode()
        return fingerprint_of([facts, self.places.astype("<i8")])

    def chosen(self, places: NDArray[np.int64]) -> CocoMaps:
        return CocoMaps(self.source, self.ignored, self.places[places])


def coco_parts(data: str | Sequence[str], labels: str | None) -> dict[str, Part]:
    """The parts of ``data`` that COCO files describe; empty where it has no such files.

    Raises UserError where a JSON file is named, and there are no images to it.
    """
    if not isinstance(data, str):
        return {}
    if any(name is not None and name.lower().endswith(".json") for name in (data, labels)):
        return find_parts(data, labels)
    if labels is not None or not Path(data).is_dir():
        return {}
    try:
        return find_parts(data)
    except UserError:
        return {}


def open_coco_maps(
    parts: Mapping[str, Part], name: str, ignored: int, *, skip_bad_objects: bool, every_fault: bool
) -> dict[str, MapSource]:
    """Label maps of parts, by "train", "val" and "test"; "all" where they are not divided.

    Args:
        parts: see `coco_parts`.
        name: what the user typed.
        ignored: the class number of pixels that belong to no class.
        skip_bad_objects: leave out annotations that are wrong.
        every_fault: tell all that is wrong, not the first of it.

    Raises:
        UserError: a file is wrong, or categories differ between parts.
    """
    if every_fault and not skip_bad_objects:
        faults = [each for part in parts.values() for each in faults_of_part(part, masks=True)]
        if faults:
            raise UserError("\n".join([f"{len(faults):,} faults:", *faults]))
    sources = {
        part: CocoSource(found, name, masks=True, skip_bad_objects=skip_bad_objects)
        for part, found in parts.items()
    }
    check_categories(list(sources.values()))
    return {
        "all" if part == WHOLE else part: CocoMaps(source, ignored)
        for part, source in sources.items()
    }

"""The COCO data of a run that detects: its parts, its classes, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from patchmine.config.schema import DetectConfig
from patchmine.data.sources.coco import CocoSource, check_categories, faults_of_part, open_coco
from patchmine.data.sources.coco_parts import WHOLE, Part, find_parts
from patchmine.errors import Say, UserError, shown_name
from patchmine.training.dividing import Divided, divided, part_given

_TOLD = 5  # names in one sentence


@dataclass(frozen=True)
class Annotated(Divided[CocoSource]):
    """Three disjoint parts with objects of the same classes."""

    @property
    def names(self) -> list[str]:
        """Of the classes, by their numbers."""
        return self.train.names


def open_annotated(config: DetectConfig, say: Say) -> Annotated:
    """The parts that ``data``, ``val`` and ``test`` name.

    Args:
        config: the settings.
        say: hears how the parts came to be, and what is odd about them.

    Raises:
        UserError: annotations that are missing or wrong, a part without objects, other classes than
            the settings name.
    """
    parts = dict(_opened(config))
    check_categories(list(parts.values()))
    found = divided(parts, config, WHOLE)
    found.tell(say)
    names = found.train.names
    if config.classes and config.classes != names:
        raise UserError(
            f"classes={config.classes}, but the categories of {shown_name(found.train.name)} are "
            f"{names}: leave classes out"
        )
    for name, part in found.parts.items():
        if not part.counts().sum():
            raise UserError(
                f"the {len(part):,} images of {shown_name(part.name)} to {_USES[name]} have no "
                "object: give others, or more of them"
            )
    counts = found.train.counts()
    if absent := [name for name, count in zip(names, counts, strict=True) if not count]:
        listed = ", ".join(map(shown_name, absent[:_TOLD]))
        say(f"Beware: the training images show no object of {listed}, which cannot be learned.")
    return Annotated(found.train, found.val, found.test, found.how)


_USES = {"train": "learn from", "val": "choose the best checkpoint by", "test": "test on"}


def _opened(config: DetectConfig) -> Iterator[tuple[str, CocoSource]]:
    """Parts by name, those that ``val`` and ``test`` name last."""
    how: dict[str, Any] = dict(masks=config.masks, skip_bad_objects=config.skip_bad_objects)
    yield from open_coco(str(config.data), config.annotations, **how).items()
    for name, given in (("val", config.val), ("test", config.test)):
        if given is not None:
            yield name, part_given(name, str(given), open_coco(str(given), **how))


def faults_of_data(config: DetectConfig) -> Iterator[str]:
    """Every fault of all that ``data``, ``val`` and ``test`` name.

    Raises:
        UserError: there are no annotations to look at.
    """
    parts: dict[str, Part] = dict(find_parts(str(config.data), config.annotations))
    for name, given in (("val", config.val), ("test", config.test)):
        if given is not None:
            parts[name] = part_given(name, str(given), find_parts(str(given)))
    for part in dict.fromkeys(parts.values()):
        yield from faults_of_part(
            part, masks=config.masks, skip_bad_objects=config.skip_bad_objects
        )

"""What is learned, chosen by and tested on, of data that come in parts or whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from patchmine.config.schema import DetectConfig, SegmentConfig
from patchmine.data.sampling import spread_indices
from patchmine.errors import Say, UserError, shown_name
from patchmine.evaluate.labelled import TEST_SHARE

P = TypeVar("P", bound="Divisible")


class Divisible(Protocol):
    """Images of which some can be chosen."""

    notes: tuple[str, ...]

    def __len__(self) -> int: ...
    def chosen(self: P, places: NDArray[np.int64]) -> P: ...


@dataclass(frozen=True)
class Divided(Generic[P]):
    """Three disjoint parts: ``val`` chooses the best checkpoint, where there is one.

    ``how`` they came to be, for people.
    """

    train: P
    val: P | None
    test: P
    how: str

    @property
    def parts(self) -> dict[str, P]:
        """Those that there are, by what they are for."""
        every = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in every.items() if part is not None}

    def tell(self, say: Say) -> None:
        """How the parts came to be, and what is odd about them."""
        for note in dict.fromkeys(note for part in self.parts.values() for note in part.notes):
            say(note)
        say(self.how)


def divided(parts: Mapping[str, P], config: SegmentConfig | DetectConfig, whole: str) -> Divided[P]:
    """The parts as the settings ``val_share`` and ``share`` want them.

    Args:
        parts: by "train", "val" and "test", or by ``whole``, the name of data without parts.
        config: the settings.
        whole: see ``parts``.

    Raises:
        UserError: nothing to learn from, or too few images.
    """
    name = shown_name(str(config.data))
    train = parts.get("train", parts.get(whole))
    if train is None:
        raise UserError(
            f"data={name} has no train/ to learn from, only {', '.join(parts)}: name the folder "
            "of the training images as data, and the others as val=... and test=..."
        )
    train, val, test, how = _tested(parts, train, config, name)
    if config.val_share and val is not None:
        raise UserError(
            f"val_share={config.val_share:g}, but {name} has val/, by which the best checkpoint is "
            "chosen: leave val_share out"
        )
    if config.share < 1:
        how += f", of its training images {100 * config.share:.3g} %"
        train = _shared(train, config)
    if config.val_share:
        train, val = _cut(train, config.val_share, name)
    if val is not None:
        how += f"; {len(val):,} images choose the best checkpoint"
    elif config.patience is not None:
        raise UserError(
            f"patience={config.patience}, but there is nothing to validate on: set val_share=0.1, "
            "or val to labelled images"
        )
    counts = f"{len(train):,} images to train on, {len(test):,} to test"
    return Divided(train, val, test, f"{how} ({counts}).")


def _tested(
    parts: Mapping[str, P], train: P, config: SegmentConfig | DetectConfig, name: str
) -> tuple[P, P | None, P, str]:
    """Training, validation and test as the data have them, and how that is."""
    val, test = parts.get("val"), parts.get("test")
    if test is not None:
        tested = "its test/" if config.test is None else shown_name(str(config.test))
        return train, val, test, f"Learns from {name}, is tested on {tested}"
    if val is not None and config.val is None:
        # Nothing is ever chosen by what the network is judged by.
        return train, None, val, f"Learns from train/ of {name}, is tested on its val/"
    train, test = _cut(train, TEST_SHARE, name)
    how = f"{name} has no part for testing: the last fifth of the list is tested on"
    return train, val, test, how


def part_given(name: str, given: str, opened: Mapping[str, Any]) -> Any:
    """What the setting ``val`` or ``test`` means by images that came in the parts ``opened``."""
    if name not in opened and len(opened) > 1:
        raise UserError(f"{name}={shown_name(given)} has the parts {', '.join(opened)}: name one")
    return opened[name] if name in opened else next(iter(opened.values()))


def _shared(train: P, config: SegmentConfig | DetectConfig) -> P:
    """The part of the training images that ``share`` leaves, drawn by ``seed``."""
    count = round(config.share * len(train))
    if count == 0:
        least = f"{np.ceil(1000 / len(train)) / 10:g}%"
        few = f"share={100 * config.share:g}% of {len(train):,} images is none"
        raise UserError(f"{few}: take {least} or more")
    return train.chosen(spread_indices(len(train), count, config.seed))


def _cut(part: P, share: float, name: str) -> tuple[P, P]:
    """The first images, and the last ``share`` of them."""
    # Neighbours in a list are often frames of one video: no random draw.
    last = max(1, round(share * len(part)))
    if last >= len(part):
        raise UserError(f"{name} has {len(part)} image, too few to keep some from training")
    places = np.arange(len(part))
    return part.chosen(places[:-last]), part.chosen(places[-last:])

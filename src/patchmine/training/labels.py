"""The labelled images of a fine-tuned run: what is trained on, chosen by and tested on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from patchmine.config.schema import FinetuneConfig
from patchmine.data.items import Item
from patchmine.data.sources.combine import Joined
from patchmine.data.sources.contract import division_of
from patchmine.data.sources.selected import Selected
from patchmine.data.sources.targets import read_targets
from patchmine.errors import Say, UserError, shown_name
from patchmine.evaluate.labelled import (
    TEST_SHARE,
    LabelledData,
    Part,
    open_labelled,
    split_by_class,
    stratified,
)

Parts: TypeAlias = tuple[Selected, Selected | None, Selected, str]
"""To train on, to choose by, to test on, and how they came to be."""
_WHAT = {"ce": "classes", "bce": "labels", "mse": "numbers"}


@dataclass(frozen=True)
class Labelled:
    """Three disjoint parts with targets of one meaning.

    Args:
        train: what is learned.
        val: what the best checkpoint is chosen by, where anything is.
        test: what the finished network is judged by.
        names: of the classes, labels or numbers.
        what: these are.
        how: the parts came to be, for people.
    """

    train: Selected
    val: Selected | None
    test: Selected
    names: list[str]
    what: str
    how: str


def open_labelled_parts(settings: FinetuneConfig, item: Item, say: Say) -> Labelled:
    """The parts that ``data``, ``labels``, ``val`` and ``test`` name.

    Raises UserError for labels that are missing, contradict each other or leave a class empty.
    """
    labelled = divide(open_parts(settings, item), settings)
    say(labelled.how)
    return labelled


def open_parts(settings: FinetuneConfig, item: Item) -> Parts:
    """All labelled images, of which `divide` takes those that ``share`` and ``val_share`` leave."""
    return _of_table(settings, item) if settings.labels else _of_folders(settings, item)


def divide(parts: Parts, settings: FinetuneConfig) -> Labelled:
    """What is trained on, chosen by and tested on; a smaller share is a part of a larger one."""
    train, val, test, how = parts
    if settings.share < 1:
        train = _shared(train, settings)
        how = f"{100 * settings.share:.3g} % of the training images of each class; {how}"
    if settings.val_share:
        kept, held_out = _split(train, settings.val_share, settings.loss)
        if len(held_out) == 0:
            raise UserError(
                f"val_share={settings.val_share:g} keeps no image: every class has but one; give "
                "val=... instead"
            )
        train, val = _part(train, kept), _part(train, held_out)
    return Labelled(train, val, test, list(train.names), _WHAT[settings.loss], how)


def _of_folders(settings: FinetuneConfig, item: Item) -> Parts:
    """Folders, lists or shards that know their classes."""
    data = open_labelled(settings.data, settings.test, item)
    train, test = (_selected(part, data) for part in (data.train, data.test))
    val = None
    if settings.val is not None:
        beside = open_labelled(settings.data, settings.val, item, names=("data", "val"))
        if beside.classes != data.classes:
            raise UserError(f"val={shown_name(str(settings.val))} has other classes than data")
        val = _selected(beside.test, beside)
    if settings.loss == "bce":
        one_hot = np.eye(len(data.classes), dtype=np.float32)
        train, test = (_with(part, one_hot[part.targets]) for part in (train, test))
        val = None if val is None else _with(val, one_hot[val.targets])
    return train, val, test, data.how


def _of_table(settings: FinetuneConfig, item: Item) -> Parts:
    """Images of one or several sources, whose labels stand in one CSV file."""
    assert settings.labels is not None, "called where a table is named"
    given = [settings.data, settings.val, settings.test]
    sources = [item.open(name) for name in given if name is not None]
    whole = sources[0] if len(sources) == 1 else Joined(sources)
    table = read_targets(settings.labels, whole, column=settings.column, loss=settings.loss)
    everything = Selected(whole, table.indices, table.values, table.names)
    bounds = np.cumsum([len(source) for source in sources])
    places = np.searchsorted(bounds, table.indices, side="right")
    parts = [_part(everything, np.flatnonzero(places == n)) for n in range(len(sources))]
    name = shown_name(str(settings.labels))
    train = parts.pop(0)
    val = parts.pop(0) if settings.val is not None else None
    if parts:
        return train, val, parts[0], f"labels of {name}; is tested on {settings.test}"
    first = np.array([train.key(index).split("/")[0] for index in range(len(train))])
    if folders := division_of(set(first.tolist())):
        kept, held_out = (np.flatnonzero(first == folder) for folder in folders)
        how = f"labels of {name}; learns from {folders[0]}/, is tested on {folders[1]}/"
    else:
        kept, held_out = _split(train, TEST_SHARE, settings.loss)
        how = f"labels of {name}; the last fifth is tested on ({len(held_out):,} of {len(train):,})"
    if len(held_out) == 0:
        raise UserError(f"labels={name} has too few images to test on: give more, or test=...")
    return _part(train, kept), val, _part(train, held_out), how


def _selected(part: Part, data: LabelledData) -> Selected:
    assert part.labels is not None, "labelled data has labels"
    return Selected(part.source, part.indices, part.labels[part.indices], data.classes)


def _part(whole: Selected, places: np.ndarray[Any, Any]) -> Selected:
    return Selected(whole.source, whole.indices[places], whole.targets[places], whole.names)


def _with(part: Selected, targets: np.ndarray[Any, Any]) -> Selected:
    return Selected(part.source, part.indices, targets, part.names)


def _split(part: Selected, share: float, loss: str) -> tuple[Any, Any]:
    """Places of what is kept, and of the last ``share``: of each class, where there are such."""
    if loss == "ce":
        return split_by_class(part.targets.astype(np.int64), share)
    held_out = round(share * len(part))
    places = np.arange(len(part))
    return places[: len(part) - held_out], places[len(part) - held_out :]


def _shared(train: Selected, settings: FinetuneConfig) -> Selected:
    """The part of the training images that ``share`` leaves, drawn by ``seed``."""
    count, classes = round(settings.share * len(train)), len(train.names)
    if settings.loss != "ce":
        chosen = np.random.default_rng(settings.seed).permutation(len(train))[:count]
        places = np.sort(chosen)
    else:
        places = stratified(train.targets.astype(np.int64), count, settings.seed)
    if count < (classes if settings.loss == "ce" else 1):
        raise UserError(
            f"share={100 * settings.share:g}% of {len(train):,} images is {count}, which leaves "
            f"some of the {classes} classes empty: take {_rounded_up(classes / len(train))} or more"
        )
    return _part(train, places)


def _rounded_up(share: float) -> str:
    """In percent with a decimal."""
    return f"{math.ceil(1000 * share) / 10:g}%"

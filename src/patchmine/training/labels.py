"""The labelled images of a fine-tuned run: what is trained on, chosen by and tested on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from patchmine.config.schema import FinetuneConfig
from patchmine.data.items import Item
from patchmine.data.sources.combine import Joined
from patchmine.data.sources.contract import division_of
from patchmine.data.sources.selected import Selected
from patchmine.data.sources.source import Spec
from patchmine.data.sources.targets import read_targets
from patchmine.errors import Say, UserError, shown_name
from patchmine.evaluate.labelled import (
    TEST_SHARE,
    LabelledData,
    Part,
    labelled_beside,
    lacking,
    open_labelled,
    split_by_class,
    stratified,
)
from patchmine.runs.preparing import NO_SOURCES, given_data

Parts: TypeAlias = tuple[Selected, Selected | None, Selected, str]
"""To train on, to choose by, to test on, and how they came to be."""
_GIVEN = ("data", "val", "test")
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


def open_labelled_parts(
    settings: FinetuneConfig, item: Item, say: Say, sources: Mapping[str, Spec] = NO_SOURCES
) -> Labelled:
    """The parts that ``data``, ``labels``, ``val`` and ``test`` name, or that ``sources`` give.

    Raises UserError for labels that are missing, contradict each other or leave a class empty.
    """
    labelled = divide(open_parts(settings, item, sources), settings)
    say(labelled.how)
    return labelled


def open_parts(
    settings: FinetuneConfig, item: Item, sources: Mapping[str, Spec] = NO_SOURCES
) -> Parts:
    """All labelled images, of which `divide` takes those that ``share`` and ``val_share`` leave."""
    given = {name: given_data(name, getattr(settings, name), sources) for name in _GIVEN}
    if settings.labels and sources:
        raise UserError(
            f"labels={shown_name(settings.labels)} names files, which a torch dataset does not "
            "have: leave it out, and let the dataset give pairs of an image and a label"
        )
    item = item.keeping(settings.remote_gb)
    return _of_table(settings, item) if settings.labels else _of_folders(settings, given, item)


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


def _of_folders(settings: FinetuneConfig, given: Mapping[str, Any], item: Item) -> Parts:
    """Folders, lists, shards or torch datasets that know their classes."""
    data = open_labelled(given["data"], given["test"], item)
    train, test = (_selected(part, data) for part in (data.train, data.test))
    val = None
    how = data.how
    if given["val"] is not None:
        beside, absent = labelled_beside(given["val"], data, item, ("data", "val"))
        val, how = _selected(beside, data), how + absent
    if settings.loss == "bce":
        one_hot = np.eye(len(data.classes), dtype=np.float32)
        train, test = (_with(part, one_hot[part.targets]) for part in (train, test))
        val = None if val is None else _with(val, one_hot[val.targets])
    return train, val, test, how


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
    train = parts.pop(0)
    val = parts.pop(0) if settings.val is not None else None
    how = f"labels of {shown_name(settings.labels)}; "
    alone: list[str] = []
    if parts:
        test, note = parts[0], f"is tested on {settings.test}"
    else:
        train, test, note, alone = _divided(train, settings)
    note += lacking(alone, f"one {item.noun}, which is learnt from and never tested")
    for part, use in ((val, "chosen by"), (test, "tested on")):
        if part is not None and settings.loss != "mse":
            absent = _absent(train, part, settings)
            names = [name for name in absent if part is val or name not in alone]
            note += lacking(names, f"no {item.noun} to be {use}")
    return train, val, test, how + note


def _divided(
    train: Selected, settings: FinetuneConfig
) -> tuple[Selected, Selected, str, list[str]]:
    """What is trained and tested on of a table's images that no setting tells apart, how they were
    told apart, and the classes with one image.
    """
    alone: list[str] = []
    first = np.array([train.key(index).split("/")[0] for index in range(len(train))])
    if folders := division_of(set(first.tolist())):
        kept, held_out = (np.flatnonzero(first == folder) for folder in folders)
        how = f"learns from {folders[0]}/, is tested on {folders[1]}/"
    else:
        kept, held_out = _split(train, TEST_SHARE, settings.loss)
        how = f"the last fifth is tested on ({len(held_out):,} of {len(train):,})"
        if settings.loss == "ce":
            once = np.flatnonzero(np.bincount(train.targets.astype(np.int64)) == 1)
            alone = [train.names[number] for number in once]
    if len(held_out) == 0:
        name = shown_name(str(settings.labels))
        raise UserError(f"labels={name} has too few images to test on: give more, or test=...")
    return _part(train, kept), _part(train, held_out), how, alone


def _absent(train: Selected, other: Selected, settings: FinetuneConfig) -> list[str]:
    """The labels that ``other`` lacks.

    Raises UserError for a label that it has and that no training image has.
    """
    known, here = _counts(train), _counts(other)
    if len(strangers := np.flatnonzero((here > 0) & (known == 0))):
        number = int(strangers[0])
        targets = other.targets
        has = targets == number if targets.ndim == 1 else targets[:, number] > 0
        file = other.key(int(np.flatnonzero(has)[0]))
        raise UserError(
            f"labels={shown_name(str(settings.labels))}: {shown_name(file)} has the label "
            f"'{shown_name(train.names[number])}', which no training image has ({len(strangers)} "
            "such): label images to learn it from, or leave it out"
        )
    return [train.names[number] for number in np.flatnonzero((here == 0) & (known > 0))]


def _counts(part: Selected) -> np.ndarray[Any, Any]:
    """(K,) images of each class or label."""
    if part.targets.ndim == 1:
        return np.bincount(part.targets.astype(np.int64), minlength=len(part.names))
    return (part.targets > 0).sum(0)


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
    first = len(part) - round(share * len(part))
    is_kept = np.arange(len(part)) < first
    if loss == "bce":  # a label that only the last ones have keeps its first image
        has = part.targets > 0
        for number in np.flatnonzero(has.any(0) & ~has[:first].any(0)):
            is_kept[np.flatnonzero(has[:, number])[0]] = True
    return np.flatnonzero(is_kept), np.flatnonzero(~is_kept)


def _shared(train: Selected, settings: FinetuneConfig) -> Selected:
    """The part of the training images that ``share`` leaves, drawn by ``seed``."""
    count, least = round(settings.share * len(train)), 1
    order = np.random.default_rng(settings.seed).permutation(len(train))
    lost = "no image"
    if settings.loss == "ce":
        least, lost = len(train.names), f"some of the {len(train.names)} classes empty"
        places = stratified(train.targets.astype(np.int64), count, settings.seed)
    else:
        if settings.loss == "bce":
            first = _one_of_each(train.targets[order] > 0)
            order, least = np.concatenate([order[first], np.delete(order, first)]), len(first)
            left = (train.targets[order[:count]] > 0).any(0)
            gone = np.flatnonzero(~left & (train.targets > 0).any(0))
            lost = (
                f"no image with the label '{shown_name(train.names[gone[0]])}'"
                if len(gone)
                else lost
            )
        places = np.sort(order[:count])
    if count < max(1, least):
        raise UserError(
            f"share={100 * settings.share:g}% of {len(train):,} images is {count}, which leaves "
            f"{lost}: take {_rounded_up(max(1, least) / len(train))} or more"
        )
    return _part(train, places)


def _one_of_each(has: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Places of the first rows of ``has`` (n, K) by which each column is met, the rarest first."""
    found: list[int] = []
    counts = has.sum(0)
    for number in np.argsort(counts, kind="stable"):
        if counts[number] and not has[found, number].any():
            found.append(int(np.flatnonzero(has[:, number])[0]))
    return np.array(found, np.int64)


def _rounded_up(share: float) -> str:
    """In percent with a decimal."""
    return f"{math.ceil(1000 * share) / 10:g}%"

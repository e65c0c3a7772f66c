"""What differs between kinds of runs where one of them goes on, or goes on longer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from patchmine.config.schema import AnyConfig, DetectConfig, SegmentConfig
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import Spec
from patchmine.runs.folder import RunFolder
from patchmine.task import Task
from patchmine.training import detecting, finetuning, pretraining, segmenting
from patchmine.training.place import Place

Sources = Mapping[str, Spec]
Data = Any  # what `open` found, which only the other functions of its kind look into


@dataclass(frozen=True)
class Kind:
    """The pieces of a kind of runs.

    Args:
        open: the data, and the settings that had to wait for them, alike in all processes.
        make: the network that settings and data describe, as the seed draws it.
        images: of the data, those that are trained on.
        train: the run, from a checkpoint or from the start to its end.
    """

    open: Callable[[Any, Place, Sources], tuple[Data, AnyConfig]]
    make: Callable[[Any, Data], Task]
    images: Callable[[Data], Source]
    train: Callable[..., RunFolder]


def _open_maps(config: SegmentConfig, place: Place, _: Sources) -> tuple[Data, SegmentConfig]:
    return segmenting.open_maps(config, place)


def _open_objects(config: DetectConfig, place: Place, _: Sources) -> tuple[Data, DetectConfig]:
    return detecting.open_objects(config, place)


_KINDS = {
    "pretrain": Kind(
        pretraining.open_images,
        lambda config, _: pretraining.make_method(config),
        lambda images: images,
        pretraining.train_method,
    ),
    "classify": Kind(
        finetuning.open_labels,
        lambda config, labelled: finetuning.make_classifier(config, labelled.train),
        lambda labelled: labelled.train,
        finetuning.train_classifier,
    ),
    "segment": Kind(
        _open_maps,
        segmenting.make_segmenter,
        lambda mapped: mapped.train,
        segmenting.train_segmenter,
    ),
    "detect": Kind(
        _open_objects,
        lambda config, _: detecting.make_detector(config),
        lambda annotated: annotated.train,
        detecting.train_detector,
    ),
}


def kind_of(config: AnyConfig) -> Kind:
    """The pieces of the kind of run that these settings are of."""
    return _KINDS[config.kind]

"""Longer training: a new run that takes over all that another one knows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from patchmine.config.resolve import command_of, results_of
from patchmine.config.schema import (
    AnyConfig,
    DetectConfig,
    FinetuneConfig,
    PretrainConfig,
    SegmentConfig,
)
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import Spec
from patchmine.errors import Say, UserError, shown_name, silent
from patchmine.runs.folder import RunFolder
from patchmine.runs.fresh import new_folder, refuse_used_folder
from patchmine.runs.known import settings_to_extend
from patchmine.runs.preparing import NO_SOURCES
from patchmine.task import Task
from patchmine.train.checkpoint import Checkpoint, load, load_newest, save
from patchmine.train.optim import fitting_state
from patchmine.training import detecting, segmenting
from patchmine.training.finetuning import make_classifier, open_labels, train_classifier
from patchmine.training.place import Place, identity_of, open_place
from patchmine.training.pretraining import make_method, open_images, train_method


def settings_of_extension(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`settings_to_extend` of a run that has a checkpoint, and mean and std; else a UserError."""
    run = RunFolder(path)
    if not run.checkpoints:
        raise UserError(
            f"{run.path} has no checkpoint to go on from: `patchmine resume {run.path}` makes its "
            "first, and of an imported run `patchmine pretrain init=...` takes the encoder"
        )
    return settings_to_extend(run.whole_config, run.path)


def extend(
    config: AnyConfig,
    path: str | os.PathLike[str],
    *,
    sources: Mapping[str, Spec] = NO_SOURCES,
    say: Say = silent,
) -> RunFolder:
    """Make a run in the new folder ``config.out`` that starts from another run's newest weights.

    Args:
        config: its settings, see `settings_of_extension`; the schedule starts at step 0.
        path: of the run whose weights, and optimizer state where it fits, are taken over.
        sources: as in `pretrain` and `finetune`.
        say: hears what happens.

    Returns:
        The new run, trained and exported; a fine-tuned one is tested, too.

    Raises:
        UserError: settings that do not fit the weights, and as `pretrain` and `finetune` do.
        Interrupted: as in `pretrain`.
    """
    folder, run = new_folder(config), RunFolder(path)
    with open_place(folder, config, say) as place:
        refuse_used_folder(folder)
        before = load_newest(run.checkpoint_dir, place.say, finite=True)
        place.engine.agree({"the step to go on from": before.step})
        if isinstance(config, FinetuneConfig):
            labelled, config = open_labels(config, place, sources)
            task = make_classifier(config, labelled.train)
            before.model["weights"] = task.weights  # by the labels and settings of now
            first = _first(task, config, labelled.train, before, place)
            return train_classifier(config, place, labelled, first)
        if isinstance(config, SegmentConfig):
            mapped, config = segmenting.open_maps(config, place)
            learner = segmenting.make_segmenter(config, mapped)
            before.model["weights"] = learner.weights
            first = _first(learner, config, mapped.train, before, place)
            return segmenting.train_segmenter(config, place, mapped, first)
        if isinstance(config, DetectConfig):
            annotated, config = detecting.open_objects(config, place)
            detector = detecting.make_detector(config)
            first = _first(detector, config, annotated.train, before, place)
            return detecting.train_detector(config, place, annotated, first)
        images, config = open_images(config, place, sources)
        first = _first(make_method(config), config, images, before, place)
        return train_method(config, place, images, first)


def _first(
    task: Task, config: AnyConfig, images: Source, before: Checkpoint, place: Place
) -> Checkpoint:
    """The new run's checkpoint of step 0, in its folder already: a resume needs no other run."""
    run = before.path.parent.parent
    _refuse_misfit(task.state_dict(), config, before)
    trained = dict(pair for group in task.param_groups() for pair in group.params)
    state = fitting_state(trained, before.optimizer)
    facts = {"identity": identity_of(task, images), "settings": results_of(config)}
    kept = {name.rsplit(".", 1)[0] for name in state}
    place.say(
        f"{shown_name(run)}, step {before.step}: all of its {len(before.model)} tensors are taken "
        f"over, and the optimizer's state of {len(kept)} of {len(trained)} that are trained; the "
        "schedule starts at step 0."
    )
    path = place.folder / "checkpoints"
    if place.engine.is_main:
        with place.engine.undisturbed():
            path = save(path, 0, before.model, state, facts, keep=config.keep_checkpoints)
        return load(path)
    return Checkpoint(path, 0, before.model, state, facts)


def _refuse_misfit(wanted: dict[str, Tensor], config: AnyConfig, before: Checkpoint) -> None:
    """Raise UserError where the settings make another network than a checkpoint is of."""

    def shape(tensors: dict[str, Tensor], name: str) -> str:
        return "x".join(map(str, tensors[name].shape)) if name in tensors else "absent"

    names = dict.fromkeys([*before.model, *wanted])
    differing = [name for name in names if shape(before.model, name) != shape(wanted, name)]
    if not differing:
        return
    name, run = differing[0], shown_name(before.path.parent.parent)
    command = command_of(config)
    command += f" init={run}" if isinstance(config, PretrainConfig) else f" {run}"
    raise UserError(
        f"{shown_name(before.path)} does not fit these settings: {name} is "
        f"{shape(before.model, name)} there and {shape(wanted, name)} with them (so are "
        f"{len(differing)} of {len(names)} tensors): leave out what changes the network, or start "
        f"a new run from the encoder alone with `patchmine {command}`"
    )

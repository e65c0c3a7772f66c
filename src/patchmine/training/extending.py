"""Longer training: a new run that takes over all that another one knows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from patchmine.config.resolve import command_of, results_of
from patchmine.config.schema import AnyConfig, PretrainConfig
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import Spec
from patchmine.errors import Say, UserError, shown_name, silent
from patchmine.models.maps import ItemMaps
from patchmine.runs.folder import RunFolder
from patchmine.runs.known import settings_to_extend
from patchmine.runs.preparing import NO_SOURCES
from patchmine.task import Task
from patchmine.train.checkpoint import Checkpoint, load, load_newest, save
from patchmine.train.optim import fitting_state
from patchmine.training.kinds import kind_of
from patchmine.training.making import make_run
from patchmine.training.place import Place, identity_of


def settings_of_extension(path: str | os.PathLike[str], *, timed: bool = False) -> dict[str, Any]:
    """`settings_to_extend` of a run that has a checkpoint, and mean and std; else a UserError."""
    run = RunFolder(path)
    if not run.checkpoints:
        raise UserError(
            f"{run.path} has no checkpoint to go on from: `patchmine resume {run.path}` makes its "
            "first, and of an imported run `patchmine pretrain init=...` takes the encoder"
        )
    return settings_to_extend(run.whole_config, run.path, timed=timed)


def extend(
    config: AnyConfig,
    path: str | os.PathLike[str],
    *,
    sources: Mapping[str, Spec] = NO_SOURCES,
    say: Say = silent,
    began: float | None = None,
) -> RunFolder:
    """Make a run in the new folder ``config.out`` that starts from another run's newest weights.

    Args:
        config: its settings, see `settings_of_extension`; the schedule starts at step 0.
        path: of the run whose weights, and optimizer state where it fits, are taken over.
        sources: as in `pretrain` and `finetune`.
        say: hears what happens.
        began: as in `pretrain`.

    Returns:
        The new run, trained and exported; a fine-tuned one is tested, too.

    Raises:
        UserError: settings that do not fit the weights, and as `pretrain` and `finetune` do.
        Interrupted: as in `pretrain`.
    """
    run, kind = RunFolder(path), kind_of(config)

    def train(config: AnyConfig, place: Place, data: Any, start: Checkpoint | None) -> RunFolder:
        if start is None:
            before = load_newest(run.checkpoint_dir, place.say, finite=True)
            place.engine.agree({"the step to go on from": before.step})
            start = _first(kind.make(config, data), config, kind.images(data), before, place)
        return kind.train(config, place, data, start)

    def opened(config: AnyConfig, place: Place) -> tuple[Any, AnyConfig]:
        return kind.open(config, place, sources)

    return make_run(config, opened, train, say, began, extends=True)


def _first(
    task: Task, config: AnyConfig, images: Source, before: Checkpoint, place: Place
) -> Checkpoint:
    """The new run's checkpoint of step 0, in its folder already: a resume needs no other run."""
    run, own = before.path.parent.parent, task.state_dict()
    if "weights" in own:  # of classes, by the labels and settings of now
        before.model["weights"] = own["weights"]
    identity = identity_of(task, images)
    same = before.facts.get("identity", {}).get("data") == identity["data"]
    _settle_maps(task, own, before.model, same)
    _refuse_misfit(own, config, before)
    trained = dict(pair for group in task.param_groups() for pair in group.params)
    state = fitting_state(trained, before.optimizer)
    settings = before.facts.get("settings", {})
    if settings.get("optimizer", "adamw") != config.optimizer:  # earlier versions had AdamW only
        state = {}
    facts = {"identity": identity, "settings": results_of(config)}
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


def _settle_maps(task: Task, own: dict[str, Tensor], before: dict[str, Tensor], same: bool) -> None:
    """Maps of the items are no part of the network: they are taken over with the ``same`` items."""
    for name, module in task.named_modules():
        table = f"{name}.values"
        if isinstance(module, ItemMaps) and table in before:
            if same:
                own[table] = before[table]
            else:
                before[table] = own[table]


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

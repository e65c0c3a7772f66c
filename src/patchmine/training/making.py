"""How a run of any kind begins, or goes on from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from patchmine.config.resolve import changed_results, results_of
from patchmine.config.schema import AnyConfig, RunConfig
from patchmine.errors import Say, UserError, shown_name
from patchmine.runs.folder import RunFolder
from patchmine.runs.fresh import new_folder, refuse_used_folder
from patchmine.runs.known import KNOWN_BY_CONTENT, is_run, settings_of_run
from patchmine.train.checkpoint import Checkpoint, load_newest
from patchmine.training.place import Place, open_place

Config = TypeVar("Config", bound=RunConfig)
Data = TypeVar("Data")
Open = Callable[[Config, Place], tuple[Data, Config]]
"""Gives the data, and the settings that had to wait for them, alike in all processes."""
Train = Callable[[Config, Place, Data, Checkpoint | None], RunFolder]
"""Makes the run, from a checkpoint or from the start to its end."""


def make_run(
    config: Config,
    open_data: Open[Config, Data],
    train: Train[Config, Data],
    say: Say,
    began: float | None = None,
    *,
    extends: bool = False,
) -> RunFolder:
    """The run in ``config.out``: a new one, or with resume=auto the one that stands there.

    ``began`` is the time of `perf_counter` from which a budget counts; None: now.  ``extends``: it
    begins with another run's weights, see `refuse_used_folder`.

    Raises UserError where something else stands there, or a run of other settings.
    """
    folder = new_folder(config)
    with open_place(folder, config, say, began) as place:
        # Under the lock, and alike in all processes: nobody begins where another one goes on.
        if config.resume == "auto" and place.engine.largest(is_run(folder)):
            return _go_on_as_told(config, place, open_data, train)
        refuse_used_folder(folder, extends=extends)
        data, config = open_data(config, place)
        return train(config, place, data, None)


def go_on(
    config: Config, place: Place, open_data: Open[Config, Data], train: Train[Config, Data]
) -> RunFolder:
    """The run in a place, from its newest readable checkpoint, with settings known to fit it."""
    run = RunFolder(place.folder)
    start = load_newest(run.checkpoint_dir, place.say, finite=True) if run.checkpoints else None
    data, config = open_data(config, place)
    _refuse_stale(run, start, config, place)
    return train(config, place, data, start)


def _go_on_as_told(
    config: Config, place: Place, open_data: Open[Config, Data], train: Train[Config, Data]
) -> RunFolder:
    """`go_on` with the settings of a command that began the run."""
    own = settings_of_run(place.folder)
    if config.mean is None:  # found in the data once; that these are the same, prints tell
        config = config.model_copy(update={"mean": own.mean, "std": own.std})

    def open_same(config: Config, place: Place) -> tuple[Data, Config]:
        data, config = open_data(config, place)
        _refuse_another(own, config, place)
        return data, config

    return go_on(config, place, open_same, train)


def _refuse_another(own: AnyConfig, config: RunConfig, place: Place) -> None:
    """UserError where the run in a place has other settings than these, complete with its data."""
    before, now = results_of(own), results_of(config)
    moved = {name: before[name] for name in KNOWN_BY_CONTENT if name in before and name in now}
    if changed := changed_results(before, now | moved):
        raise UserError(
            f"out={shown_name(place.folder)} holds a run with other settings, which is left as it "
            f"is: {'; '.join(changed)}; give those that it began with to go on, or choose another "
            "out"
        )


def _refuse_stale(
    run: RunFolder, start: Checkpoint | None, config: RunConfig, place: Place
) -> None:
    """Say where the run goes on; UserError for a checkpoint of other settings or an old one."""
    if start is not None:
        _refuse_other_settings(start, config)
    step = 0 if start is None else start.step
    least, most = -place.engine.largest(-step), place.engine.largest(step)
    if least != most:  # a stale list of files on another machine
        raise UserError(
            f"{run.checkpoint_dir} looks different from the machines of this run (steps {least} "
            f"and {most}): wait until its file system has caught up, then resume again"
        )
    from_where = f": going on from step {step}." if start else " has no checkpoint: from the start."
    place.say(f"{run.path}{from_where}")


def _refuse_other_settings(start: Checkpoint, config: RunConfig) -> None:
    """Raise UserError where config.yaml was edited or the checkpoint is another run's."""
    now, then = results_of(config), start.facts.get("settings")
    if not isinstance(then, dict):
        return  # earlier versions kept none
    common = [name for name in then if name in now and name not in KNOWN_BY_CONTENT]
    old, new = ({name: values[name] for name in common} for values in (then, now))
    if changed := changed_results(old, new):
        raise UserError(
            f"{start.path} was written with other settings than config.yaml beside it has now: "
            f"{'; '.join(changed)}. Put these back to go on, remove that file if it is of another "
            "run, or start a new run in another out"
        )

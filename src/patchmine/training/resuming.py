"""Going on with a run of any kind from its newest checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from patchmine.config.resolve import changed_results, results_of
from patchmine.config.schema import RunConfig
from patchmine.data.sources.source import Spec
from patchmine.errors import Say, UserError, silent
from patchmine.runs.folder import RunFolder
from patchmine.runs.known import KNOWN_BY_CONTENT, settings_to_resume
from patchmine.runs.preparing import NO_SOURCES
from patchmine.train.checkpoint import Checkpoint, load_newest
from patchmine.training.kinds import kind_of
from patchmine.training.place import Place, open_place


def resume(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    sources: Mapping[str, Spec] = NO_SOURCES,
    say: Say = silent,
) -> RunFolder:
    """Go on with a run from its newest readable checkpoint, exactly as if it had never stopped.

    A run that was killed before its first checkpoint starts again.

    Args:
        path: the run's folder.
        overrides: ``key=value`` for settings that do not change results (workers, device, ...), and
            ``data`` where the same images have moved.
        sources: as in `pretrain` and `finetune`.
        say: hears what happens.

    Returns:
        The run, trained and exported.

    Raises:
        UserError: other settings or images than the run's own.
        Interrupted: as in `pretrain`.
    """
    config, run = settings_to_resume(path, overrides, say), RunFolder(path)
    with open_place(run.path, config, say) as place:
        start = load_newest(run.checkpoint_dir, place.say, finite=True) if run.checkpoints else None
        kind = kind_of(config)
        data, config = kind.open(config, place, sources)
        _refuse_stale(run, start, config, place)
        return kind.train(config, place, data, start)


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

"""Going on with a run of any kind from its newest checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from patchmine.data.sources.source import Spec
from patchmine.errors import Say, silent
from patchmine.runs.folder import RunFolder
from patchmine.runs.known import settings_to_resume
from patchmine.runs.preparing import NO_SOURCES
from patchmine.training.kinds import kind_of
from patchmine.training.making import go_on
from patchmine.training.place import open_place


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
    kind = kind_of(config)
    with open_place(run.path, config, say) as place:
        return go_on(
            config, place, lambda found, where: kind.open(found, where, sources), kind.train
        )

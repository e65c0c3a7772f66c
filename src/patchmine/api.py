"""What `import patchmine` gives."""

from __future__ import annotations

from patchmine.config.resolve import missing_files
from patchmine.config.schema import RunConfig
from patchmine.strict import Mistake


def _misfits(config: RunConfig) -> list[Mistake]:
    from patchmine.runs.checking import misfits  # which takes torch seconds to import

    return misfits(config)


CHECKS = (missing_files, _misfits)
"""What is asked of the settings of a new run, in this order."""

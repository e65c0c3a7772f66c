"""patchmine: pre-train vision backbones on unlabelled images with masked image modelling.

``patchmine.pretrain(data="photos/", method="hpm", out="runs/hpm")`` makes a run, ``patchmine.Run(path)`` opens one,
``patchmine.load_encoder(path)`` gives its timm ``VisionTransformer``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

    from patchmine.run import Run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load_encoder", "pretrain"]


class _Package(ModuleType):
    """Keeps `patchmine.pretrain` the function: importing the file pretrain.py would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "pretrain" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def pretrain(*, data: Any = None, say: Callable[[str], None] = print, **settings: Any) -> Run:
    """Pre-train on ``data`` and return the finished run; the settings are those of `patchmine config schema`.

    ``pretrain(data="photos/", method="hpm", out="runs/hpm", **{"method.mask_ratio": 0.8})``; ``recipe=`` names a recipe
    or a file to start from.  ``data`` is what the command line takes, or any torch dataset of images; ``say`` hears
    what a person should know.  Raises UserError with every mistake in the settings.
    """
    from patchmine.config import from_settings
    from patchmine.pretrain import pretrain as start

    source = None
    if data is not None:
        named = all(isinstance(part, str | PathLike) for part in (data if isinstance(data, list | tuple) else [data]))
        source = None if named else data
        settings["data"] = data if named else f"python:{type(data).__name__}"
    return start(from_settings(say=say, **settings), source=source, say=say)


def load_encoder(path: str | PathLike[str]) -> VisionTransformer:
    """The encoder of a run, an export or a weights file, in eval mode.  Raises UserError where there is none."""
    from patchmine.run import open_encoder

    return open_encoder(path)


def __getattr__(name: str) -> Any:
    if name == "Run":
        from patchmine.run import Run

        return Run
    raise AttributeError(f"module 'patchmine' has no attribute {name!r}")

"""patchmine: pre-train vision backbones on unlabelled images with masked image modelling.

``patchmine.pretrain(data="photos/", method="hpm", out="runs/hpm")`` makes a run,
``patchmine.Run(path)`` opens one, ``patchmine.load_encoder(path)`` gives its timm model
(``VisionTransformer`` or ``Beit``).
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from patchmine.backbones.vit import Encoder
    from patchmine.runs.run import Run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "load_encoder", "pretrain", "resume"]


def pretrain(*, data: Any = None, say: Callable[[str], None] = print, **settings: Any) -> Run:
    """Pre-train on ``data`` and return the finished run; the settings are those of `patchmine
    config schema`.

    ``pretrain(data="photos/", method="hpm", out="runs/hpm", **{"method.mask_ratio": 0.8})``;
    ``recipe=`` names a recipe or a file to start from.  ``data`` is what the command line takes, or
    any torch dataset of images; ``say`` hears what a person should know.  Raises UserError with
    every mistake in the settings.
    """
    from patchmine.api import CHECKS
    from patchmine.config.resolve import from_settings

    source = None if data is None or _is_named(data) else data
    if data is not None:
        settings["data"] = data if source is None else f"python:{type(data).__name__}"
    config = from_settings(say=say, also=CHECKS, **settings)
    from patchmine.training import pretrain as start

    return start(config, source=source, say=say)


def resume(
    path: str | PathLike[str],
    *,
    data: Any = None,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> Run:
    """Go on with an interrupted run, exactly; returns it finished.

    ``settings`` are those that do not change results, such as ``workers``.  ``data`` is needed for
    a run on a torch dataset, or where the images have moved.  Raises UserError where the run cannot
    go on.
    """
    from patchmine.training import resume as go_on

    source = None if data is None or _is_named(data) else data
    if data is not None and source is None:
        settings["data"] = data
    return go_on(
        path, [f"{key}={value}" for key, value in settings.items()], source=source, say=say
    )


def _is_named(data: Any) -> bool:
    """Whether data is given by name: a path, or several."""
    return all(
        isinstance(part, str | PathLike)
        for part in (data if isinstance(data, list | tuple) else [data])
    )


def load_encoder(
    path: str | PathLike[str],
    model: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    *,
    source_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    weights: Literal["auto", "student", "raw", "teacher", "ema"] = "auto",
    prefix: str | None = None,
) -> Encoder:
    """The encoder of a run, an export or a weights file, in eval mode.

    Args:
        path: the folder of a run or export, a folder of timm or transformers, or a .safetensors,
            .pth, .pt or .bin file with the names of timm, MAE, HPM, VideoMAE, DINO, transformers,
            mmpretrain or torchvision.
        model: timm's name, where neither the tensors nor a config.json tell it.
        image_size: the size that it is wanted at, in pixels, one number or (height, width);
            positions are resampled from the grid that they were trained at.  None: that one.
        source_size: the size that a file was trained at, where nothing tells it.
        num_heads: attention heads, where the width is an unusual one and nothing tells them.
        weights: the trained network (student, raw) or its average (teacher, ema), where there are
        both.
        prefix: of the encoder's names, where a file holds several encoders.

    Returns:
        A ``VisionTransformer``, ``Beit`` or ``ResNet`` of timm's, or a `VideoTransformer`, without
        classifier.

    Raises:
        UserError: there is no encoder, or it does not fit.
    """
    from patchmine.runs.run import open_encoder

    return open_encoder(
        path,
        model,
        image_size,
        which=weights,
        source_size=source_size,
        num_heads=num_heads,
        prefix=prefix,
    )


def __getattr__(name: str) -> Any:
    if name == "Run":
        from patchmine.runs.run import Run

        return Run
    raise AttributeError(f"module 'patchmine' has no attribute {name!r}")

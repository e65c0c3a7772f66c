"""``patchmine show``: what a trained method does to pictures, or clips, of the user's choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchmine.backbones.names import reads_clips
from patchmine.backbones.settings import ModelSettings
from patchmine.data.decoding.decode import DecodeError
from patchmine.data.decoding.video import VIDEOS
from patchmine.data.items import CLIP, IMAGE
from patchmine.disk import output
from patchmine.errors import UserError
from patchmine.report.animation import MOVING, save_animation
from patchmine.report.panels import draw_moments, draw_panels
from patchmine.report.reading import distinct_names, read_run
from patchmine.runs.run import Run
from patchmine.types import Batch, Progress


def show(
    run_path: str | Path, paths: Sequence[str | Path], out: str | Path, *, seed: int = 0
) -> Path:
    """Draw what the method of a run makes of some images, at the point that its training has reached.

    Args:
        run_path: the run's folder.
        paths: images, which are resized to cover the run's size and cropped at their centre; of a
            run on videos, files or folders of frames, of which the clip in the middle is taken.
        out: the picture; of videos ``.gif`` and ``.mp4`` move, others are sheets of frames.
        seed: decides the random masks.

    Returns:
        ``out``.

    Raises:
        UserError: something cannot be read or written, or the run has no checkpoint.
    """
    out = Path(out)
    run = Run(run_path)
    config = run.config
    moves = reads_clips(config.model)
    _check_ending(out, moves)
    if not paths:
        raise UserError(
            "show needs something to show: name at least one image, or video of a video run, after the run"
        )
    inputs = torch.stack(
        [_read(Path(path), config) for path in paths]
    )  # (B, C, H, W) or (B, C, T, H, W)
    if config.mean is None or config.std is None:
        raise UserError(
            f"{run.config_file} has no mean and std; write those that the run was normalised with into it"
        )
    shape = (-1, *[1] * (inputs.ndim - 2))
    mean, std = (torch.tensor(values).reshape(shape) for values in (config.mean, config.std))
    method = run.method()
    progress = run_progress(run)
    method.noise.seed = seed
    method.noise.begin(progress.step)
    with torch.no_grad():
        panels = method.panels(_batch((inputs - mean) / std), progress)
    labels = distinct_names([Path(path) for path in paths])
    with output(out) as new:
        if moves and out.suffix.lower() in MOVING:
            save_animation(list(draw_moments(panels, config.mean, config.std, labels=labels)), new)
        else:
            draw_panels(panels, config.mean, config.std, labels=labels).save(new)
    return out


def _check_ending(out: Path, moves: bool) -> None:
    if out.suffix.lower() in (*Image.registered_extensions(), *(MOVING if moves else ())):
        return
    moving = ", or .gif or .mp4 for what moves" if moves else ""
    picture = out.parent / f"{out.stem or 'panel'}.png"
    raise UserError(
        f"out={out} does not end like the name of a picture; write for example out={picture}{moving}"
    )


def run_progress(run: Run) -> Progress:
    """The step whose weights are in the newest checkpoint.

    A run without metrics, such as imported weights, counts as one that is at its end.
    """
    made = int(run.checkpoints[-1].stem.removeprefix("step-")) if run.checkpoints else 0
    record = read_run(run.path, run.path.name)
    total = max(record.total_steps or 1, made, 1)
    return Progress(max(0, made - 1), total, max(1, round(record.steps_per_epoch or made)))


def _read(path: Path, config: ModelSettings) -> Tensor:
    """A picture (C, H, W) or a clip (C, T, H, W) as floats in [0, 1]."""
    kind = "video" if reads_clips(config.model) else "image"
    read = _read_clip if reads_clips(config.model) else _read_image
    try:
        pixels = read(path, config)
    except DecodeError as error:
        raise UserError(f"{path} cannot be shown: {error}") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; name {kind} files after the run"
        ) from error
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def _read_image(path: Path, config: ModelSettings) -> Tensor:
    view = IMAGE.plain_view(config, 1.0)
    return view(path.read_bytes(), np.random.default_rng(0)).views[0]  # which draws nothing


def _read_clip(path: Path, config: ModelSettings) -> Tensor:
    """The clip in the middle of a video file, or of a folder of frames."""
    view = CLIP.plain_view(config, 1.0)
    return view(VIDEOS.read(str(path)), np.random.default_rng(0)).views[0]


def _batch(images: Tensor) -> Batch:
    count = len(images)
    box = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(count, 4)
    return Batch([images], torch.arange(count), box, torch.zeros(count, dtype=torch.bool))

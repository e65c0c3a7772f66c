"""``patchmine show``: what a trained method does to pictures of the user's choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patchmine.data.decode import DecodeError
from patchmine.data.views import PlainView
from patchmine.errors import UserError
from patchmine.report.panels import draw_panels
from patchmine.report.reading import distinct_names, read_run
from patchmine.run import Run
from patchmine.types import Batch, Progress


def show(run_path: str | Path, image_paths: Sequence[str | Path], out: str | Path, *, seed: int = 0) -> Path:
    """Draw what the method of a run makes of some images, at the point that its training has reached; returns ``out``.

    Each image is resized to cover the run's image size and cropped at its centre.  ``seed`` decides the random masks.
    Raises UserError for an image that cannot be read, a run without checkpoint, a name of ``out`` that is no picture's.
    """
    out = Path(out)
    if out.suffix.lower() not in Image.registered_extensions():
        raise UserError(
            f"out={out} does not end like the name of a picture; write for example out={out.with_suffix('.png')}"
        )
    if not image_paths:
        raise UserError("show needs images to show something of: name at least one image file after the run")
    run = Run(run_path)
    config = run.config
    view = PlainView(config.image_size, crop_pct=1.0)
    images = torch.stack([_read(Path(path), view, config.channels) for path in image_paths])  # (B, C, H, W)
    if config.mean is None or config.std is None:
        raise UserError(f"{run.config_file} has no mean and std; write those that the run was normalised with into it")
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (config.mean, config.std))
    method = run.method()
    progress = run_progress(run)
    method.noise.seed = seed
    method.noise.begin(progress.step)
    with torch.no_grad():
        panels = method.panels(_batch((images - mean) / std), progress)
    sheet = draw_panels(panels, config.mean, config.std, labels=distinct_names([Path(path) for path in image_paths]))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return out


def run_progress(run: Run) -> Progress:
    """The step whose weights are in the newest checkpoint.

    A run without metrics, such as imported weights, counts as one that is at its end.
    """
    made = int(run.checkpoints[-1].stem.removeprefix("step-")) if run.checkpoints else 0
    lines = [line for line in run.metrics() if line.get("epoch")]
    per_epoch = max(1, round(lines[-1]["step"] / lines[-1]["epoch"])) if lines else max(1, made)
    total = read_run(run.path, run.path.name).total_steps or max(1, made)
    return Progress(step=max(0, made - 1), total_steps=max(total, made), steps_per_epoch=per_epoch)


def _read(path: Path, view: PlainView, channels: int) -> Tensor:
    """A picture (C, H, W) as floats in [0, 1]."""
    try:
        pixels, _, _ = view(path.read_bytes(), channels, np.random.default_rng(0))  # a plain view draws nothing
    except DecodeError as error:
        raise UserError(f"{path} cannot be shown: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; name image files after the run") from error
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def _batch(images: Tensor) -> Batch:
    count = len(images)
    box = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(count, 4)
    return Batch([images], torch.arange(count), box, torch.zeros(count, dtype=torch.bool))

"""``patchmine show``: what a trained method does to pictures, or clips, of the user's choice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from patchmine.config.schema import PretrainConfig
from patchmine.data.decoding.decode import DecodeError, probe
from patchmine.data.decoding.video import VIDEOS
from patchmine.data.items import CLIP, Item
from patchmine.data.samples import collate
from patchmine.data.sampling import spread_indices
from patchmine.data.settings import InputSettings
from patchmine.data.views.normalise import normalise
from patchmine.errors import UserError, shown_name
from patchmine.report.animation import MOVING, save_animation
from patchmine.report.panels import draw_moments, draw_panels
from patchmine.report.reading import distinct_names, read_run
from patchmine.runs.folder import RunFolder
from patchmine.runs.preparing import item_of
from patchmine.system.disk import output
from patchmine.types import Progress, Sample

FROM_FOLDER = 8  # images of a folder that are shown


def show(
    run_path: str | Path, paths: Sequence[str | Path], out: str | Path, *, seed: int = 0
) -> Path:
    """Draw what the method of a run makes of some images, at the point that its training reached.

    Args:
        run_path: the run's folder.
        paths: images, or folders of which a few are taken, which are resized to cover the run's
            size and cropped at their centre; of a run on videos, files or folders of frames, of
            which the clip in the middle is taken.
        out: the picture; of videos ``.gif`` and ``.mp4`` move, others are sheets of frames.
        seed: decides the random masks.

    Returns:
        ``out``.

    Raises:
        UserError: something cannot be read or written, or the run has no checkpoint.
    """
    out, files = Path(out), [Path(path) for path in paths]
    run = RunFolder(run_path)
    config = run.whole_config
    if not isinstance(config, PretrainConfig):
        words = " ".join(map(shown_name, files))
        raise UserError(
            f"{shown_name(run.path)} {run.made}, and show draws what pre-training does: `patchmine "
            f"predict {shown_name(run.path)} {words} out=predictions/` draws what it sees"
        )
    item = item_of(config)
    endings = [*Image.registered_extensions(), *(MOVING if item is CLIP else ())]
    if out.suffix.lower() not in endings:
        moving = ", or .gif or .mp4 for what moves" if item is CLIP else ""
        picture = out.parent / f"{out.stem or 'panel'}.png"
        raise UserError(f"out={out} is not the name of a picture; write out={picture}{moving}")
    if not files:
        raise UserError(f"show needs at least one {item.noun}: name it after the run")
    files = [file for path in files for file in _chosen(path, item)]
    samples = [replace(_read(path, config, item), index=i) for i, path in enumerate(files)]
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    method, progress = run.method(), run_progress(run)
    method.noise.seed = seed
    method.noise.begin(progress.step)
    with torch.no_grad():
        panels = method.panels(normalise(collate(samples), mean, std, "cpu"), progress)
    labels = distinct_names(files)
    with output(out) as new:
        if item is CLIP and out.suffix.lower() in MOVING:
            save_animation(list(draw_moments(panels, mean, std, labels=labels)), new)
        else:
            draw_panels(panels, mean, std, labels=labels).save(new)
    return out


def run_progress(run: RunFolder) -> Progress:
    """The step of the newest checkpoint's weights; a run without metrics counts as at its end."""
    made = int(run.checkpoints[-1].stem.removeprefix("step-")) if run.checkpoints else 0
    record = read_run(run.path, run.path.name)
    total = max(record.total_steps or 1, made, 1)
    return Progress(max(0, made - 1), total, max(1, round(record.steps_per_epoch or made)))


def _chosen(path: Path, item: Item) -> list[Path]:
    """The path itself, or of a folder of images a few that can be read, the same each time."""
    if item is CLIP or not path.is_dir():
        return [path]
    source = item.open(path)
    chosen = spread_indices(len(source), FROM_FOLDER).tolist()
    readable = []
    for index in chosen:
        with suppress(DecodeError, OSError):
            probe(source.read(index))
            readable.append(Path(source.path(index)))
    if not readable:
        raise UserError(
            f"{shown_name(path)}: none of {len(chosen)} images that were tried can be read; "
            f"`patchmine data inspect {shown_name(path)}` says why"
        )
    return readable


def _read(path: Path, settings: InputSettings, item: Item) -> Sample:
    """A picture, or the clip in the middle of a video file or of a folder of frames."""
    view = item.plain_view(settings, 1.0)
    try:
        raw = VIDEOS.read(str(path)) if item is CLIP else path.read_bytes()
        return view(raw, np.random.default_rng(0))  # which draws nothing
    except DecodeError as error:
        raise UserError(f"{path} cannot be shown: {error}") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; name {item.noun} files after the run"
        ) from error

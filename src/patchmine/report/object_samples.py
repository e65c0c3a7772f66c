"""Pictures made while a run learns objects: the true ones beside those that are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image

from patchmine.config.schema import DetectConfig
from patchmine.data.sources.contract import Source
from patchmine.data.views.display import coloured
from patchmine.data.views.objects import PlainObjectView, boxes_in_image
from patchmine.evaluate.detection import kept
from patchmine.evaluate.found import in_image
from patchmine.models.detection import Found
from patchmine.report.boxes import draw_objects, object_colours
from patchmine.report.overlays import Pixels
from patchmine.report.samples import SamplePictures, contact_sheet
from patchmine.runs.preparing import normaliser, smallest_side
from patchmine.tasks.detect import Detect
from patchmine.train.engine import Engine
from patchmine.types import Batch

_LONGER_SIDE = 480  # pixels of a cell
_SURE = 0.3  # score from which on an object is drawn
_TITLES = "truth", f"prediction (scores from {_SURE:g} on)"


def object_samples(
    task: Detect, config: DetectConfig, part: Source, folder: Path, engine: Engine
) -> SamplePictures:
    """Pictures of images of ``part`` while ``task`` learns in the run's folder."""
    names, prepared = task.names, normaliser(config, engine)
    colours = object_colours(names)

    def sheet(batches: Sequence[Batch]) -> Image.Image:
        task.eval()
        rows = []
        for each in batches:
            with engine.autocast():
                (found,) = task.predict(prepared(each))
            rows.append(_cells(each, found, names, colours))
        return contact_sheet(_TITLES, rows, names, colours)

    view = PlainObjectView(config, config.interpolation, smallest_side(task))
    return SamplePictures(folder, part, view, config.seed, sheet)


def _cells(batch: Batch, found: Found, names: Sequence[str], colours: Pixels) -> list[Image.Image]:
    """Truth and prediction of a batch of one, without the padding of its view."""
    (view,), (box,), (true,) = batch.views[0], batch.box, batch.target
    seen = [
        round(side / share) for side, share in zip(view.shape[1:], box[2:].tolist(), strict=True)
    ]
    factor = _LONGER_SIDE / max(seen)
    height, width = (max(1, round(side * factor)) for side in seen)
    size = height, width
    whole = Image.fromarray(coloured(view[:, : seen[0], : seen[1]]).permute(1, 2, 0).numpy())
    picture = np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC))
    sure = found.scores >= _SURE
    masks = None if found.masks is None else found.masks[sure]
    found = Found(found.boxes[sure], found.labels[sure], found.scores[sure], masks)
    told = in_image(found, view, box, size)
    real = true.chosen(~true.crowd)
    boxes = boxes_in_image(real.boxes, box, height, width, view)
    if real.masks is not None:
        part = real.masks[:, None, : seen[0], : seen[1]].byte()
        real = replace(real, masks=F.interpolate(part, size, mode="nearest-exact")[:, 0].bool())
    marked = kept(replace(real, boxes=boxes))
    return [
        draw_objects(picture, marked, names, colours, scores=False, side=1),
        draw_objects(picture, told, names, colours, side=1),
    ]

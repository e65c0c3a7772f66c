"""Videos tested as papers test them: several clips and crops of each, whose scores are averaged."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from patchmine.data.items import CLIP
from patchmine.errors import Say, UserError, silent
from patchmine.evaluate.evaluated import open_evaluated
from patchmine.evaluate.features import FrameReader, clip_views, device_of
from patchmine.evaluate.knn import learn_knn
from patchmine.evaluate.linear import BLOCKS, learn_grid
from patchmine.evaluate.measure import Result, measure, opened, readers_of
from patchmine.evaluate.settings import VideoSettings


def evaluate_video(settings: VideoSettings, say: Say = silent) -> list[Result]:
    """kNN and linear classifiers on features of several clips and crops of each test video.

    They learn from one clip from the middle of each training video.  A video's score is the mean
    over its clips of what sums to one: shares of the vote, or the softmax.

    Args:
        settings: model, data and protocol.
        say: hears about the progress.

    Returns:
        Two results with ``top1`` and ``top5`` in percent; ``one_view`` has those of the middle clip
        alone.  Filed as eval/video-knn.json and eval/video-linear.json.

    Raises:
        UserError: the model or the data cannot be used.
    """
    evaluated = opened(settings)
    if evaluated.item is not CLIP:
        raise UserError(
            f"{evaluated.name} is an encoder of images: `patchmine eval video` measures a run with "
            f"a video model, and this one beside it as a baseline with image={evaluated.name}"
        )
    if settings.crop_pct is not None:
        given = f"crop_pct={settings.crop_pct}: crops= are taken along the longer side"
        raise UserError(f"{given}; leave the setting out")
    # The shorter side fills the frame, nothing is cut from it (VideoMAE's test).
    evaluated = replace(evaluated, crop_pct=1.0)
    readers, notes = readers_of(settings, evaluated, BLOCKS, say), []
    if settings.image is not None:
        image = open_evaluated(settings.image, seed=settings.seed)
        readers["per_frame"] = FrameReader(image, evaluated, BLOCKS)
        averaged = "averaged over the frames of a clip, whatever their order"
        notes.append(f"per frame: features of {settings.image}, {averaged}")
    protocols = {
        "video-knn": partial(learn_knn, settings, device_of(settings)),
        "video-linear": partial(learn_grid, settings, say),
    }
    views = clip_views(evaluated.input, settings.segments, settings.crops)
    return measure(settings, protocols, say, readers, views=views, notes=notes)

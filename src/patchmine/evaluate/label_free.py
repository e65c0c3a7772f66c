"""What is measured of an encoder in training without labels, on always the same few images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches
from patchmine.data.views.images import View
from patchmine.errors import UserError
from patchmine.evaluate.features import FeatureLoop, Features
from patchmine.evaluate.labelled import Part
from patchmine.evaluate.neighbours import nearest
from patchmine.evaluate.quality import moments, rankme
from patchmine.models.onednn import fast_linear
from patchmine.ops.distill import feature_spread
from patchmine.system.disk import replacing, system_errors
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.types import Batch, Progress

FEWEST = 3  # images of which a spectrum and neighbours say anything
_NEIGHBOURS = 10
_MOST_ROWS = 64  # of a batch of the held-out loss, which needs no gradients


def label_free(features: Features) -> dict[str, float]:
    """RankMe (arXiv 2210.02885) and the deviation of the directions of features (N, D).

    The deviation is that of SimSiam (arXiv 2011.10566): the mean over the D dimensions, which is
    1 / sqrt(D) where directions are drawn evenly and 0 where all are the same.
    """
    second, _ = moments(features.x)
    deviation = float(feature_spread(features.x)) / math.sqrt(features.x.shape[1])
    return {"rankme": rankme(second), "feature_std": deviation}


@dataclass(frozen=True)
class Neighbours:
    """The nearest ``places`` (N, k) of images ``index`` (N,) of a source, among each other."""

    source: str  # its fingerprint
    index: Tensor
    places: Tensor

    @classmethod
    def of(cls, features: Features, source: str) -> Neighbours:
        """By cosine: ten, fewer of fewer than 41 images, of which most would be neighbours."""
        rows = torch.nn.functional.normalize(features.x.float(), dim=1)
        k = max(1, min(_NEIGHBOURS, (len(rows) - 1) // 4))
        return cls(source, features.index, nearest(rows, rows, k, exclude_self=True)[1])

    def kept(self, start: Neighbours) -> float | None:
        """How many of those of ``start`` are neighbours still, in percent; None: other images."""
        same = self.source == start.source and self.places.shape == start.places.shape
        if not same or not torch.equal(self.index, start.index):
            return None
        found = (self.places[:, :, None] == start.places[:, None, :]).any(2)  # (N, k)
        return 100 * float(found.float().mean())

    def write(self, path: Path) -> None:
        """One safetensors file, atomically.  Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new, system_errors(path):
            tensors = {"index": self.index, "neighbours": self.places}
            save_file(tensors, new, metadata={"source": self.source})

    @classmethod
    def read(cls, path: Path) -> Neighbours | None:
        """What `write` wrote; None where there is no such file, or one that is damaged."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                source = (file.metadata() or {}).get("source", "")
                return cls(source, file.get_tensor("index"), file.get_tensor("neighbours"))
        except (SafetensorError, OSError):
            return None


def held_out_loss(
    method: Method,
    progress: Progress,
    part: Part,
    view: View,
    prepare: Callable[[Batch], Batch],
    loop: FeatureLoop,
    most_rows: int,
) -> float:
    """The method's own loss on images that it is not trained on; every process must call this.

    Nothing is random: crops and noise of an image are always the same, in eval mode.

    Args:
        method: left in eval mode; nothing else of it changes.
        progress: where its schedules are.
        part: the images.
        view: that of training.
        prepare: brings batches to the device and normalises them.
        loop: how items are read, and the processes that share the work.
        most_rows: of a batch in training.

    Raises:
        UserError: no image can be read.
    """
    engine, repeats = loop.engine, view.repeats
    assert engine is not None, "a run has processes"
    mine = loop.share(part)
    first = repeats * _before(part, engine)

    def own() -> tuple[float, int]:
        total, done = torch.zeros((), dtype=torch.float64), 0
        loaded = plain_batches(
            part.source,
            view,
            batch_size=_even(len(mine), max(1, min(most_rows, _MOST_ROWS) // repeats)) * repeats,
            indices=mine.indices.repeat(repeats),
            workers=int(loop.reading.workers),
            bad=BadFiles(None, 1.0),
        )
        method.eval()
        with torch.no_grad(), engine.autocast(), fast_linear():
            for batch in map(prepare, loaded):
                method.noise.begin(0, first + done, repeats * len(part))
                total += len(batch) * method(batch, progress)["loss"].double().cpu()
                done += len(batch)
        return float(total), done

    shares = loop.in_all_processes(own)
    rows = sum(done for _, done in shares)
    if not rows:
        raise UserError("no image of monitor_data can be read")
    return sum(total for total, _ in shares) / rows


def _before(part: Part, engine: Engine) -> int:
    """Images of a part that the processes before this one read."""
    return sum(len(part.share(rank, engine.world_size)) for rank in range(engine.rank))


def _even(count: int, most: int) -> int:
    """The size of even batches of at most ``most``: some losses are not defined for one image."""
    return math.ceil(count / max(1, math.ceil(count / most)))

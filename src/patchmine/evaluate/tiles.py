"""Objects of images of any size, by a network of views: whole, or piece by piece.

A piece shows parts of objects along its edges.  What the next piece sees more of is left to that
one; what two pieces agree on in the strip that both see is one object, and where neither sees it
whole, all that they see together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchmine.config.schema import DetectConfig
from patchmine.data.samples import collate
from patchmine.data.views.objects import cut_view
from patchmine.evaluate.detection import KeptObjects
from patchmine.evaluate.found import in_image
from patchmine.evaluate.rle import united
from patchmine.models.detection import Found
from patchmine.ops.windows import window_starts
from patchmine.types import Batch

_EDGE = 2  # pixels of a view: boxes that end nearer to its edge are cut by it

Size = tuple[int, int]
Floats = NDArray[np.float64]


def auto_tile(config: DetectConfig) -> Size:
    """(height, width) of pieces in which objects look as large as in the images of training."""
    height, width = config.usual_size or config.image_size
    factor = min(config.image_size[0] / height, config.image_size[1] / width)
    tall, wide = (max(1, round(side / factor)) for side in config.image_size)
    return tall, wide


@dataclass(frozen=True)
class Tile:
    """A piece of an image, and where its neighbours are.

    ``top``, ``left``, ``height``, ``width`` in pixels of the image.  ``before`` and ``after``, for
    rows and columns: where the piece above, or to the left, ends, and where the one below, or to
    the right, begins; None at the image's border.
    """

    top: int
    left: int
    height: int
    width: int
    before: tuple[int | None, int | None] = (None, None)
    after: tuple[int | None, int | None] = (None, None)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(top, left, height, width)."""
        return self.top, self.left, self.height, self.width

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom)."""
        return self.left, self.top, self.left + self.width, self.top + self.height


def tiles_of(size: Size, tile: Size | None, overlap: float) -> list[Tile]:
    """The pieces of an image of ``size``, row by row; without ``tile`` there is one."""
    if tile is None:
        return [Tile(0, 0, *size)]
    rows, columns = (
        _along(side, min(piece, side), overlap) for side, piece in zip(size, tile, strict=True)
    )
    return [
        Tile(top, left, height, width, (above, to_left), (below, to_right))
        for top, height, above, below in rows
        for left, width, to_left, to_right in columns
    ]


def _along(side: int, piece: int, overlap: float) -> list[tuple[int, int, int | None, int | None]]:
    """Start, length, end of the one before and start of the one after, of pieces along an axis."""
    starts = window_starts(side, piece, max(1, round(piece * (1 - overlap))))
    ends: list[int | None] = [None, *(start + piece for start in starts[:-1])]
    return list(zip(starts, [piece] * len(starts), ends, [*starts[1:], None], strict=True))


@dataclass(frozen=True)
class ObjectFinder:
    """The objects of images (C, H, W) as they were read, in their pixels.

    Args:
        network: from views, on any device, to what is found in each.
        config: says how large views are, and what overlap counts as the same object.
        tile: (height, width) of pieces in pixels of an image; None: images are seen whole.
        overlap: share of a piece that the next one sees too.
        at_once: views that the network sees at once.
    """

    network: Callable[[Batch], Sequence[Found]]
    config: DetectConfig
    tile: Size | None
    overlap: float
    at_once: int

    def __call__(self, pictures: Sequence[Tensor]) -> list[KeptObjects]:
        """Of each of some images."""
        sizes = [(picture.shape[-2], picture.shape[-1]) for picture in pictures]
        jobs = [
            (number, tile)
            for number, size in enumerate(sizes)
            for tile in tiles_of(size, self.tile, self.overlap)
        ]
        found: list[list[tuple[Tile, KeptObjects]]] = [[] for _ in pictures]
        how = self.config, self.config.interpolation
        for start in range(0, len(jobs), self.at_once):
            some = jobs[start : start + self.at_once]
            batch = collate([cut_view(pictures[number], tile.box, *how) for number, tile in some])
            rows = zip(some, self.network(batch), batch.views[0], batch.box, strict=True)
            for (number, tile), own, view, box in rows:
                found[number].append((tile, in_image(own, view, box, sizes[number])))
        return [self._merged(own) for own in found]

    def _merged(self, found: Sequence[tuple[Tile, KeptObjects]]) -> KeptObjects:
        if len(found) == 1:
            return found[0][1]
        tall, wide = self.config.image_size
        edges = [_EDGE * max(tile.height / tall, tile.width / wide) for tile, _ in found]
        return merged(found, edges, self.config.nms)


def merged(
    found: Sequence[tuple[Tile, KeptObjects]], edges: Sequence[float], nms: float
) -> KeptObjects:
    """What was found in pieces of one image, each object once, the surest first.

    Args:
        found: a piece, and what was found in it, in pixels of the image.
        edges: for each, how near to the edge of the piece a box ends that is cut by it.
        nms: overlap (IoU), in what two pieces both see, from which on boxes of a class are one.
    """
    every = _joined([objects for _, objects in found])
    labels, scores = every.labels.numpy(), every.scores.numpy()
    parts = [_cuts(*each, edge) for each, edge in zip(found, edges, strict=True)]
    cut, elsewhere = (np.concatenate(each) for each in zip(*parts, strict=True))
    piece = np.repeat(np.arange(len(found)), [len(objects) for _, objects in found])
    boxes = every.boxes.double().numpy()
    seen = np.array([tile.corners for tile, _ in found], np.float64)[piece]  # (N, 4)
    order = np.lexsort((-scores, cut))  # whole ones first, so that parts are measured by them
    order = order[~elsewhere[order]]
    members = {i: [i] for i in order.tolist()}
    grown = True
    while grown:  # what grew by one part may now agree with the next
        kept, grown = np.zeros(0, np.int64), False
        for i in order.tolist():
            meets = (boxes[kept, :2] < boxes[i, 2:]).all(1) & (boxes[i, :2] < boxes[kept, 2:]).all(
                1
            )
            near = kept[meets & (labels[kept] == labels[i]) & (piece[kept] != piece[i])]
            agreed = _agreement(boxes, seen, near, i)
            best = int(near[agreed.argmax()]) if agreed.max(initial=0.0) > nms else None
            if best is None:
                kept = np.append(kept, i)
            elif cut[i] and cut[best]:
                boxes[best], seen[best] = _hull(boxes[[best, i]]), _hull(seen[[best, i]])
                members[best] += members.pop(i)
                piece[best], grown = -1 - best, True  # no longer of one piece
        order = kept
    rows = torch.from_numpy(order[np.argsort(-scores[order], kind="stable")])
    masks = every.masks
    return KeptObjects(
        torch.from_numpy(boxes)[rows].float(),
        every.labels[rows],
        every.scores[rows],
        every.crowd[rows],
        None if masks is None else [united([masks[i] for i in members[n]]) for n in rows.tolist()],
    )


def _joined(every: Sequence[KeptObjects]) -> KeptObjects:
    """All of them; either all have masks, or none has."""
    masks = [mask for own in every for mask in own.masks or []]
    return KeptObjects(
        torch.cat([own.boxes for own in every]),
        torch.cat([own.labels for own in every]),
        torch.cat([own.scores for own in every]),
        torch.cat([own.crowd for own in every]),
        None if every[0].masks is None else masks,
    )


def _cuts(
    tile: Tile, objects: KeptObjects, edge: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N,) whether an edge of the piece cuts a box, and whether the next piece sees more of it."""
    boxes = objects.boxes.double().numpy()
    cut = np.zeros(len(boxes), bool)
    elsewhere = cut.copy()
    starts, sides = (tile.top, tile.left), (tile.height, tile.width)
    for axis, (low, high) in enumerate(((1, 3), (0, 2))):  # rows, columns
        start, end = boxes[:, low], boxes[:, high]
        before, after = tile.before[axis], tile.after[axis]
        if before is not None:
            here = start <= starts[axis] + edge
            cut |= here
            elsewhere |= here & (end < before - edge)
        if after is not None:
            here = end >= starts[axis] + sides[axis] - edge
            cut |= here
            elsewhere |= here & (start > after + edge)
    return cut, elsewhere


def _agreement(boxes: Floats, seen: Floats, others: NDArray[np.int64], i: int) -> Floats:
    """(len(others),) IoU of boxes with box i, of that part which both their pieces see."""
    low = np.maximum(seen[others, :2], seen[i, :2])
    high = np.maximum(np.minimum(seen[others, 2:], seen[i, 2:]), low)
    theirs, own = (
        np.concatenate([np.clip(b[..., :2], low, high), np.clip(b[..., 2:], low, high)], -1)
        for b in (boxes[others], boxes[i])
    )
    corner = np.maximum(theirs[:, :2], own[:, :2])
    shared = np.clip(np.minimum(theirs[:, 2:], own[:, 2:]) - corner, 0, None).prod(-1)
    areas = (theirs[:, 2:] - theirs[:, :2]).prod(-1) + (own[:, 2:] - own[:, :2]).prod(-1)
    return shared / np.maximum(areas - shared, 1e-9)


def _hull(boxes: Floats) -> Floats:
    """(4,) around all of some boxes."""
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])

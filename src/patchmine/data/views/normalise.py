"""Batches as backbones want them: on the device, mirrored, in other colours, with mean 0 and
deviation 1.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from patchmine.data.views.photometric import change_colours
from patchmine.types import Batch


def normalise(batch: Batch, mean: Tensor, std: Tensor, device: torch.device | str) -> Batch:
    """The batch on ``device`` with views (x - mean) / std, mirrored where ``flip`` says so.

    Several crops of an image also change their colours, after mirroring.  ``mean`` and ``std`` (C,)
    are in units where bytes span [0, 1].
    """
    batch, mean, std = batch.to(device), mean.to(device), std.to(device)
    if batch.flip.ndim == 1:
        return batch.with_views([_normalise(view, batch.flip, mean, std) for view in batch.views])
    return batch.with_views(_normalise_crops(batch, mean, std))


def as_float(view: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1]; anything else as it is."""
    return view.float().div_(255) if view.dtype == torch.uint8 else view


def _normalise(view: Tensor, flip: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, C, ..., W) in, float32 out."""
    return _scaled(as_float(_mirrored(view, flip)), mean, std)


def _normalise_crops(batch: Batch, mean: Tensor, std: Tensor) -> list[Tensor]:
    """All crops of one size at once, crop-major as methods put them together."""
    views: list[Tensor] = []
    for _, group in groupby(batch.views, lambda view: view.shape):
        crops = list(group)
        taken = slice(len(views), len(views) + len(crops))
        pixels = _mirrored(torch.cat(crops), batch.flip[:, taken].T.reshape(-1))
        if batch.photometric is not None:
            pixels = change_colours(
                pixels, batch.photometric[:, taken].transpose(0, 1).flatten(0, 1)
            )
        views += _scaled(as_float(pixels), mean, std).chunk(len(crops))
    return views


def _mirrored(view: Tensor, flip: Tensor) -> Tensor:
    """As bytes, which is a quarter of the traffic; always a copy."""
    return torch.where(flip.view(-1, *[1] * (view.ndim - 1)), view.flip(-1), view)


def _scaled(view: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """In place; (B, C, ...) float32."""
    per_channel = (1, -1, *[1] * (view.ndim - 2))
    return view.sub_(mean.view(per_channel)).div_(std.view(per_channel))

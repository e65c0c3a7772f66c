"""Batches as backbones want them: on the device, mirrored, recoloured, normalised."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from patchmine.data.views.one_by_one import changed_one_by_one
from patchmine.data.views.photometric import change_colours, jitter_colours
from patchmine.types import Batch


def normalise(batch: Batch, mean: Tensor, std: Tensor, device: torch.device | str) -> Batch:
    """The batch on ``device`` with views (x - mean) / std, mirrored where ``flip`` says so.

    So is ``known``.  Colours change after mirroring, where ``photometric`` says so.  ``mean`` and
    ``std`` (C,) are in units where bytes span [0, 1].
    """
    batch, mean, std = batch.to(device), mean.to(device), std.to(device)
    several = batch.flip.ndim == 2
    views: list[Tensor] = []
    # All crops of one size at once, crop-major as methods put them together
    groups = [list(group) for _, group in groupby(batch.views, lambda view: view.shape)]
    for crops in groups if several else [[view] for view in batch.views]:
        taken = slice(len(views), len(views) + len(crops))
        flip = batch.flip[:, taken].T.reshape(-1) if several else batch.flip
        # Mirrored as bytes, which is a quarter of the traffic; always a copy
        pixels = torch.cat(crops) if several else crops[0]
        pixels = torch.where(flip.view(-1, *[1] * (pixels.ndim - 1)), pixels.flip(-1), pixels)
        if batch.photometric is not None:
            changes = batch.photometric
            if several:
                changes = changes[:, taken].transpose(0, 1).flatten(0, 1)
            if pixels.device.type == "cpu":  # three times as fast there
                pixels = changed_one_by_one(pixels, changes)
            else:
                pixels = (change_colours if several else jitter_colours)(pixels, changes)
        views += standardised(pixels, mean, std).chunk(len(crops))
    if batch.known is not None:
        flip = batch.flip.view(-1, 1, 1, 1)
        batch = replace(batch, known=torch.where(flip, batch.known.flip(-1), batch.known))
    return batch.with_views(views)


def standardised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std of (B, C, *S), in place where these are no bytes; as in `normalise`."""
    per_channel = (1, -1, *[1] * (pixels.ndim - 2))
    return as_float(pixels).sub_(mean.view(per_channel)).div_(std.view(per_channel))


def as_float(view: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1]; anything else as it is."""
    return view.float().div_(255) if view.dtype == torch.uint8 else view

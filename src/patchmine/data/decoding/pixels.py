"""What a reader found in an item: its pixels, and where there is no data among them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchmine.data.decoding.arrays import (
    channels_first,
    filled,
    fit_channels,
    scaled,
    tensor_channels_first,
    without_gaps,
)
from patchmine.data.decoding.bounds import DecodeError


class Pixels(NamedTuple):
    """An image (C, H, W) with its natural channels, and whether the last of them is alpha.

    ``gaps``: where the file says that there is no data; means stand there.  ``strays``: where
    values are not finite; they still stand there.  Each (C, H, W) bool, or None of no pixel.
    """

    image: Tensor
    has_alpha: bool = False
    gaps: Tensor | None = None
    strays: Tensor | None = None

    def fitted(self, channels: int) -> Tensor:
        """(channels, H, W); DecodeError for values that are not finite, or other channels."""
        if self.strays is not None:
            raise _endless()
        return fit_channels(self.image, channels, self.has_alpha)

    def known(self, channels: int) -> tuple[Tensor, Tensor | None]:
        """The same with NaN and what is wholly transparent as gaps; and (channels, H, W) bool,
        where there is data, None of an image without gaps.
        """
        image, gaps = self.image, self.gaps
        for missing in (self.strays, self._transparent(channels)):
            if missing is not None:
                gaps = missing if gaps is None else gaps | missing
                image = torch.from_numpy(without_gaps(image.numpy(), gaps.numpy()))
        if self.strays is not None and bool(self.image.isinf().any()):
            raise _endless()
        image = fit_channels(image, channels, self.has_alpha)
        if gaps is None:
            return image, None
        if len(gaps) != channels:
            gaps = gaps.any(0, keepdim=True).expand(channels, -1, -1)
        return image, ~gaps

    def _transparent(self, channels: int) -> Tensor | None:
        """Where an alpha that is no channel of a run is 0; None where it nowhere is."""
        if not self.has_alpha or len(self.image) == channels:
            return None
        clear = self.image[-1:] == 0
        return clear.expand_as(self.image) if bool(clear.any()) else None


def of_stored(array: np.ndarray, has_alpha: bool = False) -> Pixels:
    """Values (C, H, W) of any type, masked where there is no data."""
    gaps = None
    if isinstance(array, np.ma.MaskedArray):
        array, gaps = filled(array), torch.from_numpy(np.ma.getmaskarray(array).copy())
    if array.dtype.kind == "f":
        return _of_floats(scaled(array), has_alpha, gaps)
    return Pixels(scaled(array), has_alpha, gaps)


def of_array(array: np.ndarray, channels: int) -> Pixels:
    """An array (H, W), (H, W, C) or (C, H, W), see `channels_first`; as `of_tensor` else."""
    image = channels_first(array, channels)
    return of_stored(image, has_alpha=image.shape[0] == 4)


def of_tensor(tensor: Tensor) -> Pixels:
    """A tensor (H, W) or (C, H, W) of any type; four channels count as three and alpha."""
    image = tensor_channels_first(tensor.detach())
    has_alpha = image.shape[0] == 4
    if image.is_floating_point():
        return _of_floats(image.float(), has_alpha)
    return Pixels(image if image.dtype == torch.uint8 else scaled(image.numpy()), has_alpha)


def _of_floats(image: Tensor, has_alpha: bool, gaps: Tensor | None = None) -> Pixels:
    finite = torch.isfinite(image)
    return Pixels(image, has_alpha, gaps, None if bool(finite.all()) else ~finite)


def _endless() -> DecodeError:
    return DecodeError("holds values that are not finite (NaN or infinite)")

"""Random erasing: a box of each image becomes normal noise (Zhong et al., arXiv 1708.04896)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def erase(
    images: Float[Tensor, "B C *space"], boxes: Int[Tensor, "B 4"], noise: Float[Tensor, "B 2"]
) -> Float[Tensor, "B C *space"]:
    """Images whose boxes are filled with a normal number for every channel, frame and pixel.

    Args:
        images: normalised (B, C, H, W), or clips (B, C, T, H, W) with one box for all frames.
        boxes: (top, left, height, width) in pixels; nothing happens where the height is 0.
        noise: uniform in [0, 1): what is filled in depends on a row's own two numbers alone.

    Returns:
        New images, shaped alike.
    """
    height, width = images.shape[-2:]
    row = torch.arange(height, device=images.device)[:, None]
    column = torch.arange(width, device=images.device)
    top, left, tall, wide = boxes.view(-1, 4, *[1] * (images.ndim - 1)).unbind(1)  # (B, 1, 1, 1)
    inside = (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
    filling = pixel_noise(noise, math.prod(images.shape[1:])).view_as(images)
    return torch.where(inside, filling.to(images.dtype), images)


# Noise of this size is not drawn for the whole global batch, as masks are, to be the same however
# the batch is divided: that would be 600 MB for 1024 images, in each process.
def pixel_noise(noise: Float[Tensor, "B 2"], count: int) -> Float[Tensor, "B N"]:
    """(B, count) float32 standard normal: a hash of two numbers in [0, 1) and of the place."""
    halves = (noise * 2**16).int()
    key = (halves[:, :1] - 2**15) * 2**16 + halves[:, 1:]  # (B, 1) of 32 bits
    place = torch.arange(count, dtype=torch.int32, device=noise.device)
    word = _scramble(key ^ _scramble(place))  # (B, count)
    # Odd multiples of 2^-24 between -1 and 1, which float32 holds exactly and which are never +-1
    centred = word.bitwise_right_shift_(7).bitwise_or_(1).float().div_(2**24)
    return centred.erfinv_().mul_(math.sqrt(2))


def _scramble(word: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """A one-to-one hash of int32, in place; products keep their lower 32 bits."""
    for _ in range(2):
        word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))  # >> repeats the sign, & removes it
        word.mul_(0x045D_9F3B)  # T. Mueller's multiplier
    return word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))

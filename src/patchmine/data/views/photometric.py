"""DINO's changes of colour: drawn by the worker, made on the device for a whole batch.

On a processor `one_by_one` makes the same of one image after the other.  What is done to which
images, and how far it agrees with PIL, stands in docs/data.md.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Columns of the numbers of a crop.  Factors 1 and deviation 0 change nothing; the rest are 0 or 1,
# but for the hue's turn as a share of the circle and the order, in which 0 to 3 are brightness,
# contrast, saturation, hue.  They are applied from left to right.
FACTORS, HUE, ORDER, JITTER, GREY, SIGMA, SOLARIZE = slice(0, 3), 3, slice(4, 8), 8, 9, 10, 11
COLUMNS = 12

# facebookresearch/dino: main_dino.py, DataAugmentationDINO
_STRENGTH = np.array([0.4, 0.4, 0.2, 0.1])
_JITTER_SHARE, _GREY_SHARE, _SOLARIZE_SHARE = 0.8, 0.2, 0.2
_BLUR_SHARES = (1.0, 0.1, 0.5)  # global crop 0, global crop 1, local crops
_SIGMAS = (0.1, 2.0)
# PIL's box blurs, and how many pixels one of them reaches for the largest deviation
BLUR_PASSES, BLUR_REACH = 3, 2
HUE_OPERATION = 3
THRESHOLD = 128.0


def draw(num_crops: int, generator: np.random.Generator) -> Tensor:
    """(V, P) float32: how the colours of an image's crops change, the two global ones first."""
    chance = generator.random((num_crops, 13), dtype=np.float32)
    numbers = np.zeros((num_crops, COLUMNS), np.float32)
    jitter = chance[:, 0] < _JITTER_SHARE
    shift = (2 * chance[:, 1:5] - 1) * _STRENGTH
    numbers[:, FACTORS] = np.where(jitter[:, None], 1 + shift[:, :3], 1)
    numbers[:, HUE] = np.where(jitter, shift[:, 3], 0)
    numbers[:, ORDER] = chance[:, 5:9].argsort(1)
    numbers[:, JITTER] = jitter
    numbers[:, GREY] = chance[:, 9] < _GREY_SHARE
    shares = np.array([*_BLUR_SHARES[:2], *[_BLUR_SHARES[2]] * num_crops])[:num_crops]
    blurred = chance[:, 10] < shares
    numbers[:, SIGMA] = np.where(blurred, _SIGMAS[0] + chance[:, 11] * (_SIGMAS[1] - _SIGMAS[0]), 0)
    numbers[1, SOLARIZE] = chance[1, 12] < _SOLARIZE_SHARE
    return torch.from_numpy(numbers)


def draw_jitter(
    strengths: tuple[float, float, float, float], chance: NDArray[np.float64]
) -> Tensor:
    """(P,) float32: brightness, contrast, saturation and hue of one image, each up to its strength.

    ``chance`` (8,) in [0, 1) decides the amounts, then the order.
    """
    numbers = np.zeros(COLUMNS, np.float32)
    shift = (2 * chance[:4] - 1) * np.array(strengths)
    numbers[FACTORS], numbers[HUE] = 1 + shift[:3], shift[3]
    numbers[ORDER], numbers[JITTER] = chance[4:8].argsort(), 1
    return torch.from_numpy(numbers)


def jitter_colours(images: Tensor, numbers: Tensor) -> Tensor:
    """What `draw_jitter` says of images (N, 3, H, W), bytes or floats: float32 in [0, 1]."""
    as_bytes = images.dtype == torch.uint8
    pixels = images.float() if as_bytes else images * 255
    return _jittered(pixels, numbers, as_bytes).div_(255)


def change_colours(images: Tensor, numbers: Tensor) -> Tensor:
    """Images (N, C, H, W), bytes or floats, as ``numbers`` (N, P) say: float32, bytes in [0, 1].

    Nothing here depends on a number's value on the host, so the device is not waited for.
    """
    as_bytes = images.dtype == torch.uint8
    pixels = images.float() if as_bytes else images * 255
    if pixels.shape[1] == 3:
        pixels = _jittered(pixels, numbers, as_bytes)
        pixels = torch.where(_per_image(numbers[:, GREY]) > 0, luma(pixels, as_bytes), pixels)
    pixels = _blurred(pixels, numbers[:, SIGMA])
    if as_bytes:
        pixels = pixels.add_(0.5).floor_()
        solarized = (_per_image(numbers[:, SOLARIZE]) > 0) & (pixels >= THRESHOLD)
        pixels = torch.where(solarized, 255 - pixels, pixels)
    return pixels.div_(255)


def _per_image(column: Tensor) -> Tensor:
    return column.view(-1, 1, 1, 1)


def _jittered(pixels: Tensor, numbers: Tensor, as_bytes: bool) -> Tensor:
    """Brightness, contrast, saturation and hue, each image in its own order.

    Three of them are a blend with another picture, so that one formula serves all; where an image
    has nothing to blend in a place, its factor is 1.  The hue, which is dear, is turned once.
    """
    order = numbers[:, ORDER].long()  # (N, 4)
    neutral = torch.ones_like(numbers[:, :1])
    factors = torch.cat([numbers[:, FACTORS], neutral], dim=1).gather(1, order)  # (N, 4), by place
    before_hue = (order == HUE_OPERATION).cumsum(1) == 0
    for place in range(3):  # a fourth place before the hue is the hue's own
        factor = torch.where(before_hue[:, place], factors[:, place], 1.0)
        pixels = _blended(pixels, order[:, place], factor, as_bytes)
    turned = _hue_turned(pixels, numbers[:, HUE], as_bytes)
    pixels = torch.where(_per_image(numbers[:, JITTER]) > 0, turned, pixels)
    for place in range(1, 4):
        factor = torch.where(before_hue[:, place], 1.0, factors[:, place])
        pixels = _blended(pixels, order[:, place], factor, as_bytes)
    return pixels


def _blended(pixels: Tensor, operation: Tensor, factor: Tensor, as_bytes: bool) -> Tensor:
    """PIL's Image.blend with black, the mean grey or the grey picture, by ``operation`` (N,)."""
    operation = _per_image(operation)
    grey = luma(pixels, as_bytes)
    mean = grey.mean((2, 3), keepdim=True)
    if as_bytes:
        mean = (mean + 0.5).floor()
    other = torch.where(operation == 1, mean, grey)
    other = torch.where(operation == 0, 0.0, other)  # (N, 1, H, W)
    blend = (pixels - other).mul_(_per_image(factor)).add_(other)
    return blend.clamp_(0, 255).floor_() if as_bytes else blend


def luma(pixels: Tensor, as_bytes: bool) -> Tensor:
    """ITU-R 601-2 luma (N, 1, H, W), for bytes in PIL's fixed point, exact in float32."""
    red, green, blue = pixels.chunk(3, dim=1)
    grey = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return grey.add_(0x8000).div_(0x10000).floor_() if as_bytes else grey.div_(0x10000)


def _hue_turned(pixels: Tensor, turn: Tensor, as_bytes: bool) -> Tensor:
    """Hue (a share of the circle) plus ``turn``; of bytes hue and saturation are bytes too."""
    turn = _per_image(turn)
    value, least = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    spread = value - least
    red, green, blue = ((value - pixels) / torch.where(spread > 0, spread, 1.0)).chunk(3, dim=1)
    is_red, is_green = pixels[:, :1] == value, pixels[:, 1:2] == value
    sixths = torch.where(is_green, 2 + red - blue, 4 + green - red)
    sixths = torch.where(is_red, blue - green, sixths)
    hue = sixths / 6  # in [-1/6, 5/6]
    hue = torch.where(hue < 0, hue + 1, hue)
    if as_bytes:
        hue = ((hue * 255).floor_() + (turn * 255).trunc()).remainder(256) / 255
        saturation = (spread / torch.where(value > 0, value, 1.0) * 255).floor_() / 255
        spread = saturation * value
    else:
        hue = hue + turn
    turned = value - spread * hue_shares(hue)
    return turned.add_(0.5).floor_() if as_bytes else turned


def hue_shares(hue: Tensor) -> Tensor:
    """(N, 3, H, W) of hues (N, 1, H, W), shares of a circle: red, green and blue are an image's
    value less so much of its spread, a trapezium over the circle, each a third further.
    """
    start = torch.arange(5, 0, -2, dtype=hue.dtype, device=hue.device).view(1, 3, 1, 1)
    place = (start + hue * 6).remainder_(6)
    return torch.minimum(place, 4 - place).clamp_(0, 1)


def _blurred(pixels: Tensor, sigma: Tensor) -> Tensor:
    """PIL's GaussianBlur, three box blurs along each axis, edges repeated, as matrix products.

    On a GPU these take a fraction of the time of the passes; deviation 0 changes nothing.
    """
    height, width = pixels.shape[-2:]
    columns = blur_matrices(width, sigma)
    rows = columns if height == width else blur_matrices(height, sigma)
    with torch.autocast(pixels.device.type, enabled=False):
        return rows[:, None] @ pixels @ columns[:, None].mT


def blur_matrices(side: int, sigma: Tensor) -> Tensor:
    """(N, side, side): from a line of pixels to the blurred one, for each deviation ``sigma`` (N,).

    A box of radius r + a weighs 2r + 1 pixels alike and one more at each end by a (Gwosdek et al.
    2011, as in Pillow's BoxBlur.c).
    """
    variance = sigma.square() / BLUR_PASSES
    radius = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    taps_inside, over = 2 * radius + 1, radius * (radius + 1) - 3 * variance
    part = taps_inside * over / (6 * (variance - (radius + 1).square()))
    distance = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=sigma.device)
    away = distance.abs() - radius[:, None]  # (N, taps): up to 0 inside of the box, 1 where it ends
    weights = torch.where(away <= 0, 1.0, torch.where(away == 1, part[:, None], 0.0))
    weights = weights / weights.sum(1, keepdim=True)
    place = torch.arange(side, device=sigma.device)
    # (side, taps): the pixels that each one looks at
    source = (place[:, None] + distance).clamp(0, side - 1)
    taps = (source[:, :, None] == place).to(weights.dtype)  # (side, taps, side)
    once = torch.einsum("nt,stp->nsp", weights, taps)
    return once @ once @ once

"""Images of any channels and depth as pictures for people."""

from __future__ import annotations

import torch
from torch import Tensor


def coloured(image: Tensor) -> Tensor:
    """Three channels of bytes; deeper pixels from the smallest value, black, to the largest."""
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    if image.dtype == torch.uint8:
        return image
    image = image.float().nan_to_num(0.0, 0.0, 0.0)
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp(min=1e-12) * 255).round().byte()

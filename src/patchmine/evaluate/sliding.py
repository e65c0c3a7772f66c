"""The class of every pixel of an image of any size, by a network of crops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.config.schema import SegmentConfig
from patchmine.ops.windows import slide, slide_classes

_MOST_SCORES = 1 << 28  # that are held to be resized: a gigabyte


@dataclass(frozen=True)
class ClassMaps:
    """Classes (H, W) of normalised images (C, h, w).

    Args:
        network: from windows (B, C, h, w) to scores (B, K, h, w).
        config: says how large windows are, how far apart, and how many go at once.
        num_classes: K.
        autocast: the arithmetic of the network.
    """

    network: Callable[[Tensor], Tensor]
    config: SegmentConfig
    num_classes: int
    autocast: Callable[[], AbstractContextManager[Any]]

    @torch.inference_mode()
    def __call__(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(H, W) int64 for ``size`` = (H, W), that of the image before it was resized.

        Scores are resized, and the best one taken then (mmsegmentation); of images that are too
        large for that the classes themselves are.
        """
        config = self.config
        stride = config.window_stride
        how = (config.image_size, (stride, stride), config.eval_batch, self._scores)
        height, width = image.shape[-2:]
        if (height, width) == size:
            return slide_classes(image, *how, self.num_classes).long()
        if self.num_classes * max(height * width, size[0] * size[1]) <= _MOST_SCORES:
            scores = slide(image, *how, self.num_classes)
            resized = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)
            return resized[0].argmax(0)
        found = slide_classes(image, *how, self.num_classes)
        nearest = F.interpolate(found[None, None].double(), size, mode="nearest-exact")
        return nearest[0, 0].long()

    def _scores(self, windows: Tensor) -> Tensor:
        with self.autocast():
            return self.network(windows).float()

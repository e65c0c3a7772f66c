"""The class of every pixel of an image of any size, by a network of crops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from patchmine.config.schema import SegmentConfig
from patchmine.data.views.normalise import standardised
from patchmine.ops.windows import best_classes, resized_bands, score_bands


class ClassMaps:
    """Classes (H, W) of images (C, h, w) as they were read.

    Args:
        network: from windows (B, C, h, w), normalised, to scores (B, K, h, w).
        config: says how large windows are, how far apart, how many go at once, and what they are
            normalised by.
        device: of the network.
        autocast: its arithmetic.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        config: SegmentConfig,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.network, self.config, self.autocast = network, config, autocast
        self.mean, self.std = (torch.tensor(x, device=device) for x in (config.mean, config.std))

    @torch.inference_mode()
    def __call__(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """(H, W) int16 for ``size`` = (H, W), that of the image before it was resized.

        Scores are resized, and the best one taken then (mmsegmentation).  Only windows are ever
        normalised, and only bands of scores exist, so that large images need little memory.
        """
        config, stride = self.config, self.config.window_stride
        how = config.image_size, (stride, stride), config.eval_batch
        bands = score_bands(image, *how, self._scores, self._prepared)
        height, width = image.shape[-2:]
        if (height, width) != size:
            bands = resized_bands(bands, height, size)
        return best_classes(bands, size)

    def _prepared(self, windows: Tensor) -> Tensor:
        return standardised(windows.to(self.mean.device), self.mean, self.std)

    def _scores(self, windows: Tensor) -> Tensor:
        with self.autocast():
            return self.network(windows).float()

"""Patch tokens of frozen encoders, read once into tables of bfloat16 in memory or in a file."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchmine.errors import Say, UserError
from patchmine.evaluate.evaluated import Evaluated
from patchmine.evaluate.features import Reader

_GB = 1e9


class TokenReader(Reader):
    """Turns images (B, C, H, W), or clips, into the tokens of their patches (B, L, D)."""

    # After the final norm, without class token and registers.  The last map of a convolutional
    # network counts as tokens.

    def __init__(self, evaluated: Evaluated) -> None:
        super().__init__(evaluated)
        if evaluated.encoder is None:
            raise UserError(f"{evaluated.name} has no patch tokens: name a run or an encoder")

    def __call__(self, images: Tensor) -> Tensor:
        """(B, L, D) float32."""
        encoder: Any = self.evaluated.encoder
        x: Tensor = encoder.forward_features(images)
        if x.ndim == 4:  # (B, D, H, W), of some networks (B, H, W, D)
            x = x.movedim(1, 3) if x.shape[1] == encoder.num_features else x
            return x.flatten(1, 2).float()
        return x[:, getattr(encoder, "num_prefix_tokens", 0) :].float()


def token_tables(most: float, say: Say) -> Callable[..., Tensor]:
    """What makes tables (N, L, D): in memory up to ``most`` GB together, else in temporary files.

    The files have no name from the start: they are gone with the table, however the program ends.
    """
    held = 0.0

    def empty(*shape: int) -> Tensor:
        nonlocal held
        size = 2 * math.prod(shape) / _GB
        told = f"tokens: {' x '.join(f'{side:,}' for side in shape)} in bfloat16 are {size:,.2f} GB"
        if held + size <= most:
            held += size
            say(f"{told}, held in memory")
            return torch.empty(shape, dtype=torch.bfloat16)
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free / _GB
        if size > free:
            room = f"more than token_memory={most:g}, and {folder} has only {free:,.2f} GB free"
            raise UserError(f"{told}, {room}: set TMPDIR to a larger disk, or give fewer images")
        say(f"{told}, held in a temporary file in {folder}")
        with tempfile.TemporaryFile() as file:
            table = np.memmap(file, dtype=np.int16, mode="w+", shape=shape)
        return torch.from_numpy(table).view(torch.bfloat16)

    return empty

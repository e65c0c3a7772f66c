"""Stochastic depth and dropout by a step's own noise, so that a resumed run repeats itself."""

from __future__ import annotations

import timm.layers
from torch import Tensor, nn

from patchmine.backbones.family import family_of
from patchmine.backbones.record import Encoder
from patchmine.models.noise import Noise


class DropPath(nn.Module):
    """Drops the branch that it stands behind for a share of the rows, and enlarges the others.

    Where an image has several rows, its windows one after the other, they are dropped together.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.noise: Tensor | None = None  # (B,), of the batch to come

    def forward(self, branch: Tensor) -> Tensor:
        """(B * rows, ...) -> the same."""
        if not self.training or self.noise is None:
            return branch
        kept = (self.noise >= self.rate).to(branch.dtype) / (1 - self.rate)  # (B,)
        kept = kept.repeat_interleave(len(branch) // len(kept))
        return branch * kept.view(-1, *[1] * (branch.ndim - 1))


def seed_drop_paths(encoder: nn.Module) -> list[DropPath]:
    """Put ours in the place of timm's; they have no weights, so no name changes."""
    replaced = []
    for name, module in list(encoder.named_modules()):
        if isinstance(module, timm.layers.DropPath):
            replaced.append(DropPath(module.drop_prob))
            encoder.set_submodule(name, replaced[-1])
    return replaced


def add_drop_paths(encoder: Encoder, rate: float) -> list[DropPath]:
    """Ours behind all branches of every block, at rates from 0 to ``rate`` in even steps.

    A ResNet gets none, as published.
    """
    if family_of(encoder).batch_normed:
        return []
    added = []
    blocks = [module for module in encoder.modules() if _branches(module)]
    last = max(1, len(blocks) - 1)
    for number, block in enumerate(blocks):
        for name in _branches(block):
            path = DropPath(share) if (share := rate * number / last) else nn.Identity()
            setattr(block, name, path)
            added += [path] if isinstance(path, DropPath) else []
    return added


def _branches(block: nn.Module) -> list[str]:
    """Where timm drops the branches of a block; a ConvNeXt's has one, a transformer's two."""
    names = ("drop_path", "drop_path1", "drop_path2")
    return [name for name in names if isinstance(getattr(block, name, None), nn.Module)]


def draw_drop_paths(paths: list[DropPath], noise: Noise, tokens: Tensor, *, crops: int = 1) -> None:
    """Decide for the next pass of crop-major tokens (crops * B, ...)."""
    if any(path.training for path in paths):
        # By image first: a process that holds some of a batch's images gets their part of its
        # noise, for each crop.
        drawn = noise.uniform(len(tokens) // crops, crops * len(paths), device=tokens.device)
        drawn = drawn.reshape(len(drawn), crops, -1).transpose(0, 1).flatten(0, 1)  # (crops * B, P)
        for path, column in zip(paths, drawn.unbind(dim=1), strict=True):
            path.noise = column


class ChannelDropout(nn.Module):
    """Drops whole channels of maps (B, C, H, W) for a share of them, and enlarges the others."""

    def __init__(self, channels: int, rate: float) -> None:
        super().__init__()
        self.channels, self.rate = channels, rate
        self.noise: Tensor | None = None  # (B, C), of the batch to come

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        if not self.training or self.noise is None:
            return maps
        kept = (self.noise >= self.rate).to(maps.dtype) / (1 - self.rate)  # (B, C)
        return maps * kept[:, :, None, None]


def dropouts_of(head: nn.Module) -> list[ChannelDropout]:
    """All in a head, for `draw_dropouts`."""
    return [module for module in head.modules() if isinstance(module, ChannelDropout)]


def draw_dropouts(dropouts: list[ChannelDropout], noise: Noise, images: Tensor) -> None:
    """Decide for the next pass of images (B, ...)."""
    for dropout in dropouts:
        if dropout.training:
            dropout.noise = noise.uniform(len(images), dropout.channels, device=images.device)

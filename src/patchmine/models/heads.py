"""Projection heads of the methods that compare views; no export holds them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """A linear layer without bias: directions ``weight_v`` (out, in), lengths ``weight_g``."""

    # The names are those of torch's old `weight_norm`, which its hook makes impossible to copy.

    def __init__(self, in_features: int, out_features: int, *, trainable_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=trainable_gain)
        directions = nn.Linear(in_features, out_features, bias=False).weight
        self.weight_v = nn.Parameter(directions.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        # The outputs are scaled, not the rows: they are fewer numbers than 65536 rows of 256.
        lengths = torch.linalg.vector_norm(self.weight_v, dim=1)
        return F.linear(x, self.weight_v) * (self.weight_g[:, 0] / lengths)


class DinoHead(nn.Module):
    """DINO's head: a perceptron, a unit vector, and its similarity to each prototype."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        *,
        trainable_gain: bool,  # of the prototypes' lengths: DINO's norm_last_layer=False
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_features, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck, out_features, trainable_gain=trainable_gain)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, out) of pooled features (N, in)."""
        return self.last_layer(F.normalize(self.mlp(features).float(), dim=-1, eps=1e-12))


class StageHead(nn.Module):
    """SCFS's head of one stage: a residual bottleneck on the map, its mean, a perceptron."""

    # Batch statistics always, also in eval mode and in a teacher: a call needs two rows or more.

    def __init__(
        self, channels: int, out_features: int, *, hidden: int = 2048, bottleneck: int = 256
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, bottleneck, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(bottleneck, track_running_stats=False)
        self.conv2 = nn.Conv2d(bottleneck, bottleneck, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(bottleneck, track_running_stats=False)
        self.conv3 = nn.Conv2d(bottleneck, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels, track_running_stats=False)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.BatchNorm1d(hidden, track_running_stats=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, out_features),
            nn.BatchNorm1d(out_features, track_running_stats=False),
        )

    def forward(self, maps: Tensor, attention: Tensor | None = None) -> Tensor:
        """Unit vectors (N, out), float32, of maps (N, C, h, w)."""
        # With attention (J, N, h, w) those of attention[j, n] * maps[n], crop-major: (J * N, out).
        # Weighted maps are made as late as they can be: a 1x1 convolution without bias commutes
        # with a weight at each position, and so takes every map once (docs/methods/scfs.md).
        y = self.conv1(maps)
        weights: Tensor | None = None
        if attention is not None:
            weights = attention[:, :, None].to(y.dtype)  # (J, N, 1, h, w)
            y = (weights * y).flatten(0, 1)  # (J * N, K, h, w)
        y = F.relu(self.bn1(y), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        if weights is None:
            y = y + maps
        else:
            y = torch.addcmul(y.unflatten(0, weights.shape[:2]), weights, maps).flatten(0, 1)
        pooled = F.relu(y, inplace=True).flatten(2).mean(dim=2)  # (J * N, C)
        return F.normalize(self.mlp(pooled).float(), dim=-1, eps=1e-12)

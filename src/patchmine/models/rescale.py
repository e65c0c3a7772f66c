"""Maps of a plain transformer made finer and coarser by learned convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


class Rescale(nn.Module):
    """A map made 4, 2, 1 or 1/2 times as fine, as ViTDet and BEiT's segmentation do.

    Finer ones by transposed convolutions of stride 2, with a norm and a GELU between two; coarser
    ones by taking the largest of 2x2, or of what is left of them at an odd edge.
    """

    def __init__(
        self, widths: Sequence[int], scale: float, norm: Callable[[int], nn.Module]
    ) -> None:
        """``widths``: channels as they are, after one and after two transposed convolutions."""
        super().__init__()
        if scale not in (4.0, 2.0, 1.0, 0.5):
            raise ValueError(f"a map is made 4, 2, 1 or 1/2 times as fine, not {scale}")
        layers: list[nn.Module] = []
        if scale > 1:
            layers.append(_twice(widths[0], widths[1]))
        if scale == 4:
            layers += [norm(widths[1]), nn.GELU(), _twice(widths[1], widths[2])]
        if scale < 1:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.layers = nn.Sequential(*layers)
        self.width = widths[{4.0: 2, 2.0: 1}.get(scale, 0)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, width, scale * h, scale * w)."""
        return self.layers(x)


def _twice(channels: int, width: int) -> nn.ConvTranspose2d:
    layer = nn.ConvTranspose2d(channels, width, 2, stride=2)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer

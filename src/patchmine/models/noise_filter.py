"""Coloured noise for masks: what a Gaussian low-pass leaves of white noise, or takes away.

Hinojosa, Liu, Ghanem, "ColorMAE: Exploring data-independent masking strategies in Masked
AutoEncoders", ECCV 2024, arXiv 2407.13036.  Theirs are the four colours; the widths and the
wrapping around are ours (docs/methods/mae.md).
"""

from __future__ import annotations

from torch import Tensor, nn

from patchmine.errors import UserError
from patchmine.models.settings import NoiseColour
from patchmine.ops.blur import blurred, circular_blur_matrix
from patchmine.types import Grid

FINE, COARSE = 0.75, 2.0
"""Deviations of the two Gaussians, in patches (in blocks, where blocks are hidden)."""

# Red, green and blue add up to white, purple is white without green.  Factors of the noise, of the
# noise under the fine Gaussian and of the noise under the coarse one.
_PARTS = {"red": (0, 0, 1), "green": (0, 1, -1), "blue": (1, -1, 0), "purple": (1, -1, 1)}

SMALLEST_SIDE = 4  # below it, hardly anything of red is left in float32


class NoiseFilter(nn.Module):
    """White noise (B, rows * columns) -> noise of a colour; every place is treated alike."""

    fine_rows: Tensor
    fine_columns: Tensor
    coarse_rows: Tensor
    coarse_columns: Tensor

    def __init__(self, grid: Grid, colour: NoiseColour) -> None:
        """The filter for the rows and columns of a grid.

        Raises:
            UserError: there are too few of them.
        """
        super().__init__()
        self.rows, self.columns = grid.size[-2:]
        self.parts = _PARTS[colour]
        if min(self.rows, self.columns) < SMALLEST_SIDE:
            needed = f"needs {SMALLEST_SIDE} x {SMALLEST_SIDE} places that are hidden one by one"
            there = f"there are {self.rows} x {self.columns}"
            remedy = "try method.mask_noise=white, smaller patches or a smaller method.mask_block"
            raise UserError(f"method.mask_noise={colour} {needed}, {there}: {remedy}")
        for name, sigma in (("fine", FINE), ("coarse", COARSE)):
            for axis, side in (("rows", self.rows), ("columns", self.columns)):
                matrix = circular_blur_matrix(side, sigma)
                self.register_buffer(f"{name}_{axis}", matrix, persistent=False)

    def forward(self, noise: Tensor) -> Tensor:
        """White noise (B, L) in raster order -> coloured noise (B, L), float32, of any scale."""
        field = noise.float().reshape(len(noise), 1, self.rows, self.columns)
        fine = blurred(field, self.fine_rows, self.fine_columns)
        coarse = blurred(field, self.coarse_rows, self.coarse_columns)
        own, of_fine, of_coarse = self.parts
        return (own * field + of_fine * fine + of_coarse * coarse).flatten(1)

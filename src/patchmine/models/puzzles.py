"""DropPos's puzzle: which patches keep their position, lose it or are removed; and its pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.ops import position_targets
from patchmine.ops.patches import all_patches, images_from_values, patch_values
from patchmine.types import Grid, Mask


@dataclass(frozen=True)
class Puzzle:
    """Numbers of patches of each image by what becomes of them, each in raster order."""

    kept: Tensor  # (B, K) keep their position
    dropped: Tensor  # (B, Q) lose it
    removed: Tensor  # (B, L - V)

    @property
    def visible(self) -> Tensor:
        """(B, V), in the encoder's order: those whose place is asked for come last."""
        return torch.cat([self.kept, self.dropped], dim=1)

    @property
    def mask(self) -> Mask:
        """The same as MAE sees it; ``visible`` is in the encoder's order."""
        visible = self.visible
        return Mask(visible, self.removed, visible.shape[1] + self.removed.shape[1])


def places_as_colours(puzzle: Puzzle, places: Tensor, grid: Grid) -> Tensor:
    """Dropped patches in the colour of their ``places`` (B, Q), kept ones white: (B, 3, H, W)."""
    # Removed ones are NaN, not grey, which is about the colour of the middle.
    colours = torch.full((len(places), grid.num_patches, 3), float("nan"), device=places.device)
    wanted = position_targets.place_colours(grid, places.device)[places]  # (B, Q, 3)
    for index, colour in ((puzzle.kept, 1.0), (puzzle.dropped, wanted)):
        filled = torch.zeros(*index.shape, 3, device=places.device) + colour
        colours = colours.scatter(1, index[:, :, None].expand_as(filled), filled)
    return position_targets.fill_patches(colours, grid)


def put_at_places(
    images: Tensor, puzzle: Puzzle, places: Tensor, sureness: Tensor, grid: Grid
) -> Tensor:
    """Dropped patches at ``places`` (B, Q), the surest of several on top; NaN: nobody."""
    values = patch_values(all_patches(images.float(), grid.patch))  # (B, L, P)

    def wide(index: Tensor) -> Tensor:
        return index[:, :, None].expand(-1, -1, values.shape[-1])

    claims = sureness[:, :, None] * F.one_hot(places, grid.num_patches)  # (B, Q, L)
    strongest, winner = claims.max(dim=1)  # (B, L)
    moved = values.gather(1, wide(puzzle.dropped)).gather(1, wide(winner))
    put = moved.masked_fill((strongest == 0)[:, :, None], float("nan"))
    put = put.scatter(1, wide(puzzle.kept), values.gather(1, wide(puzzle.kept)))
    return images_from_values(put, grid, images.shape[1])

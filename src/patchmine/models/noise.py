"""Where a training step takes its randomness from."""

from __future__ import annotations

import torch
from torch import Tensor


class Noise:
    """Uniform numbers that depend on seed, step and a row's place in the global batch only."""

    # Every process draws the noise of the *whole* global batch and keeps its own rows: however the
    # batch is divided, masks are the same, and a resumed run repeats itself without stored state.

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._step = 0
        self._first_row = 0
        self._global_rows: int | None = None
        self.draws = 0  # of this step until now

    def begin(self, step: int, first_row: int = 0, global_rows: int | None = None) -> None:
        """Go to ``step``; draws are rows from ``first_row`` of a batch of ``global_rows``."""
        self._step, self._first_row, self._global_rows, self.draws = step, first_row, global_rows, 0

    def uniform(self, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """(rows, *shape) float32 in [0, 1), a row for each row of this batch."""
        total = rows if self._global_rows is None else self._global_rows
        generator = self._generator(device)
        drawn = torch.rand(total, *shape, generator=generator, device=device)
        return drawn[self._first_row : self._first_row + rows]

    def host(self) -> float:
        """One number in [0, 1) for the global batch; drawn on the CPU, it waits for no GPU."""
        return torch.rand((), generator=self._generator("cpu"), dtype=torch.float64).item()

    def _generator(self, device: torch.device | str) -> torch.Generator:
        """The generator of this step's next draw."""
        generator = torch.Generator(device=device)
        # Distinct streams by arithmetic; the generator scrambles its seed, which has 64 bits.
        generator.manual_seed(((self.seed * 1_000_003 + self._step) * 101 + self.draws) % 2**63)
        self.draws += 1
        return generator

"""Settings of the evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from patchmine.strict import LARGEST_RUN, OF_A_MACHINE, Mistake, Strict, Text


class EvalSettings(Strict):
    """What a training run measures on its way."""

    DECIDES_WEIGHTS: ClassVar[bool] = False

    eval_every: int = Field(
        0, ge=0, le=LARGEST_RUN, description="epochs between kNN evaluations; 0: none"
    )
    eval_data: Annotated[Text | None, OF_A_MACHINE] = Field(
        None, description="labelled images for that evaluation"
    )
    eval_test: Annotated[Text | None, OF_A_MACHINE] = Field(
        None, description="labelled images to test on; null: a part of eval_data"
    )
    crop_pct: float = Field(
        0.875, gt=0, le=1, description="centre crop at evaluation, share of the shorter side"
    )

    def mistakes(self) -> Iterator[Mistake]:
        """Evaluations without data."""
        if self.eval_every and self.eval_data is None:
            text = "but eval_data is not set; name a folder of labelled images"
            yield Mistake("eval_every", f"given {self.eval_every}, {text}")

"""The contract between a pre-training method and the loop that trains it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, ClassVar

from torch import nn

from patchmine.models.noise import Noise
from patchmine.types import Batch, Losses, Panel, ParamGroup, Progress


class Method(nn.Module):
    """One pre-training method: an encoder, whatever else it needs to teach that encoder, and one
    step's loss.

    A method is built as ``Method(config, encoder)``, where ``config`` is an instance of the class
    attribute ``Config`` (a pydantic model whose ``name`` is the method's).  Methods never inherit
    from methods.  A step must not wait for the device: no ``.item()``, no boolean indexing.

    ``averages_rows``: the loss of a batch is the mean over its images, so that a batch may be
    divided among processes or accumulated parts without changing the step.  False where rows meet:
    a ratio over the batch, batch statistics. ``multi_crop``: a training batch holds several crops
    of each image, as the settings ``crops`` say; pictures are still made of batches of one plain
    view. ``video``: it also trains an encoder of clips (`models.video`), whose views are (B, C, T,
    H, W).
    """

    encoder: nn.Module
    noise: Noise
    averages_rows: bool = True
    multi_crop: ClassVar[bool] = False
    video: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()

    @classmethod
    def draw_weights(cls, encoder: nn.Module) -> None:
        """Draw the first weights of a freshly built encoder, where they differ from those that it
        was built with.

        Called before the method is made, and before ``init=`` fills the encoder with weights of the
        user's choice.
        """

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """The losses of one (micro-)batch, whose views are normalised floats on the model's device."""
        raise NotImplementedError

    def after_step(self, progress: Progress) -> None:
        """Called once after every optimizer step, with the step that was just made (teachers are
        updated here).
        """

    def begin_epoch(self, progress: Progress, plain_data: Iterable[Batch]) -> None:
        """Called before the first step of an epoch, in every process; not where a run is resumed
        within an epoch.

        ``plain_data`` yields, when iterated, this process's share of the whole training set,
        uncropped; the shares of all processes together are the set, and ``Batch.index`` says which
        items they are.  Images that cannot be read are missing.
        """

    def param_groups(self) -> list[ParamGroup]:
        """What is trained and how; by default everything that takes a gradient, as the run's
        settings say.
        """
        return [ParamGroup(self.learning())]

    def sparing(self, undecayed: Collection[str], **how: Any) -> list[ParamGroup]:
        """Everything that takes a gradient, updated as ``how`` says, the ``undecayed`` names
        without weight decay.
        """
        decayed = [(name, p) for name, p in self.learning() if name not in undecayed]
        spared = [(name, p) for name, p in self.learning() if name in undecayed]
        groups = [ParamGroup(decayed, **how)]
        return [*groups, ParamGroup(spared, weight_decay=0.0, **how)] if spared else groups

    def learning(self) -> list[tuple[str, nn.Parameter]]:
        """Everything that takes a gradient, by name."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Pictures of what the method does to a batch; the first shows the input."""
        raise NotImplementedError

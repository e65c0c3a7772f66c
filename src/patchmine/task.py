"""What is trained: `Task` is all that the loop knows of it, `Method` what pre-training adds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from patchmine.backbones.family import family_of, refuse_unfit
from patchmine.errors import UserError
from patchmine.models.adapt import freeze_others, layer_groups
from patchmine.models.noise import Noise
from patchmine.models.settings import AdaptSettings, MethodSettings, parse_trainable
from patchmine.models.teacher import Average
from patchmine.types import Batch, Losses, Panel, ParamGroup, Progress


class Task(nn.Module):
    """A network with one step's loss.  A step must not wait for the device.

    Args:
        settings: what the task is built from, kept as ``config``.

    Attributes:
        noise: where a step takes its random numbers from.
        average: of the weights over steps, where `keep_average` was asked for one.
        averages_rows: the loss of a batch is the mean over its rows, so that a batch may be divided
            among processes or accumulated parts.  False where rows meet: a ratio over the batch,
            batch statistics.
        uses_targets: the loss reads ``Batch.target``, so that a run is one of these targets too.
    """

    config: Any
    noise: Noise
    averages_rows: bool = True
    uses_targets: ClassVar[bool] = False

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.config = settings
        self.noise = Noise()
        self.average: Average | None = None

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        """The losses of one (micro-)batch.

        Args:
            batch: views are normalised floats on the model's device.
            progress: which step it is.

        Returns:
            0-d tensors; ``"loss"`` is minimised, the others are logged.
        """
        raise NotImplementedError

    def after_step(self, progress: Progress) -> None:
        """Called after every optimizer step, with the step that was just made."""

    def keep_average(self, decay: float | None, parts: Iterable[str]) -> None:
        """Average the weights of some of its modules from now on (the setting ``ema_decay``)."""
        if decay is not None:
            students = {name: self.get_submodule(name) for name in parts}
            self.average = Average(decay, **students)

    def follow(self, progress: Progress) -> None:
        """Called behind `after_step`: the average follows, where there is one."""
        if self.average is not None:
            names = [name for name, _ in self.average.named_children()]
            self.average.follow(progress, **{name: self.get_submodule(name) for name in names})

    def param_groups(self) -> list[ParamGroup]:
        """What is trained and how; by default all that takes a gradient, as the settings say."""
        return [ParamGroup(self.learning())]

    def scaled_groups(self) -> list[ParamGroup]:
        """`param_groups` as the run trains them; `Method.adapt` may slow some down."""
        return self.param_groups()

    def encoders(self) -> dict[str, nn.Module]:
        """Its encoders by name: student, and teacher, partner, partner-teacher where it has them.

        Those that take a gradient are exported when the run is done.
        """
        raise NotImplementedError

    def predict(self, batch: Batch) -> Any:
        """What the task says of each row of a batch, a tensor or list, where it says anything."""
        raise NotImplementedError

    def metric(self) -> str | None:
        """The number by which the best checkpoint is kept; None: the evaluation's own."""
        return None

    def learning(self) -> list[tuple[str, nn.Parameter]]:
        """Everything that takes a gradient, by name."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def sparing(self, undecayed: Collection[str], **how: Any) -> list[ParamGroup]:
        """All that takes a gradient, ``undecayed`` names without weight decay."""
        decayed = [(name, p) for name, p in self.learning() if name not in undecayed]
        spared = [(name, p) for name, p in self.learning() if name in undecayed]
        groups = [ParamGroup(decayed, **how)]
        return [*groups, ParamGroup(spared, weight_decay=0.0, **how)] if spared else groups


class PlainItems(Protocol):
    """Yields, when iterated, this process's share of the whole training set, uncropped.

    ``Batch.index`` says which items they are; broken ones are missing.  Its length is the number of
    items of the whole set.
    """

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


class Method(Task):
    """One pre-training method: an encoder and whatever else it needs to teach that encoder.

    Methods never inherit from methods.

    Args:
        config: the method's settings.
        encoder: the network that is trained; it is what survives training.

    Where ``config.multi_crop``, a training batch holds several crops of each image, as the settings
    ``crops`` say; pictures are still made of batches of one plain view.  Views of clips are
    (B, C, T, H, W).

    ``inductive``: the loss can be computed on images that are not trained on, and in eval mode
    doing so changes nothing.  False where the method looks images up by their index.
    """

    config: MethodSettings
    encoder: nn.Module
    inductive: bool = True

    def __init__(self, config: MethodSettings, encoder: nn.Module) -> None:
        super().__init__(config)
        refuse_unfit(encoder, config.name, config.families, config.relative_positions)
        self.encoder = encoder
        self.layer_decay, self.freeze_encoder = 1.0, 0.0

    @classmethod
    def draw_weights(cls, encoder: nn.Module) -> None:
        """Draw first weights of a fresh encoder, where they differ from those it was built with.

        Called before the method is made, and before ``init=`` fills the encoder.
        """

    def adapt(self, settings: AdaptSettings) -> None:
        """Say how far the encoder moves, and how fast; LoRA's layers must be in it already.

        All else that the method learns, a partner included, keeps learning at the whole rate.
        Raises UserError for a choice that the encoder does not have.
        """
        self.layer_decay, self.freeze_encoder = settings.layer_decay or 1.0, settings.freeze_encoder
        kind = parse_trainable(settings.trainable).kind
        if kind == "last" and family_of(self.encoder).batch_normed:
            raise UserError(
                f"trainable={settings.trainable} would freeze batch norms, whose statistics move "
                f"with the EMA teacher of method={self.config.name}: choose trainable=bias or all"
            )
        if kind != "all":
            freeze_others(self.encoder, settings.trainable)
        encoders = self.encoders().values()
        learning = [name for name, part in self.named_children() if part in encoders]
        self.keep_average(settings.ema_decay, learning)

    def scaled_groups(self) -> list[ParamGroup]:
        """`param_groups`, those of the encoder as its layers are paced."""
        groups, decay, frozen = self.param_groups(), self.layer_decay, self.freeze_encoder
        if decay == 1 and frozen == 0:
            return groups
        return layer_groups(groups, self.encoder, decay, frozen_share=frozen)

    def used(self, encoder: nn.Module) -> nn.Module:
        """The average of one of its encoders where there is one, else that encoder."""
        parts = [] if self.average is None else self.average.named_children()
        averages = {self.get_submodule(name): average for name, average in parts}
        return averages.get(encoder, encoder)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, each of its encoders of which there is an average is that average."""
        averages = {} if self.average is None else dict(self.average.named_children())
        trained = {name: self.get_submodule(name) for name in averages}
        try:
            for name, average in averages.items():
                setattr(self, name, average)
            yield
        finally:
            for name, encoder in trained.items():
                setattr(self, name, encoder)

    def encoders(self) -> dict[str, nn.Module]:
        """The encoder that is trained, and that of an EMA teacher; a pair names its partner too."""
        teacher = getattr(self, "teacher", None)
        copies = {} if teacher is None else {"teacher": teacher.get_submodule("encoder")}
        return {"student": self.encoder, **copies}

    def param_groups(self) -> list[ParamGroup]:
        """All that takes a gradient, clipped as the setting ``clip_grad`` says."""
        return [ParamGroup(self.learning(), clip_norm=self.config.clip_grad)]

    def begin_epoch(self, progress: Progress, plain_data: PlainItems) -> None:
        """Called in every process before the first step of an epoch; not where a run is resumed
        within one.

        Args:
            progress: the step that comes.
            plain_data: the whole training set.
        """

    def whole_epochs(self, progress: Progress) -> Collection[int]:
        """The epochs of a run before which `begin_epoch` iterates over ``plain_data``.

        Args:
            progress: of that run, whichever.
        """
        return ()

    def difficulty(self, images: Tensor) -> Tensor | None:
        """How hard the method finds each image (B,), the same whatever the batch, or None.

        Args:
            images: normalised, (B, C, H, W) or clips (B, C, T, H, W).

        Returns:
            Numbers that can be compared between images, larger where it is harder; None where the
            method predicts no difficulty.
        """
        return None

    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Pictures of what the method does to a batch; the first shows the input."""
        raise NotImplementedError

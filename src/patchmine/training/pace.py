"""What the parts of a run take, and its length for a given time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from patchmine.config.schema import PretrainConfig
from patchmine.report.label_free import epochs_between
from patchmine.train.loop import num_pictures, save_every
from patchmine.types import Progress


@dataclass(frozen=True)
class Pace:
    """What the parts of a run take on this machine, in seconds.

    Args:
        step: one step, with its wait for data.
        picture: one of ``samples/``.
        checkpoint: writing one.
        export: writing the encoders at the end.
        look: the numbers without labels, once.
        evaluation: kNN, once.
        start: building the method, starting its workers, compiling it.
        whole: a look at all training images, as some methods take one before an epoch.
        whole_epochs: the epochs of a run before which they do.
        watched: images of a look.
        checkpoint_bytes: of one on the disk.
        export_bytes: of the encoders that are exported.
        peak_bytes: most memory until then: of this process on a CPU, of the GPU on one.
        worker_bytes: memory of the processes that read, beside what they share with this one.
        trained: parameters that learn.
    """

    step: float
    picture: float = 0.0
    checkpoint: float = 0.0
    export: float = 0.0
    look: float = 0.0
    evaluation: float = 0.0
    start: float = 0.0
    whole: float = 0.0
    whole_epochs: Callable[[Progress], Collection[int]] = lambda length: ()
    watched: int = 0
    checkpoint_bytes: int = 0
    export_bytes: int = 0
    peak_bytes: int = 0
    worker_bytes: int = 0
    trained: int = 0

    def beside(self, config: PretrainConfig, length: Progress) -> float:
        """Seconds of a run for all that is no step."""
        epochs = length.total_epochs
        between = epochs_between(config, config, self.watched, length)
        pictures = num_pictures(config, length)
        saved = _times(length.total_steps, save_every(config, length))
        looks = 1 + _times(epochs, between)
        evaluations = _times(epochs, config.eval_every) if config.eval_every else 0
        return (
            self.start
            + pictures * self.picture
            + saved * self.checkpoint
            + looks * self.look
            + evaluations * self.evaluation
            + len(self.whole_epochs(length)) * self.whole
            + self.export
        )

    def seconds(self, config: PretrainConfig, length: Progress) -> float:
        """What a run of this length takes."""
        return length.total_steps * self.step + self.beside(config, length)

    def fitting(self, config: PretrainConfig, steps_per_epoch: int, seconds: float) -> int:
        """Steps of the longest run that takes no more; one at least."""
        low, high = 1, max(1, int(seconds / self.step))
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.seconds(config, Progress(0, middle, steps_per_epoch)) <= seconds
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def evaluation_like(look: float, watched: int, labelled: int) -> float:
    """Seconds of an evaluation of ``labelled`` images, as a look at ``watched`` takes ``look``."""
    return look / max(1, watched) * labelled


def _times(total: int, every: int) -> int:
    """How often something is due that comes at multiples and at the end."""
    return math.ceil(total / every)

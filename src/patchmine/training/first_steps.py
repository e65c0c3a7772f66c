"""What a pre-training run will take, told once from its own first steps."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from patchmine.config.schema import PretrainConfig
from patchmine.report.words import duration, gib
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.train.loop import num_kept
from patchmine.training.pace import Pace, evaluation_like
from patchmine.training.timing import peak_bytes
from patchmine.types import Progress

LONG = 3_600  # seconds of a run on a CPU, from which there is advice


class FirstSteps:
    """Notes how long pictures and monitors take, and tells what the run will.

    Args:
        config: complete settings of the run.
        method: what is trained.
        engine: where it is computed.
        log: hears it.
        watched: images of a look at the numbers without labels.
        labelled: images of an evaluation.
    """

    def __init__(
        self,
        config: PretrainConfig,
        method: Method,
        engine: Engine,
        log: Log,
        watched: int,
        labelled: int,
    ) -> None:
        self.config, self.method, self.engine, self.log = config, method, engine, log
        self.watched, self.labelled = watched, labelled
        self._took: dict[str, float] = {}

    def noted(self, name: str, work: Callable[[Progress], None]) -> Callable[[Progress], None]:
        """The same work, of which the time is noted."""

        def do(progress: Progress) -> None:
            began = perf_counter()
            work(progress)
            self._took[name] = perf_counter() - began

        return do

    def tell(self, done: Progress, step: float) -> None:
        """Time, memory and disk of the whole run, after steps that took so many seconds each."""
        config, look = self.config, self._took.get("look", 0.0)
        pace = Pace(
            step=step,
            picture=self._took.get("picture", 0.0),
            look=look,
            evaluation=evaluation_like(look, self.watched, self.labelled),
            watched=self.watched,
        )
        seconds = pace.seconds(config, done)
        learning = [parameter for _, parameter in self.method.learning()]
        tensors = [*self.method.state_dict().values(), *learning, *learning]  # with AdamW's two
        kept = num_kept(config, done)
        self.log.say(
            f"The run: about {duration(seconds)} at {step:.3g} s a step; "
            f"{gib(peak_bytes(self.engine))} of memory until now; "
            f"{gib(kept * sum(tensor.nbytes for tensor in tensors))} of disk for checkpoints."
        )
        if seconds > LONG and self.engine.device.type == "cpu" and config.steps is None:
            self.log.say(
                "Shorter: budget=1h in place of epochs takes what fits into an hour, budget=8h "
                "into a night; `patchmine plan` tells both before anything is trained."
            )

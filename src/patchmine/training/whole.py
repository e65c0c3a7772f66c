"""What pre-training does with a whole training set, and with a whole method at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from patchmine.config.schema import PretrainConfig
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches
from patchmine.data.sources.contract import Source
from patchmine.data.workers import num_workers
from patchmine.errors import Say
from patchmine.models.lora import merged
from patchmine.runs import preparing
from patchmine.runs.folder import write_export
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.types import Batch

PLAIN_BATCH = 256  # images
PASS_SECONDS = 15.0  # between two lines about a pass over the whole training set


@dataclass(frozen=True)
class PlainData:
    """This process's share of the training set, squashed to the model's size, at each iteration."""

    config: PretrainConfig
    images: Source
    engine: Engine
    say: Say

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Batch]:
        count, rank, processes = len(self.images), self.engine.rank, self.engine.world_size
        share = range(count * rank // processes, count * (rank + 1) // processes)
        item = preparing.item_of(self.config)
        loaded = plain_batches(
            self.images,
            item.plain_view(self.config, None),
            batch_size=PLAIN_BATCH,
            indices=share,
            workers=num_workers(self.config.workers, self.engine.device, self.engine.local_size),
            read_timeout=self.config.read_timeout,
            bad=BadFiles(None, self.config.max_bad_share, item.noun),
        )
        done, last = 0, time.monotonic()
        for batch in map(preparing.normaliser(self.config, self.engine), loaded):
            yield batch
            done += len(batch)
            if time.monotonic() - last > PASS_SECONDS:
                last = time.monotonic()
                self.say(
                    "Looking at all training images before the epoch: "
                    f"{done:,} of this process's {len(share):,}."
                )


def write_exports(config: PretrainConfig, method: Method, folder_of: Callable[[str], Path]) -> None:
    """The encoders that learned, each in the folder of its name."""
    for name, encoder in method.encoders().items():
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            write_export(config, merged(method.used(encoder)), folder_of(name))

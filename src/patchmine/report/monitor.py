"""What is done beside training: pictures and evaluations, none of which may stop it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patchmine.backbones.settings import ModelSettings
from patchmine.data.badfiles import BadFiles
from patchmine.data.items import CLIP
from patchmine.data.loader import plain_batches
from patchmine.data.sampling import spread_indices
from patchmine.data.sources.contract import Source
from patchmine.data.workers import num_workers
from patchmine.errors import UserError, foreign_parser
from patchmine.evaluate.evaluated import Evaluated, of_run
from patchmine.evaluate.knn import knn_in_training
from patchmine.evaluate.labelled import open_labelled
from patchmine.evaluate.paired import interval_in_words
from patchmine.evaluate.settings import EvalSettings, ReadingSettings
from patchmine.report.panels import draw_panels
from patchmine.runs.preparing import item_of, normaliser
from patchmine.system.disk import refusal, replacing
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.train.settings import TrainSettings
from patchmine.types import Batch, Progress

# On a picture made during training, where a clip takes as many rows as panels
SAMPLE_IMAGES, SAMPLE_CLIPS = 6, 2


@dataclass(frozen=True)
class Watched:
    """A run in training, as what is done beside it sees it.

    Args:
        model, evaluation, training: the run's settings.
        folder: the run's.
        engine: the processes that share the work.
        images: what is trained on.
        method: what is trained.
        log: hears sentences and numbers.
    """

    model: ModelSettings
    evaluation: EvalSettings
    training: TrainSettings
    folder: Path
    engine: Engine
    images: Source
    method: Method
    log: Log

    def evaluated(self) -> Evaluated:
        """The encoder as it is used: its average, where there is one."""
        encoder = self.method.used(self.method.encoder)
        return of_run(self.model, self.evaluation.crop_pct, encoder, "the encoder in training")

    def workers(self) -> int:
        """Processes that read images."""
        return num_workers(self.training.workers, self.engine.device, self.engine.local_size)

    def write(self, progress: Progress, name: str, numbers: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl on an evaluation of this name."""
        epoch = progress.step / progress.steps_per_epoch
        self.log.write({"step": progress.step, "epoch": epoch, "eval": {"name": name, **numbers}})


class Monitor:
    """Pictures of always the same images, and kNN on labelled ones.

    Neither is worth a run: whatever fails here (a full disk, a labelled folder that was moved) is
    said, once for each of the two, and training goes on.
    """

    def __init__(self, run: Watched) -> None:
        self.run = run
        self._batch: Batch | None = None
        self._failed: set[str] = set()
        self._labelled = None
        asked = run.evaluation
        if asked.eval_every:
            item = item_of(run.model).keeping(run.training.remote_gb)
            self._labelled = open_labelled(
                asked.eval_data, asked.eval_test, item, ("eval_data", "eval_test")
            )
            parts = {"eval_data": self._labelled.train, "eval_test": self._labelled.test}
            run.engine.agree(
                {name: f"{len(part)} of {part.source.fingerprint}" for name, part in parts.items()}
            )

    @property
    def labelled_images(self) -> int:
        """How many an evaluation reads."""
        data = self._labelled
        return 0 if data is None else len(data.train) + len(data.test)

    def draw(self, progress: Progress) -> None:
        """samples/step-N.png, by the first process."""
        try:
            with foreign_parser(UserError, OSError):
                self._draw(progress)
        except (UserError, OSError) as error:
            self._say_failed("the picture", progress, error)

    def _draw(self, progress: Progress) -> None:
        model = self.run.model
        if self._batch is None:
            item = item_of(model)
            shown = SAMPLE_CLIPS if item is CLIP else SAMPLE_IMAGES
            loaded = plain_batches(
                self.run.images,
                item.plain_view(model, 1.0),
                batch_size=shown,
                indices=spread_indices(len(self.run.images), shown, self.run.training.seed),
                bad=BadFiles(None, 1.0),
            )
            self._batch = next(map(normaliser(model, self.run.engine), loaded), None)
        if self._batch is None:  # all of the chosen ones are broken
            return
        self.run.method.noise.begin(progress.step)
        self.run.method.eval()  # the loop goes back to training by itself
        with torch.no_grad(), self.run.engine.autocast(), self.run.method.in_use():
            panels = self.run.method.panels(self._batch, progress)
        assert model.mean is not None
        assert model.std is not None
        sheet = draw_panels(panels, model.mean, model.std)
        target = self.run.folder / "samples" / f"step-{progress.step:08d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as new:
            sheet.save(new)

    def evaluate(self, progress: Progress) -> dict[str, float] | None:
        """kNN every ``eval_every`` epochs and at the end: a line of metrics.jsonl, and the scores.

        Each process reads its share of the images; what fails in one of them is known to all.
        """
        last = progress.step == progress.total_steps
        if self._labelled is None or (progress.epoch % self.run.evaluation.eval_every and not last):
            return None
        evaluated, data = self.run.evaluated(), self._labelled
        try:
            with foreign_parser(UserError, OSError):
                reading = ReadingSettings(workers=self.run.workers())
                scores = knn_in_training(evaluated, data, reading, self.run.engine)
        except (UserError, OSError) as error:
            self._say_failed("the evaluation", progress, error)
            return None
        self.run.write(progress, "knn", scores)
        top1 = f"{scores['top1']:.1f} %{interval_in_words(scores)}"
        self.run.log.say(f"step {progress.step}: kNN top-1 {top1}")
        return {"top1": scores["top1"], "top5": scores["top5"]}

    def _say_failed(self, what: str, progress: Progress, error: UserError | OSError) -> None:
        if what not in self._failed:
            self.run.log.say(told_failure(what, progress, error))
        self._failed.add(what)


def told_failure(what: str, progress: Progress, error: UserError | OSError) -> str:
    """A sentence on what failed beside training."""
    why = refusal(error) if isinstance(error, OSError) else error
    after = f"after step {progress.step}"
    return f"warning: {what} {after} failed ({why}); training goes on without it"

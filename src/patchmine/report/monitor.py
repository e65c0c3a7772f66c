"""What the first process does beside training: pictures and evaluations, none of which may stop it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from patchmine.backbones.names import reads_clips
from patchmine.backbones.settings import ModelSettings
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches
from patchmine.data.sampling import spread_indices
from patchmine.data.sources.contract import Source
from patchmine.data.workers import num_workers
from patchmine.disk import refusal, replacing
from patchmine.errors import UserError, foreign_parser
from patchmine.evaluate.features import Reading
from patchmine.evaluate.knn import online_knn
from patchmine.evaluate.labelled import LabelledData, open_labelled
from patchmine.evaluate.settings import EvalSettings
from patchmine.evaluate.targets import target_of
from patchmine.report.panels import draw_panels
from patchmine.runs.preparing import item_of, normaliser
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.train.log import Log
from patchmine.types import Batch, Progress

SAMPLE_IMAGES, SAMPLE_CLIPS = (
    6,
    2,
)  # on a picture made during training, where a clip takes as many rows as panels


class Monitor:
    """Pictures of always the same images, and kNN on labelled ones.

    Neither is worth a run: whatever fails here (a full disk, a labelled folder that was moved) is
    said, once for each of the two, and training goes on.
    """

    def __init__(
        self,
        model: ModelSettings,
        evaluation: EvalSettings,
        folder: Path,
        engine: Engine,
        images: Source,
        method: Method,
        log: Log,
        *,
        seed: int,
        workers: int | Literal["auto"],
    ) -> None:
        self.model, self.evaluation, self.seed, self.workers = model, evaluation, seed, workers
        self.folder, self.engine, self.method, self.log = folder, engine, method, log
        self.images = images
        self._batch: Batch | None = None
        self._failed: set[str] = set()
        self._labelled: LabelledData | None = None
        if evaluation.eval_every and engine.is_main:
            self._labelled = open_labelled(
                evaluation.eval_data,
                evaluation.eval_test,
                video=reads_clips(model.model),
                settings=("eval_data", "eval_test"),
            )

    def draw(self, progress: Progress, batch: Batch) -> None:
        """samples/step-N.png."""
        with self._beside_training("the picture", progress):
            self._draw(progress)

    def _draw(self, progress: Progress) -> None:
        if self._batch is None:
            self._batch = next(self._fixed_images(), None)
        if self._batch is None:  # all of the chosen ones are broken
            return
        self.method.noise.begin(progress.step)
        self.method.eval()  # the loop goes back to training by itself
        with torch.no_grad(), self.engine.autocast():
            panels = self.method.panels(self._batch, progress)
        assert self.model.mean is not None
        assert self.model.std is not None
        sheet = draw_panels(panels, self.model.mean, self.model.std)
        target = self.folder / "samples" / f"step-{progress.step:08d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as new:
            sheet.save(new)

    def _fixed_images(self) -> Iterator[Batch]:
        count, shown = (
            len(self.images),
            SAMPLE_CLIPS if reads_clips(self.model.model) else SAMPLE_IMAGES,
        )
        chosen = spread_indices(count, shown, self.seed)
        view = item_of(self.model).plain_view(self.model, 1.0)
        loaded = plain_batches(
            self.images, view, batch_size=shown, indices=chosen, bad=BadFiles(None, 1.0)
        )
        return map(normaliser(self.model, self.engine), loaded)

    def evaluate(self, progress: Progress) -> None:
        """An evaluation line of metrics.jsonl, every ``eval_every`` epochs and at the end."""
        last = progress.step == progress.total_steps
        if self._labelled is None or (progress.epoch % self.evaluation.eval_every and not last):
            return
        reading = Reading(
            workers=num_workers(self.workers, self.engine.device, self.engine.local_size),
            device=str(self.engine.device),
        )
        accuracy: dict[str, float] = {}
        with self._beside_training("the evaluation", progress):
            target = target_of(
                self.model, self.evaluation.crop_pct, self.method.encoder, "the encoder in training"
            )
            accuracy = online_knn(target, self._labelled, reading=reading)
        if not accuracy:
            return
        epoch = progress.step / progress.steps_per_epoch
        self.log.write({"step": progress.step, "epoch": epoch, "eval": {"name": "knn", **accuracy}})
        self.log.say(f"step {progress.step}: kNN top-1 {accuracy['top1']:.1f} %")

    @contextmanager
    def _beside_training(self, what: str, progress: Progress) -> Iterator[None]:
        try:
            with foreign_parser(UserError, OSError):
                yield
        except (UserError, OSError) as error:
            if what not in self._failed:
                why = refusal(error) if isinstance(error, OSError) else error
                self.log.say(
                    f"warning: {what} after step {progress.step} failed ({why}); training goes on without it"
                )
            self._failed.add(what)

"""Monitors without labels: numbers of a few hundred images, at the start and during training."""

from __future__ import annotations

import math
import re

from patchmine.data.sampling import spread_indices
from patchmine.data.sources.contract import Source
from patchmine.data.views.images import View
from patchmine.errors import UserError, foreign_parser, shown_name
from patchmine.evaluate.features import FeatureLoop
from patchmine.evaluate.label_free import FEWEST, Neighbours, held_out_loss, label_free
from patchmine.evaluate.labelled import Part
from patchmine.evaluate.pooled import PooledReader
from patchmine.evaluate.settings import EvalSettings, ReadingSettings
from patchmine.report.health import Finding, findings_of
from patchmine.report.monitor import Watched, told_failure
from patchmine.report.series import read_series
from patchmine.runs.files import MONITOR_START
from patchmine.runs.preparing import item_of, normaliser
from patchmine.train.settings import TrainSettings
from patchmine.types import Progress

# Looks at the images in a run: as many as there may be while they read no more than a share of
# what training reads.
_MOST_LOOKS, _FEWEST_LOOKS, _SHARE = 20, 4, 0.02


class LabelFreeMonitor:
    """RankMe, deviation, neighbours kept since the start, held-out loss: a line of metrics.jsonl.

    None of it is worth a run: what fails is said once, and training goes on.  UserError where
    ``monitor_data`` cannot be opened.

    Args:
        run: what is watched.
        view: what becomes of an image in training.
    """

    def __init__(self, run: Watched, view: View) -> None:
        self.run, self.view = run, view
        self.is_held_out = run.evaluation.monitor_data is not None
        source = self._held_out() if self.is_held_out else run.images
        chosen = spread_indices(len(source), run.evaluation.monitor_images, run.training.seed)
        self.part = Part(source, chosen, None)
        self._failed = False
        self._told: set[str] | None = None  # kinds of findings; None: the history is not read yet

    def _held_out(self) -> Source:
        data = self.run.evaluation.monitor_data
        assert data is not None
        try:
            room = self.run.training.remote_gb
            source = item_of(self.run.model).open(data, remote_gb=room)
        except UserError as error:  # which calls every source data=
            raise UserError(re.sub("^data=", "monitor_data=", str(error))) from error
        self.run.engine.agree({"monitor_data": f"{len(source)} of {source.fingerprint}"})
        if source.fingerprint == self.run.images.fingerprint:
            same = f"monitor_data={shown_name(data)} holds the images that are trained on"
            raise UserError(f"{same}: name others, or leave it out")
        return source

    def begin(self, now: Progress) -> None:
        """The first numbers, and the neighbours that later ones are compared with."""
        self._guarded(now)

    def look(self, done: Progress) -> None:
        """The numbers after an epoch or the last step, where they are due."""
        every = epochs_between(self.run.evaluation, self.run.training, len(self.part), done)
        if done.step == done.total_steps or done.epoch % every == 0:
            self._guarded(done)

    def _guarded(self, progress: Progress) -> None:
        if len(self.part) < FEWEST:
            return
        try:
            with foreign_parser(UserError, OSError):
                self._measure(progress)
        except (UserError, OSError) as error:
            if not self._failed:
                self.run.log.say(told_failure("the monitor without labels", progress, error))
            self._failed = True

    def _measure(self, progress: Progress) -> None:
        engine, source = self.run.engine, self.part.source
        # Whether too many images are broken training judges
        reading = ReadingSettings(workers=self.run.workers(), max_bad_share=1.0)
        evaluated = self.run.evaluated()
        readers = {"": PooledReader(evaluated, "cls")}
        loop = FeatureLoop(readers, reading, engine.device, engine=engine)
        features = loop.table(self.part, "monitor")[""]
        numbers: dict[str, float] = {}
        if self.is_held_out and self.run.method.inductive:
            training = self.run.training
            rows = training.batch_size // (engine.world_size * training.accumulate)
            prepare = normaliser(self.run.model, engine)
            numbers["held_out_loss"] = held_out_loss(
                self.run.method, progress, self.part, self.view, prepare, loop, rows
            )
        if not engine.is_main or len(features) < FEWEST:
            return
        numbers |= label_free(features)
        path, own = self.run.folder / MONITOR_START, Neighbours.of(features, source.fingerprint)
        if progress.step == 0:
            own.write(path)
        start = Neighbours.read(path)
        if start is not None and (kept := own.kept(start)) is not None:
            numbers["neighbours_kept"] = kept
        self._tell(progress, numbers)

    def _tell(self, progress: Progress, numbers: dict[str, float]) -> None:
        """A line of metrics.jsonl and of the log, then whatever is wrong for the first time."""
        if self._told is None:
            self._told = {finding.kind for finding in self._findings()}
        self.run.write(progress, "monitor", numbers)
        parts = [f"RankMe {numbers['rankme']:.1f}", f"feature std {numbers['feature_std']:.4f}"]
        if (kept := numbers.get("neighbours_kept")) is not None and progress.step:
            parts.append(f"neighbours kept {kept:.0f} %")
        if (loss := numbers.get("held_out_loss")) is not None:
            parts.append(f"held-out loss {loss:.4f}")
        self.run.log.say(f"step {progress.step}: {', '.join(parts)}")
        for finding in self._findings():
            if finding.kind not in self._told:
                self.run.log.say(f"{'warning: ' if finding.is_fault else ''}{finding.text}")
                self._told.add(finding.kind)

    def _findings(self) -> list[Finding]:
        series, steps_per_epoch = read_series(self.run.folder / "metrics.jsonl")
        return findings_of(series, steps_per_epoch, is_adapted=self.run.model.init is not None)


def epochs_between(
    evaluation: EvalSettings, training: TrainSettings, watched: int, length: Progress
) -> int:
    """Epochs from look to look at so many images that are watched."""
    trained_on = length.total_steps * training.batch_size
    affordable = int(_SHARE * trained_on / max(1, watched))
    looks = min(_MOST_LOOKS, max(_FEWEST_LOOKS, affordable))
    chosen = evaluation.monitor_every or evaluation.eval_every
    return chosen or max(1, math.ceil(length.total_epochs / looks))

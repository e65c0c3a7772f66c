"""What a fine-tuned run says of items without labels: probabilities, and rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.backbones.classifier import Classifier, Head, read_head
from patchmine.backbones.export import is_export
from patchmine.backbones.family import pooled
from patchmine.backbones.whole import is_whole_classifier, open_whole_classifier
from patchmine.config.resolve import of_kind
from patchmine.config.schema import FinetuneConfig
from patchmine.data.items import CLIP
from patchmine.data.sources.contract import Source
from patchmine.errors import Say, UserError, shown_name, silent, whole_name
from patchmine.evaluate.asked import kind_of, open_asked, refuse_settings_of_others
from patchmine.evaluate.classmaps import segmented
from patchmine.evaluate.evaluated import Evaluated, of_encoder, of_run, open_evaluated
from patchmine.evaluate.features import FeatureLoop, Reader, Views, clip_views, device_of
from patchmine.evaluate.labelled import Part
from patchmine.evaluate.objects import detected
from patchmine.evaluate.settings import PredictSettings
from patchmine.models.onednn import fast_linear
from patchmine.runs.folder import RunFolder
from patchmine.runs.known import is_run

LIMIT = 0.5
"""The probability above which an image has a label (``loss=bce``)."""
_FIXED = ("file", "class", "probability")


def predicted(settings: PredictSettings, say: Say = silent) -> dict[str, list[Any]]:
    """The table's columns: ``file``, ``class``, ``probability``, and what else is asked for.

    Those of a run that segments are ``file`` and ``classes``, see `classmaps.segmented`; those of
    one that detects stand at `objects.detected`.  Raises UserError as `open_question` and
    `Question.batches` do.
    """
    kind = kind_of(settings.run)
    if kind == "segment":
        return segmented(settings, say)
    if kind == "detect":
        return detected(settings, say)
    question = open_question(settings, say)
    found: dict[str, list[Any]] = {}
    for index, values in question.batches():
        for name, column in question.rows(index, values).items():
            found.setdefault(name, []).extend(
                column if isinstance(column, list) else column.tolist()
            )
    return found


@dataclass(frozen=True)
class Question:
    """A fine-tuned run, and items that it is asked about.

    Args:
        loop: reads them.
        source: they are of.
        names: of the classes, labels or numbers.
        loss: what the run learned them by: ``ce``, ``bce`` or ``mse``.
        top: classes in a row.
        all: whether each class has a column too.
        views: of each video; None: the clip in its middle.
        by_path: whether files are named by their whole path, not by their place in the source.
    """

    loop: FeatureLoop
    source: Source
    names: Sequence[str]
    loss: str
    top: int
    all: bool
    views: Views | None
    by_path: bool

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(index (B,), probabilities or numbers (B, K)) of readable items, in order, on the CPU.

        Raises UserError where nothing, or too little, can be read.
        """
        part, done = Part(self.source, np.arange(len(self.source)), None), 0
        with fast_linear():
            for index, columns in self.loop.batches(part, "predictions", self.views):
                values = columns[""][:, 0]  # (B * V, K)
                yield index, values.view(len(index), -1, values.shape[1]).mean(1)
                done += len(index)
        self.loop.judge_broken(part, done, "predictions")

    def members(self, values: Tensor) -> Tensor:
        """(B, K): whether an item is of a class, or has a label; of numbers all are."""
        if self.loss == "ce":
            return F.one_hot(values.argmax(1), values.shape[1]).bool()
        return values > LIMIT if self.loss == "bce" else torch.ones_like(values, dtype=torch.bool)

    def rows(self, index: Tensor, values: Tensor) -> dict[str, Any]:
        """Columns of the table for a batch: lists of text, and arrays (B,) float32."""
        names = np.array([whole_name(name) for name in self.names], object)
        rows: dict[str, Any] = {"file": [self.file(place) for place in index.tolist()]}
        if self.loss == "bce":
            rows["class"] = ["|".join(names[own]) for own in self.members(values).numpy()]
        if self.loss == "ce":
            best, places = values.topk(self.top, dim=1)
            for n in range(self.top):
                number = f"_{n + 1}" if n else ""
                rows[f"class{number}"] = names[places[:, n].numpy()].tolist()
                rows[f"probability{number}"] = best[:, n].numpy()
        if self.all or self.loss != "ce":
            for name, column in zip(names, values.numpy().T, strict=True):
                while name in rows or name in _FIXED:  # a class that is called "file"
                    name += "_"
                rows[name] = column
        return rows

    def file(self, place: int) -> str:
        """The name of an item by which a person finds it, as one line."""
        return whole_name(self.source.path(place) if self.by_path else self.source.key(place))


def open_question(settings: PredictSettings, say: Say = silent) -> Question:
    """The run and the items that the settings name.

    Raises UserError for a run that was not fine-tuned, and for settings that do not fit it.
    """
    opened = _opened(Path(settings.run), say)
    refuse_settings_of_others(settings, "classify")
    evaluated, loss = opened.evaluated, opened.loss
    name = evaluated.name
    if loss != "ce" and settings.top > 1:
        raise UserError(f"top={settings.top} is for classes, but {name} learned with loss={loss}")
    if settings.top > len(opened.names):
        few = f"but {name} knows {len(opened.names)} classes"
        raise UserError(f"top={settings.top}, {few}: give at most so many")
    views = _views(settings, evaluated, opened.tested, say)
    source = open_asked(settings.data, evaluated.item.keeping(settings.remote_gb))
    for note in source.notes:
        say(note)
    return Question(
        loop=FeatureLoop({"": _Answers(opened)}, settings, device_of(settings), say),
        source=source,
        names=list(opened.names),
        loss=loss,
        top=settings.top,
        all=settings.all,
        views=views,
        by_path=isinstance(settings.data, list) and len(settings.data) > 1,
    )


@dataclass(frozen=True)
class _Opened:
    """What is asked.

    Args:
        evaluated: whose encoder is the whole network, and how items are prepared.
        scores: of normalised items, (B, K) float32.
        names: of the scores.
        loss: by which they were learned.
        tested: clips, and crops of each, by which a video was tested; an export does not tell.
    """

    evaluated: Evaluated
    scores: Callable[[Tensor], Tensor]
    names: Sequence[str]
    loss: str
    tested: tuple[int, int] = (1, 1)


def _opened(path: Path, say: Say) -> _Opened:
    """A fine-tuned run, its export, or a classifier that timm saved."""
    if is_run(path) or not is_export(path):
        run = RunFolder(path)
        task, config = run.classify(), of_kind(run.whole_config, FinetuneConfig)
        found = of_run(config, config.crop_pct, task.network().encoder, shown_name(path))
        tested = (config.test_segments, config.test_crops)
        return replace(_with_head(found, task.head_of()), tested=tested)
    if not is_whole_classifier(path):
        return _with_head(open_evaluated(path), read_head(path))
    network, names, prepared = open_whole_classifier(path)
    say(
        f"{shown_name(path)} does not tell how its classes were learned (problem_type in "
        "config.json): each image is taken to be of one of them."
    )
    whole = of_encoder(shown_name(path), network, prepared)
    return _Opened(whole, lambda images: network(images).float(), names, "ce")


def _with_head(evaluated: Evaluated, head: Head) -> _Opened:
    network: Any = Classifier(evaluated.encoder, head.layer, head.pool).eval()

    def scores(images: Tensor) -> Tensor:
        features = pooled(network.encoder, images, network.pool)
        # bfloat16 has three digits, and numbers in their own units may be large.
        with torch.autocast(images.device.type, enabled=False):
            found: Tensor = network.head(features.float())
        return found

    # In place of the encoder: whoever reads moves it to the device.
    return _Opened(replace(evaluated, encoder=network), scores, list(head.names), head.loss)


def _views(
    settings: PredictSettings, evaluated: Evaluated, tested: tuple[int, int], say: Say
) -> Views | None:
    """Those that are asked for, or else those of the run's test; None: the middle alone."""
    told = {"segments": settings.segments, "crops": settings.crops}
    given = ", ".join(f"{name}={value}" for name, value in told.items() if value not in (None, 1))
    if given and evaluated.item is not CLIP:
        raise UserError(f"{given}: is for videos, but {evaluated.name} takes images: leave it out")
    usual = dict(zip(told, tested, strict=True))
    own = {name: usual[name] for name, value in told.items() if value is None}
    segments, crops = (value or usual[name] for name, value in told.items())
    if segments * crops == 1:
        return None
    if own:
        taken = " ".join(f"{name}={value}" for name, value in own.items())
        say(f"{taken}, as the run was tested (segments=1 crops=1: the middle clip alone).")
    return clip_views(evaluated.input, segments, crops)


class _Answers(Reader):
    """Probabilities, or numbers in their own units, in the place of features: (B, 1, K)."""

    def __init__(self, opened: _Opened) -> None:
        super().__init__(opened.evaluated)
        self.scores, self.loss = opened.scores, opened.loss

    def __call__(self, images: Tensor) -> Tensor:
        scores = self.scores(images)
        if self.loss == "ce":
            scores = scores.softmax(1)
        elif self.loss == "bce":
            scores = scores.sigmoid()
        return scores[:, None]

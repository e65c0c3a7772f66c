"""A run folder: what is in it and how to open it.  Nothing in it is ever executed."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from patchmine.backbones import filling, weights
from patchmine.backbones.classifier import Classifier, Head
from patchmine.backbones.export import Preprocessing, export_encoder, is_export
from patchmine.backbones.family import Encoder, build_encoder, family_of
from patchmine.backbones.loading import LoadReport
from patchmine.config.schema import (
    AnyConfig,
    DetectConfig,
    FinetuneConfig,
    PretrainConfig,
    SegmentConfig,
)
from patchmine.errors import Say, UserError, settings_of, shown_name, silent
from patchmine.methods import method_class
from patchmine.models.adapt import AS_USED, insert_lora, tensors_used
from patchmine.models.settings import AverageSettings
from patchmine.runs.files import RunFiles
from patchmine.runs.known import is_run
from patchmine.task import Method
from patchmine.tasks.classify import Classify
from patchmine.tasks.detect import Detect
from patchmine.tasks.segment import Segment
from patchmine.train.checkpoint import Checkpoint, load, load_newest, not_finite
from patchmine.train.head import DamagedCheckpointError

_log = logging.getLogger("patchmine")

Supervised = TypeVar("Supervised", Classify, Segment, Detect)


def build_method(
    config: PretrainConfig, *, start_from: str | None = None, say: Say = silent
) -> Method:
    """The method that the settings describe, freshly initialised (seed torch first).

    Args:
        config: settings of a run.
        start_from: a run, export or weights file, whose encoder is taken instead of a random one.
        say: hears what became of its tensors.

    Raises:
        UserError: settings that do not fit together.
    """
    kind = method_class(config.method)
    encoder = _bare_encoder(config)
    kind.draw_weights(encoder)
    report = None if start_from is None else _initialise(encoder, start_from)
    insert_lora(encoder, config.trainable)  # before the method, whose EMA teachers copy it
    method = kind(config.method, encoder)
    method.adapt(config)
    if report is not None:
        # Copies start as what they are of, and foreign networks say themselves what they are.
        told = ("encoder.", "teacher.", "foreign.", "partner_teacher.", "average.")
        report.random = [name for name in method.state_dict() if not name.startswith(told)]
        say(report.render())
    return method


def build_classifier(
    config: FinetuneConfig,
    *,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    start_from: str | None = None,
    say: Say = silent,
) -> Classify:
    """The classifier that the settings describe, freshly initialised (seed torch first).

    Args:
        config: settings of a run, ``classes`` filled in.
        weights: see `Classify`, as ``scale``.
        start_from: a run, export or weights file, whose encoder is taken instead of a random one.
        say: hears what became of its tensors.

    Raises:
        UserError: settings that do not fit together.
    """

    def make(encoder: Encoder) -> Classify:
        return Classify(config, encoder, config.classes, weights, scale)

    return _built(config, make, start_from, say)


def build_segmenter(
    config: SegmentConfig,
    *,
    weights: Tensor | None = None,
    start_from: str | None = None,
    say: Say = silent,
) -> Segment:
    """The network that segments as the settings describe, freshly initialised (seed torch first).

    Arguments and errors are those of `build_classifier`; ``weights`` as in `Segment`.
    """

    def make(encoder: Encoder) -> Segment:
        return Segment(config, encoder, config.classes, config.image_size, weights)

    return _built(config, make, start_from, say)


def build_detector(
    config: DetectConfig, *, start_from: str | None = None, say: Say = silent
) -> Detect:
    """The same of a network that detects."""
    return _built(config, lambda encoder: Detect(config, encoder, config.classes), start_from, say)


def _built(
    config: AnyConfig, make: Callable[[Encoder], Supervised], start_from: str | None, say: Say
) -> Supervised:
    """A task with a head on an encoder, which may start from other weights."""
    encoder = _bare_encoder(config)
    with torch.random.fork_rng(devices=[]):  # so that the head is the same whatever it starts from
        report = None if start_from is None else _initialise(encoder, start_from)
    task = make(encoder)
    if report is not None:
        report.random = [f"head.{name}" for name in task.head.state_dict()]
        say(report.render())
    return task


def _initialise(encoder: Encoder, start_from: str) -> LoadReport:
    """Take over the weights of another encoder (init=)."""
    source = f"init={shown_name(start_from)}"
    if is_run(start_from):
        return filling.fill(encoder, RunFolder(start_from).encoder(), source)
    # A file is of the run's own model where it does not say another; a video model's tensors tell
    # what the network is and not how large its images were.
    like = None if family_of(encoder).clip(encoder) else encoder.built_from
    other, found = weights.open_weights(start_from, setting="init", like=like)
    report = filling.fill(encoder, other, source)
    report.dropped, report.notes = found.dropped, found.notes + report.notes
    report.resized = found.resized + report.resized
    report.assumed = found.assumed + report.assumed
    return report


def _bare_encoder(config: AnyConfig) -> Encoder:
    return build_encoder(config, clip=(config.clip.frames, config.clip.tubelet))


class RunFolder(RunFiles):
    """The same with what they hold: networks and their settings."""

    def method(self) -> Method:
        """The method with the weights of the newest readable checkpoint, on the CPU, in eval mode.

        Encoders of which an average is kept are that average, without LoRA's layers.

        Raises UserError when there is no checkpoint, when it does not fit the settings, or when it
        is not finite.
        """
        if not isinstance(self.config, PretrainConfig):
            raise UserError(
                f"{self.path} {self.made} (kind={self.config.kind}) and has no pre-training "
                "method: name the run that it started from"
            )
        found = self._newest()
        with settings_of(self.config_file):
            method = build_method(self.config.model_copy(update=AS_USED))
        _load(method, tensors_used(found.model), found.path)
        return method.eval()

    def classify(self) -> Classify:
        """What a fine-tuned run trained, with the weights of its best checkpoint where it chose
        one, else of the newest; on the CPU, in eval mode.

        Raises UserError for a run of another kind, and as `method` does.
        """
        task = self.trained() if isinstance(self.config, FinetuneConfig) else None
        if not isinstance(task, Classify):
            raise UserError(
                f"{self.path} {self.made} and knows no classes of images: fine-tune it first, "
                f"as in `patchmine finetune {self.path} data=labelled/ out=runs/classify`"
            )
        return task

    def segmenter(self) -> Segment:
        """What a run that segments trained, as `classify` has it.

        Raises UserError for a run of another kind, and as `method` does.
        """
        task = self.trained() if isinstance(self.config, SegmentConfig) else None
        if not isinstance(task, Segment):
            raise UserError(
                f"{self.path} {self.made} and knows no classes of pixels: teach it first, as in "
                f"`patchmine segment {self.path} data=maps/ out=runs/segment`"
            )
        return task

    def detector(self) -> Detect:
        """What a run that detects trained, as `classify` has it, and with its errors."""
        task = self.trained() if isinstance(self.config, DetectConfig) else None
        if not isinstance(task, Detect):
            raise UserError(
                f"{self.path} {self.made} and knows no objects: `patchmine detect {self.path} "
                "data=coco/ out=runs/detect` teaches them"
            )
        return task

    def trained(self) -> Classify | Segment | Detect:
        """What a run with labels trained, with the weights of its best checkpoint where it chose
        one, else of the newest; on the CPU, in eval mode.

        Raises UserError for a run without labels, and as `method` does.
        """
        config = self.config
        if isinstance(config, PretrainConfig):
            raise UserError(f"{self.path} was pre-trained, without labels: fine-tune it first")
        best = self.checkpoint_dir / "best"
        try:
            chosen = os.path.lexists(best)  # a link to a file that was removed too
            found = load(best, parts=("model",)) if chosen else self._newest()
        except DamagedCheckpointError as error:
            raise UserError(
                f"{best} is damaged ({error}): remove it to use the newest checkpoint instead"
            ) from error
        with settings_of(self.config_file):
            if isinstance(config, FinetuneConfig):
                task: Classify | Segment | Detect = build_classifier(config)
            elif isinstance(config, SegmentConfig):
                task = build_segmenter(config)
            else:
                task = build_detector(config)
        _load(task, found.model, found.path)
        return task.eval()

    def classifier(self) -> Classifier:
        """Encoder and linear layer of a fine-tuned run: images or clips, normalised, to scores.

        Raises UserError as `classify` does.
        """
        return self.classify().network().eval()

    def encoder(self, which: str = "student") -> Encoder:
        """One encoder of the run, from the newest readable checkpoint or else from its export.

        Args:
            which: a name that the method gives it: student, or teacher, partner, partner-teacher
                where there are such; of a run with ``ema_decay`` ema is the student, too, whose
                weights are their average.

        Returns:
            The encoder alone, on the CPU, in eval mode.

        Raises:
            UserError: there is no such encoder, or it is not finite.
        """
        if which == "ema" and self.keeps_average:
            which = "student"
        if not isinstance(self.config, PretrainConfig):
            encoders: dict[str, Encoder] = dict(self.trained().encoders())
            if which not in encoders:
                raise UserError(
                    f"weights={shown_name(which)}: {self.path} {self.made} and has one encoder: "
                    "leave the setting out"
                )
            return encoders[which].eval()
        folder = self.export_folder(which)
        if not self.checkpoints and is_export(folder) and not which.endswith("teacher"):
            return weights.load_encoder(folder).eval()
        if which == "student":  # without the method, some of whose files may be gone by now
            with settings_of(self.config_file):
                encoder = _bare_encoder(self.config)
            found, prefix = self._newest(), "encoder."
            tensors = tensors_used(found.model)
            names = [name for name in tensors if name.startswith(prefix)]
            _load(encoder, {name[len(prefix) :]: tensors[name] for name in names}, found.path)
            return encoder.eval()
        if not self.checkpoints and is_export(self.export_dir):
            raise UserError(
                f"weights={shown_name(which)}: {self.path} was imported as an encoder only, which "
                "is the student: leave the setting out"
            )
        method = self.method()
        encoders = method.encoders()
        if which not in encoders:
            raise UserError(
                f"{self.path} holds no {shown_name(which)}: method={method.config.name} keeps none;"
                f" use weights={' or '.join(encoders)}"
            )
        return encoders[which].eval()

    @property
    def keeps_average(self) -> bool:
        """Whether what it exports and evaluates is the average of its weights."""
        config = self.config
        return isinstance(config, AverageSettings) and config.ema_decay is not None

    def _newest(self) -> Checkpoint:
        if not self.checkpoints and is_export(self.export_dir):
            raise UserError(
                f"{self.path} was imported as an encoder only, without a checkpoint in "
                f"{self.checkpoint_dir}: it serves for eval, embed, export and init="
            )
        found = load_newest(self.checkpoint_dir, _log.warning, parts=("model",))
        if bad := not_finite({"model": found.model}):
            raise UserError(
                f"{found.path} is of a run that diverged: {bad[0].removeprefix('model.')} holds "
                f"values that are not finite ({len(bad)} of {len(found.model)} tensors do); "
                f"`patchmine resume {self.path}` goes on from the newest finite state, where there "
                "is one"
            )
        return found


def _load(module: nn.Module, tensors: dict[str, Any], path: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(
            f"{path} does not fit the settings in config.yaml ({first[0].strip()}); was one of "
            "them changed?"
        ) from error


def preprocessing_of(config: AnyConfig, encoder: Encoder) -> Preprocessing:
    """How images came to an encoder of such a run.  UserError where config.yaml does not tell."""
    if config.mean is None or config.std is None:
        raise UserError(
            "mean and std are not set; write those that the images were normalised with into "
            "config.yaml"
        )
    clips = family_of(encoder).clip(encoder) is not None
    return Preprocessing(
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        interpolation=config.interpolation,
        stride=config.clip.stride if clips else None,
    )


def write_export(
    config: AnyConfig,
    encoder: Encoder,
    folder: str | PathLike[str],
    head: Head | None = None,
    *,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """`export_encoder` of an encoder that saw images as the run prepared them."""
    return export_encoder(encoder, folder, preprocessing_of(config, encoder), head, check=check)

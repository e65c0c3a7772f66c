"""What `import patchmine` offers beside the parts themselves: to make a run, open it and use it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from typing import Any, Unpack

from patchmine import training
from patchmine.config.explain import validate
from patchmine.config.keywords import (
    DetectRunSettings,
    FinetuneRunSettings,
    Name,
    RunningSettings,
    RunSettings,
    SegmentRunSettings,
)
from patchmine.config.resolve import Checks, from_settings, of_kind, start_of
from patchmine.config.schema import (
    AnyConfig,
    DetectConfig,
    FinetuneConfig,
    PretrainConfig,
    SegmentConfig,
)
from patchmine.errors import Say
from patchmine.report.used_run import UsedRun
from patchmine.runs.checking import CHECKS, CLASSIFIER_CHECKS, PLAN_CHECKS, checks_of
from patchmine.runs.settings import ImportSettings
from patchmine.runs.transfer import import_file
from patchmine.tasks.settings import ShareSettings
from patchmine.training import planning
from patchmine.training.extending import settings_of_extension
from patchmine.training.shares import configs_of_starts
from patchmine.training.starting import settings_for, settings_of_start


class Run(UsedRun):
    """A run that was made, or is being made, in a folder.

    Beside its files (`config`, `checkpoints`, `metrics()`) it gives its networks (`encoder()`,
    `method()`), and does with them what the command line does.

    Args:
        path: the folder that `pretrain` wrote.

    Raises:
        UserError: the folder holds no run.
    """

    def extend(self, out: Name, *, data: Any = None, say: Say = print, **settings: Any) -> Run:
        """Train longer: a new run from all of this one's weights, with a schedule of its own.

        Example:
            ``patchmine.Run("runs/hpm").extend("runs/hpm-longer", epochs=400)``

        Args:
            out: the new folder.
            data: other data, as `pretrain` and `finetune` take them; None: the run's own.
            say: hears what a person should know, what became of the optimizer's state among it.
            **settings: ``epochs`` or ``steps`` of the new schedule, or the ``budget`` of time that
                chooses them, and those of `patchmine config schema` that are not to be this run's.

        Returns:
            The finished run.

        Raises:
            UserError: this run has no checkpoint, or settings do not fit its weights.
        """
        given = {"out": out, **settings}
        sources = _named(given, data)
        base = settings_of_extension(self.path, timed="budget" in settings)
        checks = checks_of(base["kind"], extends=True)
        config = from_settings(say=say, also=checks, base=base, **given)
        return Run(training.extend(config, self.path, sources=sources, say=say).path)


def pretrain(
    *,
    data: Any = None,
    recipe: Name | None = None,
    say: Say = print,
    **settings: Unpack[RunSettings],
) -> Run:
    """Pre-train an encoder on unlabelled images or videos.

    Example:
        ``pretrain(data="photos/", method={"name": "hpm", "mask_ratio": 0.8}, out="runs/hpm")``

    Args:
        data: what the command line takes (a folder, a list file, shards, or several), or any torch
            dataset of images, or a ``datasets.Dataset`` of Hugging Face's.
        recipe: name or file of settings to start from.
        say: hears what a person should know.
        **settings: those of `patchmine config schema`.  Nested ones are dicts or their models;
            dotted names such as ``**{"method.mask_ratio": 0.8}`` are taken too.

    Returns:
        The finished run, exported.

    Raises:
        UserError: settings, data or folders are wrong; the message lists every error.
    """
    given: dict[str, Any] = dict(settings)
    sources = _named(given, data)
    config = _pretraining(recipe, given, say, CHECKS)
    return Run(training.pretrain(config, sources=sources, say=say).path)


def plan(
    *,
    data: Any = None,
    recipe: Name | None = None,
    say: Say = print,
    **settings: Unpack[RunSettings],
) -> str:
    """Say what `pretrain` would take with these settings, from a few steps that are thrown away.

    Example:
        ``print(plan(recipe="my-images", data="photos/", method="hpm"))``

    Args:
        data: as `pretrain` takes it.
        recipe: name or file of settings to start from.
        say: hears what a person should know.
        **settings: those of `pretrain`; ``out`` may be left out.

    Returns:
        Lines on images, model, length, time, memory and disk, and on what fits into an hour or a
        night.

    Raises:
        UserError: settings or data are wrong; the message lists every error.
    """
    given: dict[str, Any] = dict(settings)
    sources = _named(given, data)
    config = _pretraining(recipe, given, say, PLAN_CHECKS)
    return planning.plan(config, sources=sources, say=say)


def _pretraining(
    recipe: Name | None, given: dict[str, Any], say: Say, also: Checks
) -> PretrainConfig:
    """The settings of a pre-training run, whose network may be that of what it goes on from."""
    start_from = None if recipe is None else os.fspath(recipe)
    begins = start_of(start_from, given)
    base = {} if begins is None else settings_for("pretrain", begins)
    config = from_settings(start_from, say=say, also=also, base=base, **given)
    return of_kind(config, PretrainConfig)


def finetune(
    start: Name,
    *,
    data: Any = None,
    recipe: Name | None = None,
    say: Say = print,
    **settings: Unpack[FinetuneRunSettings],
) -> Run:
    """Teach a backbone your labels, test it, and export it with its classifier.

    Example:
        ``finetune("runs/hpm", data="labelled/", out="runs/classify").classifier()``

    Args:
        start: a run, an export, a file of weights, or the name of a model (random weights).
        data: labelled images: folders are the classes, or ``labels`` names a CSV file; or any torch
            dataset of pairs of an image and the number of its class, which ``data.classes`` may
            name.
        recipe: name or file of settings to start from.
        say: hears what a person should know.
        **settings: those of `patchmine config schema finetune`; ``val`` and ``test`` may be torch
            datasets, too.

    Returns:
        The finished run: tested (``eval/test.json``) and exported with its classifier.

    Raises:
        UserError: settings, labels or folders are wrong; the message lists every error.
    """
    given: dict[str, Any] = dict(settings)
    sources = _named(given, data)
    base = settings_of_start(os.fspath(start))
    start_from = None if recipe is None else os.fspath(recipe)
    config = from_settings(start_from, say=say, also=CLASSIFIER_CHECKS, base=base, **given)
    return Run(training.finetune(of_kind(config, FinetuneConfig), sources=sources, say=say).path)


def segment(
    start: Name,
    *,
    data: Any = None,
    recipe: Name | None = None,
    say: Say = print,
    **settings: Unpack[SegmentRunSettings],
) -> Run:
    """Teach a backbone the class of every pixel, test it, and export its encoder.

    Example:
        ``segment("runs/hpm", data="camvid/", out="runs/segment", ignore_index=11)``

    Args:
        start: a run, an export, a file of weights, or the name of a model (random weights).
        data: a folder of ``{train,val,test}/{images,labels}``, one of ``images`` and ``labels``, or
            a list of "image label" lines; or with COCO files.
        recipe: name or file of settings to start from.
        say: hears what a person should know.
        **settings: those of `patchmine config schema segment`.

    Returns:
        The finished run, tested (``eval/test.json``).

    Raises:
        UserError: settings, label maps or folders are wrong; the message lists every error.
    """
    config = _config_of("segment", start, data, recipe, say, dict(settings))
    return Run(training.segment(of_kind(config, SegmentConfig), say=say).path)


def detect(
    start: Name,
    *,
    data: Any = None,
    recipe: Name | None = None,
    say: Say = print,
    **settings: Unpack[DetectRunSettings],
) -> Run:
    """Teach a backbone to find objects, test it, and export its encoder.

    Example:
        ``detect("runs/hpm", data="coco/", out="runs/detect", image_size=640, masks=True)``

    Args:
        start: a run, an export, a file of weights, or the name of a model (random weights).
        data: a folder of images with annotations in COCO's format, in parts ``train``, ``val`` and
            ``test`` or whole; or a COCO file beside its images.
        recipe: name or file of settings to start from.
        say: hears what a person should know.
        **settings: those of `patchmine config schema detect`.

    Returns:
        The finished run, tested (``eval/test.json``).

    Raises:
        UserError: settings, annotations or folders are wrong; the message lists every error.
    """
    config = _config_of("detect", start, data, recipe, say, dict(settings))
    return Run(training.detect(of_kind(config, DetectConfig), say=say).path)


def _config_of(
    kind: str, start: Name, data: Any, recipe: Name | None, say: Say, given: dict[str, Any]
) -> AnyConfig:
    """The settings of a run of this kind that starts from ``start``."""
    if data is not None:
        given["data"] = data
    base = settings_for(kind, os.fspath(start))
    start_from = None if recipe is None else os.fspath(recipe)
    return from_settings(start_from, say=say, also=checks_of(kind), base=base, **given)


def compare_shares(
    start: Name,
    *,
    data: Any = None,
    shares: Sequence[float | str] = (),
    baselines: bool = True,
    compare: Sequence[Name] = (),
    seeds: int = 1,
    recipe: Name | None = None,
    say: Say = print,
    **settings: Unpack[FinetuneRunSettings],
) -> dict[str, Any]:
    """Say how much pre-training is worth: runs with parts of the labels, from several starts.

    A run is made in ``out/runs`` for each start, share and seed, at equal settings; those that are
    finished are not made again, so that the same call goes on after an interruption.

    Example:
        ``compare_shares("runs/hpm", data="labelled/", shares=[0.01, 0.1, 1], out="runs/verdict")``

    Args:
        start: a run, an export, or a file of weights.
        data: labelled images, as in `finetune`.
        shares: of the labels, as 0.1 or "10%"; those of a smaller share are among those of a larger
            one.
        baselines: also from random weights.
        compare: further starts; the name of a model stands for its random weights.
        seeds: runs of each, with other labels and other random numbers.
        recipe: name or file of settings to start from.
        say: hears what a person should know.
        **settings: those of `patchmine config schema finetune`.

    Returns:
        What ``out/eval/shares.json`` holds: ``entries``, one for each share and start, with mean
        (``top1`` in percent) and ``std`` over seeds; ``write_report`` takes ``out``.

    Raises:
        UserError: settings, labels or folders are wrong, before anything is trained.
    """
    asked = {"shares": list(shares), "baselines": baselines, "seeds": seeds}
    asked["compare"] = [os.fspath(name) for name in compare]
    wanted = validate(ShareSettings, asked, where="the settings of compare_shares")
    given: dict[str, Any] = dict(settings)
    sources = _named(given, data)
    start_from = None if recipe is None else os.fspath(recipe)

    def read(base: dict[str, Any], hears: Say) -> Any:
        return from_settings(start_from, say=hears, also=CLASSIFIER_CHECKS, base=base, **given)

    configs = configs_of_starts(os.fspath(start), wanted, read, say)
    return training.compare_shares(configs, wanted, sources=sources, say=say)


def resume(
    path: Name,
    *,
    data: Any = None,
    val: Any = None,
    test: Any = None,
    say: Say = print,
    **settings: Unpack[RunningSettings],
) -> Run:
    """Go on with an interrupted run, exactly.

    Args:
        path: the run's folder.
        data: of a run on a dataset of Python's, or where the same images have moved.
        val: the same of a fine-tuned run's images to choose by, as ``test`` of those to test on.
        test: see ``val``.
        say: hears what a person should know.
        **settings: those that change no weights, such as ``workers``.

    Returns:
        The finished run.

    Raises:
        UserError: the run cannot go on, or a setting would change its weights.
    """
    parts = {name: part for name, part in (("val", val), ("test", test)) if part is not None}
    given: dict[str, Any] = {**settings, **parts}
    sources = _named(given, data)
    words = [f"{name}={value}" for name, value in given.items() if name not in sources]
    return Run(training.resume(path, words, sources=sources, say=say).path)


def _named(given: dict[str, Any], data: Any) -> dict[str, Any]:
    """What the settings name data, val and test that are objects, which are given by these names.

    Args:
        given: the user's settings, which get ``data``, and names in the place of objects.
        data: a path, several, an object, or None where there is none.
    """
    if data is not None:
        given["data"] = data
    sources = {}
    for name in given.keys() & {"data", "val", "test"}:
        value = given[name]
        parts = value if isinstance(value, list | tuple) else [value]
        if value is not None and not all(isinstance(part, str | PathLike) for part in parts):
            sources[name] = value
            given[name] = f"python:{type(value).__name__}"
    return sources


def import_weights(file: Name, out: Name, *, say: Say = print, **settings: Any) -> Run:
    """Turn a checkpoint of somebody else into a run, which serves wherever a run does.

    Args:
        file: a weights file in any layout that `load_encoder` knows, or a folder of it.
        out: the new folder.
        say: hears what became of every tensor.
        **settings: the others of `patchmine config schema import`.

    Returns:
        The run, with an export of its encoder.

    Raises:
        UserError: a file of another kind, and tensors that are missing, unexpected, of another
            shape or not finite.
    """
    values = {"file": file, "out": out, **settings}
    given = validate(ImportSettings, values, where="the settings of import_weights")
    return Run(import_file(**dict(given), say=say).path)

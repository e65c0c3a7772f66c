"""Whether model, method and files of a run's settings fit together: told before data are read."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from patchmine.backbones.names import reads_clips
from patchmine.config.missing import missing_files
from patchmine.config.resolve import Checks
from patchmine.config.schema import (
    DetectConfig,
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
    SegmentConfig,
)
from patchmine.errors import UserError, foreign_parser, shown_name
from patchmine.runs import lock
from patchmine.runs.fresh import new_folder, refuse_used_folder
from patchmine.runs.known import is_run
from patchmine.strict import SettingError

if TYPE_CHECKING:
    from patchmine.task import Task

_GIB = 2**30

Check = Callable[[Any], list[SettingError]]


class _MisfitError(Exception):
    """What an argument makes timm or torch raise, which is no sentence of ours."""


def misfits(config: PretrainConfig) -> list[SettingError]:
    """A model that cannot be built, a method that it does not suit, what this machine lacks."""
    found = [SettingError("", text) for text in _refusals(config)]
    return found + _lacking(config)


def misfits_of_classifier(config: FinetuneConfig) -> list[SettingError]:
    """A backbone that cannot be built or is not moved as asked, what this machine lacks."""
    from patchmine.runs.folder import build_classifier

    found: list[SettingError] = []
    for name in ("test_segments", "test_crops"):
        if getattr(config, name) > 1 and not reads_clips(config.model):
            text = f"model={shown_name(config.model)} reads images, of which there is one view: 1"
            found.append(SettingError(name, f"given {getattr(config, name)}, but {text}"))
    return found + _misfits_of_network(config, build_classifier) + _lacking(config)


def misfits_of_segmenter(config: SegmentConfig) -> list[SettingError]:
    """A backbone or head that cannot be built or moved as asked, what this machine lacks."""
    from patchmine.runs.folder import build_segmenter

    return _misfits_of_network(config, build_segmenter) + _lacking(config)


def misfits_of_detector(config: DetectConfig) -> list[SettingError]:
    """A backbone or head that cannot be built or moved as asked, what this machine lacks."""
    from patchmine.runs.folder import build_detector

    found = _misfits_of_network(config, build_detector) + _lacking(config)
    needed = ["faster_coco_eval", *(["pycocotools"] if config.masks else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        text = f"detection needs {' and '.join(missing)}, which is not installed"
        found.append(SettingError("", f"{text}; run `pip install patchmine[det]`"))
    return found


def _misfits_of_network(config: Any, build: Callable[[Any], Task]) -> list[SettingError]:
    """What building a network with a head says."""
    import torch

    named = config.model_copy(update={"classes": config.classes or ["one", "other"]})
    try:
        with torch.device("meta"), foreign_parser(_MisfitError):
            build(named).param_groups()
    except UserError as error:
        return [SettingError("", str(error))]
    except _MisfitError as error:
        if "meta" not in str(error):
            model = f"model={shown_name(config.model)} cannot be built"
            return [SettingError("", f"{model} ({error}): check model_args and the sizes")]
    return []


def _lacking(config: RunConfig) -> list[SettingError]:
    """What this machine does not have."""
    import torch

    found = []
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        missing = "but wandb is not installed; run `pip install patchmine[wandb]`"
        found.append(SettingError("wandb", f"given '{shown_name(config.wandb)}', {missing}"))
    if config.device == "cuda" and not torch.cuda.is_available():
        found.append(SettingError("", "device=cuda, but torch sees no GPU: give device=cpu"))
    return found


def misplaced(config: RunConfig, *, extends: bool = False) -> list[SettingError]:
    """Files that are not there, and a place where no new run can be made."""
    found = missing_files(config)
    try:
        folder = new_folder(config)
        goes_on = config.resume == "auto" and is_run(folder)
        # Whoever writes there is told of by the lock.
        if not goes_on and not os.path.lexists(folder / lock.NAME):
            refuse_used_folder(folder, extends=extends)
    except UserError as error:
        found.append(SettingError("", str(error)))
    return found


def _of(kind: type[RunConfig], check: Check) -> Check:
    """The check, which settings of another kind pass: `of_kind` tells what those are for."""
    return lambda config: check(config) if isinstance(config, kind) else []


CHECKS = (misplaced, _of(PretrainConfig, misfits))
"""What is asked of the settings of a new run, in this order; torch is imported for the second."""
PLAN_CHECKS = (missing_files, CHECKS[1])
"""The same of one that is planned, and has no place yet."""
CLASSIFIER_CHECKS = (misplaced, _of(FinetuneConfig, misfits_of_classifier))
"""The same of a run that fine-tunes."""


SEGMENTER_CHECKS = (misplaced, _of(SegmentConfig, misfits_of_segmenter))
"""The same of a run that segments."""


DETECTOR_CHECKS = (misplaced, _of(DetectConfig, misfits_of_detector))
"""The same of a run that detects."""


def checks_of(kind: str, *, extends: bool = False) -> Checks:
    """What is asked of the settings of a new run of this kind, or of one that ``extends`` a run."""
    every: dict[str, Checks] = {
        "classify": CLASSIFIER_CHECKS,
        "segment": SEGMENTER_CHECKS,
        "detect": DETECTOR_CHECKS,
    }
    checks = every.get(kind, CHECKS)
    into = partial(misplaced, extends=extends)
    return tuple(into if check is misplaced else check for check in checks)


def _refusals(config: PretrainConfig) -> list[str]:
    """What building the method says, and what it would say with a usual model."""
    if config.by_size:
        return []  # each row has its own model, which is checked with the row
    told = _refusal(config)
    if told is None or told.startswith("method."):
        return [] if told is None else [told]
    # A model that cannot be built hides what is wrong with the method.
    usual = {"model": PretrainConfig.model_fields["model"].default, "model_args": {}}
    more = _refusal(config.model_copy(update=usual))
    return [told, more] if more is not None and more.startswith("method.") else [told]


def _refusal(config: PretrainConfig) -> str | None:
    """What building the method says, on the meta device: its tensors have shapes and no memory."""
    import torch

    from patchmine.runs.folder import build_method
    from patchmine.runs.preparing import train_view

    method_name = f"method={config.method.name}"
    try:
        with torch.device("meta"), foreign_parser(_MisfitError):
            method = build_method(config)
            train_view(config, method)
    except UserError as error:
        return str(error)
    except _MisfitError as error:
        if "meta" in str(error):  # something that only real tensors allow: the run will tell
            return None
        remedy = "check model_args and the sizes among the method's settings"
        model = f"model={shown_name(config.model)}"
        return f"{model} cannot be built for {method_name} ({error}): {remedy}"
    size = 4 * sum(tensor.numel() for tensor in method.state_dict().values())  # bytes
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None  # a machine that does not tell
    if size <= memory:
        return None
    weights = f"model={config.model} and {method_name} have weights of {size / _GIB:,.0f} GiB"
    machine = f"this machine has {memory / _GIB:,.0f} GiB of memory"
    return f"{weights}, and {machine}: choose a smaller model, or smaller sizes"

"""What the words of a command and the files that they name say of themselves, before torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from patchmine.backbones.description import describe_weights, find_weights
from patchmine.backbones.settings import ModelSettings
from patchmine.config.overrides import exists
from patchmine.config.resolve import changed_results, command_of, parse, results_of
from patchmine.config.schema import KINDS, AnyConfig, PretrainConfig
from patchmine.errors import Say, UserError, shown_name

CONFIG = "config.yaml"
KNOWN_BY_CONTENT = (
    "data",
    "labels",
    "annotations",
    "val",
)  # by fingerprints, so that files may move
_OF_THE_DATA = ("category_ids", "usual_size")  # which a run fills in for other images anew
_PREPARED = (*ModelSettings.model_fields, "interpolation", "crop_pct")
_OF_THE_NETWORK = {*ModelSettings.model_fields} - {"init", "max_pixels"}


def tell_errors(read: Callable[[Say], Any], say: Say) -> None:
    """Read settings for nothing but their errors.

    Args:
        read: reads them, and tells what it decides.
        say: hears that only where there is an error: whoever reads them again will say it.

    Raises:
        UserError: as ``read`` does.
    """
    heard: list[str] = []
    try:
        read(heard.append)
    except UserError:
        for text in heard:
            say(text)
        raise


def is_run(path: str | PathLike[str]) -> bool:
    """Whether a folder holds the settings of a run."""
    return (Path(path) / CONFIG).is_file()


def settings_file(path: str | PathLike[str]) -> Path:
    """The settings of the run in a folder.  Raises UserError where there is no run."""
    folder = Path(path)
    if not folder.is_dir():
        kind = "is a file, not the folder of a run" if folder.is_file() else "does not exist"
        raise UserError(
            f"{folder} {kind}; give the folder that `patchmine pretrain` wrote (its out=)"
        )
    if not is_run(folder):
        raise UserError(
            f"{folder} is no run: it has no config.yaml; give the folder that `patchmine "
            "pretrain` wrote"
        )
    return folder / CONFIG


def settings_of_run(path: str | PathLike[str]) -> AnyConfig:
    """Those in its config.yaml.  Raises UserError where there is no run, or a damaged one."""
    return parse(settings_file(path), [])


def settings_to_resume(path: str | PathLike[str], overrides: Sequence[str], say: Say) -> AnyConfig:
    """The settings that a run goes on with.

    Raises UserError for settings that decide its weights and are not those of the run.
    """
    file = settings_file(path)
    config = parse(file, overrides, say)
    own, now = results_of(parse(file, [])), results_of(config)
    moved = {name: own[name] for name in KNOWN_BY_CONTENT if name in own}
    if changed := changed_results(own, now | moved):
        command = command_of(config)
        longer = " ".join(["patchmine extend", shown_name(path), *overrides, "out=..."])
        raise UserError(
            "a resumed run must keep the settings that decide its weights, but "
            f"{'; '.join(changed)}: leave them out, train longer from its weights with "
            f"`{longer}`, or start a new run with `patchmine {command}` and another out"
        )
    return config


def settings_to_extend(
    config: AnyConfig, path: str | PathLike[str], *, timed: bool = False
) -> dict[str, Any]:
    """The settings of a run that goes on from another: all of its own but folder and length.

    ``timed``: a budget chooses its length, of which the warm-up keeps the share that it has now.

    A pre-training run has another seed, so that order, crops and masks are not those of the first
    epochs once more; that of a fine-tuned run also draws its share of the labels, and stays.
    ``init`` names the run, which stands in ``path``.
    """
    own = {"out", "resume", "by_size", *_OF_THE_DATA}
    settings = config.model_dump(mode="json", exclude=own)
    if isinstance(config, PretrainConfig):
        settings["seed"] = config.seed + 1
        settings["freeze_encoder"] = 0.0  # the decoder has learned by now
    length = {} if timed else {"epochs": None, "steps": None}
    return {**settings, **length, "init": str(Path(path))}


def prepared_as(config: AnyConfig) -> dict[str, Any]:
    """The network of a run and how its images are prepared, for a run that starts from it."""
    return config.model_dump(mode="json", include=set(_PREPARED))


def words_known_to_fit(
    start: str, words: Sequence[str], kind: str = "classify"
) -> tuple[dict[str, Any], list[str]]:
    """What is to learn labels, as far as it is told without torch.

    Args:
        start: a run, an export, a file of weights, or the name of a model.
        words: ``key=value``, for a run that starts from it.
        kind: of that run.

    Returns:
        The settings that ``start`` stands for, as far as they are known, and the words that can be
        judged by these.  Of a file of weights hardly anything is known, and nothing is judged that
        depends on its network.

    Raises:
        UserError: the settings of a run cannot be read.
    """
    base: dict[str, Any] = {"kind": kind}
    if is_run(start):
        own = prepared_as(settings_of_run(start))
        known = {name: own[name] for name in own if name in KINDS[kind].model_fields}
        return {**known, **base, "init": start}, [*words]
    if not exists(start):
        is_name = "/" not in start.removeprefix("timm/")
        return {**base, "model": start if is_name else "unknown"}, [*words]
    base |= {"model": "unknown", "init": start}
    unsure = _OF_THE_NETWORK
    with suppress(UserError):
        told = describe_weights(find_weights(Path(start)))
        if told.model is not None and told.image_size is not None:
            base |= {"model": told.model, "image_size": list(told.image_size)}
            base["channels"] = told.model_args.get("in_chans", 3)
            base["patch_size"] = told.model_args.get("patch_size")
            unsure = {"clip"}
    return base, [word for word in words if word.split("=")[0].split(".")[0] not in unsure]

"""What a run that is to be fine-tuned starts from: its network, and how it takes images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm

from patchmine.backbones.family import family_of
from patchmine.backbones.names import VIDEO_MODELS
from patchmine.config.explain import did_you_mean
from patchmine.config.overrides import exists
from patchmine.config.schema import KINDS
from patchmine.data.items import CLIP
from patchmine.errors import UserError, shown_name
from patchmine.evaluate.evaluated import open_evaluated
from patchmine.runs.folder import RunFolder
from patchmine.runs.known import is_run, prepared_as


def settings_of_start(start: str) -> dict[str, Any]:
    """The settings of a network and its images that the name of a backbone stands for.

    Args:
        start: the folder of a run or export, a file of weights, or the name of an architecture,
            whose weights are then random.

    Returns:
        Settings of a run, ``init`` among them where there are weights; ``kind`` is "classify".

    Raises:
        UserError: there is nothing of that name, or no encoder in it.
    """
    kind = {"kind": "classify"}
    if not exists(start):
        return {**kind, "model": _known_model(start)}
    if is_run(start):
        return {**kind, **prepared_as(RunFolder(start).whole_config), "init": start}
    found = open_evaluated(Path(start))
    built: Any = found.encoder.built_from if found.encoder is not None else None
    own = found.input.model_dump(mode="json", include={"channels", "mean", "std"})
    if family_of(found.encoder or "").item is CLIP:
        own["clip"] = found.input.clip.model_dump(mode="json")
    return {
        **kind,
        **own,
        "model": built.model,
        "model_args": dict(built.model_args),
        "patch_size": built.patch_size,
        "image_size": list(built.image_size),
        "crop_pct": found.crop_pct,
        "init": start,
    }


def _known_model(name: str) -> str:
    architecture = name.removeprefix("timm/").split(".")[0]
    if timm.is_model(architecture) or name in VIDEO_MODELS:
        return name
    near = did_you_mean(architecture, [*timm.list_models(), *VIDEO_MODELS])
    raise UserError(
        f"'{shown_name(name)}' is no run, export or file that exists, and no architecture of "
        f"timm's{near}"
    )


def settings_for(kind: str, start: str) -> dict[str, Any]:
    """Those of `settings_of_start` that a run of this kind has."""
    known = KINDS[kind].model_fields
    own = {name: value for name, value in settings_of_start(start).items() if name in known}
    return own | {"kind": kind}

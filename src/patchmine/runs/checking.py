"""Whether model, method and files of a run's settings fit together: told before data are read, and
without weights.
"""

from __future__ import annotations

import importlib.util
import os

from patchmine.config.resolve import missing_files
from patchmine.config.schema import RunConfig
from patchmine.errors import UserError, foreign_parser, shown_name
from patchmine.strict import SettingError

_GIB = 2**30


class _MisfitError(Exception):
    """What an argument makes timm or torch raise, which is no sentence of ours."""


def misfits(config: RunConfig) -> list[SettingError]:
    """What is wrong with settings that are right one by one: a model that cannot be built, a method
    that it does not suit, a device that this machine lacks.
    """
    found = _misbuilt(config)
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        text = f"given '{shown_name(config.wandb)}', but wandb is not installed; run `pip install patchmine[wandb]`"
        found.append(SettingError("wandb", text))
    import torch  # only now, where all that needs no torch is right

    if config.device == "cuda" and not torch.cuda.is_available():
        found.append(SettingError("", "device=cuda, but torch sees no GPU: give device=cpu"))
    return found


CHECKS = (missing_files, misfits)
"""What is asked of the settings of a new run, in this order; torch is imported for the second."""


def _misbuilt(config: RunConfig) -> list[SettingError]:
    if config.by_size:
        return []  # each row has its own model, which is checked with the row
    told = _refusal(config)
    if told is None:
        return []
    usual = RunConfig.model_fields["model"].default
    more = None
    if not told.startswith(
        "method."
    ):  # a model that cannot be built hides what is wrong with the method
        more = _refusal(config.model_copy(update={"model": usual, "model_args": {}}))
    return [
        SettingError("", told),
        *([SettingError("", more)] if more is not None and more.startswith("method.") else []),
    ]


def _refusal(config: RunConfig) -> str | None:
    """What building the method says; on the meta device, where tensors have shapes and no memory."""
    import torch

    from patchmine.runs.preparing import train_view
    from patchmine.runs.run import build_method

    try:
        with torch.device("meta"), foreign_parser(_MisfitError):
            method = build_method(config)
            train_view(config, method)
    except UserError as error:
        return str(error)
    except _MisfitError as error:
        if "meta" in str(error):  # something that only real tensors allow: the run will tell
            return None
        return (
            f"model={shown_name(config.model)} cannot be built for method={config.method.name} ({error}): check "
            "model_args and the sizes among the method's settings"
        )
    size = 4 * sum(tensor.numel() for tensor in method.state_dict().values())  # bytes
    memory = _memory()
    if memory is not None and size > memory:
        return (
            f"model={config.model} and method={config.method.name} have weights of {size / _GIB:,.0f} GiB, and this "
            f"machine has {memory / _GIB:,.0f} GiB of memory: choose a smaller model, or smaller sizes"
        )
    return None


def _memory() -> int | None:
    """Bytes of memory of this machine, where it tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None

"""The encoders that can be named, and what each of them is, for people."""

from __future__ import annotations

import re
from collections.abc import Sequence

import timm

from patchmine.backbones.family import create_encoder, family_of
from patchmine.backbones.names import VIDEO_MODELS

MOST_COUNTED = 32  # models whose parameters are counted: each is built, without memory for weights

_MODULES = (
    *("vision_transformer", "deit", "eva", "resnet", "convnext"),
    *("swin_transformer", "swin_transformer_v2"),
)
# Two class tokens; rotary positions anew in every block; norms behind attention; a layer before the
# classifier; timm's own tests.
_UNFIT = ("distilled", "rope_mixed", "eva02_enormous", "convnext_large_mlp", "test_convnext")
_COLUMNS = ("model", "family", "parameters", "image", "patch")


def model_names() -> list[str]:
    """Timm's networks of our families, then our own of videos."""
    names = [name for module in _MODULES for name in timm.list_models(module=module)]
    return [name for name in names if not any(part in name for part in _UNFIT)] + [*VIDEO_MODELS]


def model_table(names: Sequence[str]) -> list[str]:
    """A line for each model under a line of titles, in columns.

    Parameters are those of the encoder, in millions; "-" where the list is long or there is
    nothing to tell: only patches of one size count as such.
    """
    counted = len(names) <= MOST_COUNTED
    rows = [_COLUMNS, *(_row(name, counted) for name in names)]
    first, second, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([row[0].ljust(first), row[1].ljust(second), *map(str.rjust, row[2:], others)])
        for row in rows
    ]


def _row(name: str, counted: bool) -> tuple[str, ...]:
    millions = "-"
    if counted:
        encoder = create_encoder(name, {"device": "meta"}, "list models")
        millions = f"{sum(each.numel() for each in encoder.parameters()) / 1e6:.1f}"
    usual = timm.get_pretrained_cfg(name)
    size = 224 if usual is None else usual.input_size[-1]
    patch = re.search(r"patch(\d+)", name)
    return name, family_of(name).name, millions, str(size), patch[1] if patch else "-"

"""What encoders that are a row of stages have in common: each stage halves the map before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from patchmine.backbones.record import Encoder


def note_image_size(encoder: Encoder, size: Any, channels: int) -> Encoder:
    """The encoder, which takes images of any size and has no tensor that tells its own."""
    if size is not None:
        stated = (channels, *((size, size) if isinstance(size, int) else size))
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "input_size": stated}
    return encoder


def renote_image_size(encoder: Encoder, size: tuple[int, int]) -> None:
    """Nothing else changes with the size."""
    note_image_size(encoder, size, encoder.pretrained_cfg["input_size"][0])


def noted_image_size(encoder: Encoder) -> tuple[int, int]:
    """(height, width) in pixels that it was built for."""
    height, width = encoder.pretrained_cfg["input_size"][1:]
    return int(height), int(width)


def stage_channels(encoder: Encoder) -> dict[str, int]:
    """Every stage with the channels of its map."""
    return {info["module"]: int(info["num_chs"]) for info in encoder.feature_info}


def last_step(encoder: Encoder) -> int:
    """Pixels from place to place of the last map."""
    return int(encoder.feature_info[-1]["reduction"])


def count_blocks(tensors: Mapping[str, Tensor], stages: str) -> tuple[int, ...]:
    """Blocks in each stage of a state dict that names them ``STAGES.0.blocks.0.`` and so on."""
    places = {tuple(name.split(".")[1:4:2]) for name in tensors if _is_block(name, stages)}
    counts = [0] * len({stage for stage, _ in places})
    for stage, _ in places:
        if not stage.isdecimal() or int(stage) >= len(counts):
            return ()
        counts[int(stage)] += 1
    return tuple(counts)


def _is_block(name: str, stages: str) -> bool:
    parts = name.split(".")
    return len(parts) > 4 and parts[0] == stages and parts[2] == "blocks"


def no_blocks(encoder: Encoder, *_: Any) -> tuple[Tensor, dict[str, Any]]:
    """For `Family.enter_blocks`."""
    raise TypeError(f"a {type(encoder).__name__} has no blocks that take tokens")

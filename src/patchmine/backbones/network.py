"""A network on its way out, and whether another library gives what it gives."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchmine.backbones.export import Preprocessing
from patchmine.errors import Say, UserError, foreign_parser, shown_name

TOLERANCE = 1e-4
"""How far outputs may differ elsewhere, as a share of the largest one: far beyond rounding."""
_BATCHES = (1, 3)  # a single item, and another number than whatever was traced


@dataclass(frozen=True)
class Network:
    """What is exported, what goes into it and what comes out.

    Args:
        module: on the CPU, in eval mode; from (B, *input_size) to (B, outputs).
        architecture: its name, for people.
        input_size: (channels, height, width), or of clips (channels, frames, height, width).
        preprocessing: how images become its input.
        loss: what outputs were trained by: "ce" makes them logits of classes, "bce" logits of
            labels, "mse" values; None: they are features.
        names: of the outputs that are no features, in their order.
        maps: of a network that gives scores (B, K, H, W) of classes for every pixel: how images of
            other sizes are brought to it; None of one that gives (B, outputs).
    """

    module: nn.Module
    architecture: str
    input_size: Sequence[int]
    preprocessing: Preprocessing
    loss: str | None = None
    names: Sequence[str] = ()
    maps: Mapping[str, Any] | None = None

    @property
    def input_name(self) -> str:
        """``images`` or ``clips``."""
        return "images" if len(self.input_size) == 3 else "clips"

    @property
    def output_name(self) -> str:
        """``scores`` of pixels, or ``features``, ``logits`` or ``values``."""
        if self.maps is not None:
            return "scores"
        return {None: "features", "mse": "values"}.get(self.loss, "logits")

    @property
    def remedy(self) -> str:
        """What is left where the network cannot leave in some other format."""
        return "use to=timm" if self.maps is None else "use the run's own Run.segmenter()"

    def told(self) -> dict[str, Any]:
        """What a person needs to know to use it."""
        prepared = self.preprocessing
        told: dict[str, Any] = {
            "architecture": self.architecture,
            "image_size": list(self.input_size[-2:]),
            "mean": list(prepared.mean),
            "std": list(prepared.std),
            "interpolation": prepared.interpolation,
        }
        if self.maps is None:
            told["crop_pct"] = prepared.crop_pct
        if prepared.stride is not None:
            told |= {"frames": self.input_size[1], "stride": prepared.stride}
        if self.loss is not None:
            told |= {"loss": self.loss, "class_names": list(self.names)}
        return told | dict(self.maps or {})


def check_outputs(network: Network, other: Callable[[Tensor], Tensor], library: str) -> str:
    """A sentence on how far ``other`` is from the network; UserError beyond `TOLERANCE`."""
    difference = largest_difference(network, other)
    measured = (
        f"on 1 and 3 random {network.input_name}, {network.output_name} in {library} differ by at "
        f"most {difference:.1e} of the largest"
    )
    if not difference <= TOLERANCE:  # nor is NaN
        raise UserError(
            f"nothing was written: {measured}, which is more than {TOLERANCE:g}: {network.remedy}, "
            f"and try another version of {library.split()[0]}"
        )
    return f"Checked: {measured}."


@torch.no_grad()
def largest_difference(network: Network, other: Callable[[Tensor], Tensor]) -> float:
    """How far ``other`` is from the network on random input, as a share of the largest output."""
    generator, found = torch.Generator().manual_seed(0), []
    for count in _BATCHES:
        items = torch.randn(count, *network.input_size, generator=generator)
        wanted, given = network.module(items), other(items)
        if given.shape != wanted.shape:
            return math.inf
        scale = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)
        found.append((given - wanted).abs().max() / scale)
    return float(torch.stack(found).max())


def check_transformers(network: Network, say: Say, folder: Path) -> None:
    """Open an exported folder by transformers, and say how far outputs are; UserError if far."""
    if importlib.util.find_spec("transformers") is None:
        say(
            "Not checked in transformers, which is not installed: "
            '`pip install "patchmine[export]"`, and export again.'
        )
        return
    import transformers

    library = f"transformers {transformers.__version__}"
    kind = transformers.AutoModelForImageClassification
    if network.loss is None:
        kind = transformers.AutoModel

    def refuse(reason: str) -> UserError:
        return UserError(
            f"nothing was written: {library} does not open {network.architecture} ({reason}): use "
            "to=timm, or try another version of transformers"
        )

    with _no_progress_bar(), foreign_parser(refuse):
        model = kind.from_pretrained(str(folder), local_files_only=True).eval()

    def outputs(images: Tensor) -> Tensor:
        found = model(images)
        return found.pooler_output if network.loss is None else found.logits

    if network.names and list(model.config.id2label.values()) != list(network.names):
        raise refuse(f"it names the outputs {shown_name(str(model.config.id2label))}")
    say(check_outputs(network, outputs, library))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one for every file that it opens."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

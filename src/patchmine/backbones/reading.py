"""A file of weights read: the network in it that is wanted, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchmine.backbones.architecture import CLIP_EPS, TIMM_EPS
from patchmine.backbones.description import Description, describe_weights, find_weights
from patchmine.backbones.loading import read_checkpoint
from patchmine.backbones.naming import Network, Weights, find_network
from patchmine.errors import shown_name

_TRANSFORMERS_EPS = 1e-12


@dataclass(frozen=True)
class ReadFile:
    """``source`` names the file in messages; ``arguments`` are of the script that wrote it."""

    source: str
    network: Network
    known: Description
    arguments: Any

    @property
    def has_decoder(self) -> bool:
        """Whether there is what an encoder was pre-trained with."""
        return any(name.startswith("decoder_") for name in self.network.tensors)


def read_file(
    path: str | Path,
    *,
    weights: Weights = "auto",
    prefix: str | None = None,
    setting: str | None = None,
) -> ReadFile:
    """Read a file or a folder with a config.json; arguments and errors are `open_weights`'s."""
    file = find_weights(Path(path), setting or "file")
    source = shown_name(path) if setting is None else f"{setting}={shown_name(path)}"
    content = read_checkpoint(file, setting or "file")
    network = find_network(content, source, weights, prefix)
    known = _with_usual(describe_weights(file, content), network)
    if "partner" in network.place.prefix:
        # config.yaml names the first network of a pair
        known = replace(known, model=None, model_args={})
    return ReadFile(source, network, known, content.get("args"))


def _with_usual(known: Description, network: Network) -> Description:
    """What is known, with what transformers' networks usually have and only a config.json tells."""
    naming, tensors = network.place.naming, network.tensors
    eps, activation = known.norm_eps, known.act_layer
    if naming == "transformers" and "blocks.0.ls1.gamma" not in tensors:
        eps = eps or _TRANSFORMERS_EPS
    if naming == "transformers' CLIP":
        is_clip = "norm_pre.weight" in tensors  # else SigLIP
        eps = eps or (CLIP_EPS if is_clip else TIMM_EPS)
        activation = activation or ("quick_gelu" if is_clip else "gelu_tanh")
    return replace(known, norm_eps=eps, act_layer=activation)

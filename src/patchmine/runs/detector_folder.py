"""A run that detects as a folder that torch and torchvision open, with the text that does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from patchmine.backbones.loading import refuse_non_finite
from patchmine.backbones.network import Network
from patchmine.backbones.torch_file import check_graph, save_graph, traced
from patchmine.config.schema import DetectConfig
from patchmine.errors import Say, shown_name
from patchmine.models.detection import Backbone
from patchmine.runs import detector_loader
from patchmine.runs.folder import RunFolder, preprocessing_of
from patchmine.system.disk import exchanging, refuse_other_content, settle, system_errors
from patchmine.tasks.detect import Detect

WEIGHTS, GRAPH, CONFIG, LOADER = "model.safetensors", "maps.pt2", "config.json", "load.py"
FILES = {WEIGHTS, GRAPH, CONFIG, LOADER}
_TORCHVISION = {"proposals.": "rpn.", "objects.": "roi_heads."}
"""Parts of `DetectHead`, and what torchvision's whole models call them."""


def write_detector(run: RunFolder, config: DetectConfig, folder: Path, say: Say) -> Path:
    """Write what a run that detects learned, as a folder that needs no patchmine.

    Args:
        run: that detects.
        config: its settings.
        folder: a new or empty one, or one that this wrote; it appears whole and checked, or not at
            all.
        say: hears how far the folder's maps are from the network's.

    Returns:
        The folder.

    Raises:
        UserError: ``folder`` holds anything else, torch cannot write the graph or gives other maps
            by it, or a weight is not finite.
    """
    refuse_other_content(folder, FILES)
    task = run.detector()
    backbone = task.backbone().eval()
    own, heads = dict(sorted(backbone.state_dict().items())), _heads(task)
    refuse_non_finite(own | heads, f"out={shown_name(folder)}")
    told = _told(config, task, backbone)
    network = Network(
        _Joined(backbone),
        task.encoder.built_from.architecture,
        (config.channels, *config.image_size),
        preprocessing_of(config, task.encoder),
    )
    with exchanging(folder) as new:
        with system_errors(new / WEIGHTS):
            save_file({**own, **heads}, new / WEIGHTS, metadata={"format": "pt"})
        save_graph(traced(_Graph(backbone), network, own), new / GRAPH)
        (new / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        text = Path(detector_loader.__file__).read_text(encoding="utf-8")
        (new / LOADER).write_text(text, encoding="utf-8")
        for name in FILES:
            settle(new / name)
        loaded = detector_loader.Detector(new)
        checked = check_graph(network, _Joined(loaded.network.backbone))
    say(checked)
    return folder


class _Graph(nn.Module):
    """A backbone's maps in float32, of weights that are given, too."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = (backbone,)  # no part, so that its weights are no constants of the graph

    def forward(self, weights: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        maps = functional_call(self.backbone[0], weights, (images,))
        return {name: one.float() for name, one in maps.items()}


class _Joined(nn.Module):
    """All maps in a row, to be compared."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([one.flatten(1) for one in self.backbone(images).values()], dim=1)


def _heads(task: Detect) -> dict[str, Tensor]:
    """What stands behind the maps, under torchvision's names."""
    found: dict[str, Tensor] = {}
    for name, tensor in task.head.state_dict().items():
        for ours, theirs in _TORCHVISION.items():
            if name.startswith(ours):
                found[theirs + name.removeprefix(ours)] = tensor
    return found


def _told(config: DetectConfig, task: Detect, backbone: Backbone) -> dict[str, Any]:
    """What the loader and a person need to know."""
    return {
        "architecture": task.encoder.built_from.architecture,
        "class_names": task.names,
        "image_size": list(config.image_size),
        "mean": config.mean,
        "std": config.std,
        "interpolation": config.interpolation,
        "head": config.head,
        "masks": config.masks,
        "width": backbone.out_channels,
        "strides": backbone.strides,
        "anchor_scale": config.anchor_scale,
        "proposals": config.proposals,
        "score_threshold": config.score_threshold,
        "nms": config.nms,
    }

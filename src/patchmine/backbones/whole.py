"""Classifiers that timm saved (`timm.models.save_for_hf`): whole networks, in timm's own words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from patchmine.backbones.description import CONFIG, describe_weights, find_weights, read_json
from patchmine.backbones.family import family_of
from patchmine.backbones.loading import (
    COUNTER,
    LoadReport,
    check_fit,
    load_tensors,
    read_checkpoint,
    tensors_only,
)
from patchmine.backbones.names import reads_clips
from patchmine.backbones.weights import refuse_giants
from patchmine.errors import UserError, foreign_parser, shown_name


class WholeClassifier(NamedTuple):
    """``network``: images (B, C, H, W) to scores (B, K) of ``names``; ``prepared`` tells how."""

    network: nn.Module
    names: list[str]
    prepared: Mapping[str, Any]


def is_whole_classifier(folder: Path) -> bool:
    """Whether a folder with a config.json holds a network of timm's with its classifier.

    timm does not write ``problem_type``, which our exports tell; older ones of ours did not either.
    """
    config = read_json(folder / CONFIG)
    model = config.get("architecture")
    if not isinstance(model, str) or reads_clips(model) or not timm.is_model(model):
        return False
    return config.get("problem_type") is None and _outputs(config) > 0


def open_whole_classifier(folder: Path) -> WholeClassifier:
    """The network that timm saved in ``folder``, on the CPU, in eval mode; nothing is downloaded.

    Raises UserError where its configuration and its tensors do not fit together, and where nothing
    names its classes.
    """
    source, config = shown_name(folder), read_json(folder / CONFIG)
    names = _class_names(config, source)
    file = find_weights(folder)
    known, content = describe_weights(file), read_checkpoint(file)
    arguments: dict[str, Any] = {**known.model_args, "num_classes": len(names)}
    if known.norm_eps is not None:
        arguments["norm_eps"] = known.norm_eps
    tensors = tensors_only(content)
    model, allow = str(known.model), [f"*.{COUNTER}"]

    def refuse(reason: str) -> UserError:
        return UserError(f"{source}: timm cannot build {model} as {CONFIG} says ({reason})")

    create = family_of(model).create
    with foreign_parser(refuse):
        refuse_giants({"img_size": known.image_size or 0, **arguments}, tensors, source)
        with torch.device("meta"):  # compared before there is memory for what a file claims
            check_fit(create(model, arguments), tensors, LoadReport(source), allow=allow)
        network = create(model, arguments)
    load_tensors(network, tensors, LoadReport(source), allow=allow)
    return WholeClassifier(network.eval(), names, config.get("pretrained_cfg") or {})


def _outputs(config: Mapping[str, Any]) -> int:
    """Scores that a network of this configuration gives; 0 without a classifier."""
    arguments = config.get("model_args")
    inner = arguments.get("num_classes") if isinstance(arguments, dict) else None
    stated = config.get("num_classes", inner)
    return stated if type(stated) is int else 0


def _class_names(config: Mapping[str, Any], source: str) -> list[str]:
    """One for each score: ``label_names``, a list or timm's table of numbers and names."""
    prepared, count = config.get("pretrained_cfg"), _outputs(config)
    inner = prepared.get("label_names") if isinstance(prepared, dict) else None
    described = config.get("label_descriptions")
    told = (
        config.get("label_names") or inner or list(described if isinstance(described, dict) else ())
    )
    if not told:
        raise UserError(
            f"{source} has a classifier of {count} scores, but nothing names them: write the list "
            f"of its classes into {CONFIG}, as label_names"
        )
    if isinstance(told, dict):
        told = [told.get(str(number), f"class {number}") for number in range(count)]
    if not isinstance(told, list):
        told = []
    if len(told) != count:
        raise UserError(
            f"{source}: {CONFIG} has num_classes={count} and {len(told)} names of classes: correct "
            "the one that is wrong"
        )
    if not all(isinstance(name, str) for name in told):
        raise UserError(f"{source}: label_names in {CONFIG} is no list of texts: write one")
    return told

"""What can be measured: a run, an export, an architecture of timm's, their random twins, bare
pixels.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import timm
import torch
from timm.data.config import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from patchmine.backbones.description import CONFIG, read_json, weights_in
from patchmine.backbones.family import build_encoder, family_of, initialise_encoder, is_encoder
from patchmine.backbones.loading import LoadReport, load_tensors, read_checkpoint, tensors_only
from patchmine.backbones.names import reads_clips
from patchmine.backbones.naming import Weights
from patchmine.backbones.settings import ModelSettings
from patchmine.backbones.weights import load_encoder, open_weights, resize_encoder
from patchmine.config.overrides import exists
from patchmine.data.settings import MAX_PIXELS, Clip, InputSettings
from patchmine.errors import UserError, foreign_parser, shown_name
from patchmine.runs.run import Run, is_run

RAW_PIXELS = "raw-pixels"
RANDOM_INIT = "random-init"
CROP_PCT = 0.875  # 224 / 256, the resize and centre crop of DINO, MAE and HPM
# Classifiers and decoders in a file of weights are not what is measured; int buffers are not
# weights.
_NOT_WANTED = (
    "head.*",
    "head_dist.*",
    "fc.*",
    "classifier.*",
    "decoder*",
    "mask_token",
    "*num_batches_tracked",
)


@dataclass(frozen=True)
class Target:
    """A frozen encoder and how its images are prepared.  ``encoder`` None: the pixels themselves.

    ``mean`` and ``std`` in [0, 1] units, one per channel.  ``clip``: how clips are taken, of an
    encoder of videos;
    None: it takes images.  ``max_pixels``: images of more count as broken.  ``folder``: the run
    that results are filed in.  ``note``: what a reader of the numbers must know.
    """

    name: str
    encoder: nn.Module | None
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float | None = CROP_PCT
    clip: Clip | None = None
    max_pixels: int = MAX_PIXELS
    folder: Path | None = None
    note: str = ""

    @property
    def kind(self) -> Literal["image", "video"]:
        """What an item of its data is."""
        return "image" if self.clip is None else "video"

    @property
    def input(self) -> InputSettings:
        """What its data are read as."""
        return InputSettings(
            image_size=self.image_size,
            channels=self.channels,
            mean=list(self.mean),
            std=list(self.std),
            max_pixels=self.max_pixels,
            clip=self.clip or Clip(),
        )


def open_target(
    spec: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    weights: str = "student",
    seed: int = 0,
) -> Target:
    """The target that ``spec`` names, with weights that are finite; nothing is ever downloaded.

    A run folder (``weights`` a name that its method gives an encoder) | an export folder | a file with the weights of a
    plain ViT or ResNet | the name of a timm architecture (``weights`` a local file, else random
    ones, which ``note`` says), or of a video model (random weights only) | ``random-init:SPEC``,
    the same architecture with random weights from ``seed`` | ``raw-pixels`` or ``raw-pixels:SPEC``,
    the images as SPEC would see them.  ``image_size`` and ``channels`` overrule the target's own.
    Raises UserError for anything else, and for weights that hold NaN or infinity.
    """
    target = _open(spec, image_size, channels, weights, seed)
    if channels is not None and channels != target.channels:
        raise UserError(
            f"channels={channels}, but {target.name} was made for {target.channels}: leave the setting out"
        )
    if target.encoder is not None:
        _refuse_infinite(target.name, target.encoder)
        if image_size is not None:
            _refuse_size(target)
    return target


def _refuse_size(target: Target) -> None:
    """UserError for images of a size that the encoder cannot take: it is shown a grey one."""
    height, width = target.image_size
    frames = () if target.clip is None else (target.clip.frames,)

    def refuse(reason: str) -> UserError:
        return UserError(
            f"image_size={height}x{width} is nothing that {target.name} can take ({reason})"
        )

    encoder: Any = target.encoder
    with at_rest(encoder), torch.inference_mode(), foreign_parser(refuse):
        encoder.forward_features(torch.zeros(1, target.channels, *frames, height, width))


def _refuse_infinite(name: str, encoder: nn.Module) -> None:
    for tensor_name, tensor in encoder.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{name}: its tensor {tensor_name} holds values that are not finite (NaN or infinity), so that no "
                "feature would mean anything: take an earlier checkpoint, or train again with a lower blr"
            )


def _open(
    spec: str | Path,
    image_size: tuple[int, int] | None,
    channels: int | None,
    weights: str,
    seed: int,
) -> Target:
    text = str(spec)
    kind, _, inner = text.partition(":")
    if kind in (RAW_PIXELS, RANDOM_INIT) and inner:
        if inner.partition(":")[0] in (RAW_PIXELS, RANDOM_INIT) and ":" in inner:
            raise UserError(
                f"'{shown_name(text)}': behind {kind}: stands a run, an export, a file or an architecture"
            )
        base = _open(inner, image_size, channels, weights, seed)
        return replace(
            raw_pixels(base) if kind == RAW_PIXELS else random_twin(base, seed), name=text
        )
    if kind == RAW_PIXELS:
        return _raw(image_size or (32, 32), channels or 3)
    if kind == RANDOM_INIT:
        raise UserError(
            f"{RANDOM_INIT} needs the run or architecture to copy: write {RANDOM_INIT}:RUN"
        )
    if exists(text):
        return _of_path(Path(text), image_size, weights)
    return _of_timm(text, image_size, channels, weights, seed)


def _of_path(path: Path, image_size: tuple[int, int] | None, weights: str) -> Target:
    name = shown_name(path)
    if is_run(path):
        return _resized(_of_run(path, weights), image_size)
    if weights_in(path) is not None:
        if weights != "student":  # which would be measured in silence
            raise UserError(
                f"weights={shown_name(weights)}: {name} is an export, which holds one encoder; leave the setting out, "
                "or name the run that it is from"
            )
        return _resized(_of_export(path), image_size)
    if path.is_dir():
        raise UserError(
            f"{name} is neither a run (a folder with config.yaml) nor an export (config.json and model.safetensors): "
            "give one of these, a file of weights, or the name of a timm architecture"
        )
    if not path.is_file():
        raise UserError(
            f"{name} is a pipe, a socket or a device: give a run, an export or a file of weights"
        )
    if weights not in get_args(Weights):
        raise UserError(
            f"weights={shown_name(weights)}: of the file {name} {' or '.join(get_args(Weights))} can be taken"
        )
    # What is measured must be what was asked for: "student" is the default, of files with one
    # network too.
    wanted = cast(Weights, "auto" if weights == "student" else weights)
    encoder, report = open_weights(path, image_size=image_size, weights=wanted)
    target = _of_timm_model(name, encoder)
    return replace(_sized(target, image_size), note="; ".join(report.assumed))


@contextmanager
def at_rest(encoder: nn.Module | None) -> Iterator[None]:
    """The encoder in eval mode; afterwards every one of its parts is in the mode it was in."""
    modes = (
        [(module, module.training) for module in encoder.modules()] if encoder is not None else []
    )
    if encoder is not None:
        encoder.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def random_twin(target: Target, seed: int = 0) -> Target:
    """The same architecture, every weight drawn anew from ``seed``: the floor that training has to
    rise above.
    """
    if target.encoder is None:
        raise UserError(f"{target.name} has no weights that could be drawn at random")
    encoder = copy.deepcopy(target.encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in encoder.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        if is_encoder(encoder):
            initialise_encoder(encoder)
    return replace(
        target, name=f"{RANDOM_INIT}:{target.name}", encoder=encoder, folder=None, note=""
    )


def raw_pixels(target: Target) -> Target:
    """The images that ``target`` would see, without its encoder."""
    return replace(target, name=f"{RAW_PIXELS}:{target.name}", encoder=None, folder=None, note="")


def _raw(image_size: tuple[int, int], channels: int) -> Target:
    mean, std = _imagenet(channels)
    return Target(RAW_PIXELS, None, image_size, channels, mean, std)


def _imagenet(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's statistics for colour images; for other channels [-1, 1], which serves any data."""
    if channels == 3:
        return tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
    return (0.5,) * channels, (0.5,) * channels


def _of_run(path: Path, weights: str) -> Target:
    run = Run(path)
    config = run.config
    if config.mean is None or config.std is None:
        raise UserError(
            f"{run.config_file} has no mean and std: it is no finished set of settings; start the run again"
        )
    encoder = run.encoder(weights)
    note = "" if weights == "student" else f"weights: {weights}"
    return replace(
        target_of(config, config.crop_pct, encoder, shown_name(path)), folder=path, note=note
    )


def target_of(config: ModelSettings, crop_pct: float, encoder: nn.Module, name: str) -> Target:
    """The encoder of a run with these settings, which are complete."""
    assert config.mean is not None
    assert config.std is not None
    return Target(
        name,
        encoder,
        config.image_size,
        config.channels,
        tuple(config.mean),
        tuple(config.std),
        crop_pct,
        config.clip if reads_clips(config.model) else None,
        max_pixels=config.max_pixels,
    )


def _of_export(path: Path) -> Target:
    cfg = read_json(path / CONFIG).get("pretrained_cfg") or _of_transformers(path)
    return _of_timm_model(shown_name(path), load_encoder(path), cfg)


def _of_transformers(path: Path) -> dict[str, Any]:
    """How transformers prepares images for the network in a folder, in the words of timm."""
    file = path / "preprocessor_config.json"
    prepared = read_json(file) if file.is_file() else {}
    names = {"mean": "image_mean", "std": "image_std"}
    found = {ours: prepared.get(theirs) for ours, theirs in names.items()}
    return {
        name: value for name, value in found.items() if isinstance(value, list) and len(value) == 3
    }


def _of_timm_model(name: str, encoder: nn.Module, cfg: Mapping[str, Any] | None = None) -> Target:
    """A target whose images are prepared as timm's description of the model says."""
    if cfg is None:
        cfg = getattr(encoder, "pretrained_cfg", {})
    channels = next(p for p in encoder.parameters() if p.ndim >= 4).shape[1]
    with foreign_parser(
        lambda reason: UserError(f"{name}: how it takes images cannot be read ({reason})")
    ):
        prepared = resolve_data_config(pretrained_cfg={"crop_pct": CROP_PCT, **cfg})
        size = (
            getattr(getattr(encoder, "patch_embed", None), "img_size", None)
            or prepared["input_size"][1:]
        )
        mean, std = (tuple(map(float, prepared[key])) for key in ("mean", "std"))
        crop_pct, clip = float(prepared["crop_pct"]), None
        size_of_clip = family_of(encoder).clip(encoder) if is_encoder(encoder) else None
        if size_of_clip is not None:
            frames, tubelet = size_of_clip
            clip = Clip(frames=frames, tubelet=tubelet, stride=cfg.get("stride", Clip().stride))
    if len(mean) != channels:
        mean, std = _imagenet(channels)
    if (
        not all(map(math.isfinite, (*mean, *std)))
        or not all(value > 0 for value in std)
        or not 0 < crop_pct <= 1
    ):
        raise UserError(
            f"{name}: no images can be prepared with mean {mean}, std {std} and crop_pct {crop_pct}"
        )
    return Target(name, encoder, tuple(size), channels, mean, std, crop_pct, clip)


def _of_timm(
    name: str, size: tuple[int, int] | None, channels: int | None, weights: str, seed: int
) -> Target:
    bare = name.removeprefix("timm/")
    if reads_clips(bare) and weights == "student":
        return _of_video(name, size or (224, 224), channels or 3, seed)
    if not timm.is_model(bare.split(".")[0]):
        near = difflib.get_close_matches(bare.split(".")[0], timm.list_models(), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UserError(
            f"'{shown_name(name)}' is no run, export or file that exists, and no architecture of timm's{hint}"
        )
    settings: dict[str, Any] = dict(pretrained=False, num_classes=0, in_chans=channels or 3)
    if weights == "student":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = _create(bare, settings, size)
        note = f"no weights were loaded: {shown_name(name)} is measured with random ones (give weights=FILE for others)"
        return replace(_sized(_of_timm_model(name, encoder), size), note=note)
    encoder = _create(bare, settings, size)
    if is_encoder(encoder) and not family_of(encoder).convolutional:
        encoder = load_encoder(weights, model=bare, image_size=size)
    else:
        content = read_checkpoint(weights, "weights")
        tensors = tensors_only(content.get("state_dict", content.get("model", content)))
        load_tensors(encoder, tensors, LoadReport(str(weights)), allow=_NOT_WANTED)
    return replace(
        _sized(_of_timm_model(name, encoder), size), name=shown_name(f"{name} ({weights})")
    )


def _of_video(name: str, size: tuple[int, int], channels: int, seed: int) -> Target:
    clip = Clip()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(
            name, image_size=size, channels=channels, clip=(clip.frames, clip.tubelet)
        )
    note = f"no weights were loaded: {name} is measured with random ones (give a file of weights itself for others)"
    return replace(_of_timm_model(name, encoder), note=note)


def _create(name: str, settings: dict[str, Any], size: tuple[int, int] | None) -> nn.Module:
    """timm's model; convolutional networks take any size and know no ``img_size``."""

    def refuse(reason: str) -> UserError:
        given = f"image_size={'x'.join(map(str, size))}, " if size is not None else ""
        return UserError(
            f"timm cannot build {name} with {given}channels={settings['in_chans']} ({reason})"
        )

    with foreign_parser(refuse):
        if size is not None:
            with suppress(TypeError):
                return timm.create_model(name, img_size=size, **settings)
        return timm.create_model(name, **settings)


def _sized(target: Target, size: tuple[int, int] | None) -> Target:
    return target if size is None else replace(target, image_size=size)


def _resized(target: Target, size: tuple[int, int] | None) -> Target:
    """The target for images of another size: a plain ViT's positions are resampled."""
    if size is None or size == target.image_size:
        return target
    if target.encoder is not None and is_encoder(target.encoder):
        resize_encoder(target.encoder, size)
    return _sized(target, size)

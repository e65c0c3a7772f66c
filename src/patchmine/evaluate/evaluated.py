"""The model under evaluation: of a run, an export, a file, timm; or random weights, bare pixels."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from timm.data.config import resolve_data_config
from torch import nn

from patchmine.backbones import weights as files
from patchmine.backbones.description import CONFIG, read_json, weights_in
from patchmine.backbones.family import Encoder, build_encoder, family_of, initialise_encoder
from patchmine.backbones.family import is_encoder as has_family
from patchmine.backbones.filling import resize_encoder
from patchmine.backbones.loading import LoadReport, load_tensors, read_checkpoint, tensors_only
from patchmine.backbones.naming import Weights
from patchmine.config.overrides import exists
from patchmine.config.schema import PretrainConfig
from patchmine.data.items import CLIP, IMAGE, Item
from patchmine.data.settings import Clip, InputSettings
from patchmine.errors import UserError, foreign_parser, shown_name
from patchmine.runs.folder import RunFolder, build_method
from patchmine.runs.known import is_run

RAW_PIXELS, RANDOM_INIT = "raw-pixels", "random-init"
START = "start"  # the encoder before a run trained it, in results
CROP_PCT = 0.875  # 224 / 256, the resize and centre crop of DINO, MAE and HPM
# Of a file of weights: classifiers, decoders and counters are not what is evaluated.
_NOT_WANTED = (
    *("head.*", "head_dist.*", "fc.*", "classifier.*"),
    *("decoder*", "mask_token", "*num_batches_tracked"),
)


@dataclass(frozen=True)
class Evaluated:
    """A frozen encoder and how its items are prepared."""

    name: str
    encoder: Encoder | None  # of images (B, C, H, W), or clips (B, C, T, H, W); None: the pixels
    input: InputSettings
    item: Item = IMAGE
    crop_pct: float = CROP_PCT  # centre crop, share of the shorter side
    folder: Path | None = None  # the run that results are filed in
    note: str = ""  # what a reader of the numbers must know
    table: str = ""  # what became of every tensor of the file that it is from, the note among it

    @property
    def told(self) -> str:
        """What is said about it before it is measured."""
        return self.table or self.note

    def resized(self, size: tuple[int, int] | None) -> Evaluated:
        """The same for images of another size (height, width); positions are moved there."""
        if size is None or size == self.input.image_size:
            return self
        if self.encoder is not None and has_family(self.encoder):
            resize_encoder(self.encoder, size)
        return replace(self, input=self.input.model_copy(update={"image_size": size}))

    def random_init(self, seed: int = 0) -> Evaluated:
        """The same architecture, every weight drawn anew: what training has to rise above."""
        if self.encoder is None:
            raise UserError(f"{self.name} has no weights that could be drawn at random")
        encoder = copy.deepcopy(self.encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in encoder.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
            if has_family(encoder):
                initialise_encoder(encoder)
        name = f"{RANDOM_INIT}:{self.name}"
        return replace(self, name=name, encoder=encoder, folder=None, note="", table="")

    def start(self) -> Evaluated | None:
        """The encoder as it was before the run trained it, for the same images; None where it was
        random, or is of no pre-training run.

        Raises UserError where what ``init`` names is gone, or is another network by now.
        """
        config = None if self.folder is None else RunFolder(self.folder).whole_config
        if not isinstance(config, PretrainConfig) or config.init is None:
            return None
        if not exists(config.init):
            begun = f"init={shown_name(config.init)}, which {self.name} began from"
            raise UserError(f"{begun}, is no longer there (or not from this folder)")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # as training did: what init lacks is random
            encoder = build_method(config, start_from=config.init).encoder.eval()
        name = f"{START}:{self.name}"
        found = of_run(config, self.crop_pct, encoder, name).resized(self.input.image_size)
        return replace(self, name=name, encoder=found.encoder, folder=None, note="", table="")

    def raw_pixels(self) -> Evaluated:
        """The images that the encoder would see, without it."""
        name = f"{RAW_PIXELS}:{self.name}"
        return replace(self, name=name, encoder=None, folder=None, note="", table="")


def open_evaluated(
    spec: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    weights: str = "student",
    seed: int = 0,
    crop_pct: float | None = None,
    stride: int | None = None,
) -> Evaluated:
    """The model that ``spec`` names, with weights that are finite; nothing is ever downloaded.

    Args:
        spec: the folder of a run or of an export; a file of weights; the name of a timm
            architecture or a video model; ``random-init:SPEC``, the same with random weights;
            ``raw-pixels`` or ``raw-pixels:SPEC``, the images as SPEC would see them.
        image_size: (height, width) in pixels that overrules the model's own.
        channels: of images, where the spec does not say it.
        weights: a name that the run's method gives an encoder; of a file the trained network or
            its average; for a timm architecture a local file, without which weights are random.
        seed: decides random weights.
        crop_pct: overrules the model's own, as ``stride`` does for clips.

    Raises:
        UserError: there is no such model, its weights are NaN or infinite, or a setting does not
            fit it.
    """
    found = _open(str(spec), image_size, channels, weights, seed)
    if channels is not None and channels != found.input.channels:
        made_for = f"{found.name} was made for {found.input.channels}"
        raise UserError(f"channels={channels}, but {made_for}: leave the setting out")
    if found.encoder is not None:
        _refuse_unusable(found, image_size)
    if crop_pct is not None:
        found = replace(found, crop_pct=crop_pct)
    if stride is None:
        return found
    if found.item is not CLIP:
        wrong = f"stride={stride} is for clips, but {found.name} takes images"
        raise UserError(f"{wrong}: leave it out")
    clip = found.input.clip.model_copy(update={"stride": stride})
    return replace(found, input=found.input.model_copy(update={"clip": clip}))


def of_run(settings: InputSettings, crop_pct: float, encoder: Encoder, name: str) -> Evaluated:
    """An encoder of a run with these settings, in which mean and std are set."""
    return Evaluated(name, encoder, settings, family_of(encoder).item, crop_pct)


@contextmanager
def in_eval_mode(encoder: nn.Module | None) -> Iterator[None]:
    """The encoder in eval mode; afterwards every one of its parts is in the mode it was in."""
    modes = [] if encoder is None else [(part, part.training) for part in encoder.modules()]
    if encoder is not None:
        encoder.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _refuse_unusable(evaluated: Evaluated, size: tuple[int, int] | None) -> None:
    """UserError for infinite weights, and for a size that fails when a grey image is encoded."""
    encoder: Any = evaluated.encoder
    for name, tensor in encoder.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = f"{evaluated.name}: its tensor {name} holds NaN or infinity"
            raise UserError(f"{bad}: take an earlier checkpoint, or train again with a lower blr")
    if size is None:
        return
    height, width = size
    frames = (evaluated.input.clip.frames,) if evaluated.item is CLIP else ()

    def refuse(reason: str) -> UserError:
        given = f"image_size={height}x{width}"
        return UserError(f"{given} is nothing that {evaluated.name} can take ({reason})")

    with in_eval_mode(encoder), torch.inference_mode(), foreign_parser(refuse):
        encoder.forward_features(torch.zeros(1, evaluated.input.channels, *frames, height, width))


def _open(
    text: str, size: tuple[int, int] | None, channels: int | None, weights: str, seed: int
) -> Evaluated:
    kind, _, inner = text.partition(":")
    if kind not in (RAW_PIXELS, RANDOM_INIT):
        if exists(text):
            return _of_path(Path(text), size, weights)
        return _of_name(text, size, channels, weights, seed)
    if inner.startswith((f"{RAW_PIXELS}:", f"{RANDOM_INIT}:")):
        what = "a run, an export, a file or an architecture"
        raise UserError(f"'{shown_name(text)}': behind {kind}: stands {what}")
    if inner:
        base = _open(inner, size, channels, weights, seed)
        bare = base.raw_pixels() if kind == RAW_PIXELS else base.random_init(seed)
        return replace(bare, name=text)
    if kind == RANDOM_INIT:
        raise UserError(f"{RANDOM_INIT} needs a run or architecture: write {RANDOM_INIT}:RUN")
    return Evaluated(RAW_PIXELS, None, _input(size or (32, 32), channels or 3))


def _of_path(path: Path, size: tuple[int, int] | None, weights: str) -> Evaluated:
    name = shown_name(path)
    if is_run(path):
        run = RunFolder(path)
        config = run.whole_config
        found = of_run(config, config.crop_pct, run.encoder(weights), name)
        note = "" if weights == "student" else f"weights: {weights}"
        return replace(found, folder=path, note=note).resized(size)
    if weights_in(path) is not None:
        if weights != "student":  # which would be evaluated in silence
            one = f"weights={shown_name(weights)}: {name} is an export, which holds one encoder"
            raise UserError(f"{one}: leave the setting out, or name the run that it is from")
        cfg = read_json(path / CONFIG).get("pretrained_cfg") or _of_transformers(path)
        encoder, report = files.open_weights(path)
        return _with_report(of_encoder(name, encoder, cfg).resized(size), report)
    if path.is_dir():
        neither = "neither a run (config.yaml) nor an export (config.json, model.safetensors)"
        raise UserError(f"{name} is {neither}: give one, a file of weights or a timm architecture")
    if not path.is_file():
        raise UserError(f"{name} is no regular file: give a run, an export or a file of weights")
    if weights not in get_args(Weights):
        known = " or ".join(get_args(Weights))
        raise UserError(f"weights={shown_name(weights)}: of the file {name} {known} can be taken")
    # "student" is the default, of files with one network too.
    wanted: Any = "auto" if weights == "student" else weights
    encoder, report = files.open_weights(path, image_size=size, weights=wanted)
    return _with_report(of_encoder(name, encoder, size=size), report)


def _with_report(found: Evaluated, report: LoadReport) -> Evaluated:
    return replace(found, note="; ".join(report.assumed), table=report.render())


def _of_transformers(path: Path) -> dict[str, Any]:
    """How transformers prepares images for the network in a folder, in the words of timm."""
    file = path / "preprocessor_config.json"
    prepared = read_json(file) if file.is_file() else {}
    found = {ours: prepared.get(f"image_{ours}") for ours in ("mean", "std")}
    return {key: each for key, each in found.items() if isinstance(each, list) and len(each) == 3}


def _of_name(
    name: str, size: tuple[int, int] | None, channels: int | None, weights: str, seed: int
) -> Evaluated:
    """A video model or an architecture of timm's, its weights random or from a local file."""
    bare, shown = name.removeprefix("timm/"), shown_name(name)
    is_random, is_video = weights == "student", family_of(bare).item is CLIP
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_video and is_random:
            clip = (Clip().frames, Clip().tubelet)
            image_size = size or (224, 224)
            encoder = build_encoder(bare, image_size=image_size, channels=channels or 3, clip=clip)
        else:
            encoder = _create(bare, shown, size, channels or 3)
    if is_random:
        other = "a file of weights itself" if is_video else "weights=FILE"
        told = f"no weights were loaded: {shown} is measured with random ones"
        return replace(of_encoder(name, encoder, size=size), note=f"{told} (give {other})")
    if has_family(encoder) and not family_of(encoder).batch_normed:
        encoder, report = files.open_weights(weights, model=bare, image_size=size)
    else:
        content = read_checkpoint(weights, "weights")
        tensors = tensors_only(content.get("state_dict", content.get("model", content)))
        report = LoadReport(str(weights))
        load_tensors(encoder, tensors, report, allow=_NOT_WANTED)
    found = of_encoder(name, encoder, size=size)
    return replace(found, name=shown_name(f"{name} ({weights})"), table=report.render())


def _create(name: str, shown: str, size: tuple[int, int] | None, channels: int) -> nn.Module:
    """timm's model with random weights."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        near = ", ".join(difflib.get_close_matches(architecture, timm.list_models(), n=3))
        missing = "is no run, export or file that exists, and no architecture of timm's"
        raise UserError(f"'{shown}' {missing}{'; near: ' if near else ''}{near}")

    def refuse(reason: str) -> UserError:
        given = f"image_size={size[0]}x{size[1]}, " if size is not None else ""
        return UserError(f"timm cannot build {name} with {given}channels={channels} ({reason})")

    settings: dict[str, Any] = dict(pretrained=False, num_classes=0, in_chans=channels)
    with foreign_parser(refuse):
        if size is not None:
            with suppress(TypeError):  # convolutional networks take any size and know no img_size
                return timm.create_model(name, img_size=size, **settings)
        return timm.create_model(name, **settings)


def of_encoder(
    name: str,
    encoder: Encoder,
    cfg: Mapping[str, Any] | None = None,
    size: tuple[int, int] | None = None,
) -> Evaluated:
    """The encoder with images prepared as timm's description of it says."""

    def refuse(reason: str) -> UserError:
        return UserError(f"{name}: how it takes images cannot be read ({reason})")

    cfg = getattr(encoder, "pretrained_cfg", {}) if cfg is None else cfg
    channels = next(part for part in encoder.parameters() if part.ndim >= 4).shape[1]
    family = family_of(encoder) if has_family(encoder) else None
    more: dict[str, Any] = {}
    with foreign_parser(refuse):
        if family is not None and (shape := family.clip(encoder)):
            stride = cfg.get("stride", Clip().stride)
            more["clip"] = Clip(frames=shape[0], tubelet=shape[1], stride=stride)
        prepared = resolve_data_config(pretrained_cfg={"crop_pct": CROP_PCT, **cfg})
        if size is None:
            own = getattr(getattr(encoder, "patch_embed", None), "img_size", None)
            size = tuple(own or prepared["input_size"][1:])
        crop_pct = float(prepared["crop_pct"])
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct={crop_pct}")
        statistics = {key: [*map(float, prepared[key])] for key in ("mean", "std")}
        if len(statistics["mean"]) == channels:
            more |= statistics
        item = IMAGE if family is None else family.item
        return Evaluated(name, encoder, _input(size, channels, **more), item, crop_pct)


def _input(size: tuple[int, int], channels: int, **more: Any) -> InputSettings:
    """By default ImageNet's statistics for colour images; for others [-1, 1], which serves any."""
    if channels != 3:
        half = [0.5] * channels
        more = {"mean": half, "std": half} | more
    return InputSettings(image_size=size, channels=channels, **more)

"""The encoder on disk: a folder that timm and transformers open, and the way back from there or from a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchmine.disk import settle
from patchmine.errors import UserError
from patchmine.models.architecture import infer_architecture
from patchmine.models.beit import resample_tables
from patchmine.models.loading import (
    COUNTER,
    LoadReport,
    Tensors,
    load_tensors,
    read_checkpoint,
    resample_positions,
    tensors_only,
)
from patchmine.models.official import encoder_tensors
from patchmine.models.resnet import create, has_cifar_stem, infer_resnet, is_resnet, names_resnet
from patchmine.models.video import VideoTransformer, create_video, is_video
from patchmine.models.vit import Encoder, embedded_prefix

CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"


def export_encoder(
    encoder: Encoder,
    folder: str | Path,
    *,
    model: str,
    model_args: Mapping[str, Any],
    image_size: tuple[int, int],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    stride: int | None = None,
) -> Path:
    """Write a folder that `timm.create_model("local-dir:FOLDER")` and `transformers.AutoModel` open.

    Only `load_encoder` opens that of a video model or of a ResNet with a stem for small images, which timm cannot
    build; the README in the folder says so.  ``model`` and ``model_args`` are what the encoder was built from; ``mean``
    and ``std`` are in [0, 1] units, one for each channel; ``stride`` is the distance of a clip's frames, noted for who
    opens the folder.  The folder appears complete or not at all; an older export is replaced.  Raises UserError when
    ``folder`` holds anything else, ValueError when the encoder is not what ``model`` and ``model_args`` describe.
    """
    folder = Path(folder)
    _refuse_other_content(folder)
    architecture = model.removeprefix("timm/").split(".")[0]
    arguments: dict[str, Any] = {**model_args, "in_chans": channels}
    size = [channels, *image_size]
    pool = encoder.global_pool
    if isinstance(encoder, ResNet):
        pool = arguments["global_pool"] = encoder.global_pool.pool_type
        places = {name: encoder.pretrained_cfg[name] for name in ("first_conv", "classifier")}
    else:
        arguments["img_size"] = list(image_size)
        arguments["patch_size"] = encoder.patch_embed.patch_size[-1]
        places = {"first_conv": "patch_embed.proj", "classifier": "head"}
        if isinstance(encoder, VideoTransformer):
            arguments["num_frames"] = encoder.patch_embed.num_frames
            arguments["tubelet_size"] = encoder.patch_embed.patch_size[0]
            size = [channels, encoder.patch_embed.num_frames, *image_size]
        else:
            arguments["global_pool"] = pool
    if isinstance(encoder, VisionTransformer):
        arguments["fc_norm"] = not isinstance(encoder.fc_norm, nn.Identity)
    arguments.pop("num_classes", None)  # transformers passes its own and refuses a second one
    any_size = isinstance(encoder, ResNet) or arguments.get("dynamic_img_size", False)
    _check_description(encoder, architecture, arguments)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": not any_size,
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            **({} if stride is None else {"stride": stride}),
            **places,
        },
    }
    _write(encoder, config, folder)
    return folder


def _check_description(encoder: Encoder, architecture: str, arguments: dict[str, Any]) -> None:
    """Build the described model without memory and compare, so that no folder is written that nobody can open."""
    rebuilt = _network(architecture, {**arguments, "device": "meta"})
    wanted = {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    heads = [None if isinstance(m, ResNet) else m.blocks[0].attn.num_heads for m in (rebuilt, encoder)]
    if wanted != given or heads[0] != heads[1]:
        differing = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise ValueError(
            f"model={architecture} with {arguments} is not the encoder to be exported: {differing or 'heads'}"
        )


def _network(architecture: str, arguments: Mapping[str, Any]) -> Any:
    """What the name and the arguments describe, without classifier: timm's, or ours for clips."""
    if is_video(architecture):
        return create_video(architecture, **arguments)
    return create(architecture, **{**arguments, "num_classes": 0})


def _refuse_other_content(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        raise UserError(
            f"out={folder} is a {'link' if folder.is_symlink() else 'file'}: choose another folder for the export"
        )
    content = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if not content or (is_export(folder) and set(content) <= {CONFIG, WEIGHTS, README}):
        return
    other = next(name for name in content if not is_export(folder) or name not in (CONFIG, WEIGHTS, README))
    raise UserError(f"out={folder} holds other things than an export (such as {other}): choose an empty or new folder")


def _write(encoder: Encoder, config: dict[str, Any], folder: Path) -> None:
    """Fill a folder beside the final one, then rename it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    new.mkdir()
    try:
        tensors = {name: _plain(tensor) for name, tensor in encoder.state_dict().items()}
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (new / README).write_text(_readme(encoder, config), encoding="utf-8")
        for path in (new / WEIGHTS, new / CONFIG, new):
            settle(path)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in float32 unless it is a counter."""
    plain = tensor.detach().cpu()
    return (plain.float() if plain.is_floating_point() else plain).contiguous().clone()


_OPEN_ANYWHERE = """```python
import timm
encoder = timm.create_model("local-dir:FOLDER", pretrained=True)
features = encoder.forward_features(images)  # {shape}
```

```python
from transformers import AutoModel
features = AutoModel.from_pretrained("FOLDER")(images).last_hidden_state
```"""

_OPEN_HERE = """```python
import patchmine
encoder = patchmine.load_encoder("FOLDER").eval()
features = encoder.forward_features(images)  # {shape}
```

timm and transformers cannot open this folder: the network begins with a 3x3 convolution of stride 1 and no max-pooling
(`cifar_stem` in config.json), which timm's ResNets cannot be asked for.  The tensors have timm's names: build timm's
`{architecture}`, put `Conv2d({channels}, 64, 3, padding=1, bias=False)` in the place of `conv1` and `Identity()`
in the place of `maxpool`, and load `model.safetensors`."""


_OPEN_CLIPS = """```python
import patchmine
encoder = patchmine.load_encoder("FOLDER").eval()
features = encoder.forward_features(clips)  # {shape}
```

timm and transformers cannot open this folder: the first layer looks at cubes of several frames and the positions are a
table over time, rows and columns (VideoMAE, arXiv 2203.12602), which timm's vision transformers do not have.
The other tensors have timm's names."""


def _readme(encoder: Encoder, config: dict[str, Any]) -> str:
    """A model card: what this is and how to open it."""
    cfg = config["pretrained_cfg"]
    width = config["num_features"]
    video = isinstance(encoder, VideoTransformer)
    how = (_OPEN_CLIPS if video else _OPEN_HERE if has_cifar_stem(encoder) else _OPEN_ANYWHERE).format(
        shape=f"(batch, {width}, rows, columns)" if isinstance(encoder, ResNet) else f"(batch, tokens, {width})",
        architecture=config["architecture"],
        channels=cfg["input_size"][0],
    )
    axes = "channels, frames, height, width" if video else "channels, height, width"
    tags = "library_name: timm\ntags: [image-feature-extraction, timm]"
    return f"""---
{"tags: [video-feature-extraction]" if video else tags}
---
# {config["architecture"]}, pre-trained without labels by patchmine

Give the path of this folder in place of FOLDER.

{how}

Input: {"x".join(map(str, cfg["input_size"]))} ({axes}), values in [0, 1], then `(x - mean) / std` with
mean {cfg["mean"]} and std {cfg["std"]}.
"""


def is_export(path: str | Path) -> bool:
    """Whether ``path`` is a folder with an encoder under timm's names and the configuration to build it."""
    return (Path(path) / CONFIG).is_file() and (Path(path) / WEIGHTS).is_file()


def load_encoder(
    path: str | Path,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Encoder:
    """The encoder in an export folder, in a run folder's export, or in a .safetensors, .pth or .pt file.

    A file may be a timm or torchvision state dict or an official MAE, VideoMAE, HPM or DINO checkpoint; its
    architecture is read off the tensors, or is ``model`` with ``model_args`` where given.  ``image_size`` (height,
    width) resamples the positions of a file or folder to another size; a ResNet has none, and those of a video model
    are computed anew.

    Raises UserError for a path that holds no encoder and for weights that do not fit.
    """
    path = Path(path)
    folder = next((candidate for candidate in (path, path / "export") if is_export(candidate)), None)
    if folder is not None:
        encoder = _from_export(folder)
    elif path.is_dir():
        raise UserError(
            f"{path} holds no {CONFIG} and {WEIGHTS}, neither itself nor in export/: "
            "give an export, or run `patchmine export` first"
        )
    else:
        encoder = _from_file(path, model, model_args or {}, image_size)
    if image_size is None or isinstance(encoder, ResNet) or encoder.patch_embed.img_size == tuple(image_size):
        return encoder
    encoder.set_input_size(image_size)
    return encoder


def _from_export(folder: Path) -> Encoder:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        architecture, arguments = config["architecture"], dict(config.get("model_args") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} is no configuration of an export ({error!r}): export again") from error
    tensors = tensors_only(read_checkpoint(folder / WEIGHTS))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("head.", "fc."))}
    encoder = _create(architecture, arguments, folder / CONFIG)
    load_tensors(encoder, tensors, LoadReport(str(folder / WEIGHTS)))
    return encoder


def _create(model: str, arguments: dict[str, Any], source: Path) -> Encoder:
    """A plain or BEiT-style ViT, one of clips, or a ResNet of timm's.  Nothing is downloaded."""
    if not is_video(model) and not timm.is_model(model):
        raise UserError(f"{source}: timm {timm.__version__} knows no architecture {model!r}; a newer timm may")
    try:
        encoder = _network(model, arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"{source}: timm cannot build {model} with {arguments} ({error})") from error
    if not isinstance(encoder, VisionTransformer | Beit | ResNet):
        raise UserError(f"{source}: {model} is a {type(encoder).__name__}, not a plain vision transformer or ResNet")
    return encoder


def _from_file(
    path: Path, model: str | None, model_args: Mapping[str, Any], image_size: tuple[int, int] | None
) -> Encoder:
    tensors = encoder_tensors(read_checkpoint(path), str(path))
    if is_resnet(tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    if model is None and is_resnet(tensors):
        architecture, arguments = infer_resnet(tensors, str(path))
        encoder = _create(architecture, arguments, path)
    elif model is None:
        encoder = infer_architecture(
            tensors, str(path), num_heads=model_args.get("num_heads"), image_size=image_size
        ).build()
    else:
        name = model.removeprefix("timm/").split(".")[0]
        size = {} if image_size is None or names_resnet(name) else {"img_size": image_size}
        encoder = _create(name, {**size, **model_args}, path)
    fill(encoder, tensors, str(path))
    return encoder


def fill(encoder: Encoder, tensors: Tensors, source: str) -> None:
    """Load an encoder's weights; positions, absolute and relative, are resampled where the grid differs.

    Raises UserError, naming ``source``, for tensors that do not fit.
    """
    if isinstance(encoder, VisionTransformer | Beit) and encoder.pos_embed is not None and "pos_embed" in tensors:
        positions = tensors["pos_embed"]
        if positions.shape != encoder.pos_embed.shape:
            positions = resample_positions(positions, encoder.patch_embed.grid_size, embedded_prefix(encoder))
        tensors = {**tensors, "pos_embed": positions}
    if isinstance(encoder, Beit):
        tensors = resample_tables(encoder, tensors)
    load_tensors(encoder, tensors, LoadReport(source), allow=[f"*.{COUNTER}"])

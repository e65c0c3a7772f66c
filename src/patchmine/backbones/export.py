"""The encoder on disk: a folder that timm and transformers open."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchmine.backbones.description import CONFIG, WEIGHTS, note
from patchmine.backbones.family import Encoder, family_of
from patchmine.backbones.loading import refuse_non_finite
from patchmine.backbones.model_card import model_card
from patchmine.backbones.video import VideoTransformer
from patchmine.disk import settle, system_errors
from patchmine.errors import UserError, shown_name

README = "README.md"


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
    """Write a folder that `timm.create_model("local-dir:FOLDER")` and `transformers.AutoModel`
    open.

    Only `load_encoder` opens that of a video model or of a ResNet with a stem for small images,
    which timm cannot build; the README in the folder says so.  ``model`` and ``model_args`` are
    what the encoder was built from; ``mean`` and ``std`` are in [0, 1] units, one for each channel;
    ``stride`` is the distance of a clip's frames, noted for who opens the folder.  The folder
    appears complete or not at all; an older export is replaced.  Raises UserError when ``folder``
    holds anything else, ValueError when the encoder is not what ``model`` and ``model_args``
    describe.
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
    norm_eps = arguments.pop("norm_eps", None)  # timm has no argument for it
    refuse_non_finite(encoder.state_dict(), f"out={shown_name(folder)}")
    any_size = isinstance(encoder, ResNet) or arguments.get("dynamic_img_size", False)
    _check_description(encoder, architecture, arguments)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "global_pool": pool,
        "model_args": arguments,
        **({} if norm_eps is None else {"norm_eps": norm_eps}),
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
    """Build the described model without memory and compare, so that no folder is written that
    nobody can open.
    """
    rebuilt = family_of(architecture).create(
        architecture, {**arguments, "num_classes": 0, "device": "meta"}
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    heads = [
        None if isinstance(m, ResNet) else m.blocks[0].attn.num_heads for m in (rebuilt, encoder)
    ]
    if wanted != given or heads[0] != heads[1]:
        differing = sorted(
            name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)
        )
        raise ValueError(
            f"model={architecture} with {arguments} is not the encoder to be exported: {differing or 'heads'}"
        )


def _refuse_other_content(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        raise UserError(
            f"out={folder} is a {'link' if folder.is_symlink() else 'file'}: choose another folder for the export"
        )
    content = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if not content or (is_export(folder) and set(content) <= {CONFIG, WEIGHTS, README}):
        return
    other = next(
        name for name in content if not is_export(folder) or name not in (CONFIG, WEIGHTS, README)
    )
    raise UserError(
        f"out={folder} holds other things than an export (such as {other}): choose an empty or new folder"
    )


def _write(encoder: Encoder, config: dict[str, Any], folder: Path) -> None:
    """Fill a folder beside the final one, then rename it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    new.mkdir()
    try:
        tensors = {name: _plain(tensor) for name, tensor in encoder.state_dict().items()}
        with system_errors(new / WEIGHTS):
            save_file(tensors, new / WEIGHTS, metadata=_note(encoder, config))
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (new / README).write_text(model_card(encoder, config), encoding="utf-8")
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


def _note(encoder: Encoder, config: dict[str, Any]) -> dict[str, str]:
    """What the file says of itself when it is copied without its folder."""
    if isinstance(encoder, ResNet):
        return {"format": "pt"}
    embed = encoder.patch_embed
    eps = {"norm_eps": config["norm_eps"]} if "norm_eps" in config else {}
    clip = (
        {"clip": (embed.num_frames, embed.patch_size[0])}
        if isinstance(encoder, VideoTransformer)
        else {}
    )
    return note(tuple(embed.img_size), encoder.blocks[0].attn.num_heads, **clip, **eps)


def is_export(path: str | Path) -> bool:
    """Whether ``path`` is a folder with an encoder under timm's names and the configuration to
    build it.
    """
    return (Path(path) / CONFIG).is_file() and (Path(path) / WEIGHTS).is_file()

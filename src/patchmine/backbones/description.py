"""What is known about a file of weights besides its tensors: the folder that it lies in, its notes.

Tensors tell neither the shape of the images that a network was trained on nor its attention heads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from patchmine.errors import UserError, foreign_parser, shown_name

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NOTE = "patchmine.weights"  # key of our note in the metadata of a safetensors file
LARGEST_SIDE = 2**15  # pixels or frames; what states more is damaged
_WEIGHTS_NAMES = (WEIGHTS, "pytorch_model.bin")
_LARGEST_TEXT = 2**24  # bytes
_NAMED_BY_TRANSFORMERS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_GELU_ONLY = ("vit", "vit_mae", "dinov2", "dinov2_with_registers")  # model_type of transformers


@dataclass(frozen=True)
class Description:
    """What is known of an encoder's weights; None where nothing says it.

    ``image_size`` is the (height, width) in pixels that they were trained at, ``clip`` (frames,
    frames in a tubelet), ``norm_eps`` of a network whose own code has another than timm's,
    ``act_layer`` what a CLIP has for an activation, in timm's word, ``method`` the settings of what
    trained it.  ``source`` names what says it all; it is not ``certain`` where these are arguments
    of a script.
    """

    source: str = ""
    image_size: tuple[int, int] | None = None
    clip: tuple[int, int] | None = None
    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    num_heads: int | None = None
    decoder_num_heads: int | None = None
    norm_eps: float | None = None
    act_layer: str | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    certain: bool = True


def find_weights(path: Path, setting: str = "file") -> Path:
    """The regular file that ``path`` is, or that the folder or its ``export/`` holds."""
    if path.is_dir():
        found = weights_in(path) or weights_in(path / "export")
        if found is not None:
            return found
        raise UserError(
            f"{setting}={shown_name(path)} is a folder, not a file of weights, and holds no "
            f"{CONFIG} and {WEIGHTS}: give an export or a file, or run `patchmine export` first"
        )
    if not path.is_file():
        exists = path.exists() or path.is_symlink()
        what = "is no regular file" if exists else "does not exist"
        raise UserError(
            f"{setting}={shown_name(path)} {what}: give a .safetensors, .pth or .pt file"
        )
    if path.name == "last" and path.stat().st_size < 100:  # a run's pointer to its newest file
        named = path.with_name(path.read_text(encoding="utf-8", errors="replace").strip())
        return named if named.parent == path.parent and named.is_file() else path
    return path


def weights_in(folder: Path) -> Path | None:
    """The file of weights beside a config.json."""
    named = [folder / name for name in _WEIGHTS_NAMES]
    return next((path for path in named if path.is_file() and (folder / CONFIG).is_file()), None)


def is_safetensors(path: Path) -> bool:
    """By the name, or by the first bytes: the file that a link leads to may have any name."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    stated = int.from_bytes(head[:8], "little")
    return len(head) == 9 and head[8:] == b"{" and stated < path.stat().st_size


def describe_weights(file: Path, content: Mapping[str, Any] | None = None) -> Description:
    """What is known about ``file``, whose ``content`` may hold a script's arguments."""
    config, run = file.parent / CONFIG, file.parent.parent / "config.yaml"
    if file.name in _WEIGHTS_NAMES and config.is_file():
        return _of_config(read_json(config), config)
    if file.parent.name == "checkpoints" and run.is_file():
        return _of_run(run)
    noted = _of_note(file)
    return noted or _of_arguments((content or {}).get("args"), file) or Description()


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.  Raises UserError, naming the file, where there is none."""

    def refuse(reason: str) -> UserError:
        return UserError(
            f"{shown_name(file)} is no configuration of an export ({reason}): export again"
        )

    with foreign_parser(refuse):
        if file.stat().st_size > _LARGEST_TEXT:
            raise ValueError("too long")
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise refuse("no JSON object")
    return content


def note(image_size: tuple[int, int], num_heads: int, **more: Any) -> dict[str, str]:
    """Metadata for a safetensors file of ours: what its tensors do not say, wherever it goes."""
    content = {"image_size": image_size, "num_heads": num_heads, **more}
    return {"format": "pt", NOTE: json.dumps(content)}


def _of_note(file: Path) -> Description | None:
    """Our own note in a safetensors file (`note`)."""
    if not file.is_file() or not is_safetensors(file):
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            content = json.loads((opened.metadata() or {}).get(NOTE, "null"))
    except Exception:  # noqa: BLE001  (whatever is wrong with the file, its reader says it)
        return None
    if not isinstance(content, dict):
        return None
    return Description(
        shown_name(file),
        _size(content.get("image_size"), file),
        _size(content.get("clip"), file),
        num_heads=_number(content.get("num_heads")),
        decoder_num_heads=_number(content.get("decoder_num_heads")),
        norm_eps=_real(content.get("norm_eps")),
        method=content,
    )


def _of_config(config: dict[str, Any], file: Path) -> Description:
    """A config.json: timm's and ours name an architecture, transformers' a model_type."""
    name = shown_name(file)
    if isinstance(config.get("architecture"), str):
        arguments, prepared = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
        if not isinstance(arguments, dict) or not isinstance(prepared, dict):
            raise UserError(
                f"{name} is no configuration of an export: model_args is no object; export again"
            )
        stated = prepared.get("input_size")
        usual = stated[-2:] if isinstance(stated, list) else None
        return Description(
            name,
            _size(arguments.get("img_size", usual), file),
            model=config["architecture"],
            model_args=arguments,
            norm_eps=_real(config.get("norm_eps")),
        )
    if not isinstance(config.get("model_type"), str):
        raise UserError(
            f"{name} is no configuration of an export: it has neither architecture (timm's and "
            "ours) nor model_type (transformers')"
        )
    vision = config.get("vision_config")
    config = {**config, **vision} if isinstance(vision, dict) else config
    of_clip = config["model_type"].startswith(("clip", "siglip"))
    activation = config.get("hidden_act", None if of_clip else "gelu")
    if config["model_type"] in _GELU_ONLY and activation != "gelu":
        raise UserError(
            f"{name} states hidden_act={activation!r}: only networks with gelu are read"
        )
    if of_clip and str(activation) not in (*_NAMED_BY_TRANSFORMERS, "None"):
        known = ", ".join(_NAMED_BY_TRANSFORMERS)
        raise UserError(f"{name} states hidden_act={activation!r}: only {known} are read")
    return Description(
        name,
        _size(config.get("image_size"), file),
        num_heads=_number(config.get("num_attention_heads")),
        decoder_num_heads=_number(config.get("decoder_num_attention_heads")),
        norm_eps=_real(config.get("layer_norm_eps")),
        act_layer=_NAMED_BY_TRANSFORMERS.get(str(activation)) if of_clip else None,
        method=config,
    )


def _of_run(file: Path) -> Description:
    def refuse(reason: str) -> UserError:
        return UserError(f"{shown_name(file)} cannot be read as settings ({reason})")

    with foreign_parser(refuse):
        if file.stat().st_size > _LARGEST_TEXT:
            raise ValueError("too long for settings")
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        clip, method = settings.get("clip") or {}, settings.get("method") or {}
        arguments = dict(settings.get("model_args") or {})
        if settings.get("patch_size") is not None:
            arguments["patch_size"] = settings["patch_size"]
        arguments["in_chans"] = settings.get("channels", 3)
        return Description(
            shown_name(file),
            _size(settings.get("image_size"), file),
            (clip["frames"], clip["tubelet"]) if "frames" in clip else None,
            model=settings["model"],
            model_args=arguments,
            decoder_num_heads=_number(method.get("decoder_num_heads")),
            method=method,
        )


def _of_arguments(arguments: Any, file: Path) -> Description | None:
    """The arguments of MAE's, HPM's and VideoMAE's scripts; their images are square."""
    if not isinstance(arguments, argparse.Namespace):
        return None
    names = ("input_size", "num_frames", "tubelet_size")
    size, frames, tubelet = (_number(vars(arguments).get(name)) for name in names)
    if size is None or size > LARGEST_SIDE:
        return None
    clip = (frames, tubelet) if frames and tubelet else None
    return Description(f"args in {shown_name(file)}", (size, size), clip, certain=False)


def as_size(value: Any) -> tuple[int, int] | None:
    """Two sides from a number or a pair; None for anything else."""
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        return None
    return sides[0], sides[1]


def _size(value: Any, file: Path) -> tuple[int, int] | None:
    size = as_size(value)
    if size is None and value is not None:
        raise UserError(
            f"{shown_name(file)} states the size {str(value)[:60]}, which is none: write "
            "[height, width]"
        )
    return size


def _number(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _real(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 < value < 1 else None

"""What is known about a file of weights besides its tensors: the folder that it lies in, and the
file's own notes.

Tensors tell neither the shape of the images that a network was trained on nor its attention heads.
The ``config.json`` of timm, of transformers and of our exports does, and so do a run's
``config.yaml``, the note that we write into safetensors files, and the arguments that the official
scripts keep in theirs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from patchmine.errors import UserError, foreign_parser, shown_name

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NOTE = "patchmine.weights"  # key of our note in the metadata of a safetensors file
_WEIGHTS_NAMES = (WEIGHTS, "pytorch_model.bin")
LARGEST_SIDE = 2**15  # pixels or frames; what states more is damaged
_LARGEST_TEXT = 2**24  # bytes


@dataclass(frozen=True)
class Description:
    """What is known of an encoder's weights; None where nothing says it.

    ``image_size`` is the (height, width) in pixels that they were trained at.  ``model`` and
    ``model_args`` are names of timm's or ours.  ``norm_eps`` belongs to the norms of a network
    whose own code has another than timm's 1e-6. ``source`` names what says it all, for messages; it
    is not ``certain`` where these are arguments of a script.
    """

    source: str = ""
    image_size: tuple[int, int] | None = None
    clip: tuple[int, int] | None = None  # frames and frames in a tubelet
    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    num_heads: int | None = None
    decoder_num_heads: int | None = None
    norm_eps: float | None = None
    method: Mapping[str, Any] = field(
        default_factory=dict
    )  # settings of the method that trained it
    certain: bool = True

    def without_model(self) -> Description:
        """The same for other tensors of that network than the encoder that ``model`` is."""
        return replace(self, model=None, model_args={})


def find_weights(path: Path, setting: str = "file") -> Path:
    """The file of weights that ``path`` is, or that this folder (or its ``export/``) keeps beside a
    config.json.

    Raises UserError where there is none, and for what is no regular file: reading from a pipe would
    wait for ever.
    """
    if path.is_dir():
        found = weights_in(path) or weights_in(path / "export")
        if found is not None:
            return found
        raise UserError(
            f"{setting}={shown_name(path)} is a folder, not a file of weights, and holds no {CONFIG} and {WEIGHTS}, "
            "neither itself nor in export/: give an export or a file, or run `patchmine export` first"
        )
    if not path.is_file():
        exists = path.exists() or path.is_symlink()
        what = "is no regular file" if exists else "does not exist"
        raise UserError(
            f"{setting}={shown_name(path)} {what}: give a .safetensors, .pth or .pt file"
        )
    return _followed(path)


def weights_in(folder: Path) -> Path | None:
    """The file of weights beside a config.json."""
    named = [folder / name for name in _WEIGHTS_NAMES]
    return next((path for path in named if path.is_file() and (folder / CONFIG).is_file()), None)


def _followed(path: Path) -> Path:
    """The checkpoint that a run's ``last`` points to, which is a small file where there are no
    links.
    """
    if path.name == "last" and path.stat().st_size < 100:
        named = path.with_name(path.read_text(encoding="utf-8", errors="replace").strip())
        return named if named.parent == path.parent and named.is_file() else path
    return path


def is_safetensors(path: Path) -> bool:
    """By the name, or by the first bytes: the file that a link leads to may have any name."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return (
        len(head) == 9
        and head[8:] == b"{"
        and int.from_bytes(head[:8], "little") < path.stat().st_size
    )


def describe(file: Path, content: Mapping[str, Any] | None = None) -> Description:
    """What is known about the weights in ``file``, whose unpickled ``content`` may hold the
    arguments of a script.

    Raises UserError for a description that cannot be read.
    """
    found = _by_folder(file) or _by_note(file)
    return found or _by_arguments((content or {}).get("args"), file) or Description()


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


def _by_note(file: Path) -> Description | None:
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


def note(image_size: tuple[int, int], num_heads: int, **more: Any) -> dict[str, str]:
    """Metadata for a safetensors file of ours, so that it says what its tensors do not, wherever it
    is copied to.
    """
    return {
        "format": "pt",
        NOTE: json.dumps({"image_size": image_size, "num_heads": num_heads, **more}),
    }


def _by_folder(file: Path) -> Description | None:
    config = file.parent / CONFIG
    if file.name in _WEIGHTS_NAMES and config.is_file():
        return _of_config(read_json(config), config)
    run = file.parent.parent / "config.yaml"
    if file.parent.name == "checkpoints" and run.is_file():
        return _of_run(run)
    return None


def _of_config(config: dict[str, Any], file: Path) -> Description:
    if isinstance(config.get("architecture"), str):
        return _of_timm(config, file)
    if isinstance(config.get("model_type"), str):
        return _of_transformers(config, file)
    raise UserError(
        f"{shown_name(file)} is no configuration of an export: it has neither architecture (timm's and ours) nor "
        "model_type (transformers')"
    )


def _of_timm(config: dict[str, Any], file: Path) -> Description:
    arguments = config.get("model_args") or {}
    prepared = config.get("pretrained_cfg") or {}
    if not isinstance(arguments, dict) or not isinstance(prepared, dict):
        raise UserError(
            f"{shown_name(file)} is no configuration of an export: model_args is no object; export again"
        )
    stated = prepared.get("input_size")
    size = _size(arguments.get("img_size", stated[-2:] if isinstance(stated, list) else None), file)
    return Description(
        shown_name(file),
        size,
        model=config["architecture"],
        model_args=arguments,
        norm_eps=_real(config.get("norm_eps")),
    )


def _of_transformers(config: dict[str, Any], file: Path) -> Description:
    vision = config.get("vision_config")
    config = {**config, **vision} if isinstance(vision, dict) else config
    activation = config.get("hidden_act", "gelu")
    if (
        config["model_type"] in ("vit", "vit_mae", "dinov2", "dinov2_with_registers")
        and activation != "gelu"
    ):
        raise UserError(
            f"{shown_name(file)} states hidden_act={activation!r}: only networks with gelu are read"
        )
    return Description(
        shown_name(file),
        _size(config.get("image_size"), file),
        num_heads=_number(config.get("num_attention_heads")),
        decoder_num_heads=_number(config.get("decoder_num_attention_heads")),
        norm_eps=_real(config.get("layer_norm_eps")),
        method=config,
    )


def _of_run(file: Path) -> Description:
    with foreign_parser(
        lambda reason: UserError(f"{shown_name(file)} cannot be read as settings ({reason})")
    ):
        if file.stat().st_size > _LARGEST_TEXT:
            raise ValueError("too long for settings")
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        clip = settings.get("clip") or {}
        method = settings.get("method") or {}
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


def _by_arguments(arguments: Any, file: Path) -> Description | None:
    """The arguments of MAE's, HPM's and VideoMAE's scripts; their images are square."""
    if not isinstance(arguments, argparse.Namespace):
        return None
    stated = vars(arguments)
    size, frames, tubelet = (
        _number(stated.get(name)) for name in ("input_size", "num_frames", "tubelet_size")
    )
    if size is None or size > LARGEST_SIDE:
        return None
    clip = (frames, tubelet) if frames and tubelet else None
    return Description(f"args in {shown_name(file)}", (size, size), clip, certain=False)


def _size(value: Any, file: Path) -> tuple[int, int] | None:
    """Two sides from a number or a pair."""
    if value is None:
        return None
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        raise UserError(
            f"{shown_name(file)} states the size {str(value)[:60]}, which is none: write [height, width]"
        )
    return sides[0], sides[1]


def _number(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _real(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 < value < 1 else None

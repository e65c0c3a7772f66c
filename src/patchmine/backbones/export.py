"""The encoder on disk: a folder that timm and transformers open."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from patchmine.backbones.classifier import PROBLEMS, Head
from patchmine.backbones.description import CONFIG, WEIGHTS, note
from patchmine.backbones.family import create_encoder, family_of, input_size
from patchmine.backbones.loading import refuse_non_finite
from patchmine.backbones.record import Encoder, Family
from patchmine.errors import shown_name
from patchmine.system.disk import exchanging, refuse_other_content, settle, system_errors

README = "README.md"

_OPEN_HERE = """```python
import patchmine
encoder = patchmine.load_encoder("FOLDER").eval()
features = encoder.forward_features({items})  # {shape}
```"""
_OPEN_ANYWHERE = """```python
import timm
encoder = timm.create_model("local-dir:FOLDER", pretrained=True)
features = encoder.forward_features({items})  # {shape}
```

```python
from transformers import AutoModel
features = AutoModel.from_pretrained("FOLDER")({items}).last_hidden_state
```"""
_CLASSIFY_HERE = """```python
import patchmine
scores = patchmine.Run("RUN").classifier()({items})  # (batch, {count}), before softmax
```"""
_CLASSIFY_ANYWHERE = """```python
import timm
classifier = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
scores = classifier({items})  # (batch, {count}), before softmax
```

```python
from transformers import AutoModelForImageClassification
scores = AutoModelForImageClassification.from_pretrained("FOLDER")({items}).logits
```

The scores are of, in this order (`label_names` in config.json): {names}."""
_SMALL_STEM = """

timm and transformers cannot open this folder: the network begins with a 3x3 convolution of stride 1
and no max-pooling (`cifar_stem` in config.json), which timm's ResNets cannot be asked for.  The
tensors have timm's names: build timm's `{architecture}`, put
`Conv2d({channels}, 64, 3, padding=1, bias=False)` in the place of `conv1` and `Identity()` in the
place of `maxpool`, and load `model.safetensors`."""
_CUBES = """

timm and transformers cannot open this folder: the first layer looks at cubes of several frames and
the positions are a table over time, rows and columns (VideoMAE, arXiv 2203.12602), which timm's
vision transformers do not have.  The other tensors have timm's names."""
_CARD = """---
{tags}
---
# {architecture}, {trained} by patchmine

Give the path of this folder in place of FOLDER.

{how}

{eps}Input: {size} ({axes}), values in [0, 1], then `(x - mean) / std` with
mean {mean} and std {std}.
"""
_EPS = """The layer norms were trained with eps={norm_eps:g} (`norm_eps` in config.json), as in
transformers; timm takes 1e-6, which changes features by about as much.  `patchmine.load_encoder`
sets it.

"""


@dataclass(frozen=True)
class Preprocessing:
    """How images came to the encoder.

    Args:
        mean: in [0, 1] units, one for each channel.
        std: likewise.
        crop_pct: share of an image's shorter side that a centre crop keeps.
        interpolation: that images were resized by.
        stride: frames from one frame of a clip to the next; None for images.
    """

    mean: Sequence[float]
    std: Sequence[float]
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    stride: int | None = None


def export_encoder(
    encoder: Encoder,
    folder: str | PathLike[str],
    preprocessing: Preprocessing,
    head: Head | None = None,
    *,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a folder that timm (`create_model("local-dir:FOLDER")`) and transformers open.

    Only `load_encoder` opens that of a video model or of a ResNet with a stem for small images,
    which timm cannot build; the README in the folder says so.  The folder appears complete or not
    at all; an older export is replaced.

    Args:
        encoder: of `build_encoder` or `load_encoder`, which says what it was built from.
        folder: a new or empty one, or an export.
        preprocessing: noted for who opens the folder.
        head: the classifier on it, which timm's and transformers' networks then have too.
        check: is shown the folder before it takes its place, which nothing does if this raises.

    Raises:
        UserError: ``folder`` holds anything else, or a weight is not finite.
        ValueError: the encoder is not what it was built from any more.
    """
    folder = Path(folder)
    refuse_other_content(folder, (CONFIG, WEIGHTS), (README,))
    refuse_non_finite(encoder.state_dict(), f"out={shown_name(folder)}")
    family, config = family_of(encoder), _config(encoder, preprocessing, head)
    described = encoder.state_dict() if head is None else head.tensors(encoder)
    if head is None or family.timm_opens(encoder):
        _check_description(encoder, described, config)
    tensors = {name: _plain(tensor) for name, tensor in described.items()}
    with exchanging(folder) as new:
        with system_errors(new / WEIGHTS):
            save_file(tensors, new / WEIGHTS, metadata=_note(encoder, config))
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (new / README).write_text(_model_card(encoder, family, config), encoding="utf-8")
        for path in (new / WEIGHTS, new / CONFIG):
            settle(path)
        if check is not None:
            check(new)
    return folder


def is_export(path: str | Path) -> bool:
    """Whether ``path`` is a folder with an encoder under timm's names and its configuration."""
    return (Path(path) / CONFIG).is_file() and (Path(path) / WEIGHTS).is_file()


def _config(encoder: Encoder, preprocessing: Preprocessing, head: Head | None) -> dict[str, Any]:
    """timm's config.json, and what timm's arguments cannot say (``norm_eps``, ``stride``)."""
    family, built = family_of(encoder), encoder.built_from
    own = family.export_arguments(encoder) | ({} if head is None else head.arguments(encoder))
    num_classes, told = 0, dict[str, Any]()
    if head is not None:
        num_classes = head.layer.out_features
        told = {"label_names": list(head.names), "problem_type": PROBLEMS[head.loss]}
    arguments = {**built.model_args, "in_chans": built.channels, **own}
    arguments.pop("num_classes", None)  # transformers passes its own and refuses a second one
    # Of most models timm has no argument for it; load_encoder sets it.
    eps = None if "norm_eps" in own else arguments.pop("norm_eps", None)
    stated = getattr(encoder, "pretrained_cfg", {})
    places = {"first_conv": "patch_embed.proj", "classifier": family.classifier}
    if family.hierarchical:
        places = {name: stated[name] for name in places}
    any_size = family.hierarchical or arguments.get("dynamic_img_size", False)
    stride = {} if preprocessing.stride is None else {"stride": preprocessing.stride}
    return {
        "architecture": built.architecture,
        "num_classes": num_classes,
        **told,
        "num_features": encoder.num_features,
        "global_pool": own.get("global_pool") or encoder.global_pool,
        "model_args": arguments,
        **({} if eps is None else {"norm_eps": eps}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": list(input_size(encoder)),
            "fixed_input_size": not any_size,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": num_classes,
            "pool_size": None,
            **stride,
            **places,
        },
    }


def _check_description(
    encoder: Encoder, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Build the described model without memory and compare, so that others can open the folder."""
    architecture, arguments = config["architecture"], config["model_args"]
    rebuilt = create_encoder(
        architecture, {**arguments, "device": "meta"}, "the export", config["num_classes"]
    )
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in each.items()}
        for each in (rebuilt.state_dict(), tensors)
    ]
    heads = [
        each.blocks[0].attn.num_heads if hasattr(each, "blocks") else None
        for each in (rebuilt, encoder)
    ]
    if shapes[0] != shapes[1] or heads[0] != heads[1]:
        names = sorted(shapes[0].keys() | shapes[1].keys())
        differing = [name for name in names if shapes[0].get(name) != shapes[1].get(name)]
        raise ValueError(
            f"model={architecture} with {arguments} is not the encoder to be exported: "
            f"{differing or 'heads'}"
        )


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in float32 unless it is a counter."""
    plain = tensor.detach().cpu()
    return (plain.float() if plain.is_floating_point() else plain).contiguous().clone()


def _note(encoder: Encoder, config: dict[str, Any]) -> dict[str, str]:
    """What the file says of itself when it is copied without its folder."""
    family = family_of(encoder)
    if family.hierarchical:
        return {"format": "pt"}
    clip = family.clip(encoder)
    more = {} if clip is None else {"clip": clip}
    if "norm_eps" in config:
        more["norm_eps"] = config["norm_eps"]
    return note(family.image_size(encoder), encoder.blocks[0].attn.num_heads, **more)


def _model_card(encoder: Encoder, family: Family, config: dict[str, Any]) -> str:
    """The README: what the folder holds, and how timm, transformers or patchmine open it."""
    prepared, width = config["pretrained_cfg"], config["num_features"]
    video = family.clip(encoder) is not None
    names = config.get("label_names")
    anywhere, here = _OPEN_ANYWHERE, _OPEN_HERE
    if names is not None:
        anywhere, here = _CLASSIFY_ANYWHERE, _CLASSIFY_HERE
    how = anywhere
    if not family.timm_opens(encoder):
        how = here + (_CUBES if video else _SMALL_STEM)
    maps, tokens = f"(batch, {width}, rows, columns)", f"(batch, tokens, {width})"
    use = "feature-extraction" if names is None else "classification"
    timm_tags = f"library_name: timm\ntags: [image-{use}, timm]"
    return _CARD.format(
        tags=f"tags: [video-{use}]" if video else timm_tags,
        trained="pre-trained without labels" if names is None else "fine-tuned",
        architecture=config["architecture"],
        how=how.format(
            items="clips" if video else "images",
            shape=maps if family.hierarchical else tokens,
            architecture=config["architecture"],
            channels=prepared["input_size"][0],
            count=config["num_classes"],
            names=", ".join(map(shown_name, names or [])),
        ),
        eps=_EPS.format(**config) if "norm_eps" in config else "",
        size="x".join(map(str, prepared["input_size"])),
        axes=f"channels, {'frames, ' if video else ''}height, width",
        mean=prepared["mean"],
        std=prepared["std"],
    )

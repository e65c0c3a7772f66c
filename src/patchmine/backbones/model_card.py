"""The README of an export: what the folder holds, and how timm, transformers or patchmine open it."""

from __future__ import annotations

from typing import Any

from timm.models.resnet import ResNet

from patchmine.backbones.record import Encoder
from patchmine.backbones.resnet import has_cifar_stem
from patchmine.backbones.video import VideoTransformer

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


def model_card(encoder: Encoder, config: dict[str, Any]) -> str:
    """A model card: what this is and how to open it."""
    cfg = config["pretrained_cfg"]
    width = config["num_features"]
    video = isinstance(encoder, VideoTransformer)
    how = (
        _OPEN_CLIPS
        if video
        else _OPEN_HERE
        if isinstance(encoder, ResNet) and has_cifar_stem(encoder)
        else _OPEN_ANYWHERE
    ).format(
        shape=f"(batch, {width}, rows, columns)"
        if isinstance(encoder, ResNet)
        else f"(batch, tokens, {width})",
        architecture=config["architecture"],
        channels=cfg["input_size"][0],
    )
    axes = "channels, frames, height, width" if video else "channels, height, width"
    tags = "library_name: timm\ntags: [image-feature-extraction, timm]"
    size = "x".join(map(str, cfg["input_size"]))
    return f"""---
{"tags: [video-feature-extraction]" if video else tags}
---
# {config["architecture"]}, pre-trained without labels by patchmine

Give the path of this folder in place of FOLDER.

{how}

{_eps_note(config)}Input: {size} ({axes}), values in [0, 1], then `(x - mean) / std` with
mean {cfg["mean"]} and std {cfg["std"]}.
"""


def _eps_note(config: dict[str, Any]) -> str:
    """What timm's arguments cannot say."""
    if "norm_eps" not in config:
        return ""
    return (
        f"The layer norms were trained with eps={config['norm_eps']:g} (`norm_eps` in config.json), as in "
        "transformers; timm takes 1e-6,\n"
        "which changes features by about as much.  `patchmine.load_encoder` sets it.\n\n"
    )

"""Reference numbers: `METHOD.safetensors`, with a `METHOD.json` beside it that says all about
sizes, options and cases.

The tests read every number that belongs to a file from its JSON, so that they run on any folder of
the same format: ``PATCHMINE_GOLDEN=folder pytest tests/golden``.  A constant that is left in a test
is one of the published method.  How far a number may be off is said in one place, `TOLERANCES`, or
by the file itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from patchmine.backbones.family import Encoder, build_encoder
from patchmine.task import Method
from patchmine.types import Batch

# The same thing is called differently in different files.
ALIASES = {
    "image_size": ("img_size", "img"),
    "patch_size": ("patch",),
    "embed_dim": ("dim",),
    "num_heads": ("heads",),
    "decoder_embed_dim": ("ddim",),
    "decoder_depth": ("ddepth",),
    "decoder_num_heads": ("dheads",),
    "norm_eps": ("eps_layernorm",),
    "norm_pix_loss": ("norm_pix",),
}


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of each channel


class Tolerance(NamedTuple):
    """How far a number may be off: ``absolute + of_largest * largest expected entry + relative *
    expected entry``.
    """

    absolute: float = 0.0
    relative: float = 0.0
    of_largest: float = 0.0

    def check(self, found: Tensor, expected: Tensor, name: str) -> None:
        """AssertionError that names ``name`` where a number is further off."""
        bound = self.absolute + self.of_largest * expected.abs().max().item()
        torch.testing.assert_close(
            found,
            expected,
            atol=bound,
            rtol=self.relative,
            msg=lambda text: f"{name} ({self}): {text}",
        )

    def check_number(self, found: float | Tensor, expected: float, name: str) -> None:
        """The same for a single number."""
        value = found.item() if isinstance(found, Tensor) else found
        assert value == pytest.approx(expected, rel=self.relative, abs=self.absolute), name


# By file and quantity, for float32 on a processor; from section 10 of each specification where
# nothing else is said. They are of rounding alone: the reference and we sum the same products in
# another order.  ``"tolerances"`` in a JSON (quantity -> a number, which is absolute, or
# {"absolute": .., "relative": .., "of_largest": ..}) goes before them.
TOLERANCES: dict[str, dict[str, Tolerance]] = {
    "mae": {
        "table": Tolerance(1e-6),
        "tokens": Tolerance(2e-5, 1e-4),
        "target": Tolerance(1e-5, 1e-5),
        "loss": Tolerance(relative=1e-5),
        "gradient": Tolerance(1e-7, of_largest=1e-3),
    },
    "hpm": {
        "table": Tolerance(1e-6),
        "tokens": Tolerance(2e-5),
        "target": Tolerance(1e-5, 1e-5),
        "loss": Tolerance(relative=1e-5),
        # The reference rounds 1 - sigmoid; the half-pair form does not.
        "relative loss": Tolerance(relative=1e-4),
        "relative objective": Tolerance(of_largest=5e-3),
        "half pairs": Tolerance(relative=1e-6),
        "absolute objective": Tolerance(of_largest=1e-3),
        # The relative objective does not see a shift: the gradient of the last bias is rounding
        # alone.
        "gradient": Tolerance(1e-7, of_largest=1e-3),
        "decay": Tolerance(1e-12),
        "average": Tolerance(1e-7, 1e-6),
    },
    "videomae": {
        "table": Tolerance(1e-6),
        "tokens": Tolerance(2e-5, 1e-4),
        "target": Tolerance(1e-5, 1e-5),
        "loss": Tolerance(relative=1e-5),
        "gradient": Tolerance(1e-7, of_largest=1e-3),
    },
    "amt": {
        "table": Tolerance(1e-6),
        "map": Tolerance(1e-6),
        "tokens": Tolerance(1e-5),
        "target": Tolerance(1e-5),
        "loss": Tolerance(relative=1e-6),
        "gradient": Tolerance(of_largest=1e-5),
    },
    "amt_simmim": {
        "map": Tolerance(1e-6),
        "tokens": Tolerance(1e-5),
        "target": Tolerance(1e-5),
        "loss": Tolerance(relative=1e-6),
        "gradient": Tolerance(of_largest=1e-5),
    },
    "simmim": {
        "tokens": Tolerance(1e-5),
        "target": Tolerance(1e-5),
        "loss": Tolerance(relative=1e-6),
        "gradient": Tolerance(of_largest=1e-5),
    },
    "droppos": {
        "table": Tolerance(1e-6),
        "smoothing": Tolerance(2e-7),
        "smoothing sums": Tolerance(1e-6),
        # A matrix product in place of the convolution, where numbers are above 4: a few units in
        # the last place.
        "enc_in": Tolerance(3e-6, 1e-6),
        "tokens": Tolerance(2e-5),
        "weights": Tolerance(1e-6),
        "loss": Tolerance(relative=1e-5),
        "accuracy": Tolerance(1e-6),
        "weighted accuracy": Tolerance(1e-5),
        "mean error": Tolerance(1e-5),
        "gradient": Tolerance(1e-6, 1e-4),
    },
    "emae": {
        "table": Tolerance(1e-6),
        "tokens": Tolerance(2e-5),
        "loss": Tolerance(relative=1e-5),
        "gradient": Tolerance(of_largest=1e-4),
    },
    "mokd": {
        "temperature": Tolerance(relative=1e-12),
        "table": Tolerance(1e-6),
        "tokens": Tolerance(5e-5),
        "loss": Tolerance(relative=1e-5),
        "gradient": Tolerance(of_largest=1e-4),
        "statistics": Tolerance(1e-6),
        "parameters": Tolerance(1e-5),
    },
    "scfs": {
        "temperature": Tolerance(1e-12),
        "attention": Tolerance(2e-5),
        "tokens": Tolerance(5e-5),
        "loss": Tolerance(relative=2e-5),
        "gradient": Tolerance(of_largest=1e-4),
        "statistics": Tolerance(1e-6),
    },
    "semaim": {
        "table": Tolerance(1e-6),
        "window": Tolerance(1e-7),
        "map": Tolerance(1e-6),
        "teacher map": Tolerance(1e-5),
        # Ties.  Of two patches whose similarities, or softmaxes of them, are nearer than this,
        # either may be the centre or come first: three units in the last place below 1, which is
        # how 1 - softmax is stored.
        "order": Tolerance(2e-7),
        "tokens": Tolerance(1e-4),
        "target": Tolerance(1e-5, 1e-5),
        "loss_map": Tolerance(1e-4, 1e-4),
        "loss": Tolerance(1e-5),
        "gradient": Tolerance(
            1e-8, relative=1e-4
        ),  # of the norms of the difference and of the gradient
        "gradient norm": Tolerance(relative=1e-4),
    },
}


@dataclass(frozen=True)
class Golden:
    """The reference tensors of one file and the description that belongs to them."""

    file: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        """What the JSON has under ``config``."""
        return self.meta.get("config", {})

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        """A stored tensor; a file that has none of this name does not demand the comparison."""
        if name not in self.tensors:
            pytest.skip(f"{self.file} stores no {name}")
        return self.tensors[name]

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the JSON, under whichever of its names; the published value where the file
        says nothing.
        """
        return setting_of(self.config, self.meta, name, default)

    def scalar(self, name: str) -> float:
        """A number of the JSON, or the one-element tensor of that name."""
        scalars = self.meta.get("scalars", {})
        if name not in scalars:
            return self[name].item()
        # Where a file has both, they are the same number.
        assert name not in self or self[name].item() == pytest.approx(scalars[name], rel=1e-6), name
        return scalars[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names start with ``prefix``, which is taken off."""
        return {
            name.removeprefix(prefix): t
            for name, t in self.tensors.items()
            if name.startswith(prefix)
        }

    def tolerance(self, quantity: str) -> Tolerance:
        """The file's own, else that of `TOLERANCES`."""
        return stated_tolerances(self.meta).get(quantity, TOLERANCES[self.file][quantity])

    def check(self, found: Tensor, expected: Tensor | str, quantity: str) -> None:
        """Compare with a tensor, or with the stored one of that name, as closely as ``quantity``
        asks for.
        """
        name = expected if isinstance(expected, str) else quantity
        stored = self[expected] if isinstance(expected, str) else expected
        self.tolerance(quantity).check(found, stored.to(found.dtype), name)

    def check_number(self, found: float | Tensor, expected: float, quantity: str = "loss") -> None:
        """The same for a single number."""
        self.tolerance(quantity).check_number(found, expected, quantity)

    def check_gradients(
        self,
        parameters: Mapping[str, nn.Parameter],
        stored: Mapping[str, Tensor],
        own_name: Callable[[str], str],
    ) -> None:
        """Gradients by reference name.  ``.row0`` at the end of one: all rows are equal, and only
        the first is kept.
        """
        assert stored, "no gradients are stored under that name"
        for name, expected in stored.items():
            found = parameters[own_name(name.removesuffix(".row0"))].grad
            assert found is not None, name
            if name.endswith(".row0"):
                torch.testing.assert_close(found, found[:1].expand_as(found))
                found = found[0]
            self.tolerance("gradient").check(
                found.reshape(expected.shape), expected, f"gradient of {name}"
            )

    def encoder(
        self, model: str = "vit_tiny_patch16_224", clip: tuple[int, int] | None = None, **more: Any
    ) -> Encoder:
        """A network of the stored sizes."""
        return build_encoder(
            model,
            image_size=pair(self.setting("image_size")),
            patch_size=self.setting("patch_size"),
            channels=self.setting("channels", 3),
            clip=clip,
            model_args=encoder_sizes(self.config, self.meta) | more,
        )

    def decoder(self) -> dict[str, Any]:
        """The settings of a method's decoders; its blocks are made as the encoder's unless the JSON
        says otherwise.
        """
        return decoder_sizes(self.config, self.meta)


def setting_of(
    config: Mapping[str, Any], meta: Mapping[str, Any], name: str, default: Any = None
) -> Any:
    """A setting from the configuration or from beside it."""
    for place in (config, meta):
        for called in (name, *ALIASES.get(name, ())):
            if called in place:
                return place[called]
    assert default is not None, f"the JSON names no {name}"
    return default


def encoder_sizes(config: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """timm's arguments for a vision transformer of the stored sizes."""
    norm = partial(nn.LayerNorm, eps=setting_of(config, meta, "norm_eps", 1e-6))
    sizes = {name: setting_of(config, meta, name) for name in ("embed_dim", "depth", "num_heads")}
    blocks = {"mlp_ratio": setting_of(config, meta, "mlp_ratio", 4.0), "norm_layer": norm}
    return {**sizes, **blocks, "qkv_bias": setting_of(config, meta, "qkv_bias", True)}


def decoder_sizes(config: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings for decoders of the stored sizes."""
    sizes = {
        name: setting_of(config, meta, name)
        for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    }
    usual = {"mlp_ratio": 4.0, "norm_eps": 1e-6, "qkv_bias": True}
    for name, published in usual.items():
        of_encoder = setting_of(config, meta, name, published)
        sizes[f"decoder_{name}"] = setting_of(config, meta, f"decoder_{name}", of_encoder)
    return sizes


def pair(size: int | list[int]) -> tuple[int, int]:
    """(rows, columns) of a number that stands for both, or of a list of two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def stated_tolerances(meta: Mapping[str, Any]) -> dict[str, Tolerance]:
    """What a JSON itself says: its ``tolerances``, or a sentence such as "1e-5 relative on losses"."""
    stated: dict[str, Tolerance] = {}
    quantities = {"losses": "loss", "pred": "tokens", "gradients": "gradient"}
    for number, kind, word in re.findall(
        r"([\d.]+e-?\d+) (relative|absolute) on (\w+)", meta.get("tolerance", "")
    ):
        quantity = quantities.get(word, word)
        # Of tensors "relative" means to their largest entry, as in the specification.
        kind = "of_largest" if (kind, quantity) == ("relative", "gradient") else kind
        stated[quantity] = Tolerance(**{kind: float(number)})
    for quantity, bound in meta.get("tolerances", {}).items():
        stated[quantity] = (
            Tolerance(**bound) if isinstance(bound, dict) else Tolerance(float(bound))
        )
    return stated


def golden_folder() -> Path:
    """PATCHMINE_GOLDEN, or `../shared/golden` beside the repository."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "golden"
    return Path(os.environ.get("PATCHMINE_GOLDEN") or beside)


@cache
def described(file: str) -> dict[str, Any]:
    """The JSON of a file; nothing where there is none, so that tests can be listed without the
    folder.
    """
    path = golden_folder() / f"{file}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@cache
def stored_names(file: str) -> list[str]:
    """Names of all tensors of a file; none where there is no file."""
    path = golden_folder() / f"{file}.safetensors"
    if not path.is_file():
        return []
    with safe_open(path, framework="pt") as opened:
        return list(opened.keys())


def load_golden(file: str) -> Golden:
    """The vectors of a file, or a skipped test where the folder lacks it."""
    folder = golden_folder()
    if not folder.is_dir():
        pytest.skip(f"the folder of golden vectors {folder} is missing; set PATCHMINE_GOLDEN")
    if not described(file):
        pytest.skip(f"{folder / file}.json is missing")
    return Golden(file, described(file), load_file(folder / f"{file}.safetensors"))


class FedNoise:
    """Stands in for a method's noise and gives what was stored, one after the other; the last one
    again and again.
    """

    def __init__(self, *stored: Tensor) -> None:
        self.stored = list(stored)

    def uniform(self, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        noise = self.stored.pop(0) if len(self.stored) > 1 else self.stored[0]
        assert noise.shape == (rows, *shape)
        return noise.to(device)


def repeating(order: Tensor) -> Tensor:
    """Noise whose ascending order (B, n) is ``order``: the k-th of it gets the k-th lowest number
    in [0, 1).
    """
    ranks = torch.arange(order.shape[1]).expand_as(order) / order.shape[1]
    return torch.zeros(order.shape).scatter(1, order, ranks)


def batch_of(*views: Tensor) -> Batch:
    """Views of whole, unflipped images."""
    rows, count = len(views[0]), len(views)
    box = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(rows, count, 4)
    flip = torch.zeros(rows, count, dtype=torch.bool)
    if count == 1:
        box, flip = box[:, 0], flip[:, 0]
    return Batch(list(views), torch.arange(rows), box, flip)


def load_weights(
    method: Method, stored: Mapping[str, Tensor], absent: tuple[str, ...] = ()
) -> None:
    """Stored tensors under our names; nothing may be missing but what starts with one of
    ``absent``, nothing left.
    """
    found = method.load_state_dict(dict(stored), strict=False)
    assert not found.unexpected_keys
    assert all(name.startswith(absent) for name in found.missing_keys), found.missing_keys


def wide(index: Tensor, values: Tensor) -> Tensor:
    """An index (B, N) repeated over the last dimension of ``values``, as `gather` wants it."""
    return index[:, :, None].expand(-1, -1, values.shape[-1])


def cut(images: Tensor, patch: tuple[int, ...]) -> Tensor:
    """All patches of pictures in PixelShuffle's order, (channel, row, column): (B, C, H, W) -> (B,
    L, C * p * q).
    """
    blocks = images.unfold(2, patch[0], patch[0]).unfold(
        3, patch[1], patch[1]
    )  # (B, C, rows, columns, p, q)
    return blocks.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def normalised_crops(golden: Golden) -> list[Tensor]:
    """Two global crops and the local ones, which are stored in bytes, with ImageNet's mean and
    deviation.
    """
    mean, std = torch.tensor(IMAGENET)[:, :, None, None]
    count = 2 + golden.config["n_local"]
    return [(golden[f"in.crop{number}_u8"] / 255 - mean) / std for number in range(count)]


def tiny_resnet(channels: list[int], image_size: int | list[int]) -> ResNet:
    """timm's ResNet with one block a stage; its stem, which is 64 wide whatever is asked for, as
    narrow as stored.
    """
    sizes = {"layers": [1] * len(channels), "channels": channels}
    encoder = build_encoder("resnet18", image_size=pair(image_size), model_args=sizes)
    encoder.conv1 = nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False)
    encoder.bn1 = nn.BatchNorm2d(channels[0])
    encoder.layer1 = nn.Sequential(BasicBlock(channels[0], channels[0]))
    return encoder

"""Reference numbers: `METHOD.safetensors`, with a `METHOD.json` beside it that says all about sizes and options."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from patchmine.method import Method
from patchmine.methods import METHODS
from patchmine.models.official import from_reference_names
from patchmine.models.vit import build_encoder
from patchmine.types import Batch


@dataclass(frozen=True)
class Golden:
    """One method's reference tensors and the description that belongs to them."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    def scalar(self, name: str) -> float:
        """A number of the JSON, or the one-element tensor of that name."""
        scalars = self.meta.get("scalars", {})
        return scalars[name] if name in scalars else self.tensors[name].item()

    def state(self, prefix: str = "state.", *, teacher: bool = False) -> dict[str, Tensor]:
        """Stored parameters under our names."""
        stored = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        return from_reference_names(stored, teacher=teacher)

    def gradients(self, prefix: str) -> dict[str, Tensor]:
        """Stored gradients ``PREFIX.grad.NAME`` by reference name."""
        start = f"{prefix}.grad."
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}

    def batch(self) -> Batch:
        images = self.tensors["imgs"]
        rows = len(images)
        return Batch([images], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool))

    def build(self, **options: Any) -> Method:
        """The method at the stored sizes with the stored weights of the student."""
        c = self.config
        assert self.meta.get("norm_eps", 1e-6) == 1e-6, "decoders are built with eps 1e-6"
        assert self.meta.get("mlp_ratio", 4.0) == 4.0, "decoders are built with an MLP ratio of 4"
        sizes = dict(embed_dim=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"])
        encoder = build_encoder(
            "vit_tiny_patch16_224",
            image_size=(c["img_size"], c["img_size"]),
            patch_size=c["patch_size"],
            model_args=sizes
            | dict(mlp_ratio=self.meta.get("mlp_ratio", 4.0), qkv_bias=self.meta.get("qkv_bias", True)),
        )
        kind = METHODS[self.meta["method"]]
        decoder = {name: c[name] for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")}
        method = kind(kind.Config(mask_ratio=c["mask_ratio"], **decoder, **options), encoder)
        own = method.state_dict()
        state = {name: tensor for name, tensor in self.state().items() if name in own}
        missing = method.load_state_dict(state, strict=False).missing_keys
        assert all(name.startswith("teacher.") for name in missing)
        if "decoder_input.pos_embed" in self.state():  # a fixed table, not a parameter: it must be the one we compute
            stored = self.state()["decoder_input.pos_embed"][0, 1:]
            torch.testing.assert_close(method.decoder_input.pos_embed, stored, atol=1e-6, rtol=0)
        return method.train()


class FedNoise:
    """Stands in for a method's noise and gives what was stored."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def uniform(self, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        assert self.noise.shape == (rows, *shape)
        return self.noise.to(device)


@pytest.fixture(scope="session")
def golden_folder(repository: Path) -> Path:
    """PATCHMINE_GOLDEN, or `../shared/golden` beside the repository."""
    folder = Path(os.environ.get("PATCHMINE_GOLDEN") or repository.parent / "shared" / "golden")
    if not folder.is_dir():
        pytest.skip(f"the folder of golden vectors {folder} is missing; set PATCHMINE_GOLDEN")
    return folder


@pytest.fixture(scope="session")
def load_golden(golden_folder: Path) -> Callable[[str], Golden]:
    """Golden vectors by method name."""

    def load(name: str) -> Golden:
        path = golden_folder / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"{path} is missing")
        return Golden(json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")))

    return load


@pytest.fixture(scope="session")
def fed_noise() -> type[FedNoise]:
    return FedNoise


@pytest.fixture(scope="session")
def compare_gradients() -> Callable[..., None]:
    """Gradients of a method against stored ones: relative to each one's largest entry, plus an absolute 1e-7.

    ``.row0`` at the end of a stored name: only the first row is kept there because all rows are equal.
    """

    def compare(method: Method, stored: dict[str, Tensor], relative: float = 1e-3) -> None:
        assert stored, "no gradients are stored under that name"
        parameters = dict(method.named_parameters())
        for name, expected in stored.items():
            (own,) = from_reference_names({name.removesuffix(".row0"): expected})
            found = parameters[own].grad
            assert found is not None, name
            if name.endswith(".row0"):
                torch.testing.assert_close(found, found[:1].expand_as(found))
                found = found[0].reshape(expected.shape)
            bound = relative * expected.abs().max().item() + 1e-7
            torch.testing.assert_close(
                found, expected, atol=bound, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )

    return compare

"""Random weights of small networks, and how a file of vectors is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from second_folder import reference as slow
from torch import Tensor

SOURCE = "plain loops in float64, stored in float32"
RATIO = 3.0  # of the MLPs, where the published one is 4


class Drawing:
    """Random numbers that float32 holds, as float64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).double()

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).double()

    def linear(
        self, name: str, width: int, out: int, *, bias: bool = True, shape: Sequence[int] = ()
    ) -> dict:
        drawn = {
            f"{name}.weight": self.normal(out, width, scale=width**-0.5).reshape(
                shape or (out, width)
            )
        }
        return drawn | ({f"{name}.bias": self.normal(out, scale=0.05)} if bias else {})

    def norm(self, name: str, width: int) -> dict[str, Tensor]:
        weight = (1 + self.normal(width, scale=0.05)).float().double()
        return {f"{name}.weight": weight, f"{name}.bias": self.normal(width, scale=0.05)}

    def blocks(
        self, name: str, width: int, depth: int, *, qkv: str = "one", ratio: float = RATIO
    ) -> dict[str, Tensor]:
        """``qkv``: one bias for all three, "none", or "qv" for two that are stored apart."""
        drawn: dict[str, Tensor] = {}
        hidden = int(width * ratio)
        for i in range(depth):
            own = f"{name}.{i}"
            drawn |= self.norm(f"{own}.norm1", width) | self.norm(f"{own}.norm2", width)
            drawn |= self.linear(f"{own}.attn.qkv", width, 3 * width, bias=qkv == "one")
            if qkv == "qv":
                drawn |= {
                    f"{own}.attn.{part}_bias": self.normal(width, scale=0.05) for part in "qv"
                }
            drawn |= self.linear(f"{own}.attn.proj", width, width)
            drawn |= self.linear(f"{own}.mlp.fc1", width, hidden) | self.linear(
                f"{own}.mlp.fc2", hidden, width
            )
        return drawn

    def encoder(self, c: dict[str, Any], *, qkv: str = "one") -> dict[str, Tensor]:
        width, patch = c["embed_dim"], c["patch_size"]
        rows, columns = grid(c)
        table = slow.sincos(width, rows, columns).float().double()
        drawn = {"cls_token": self.normal(1, 1, width, scale=0.3)}
        drawn["pos_embed"] = torch.cat([torch.zeros(1, 1, width), table[None]], dim=1)
        drawn |= self.linear(
            "patch_embed.proj", 3 * patch**2, width, shape=(width, 3, patch, patch)
        )
        return drawn | self.blocks("blocks", width, c["depth"], qkv=qkv) | self.norm("norm", width)

    def decoder(self, c: dict[str, Any], out: int, *, qkv: str = "one") -> dict[str, Tensor]:
        width = c["decoder_embed_dim"]
        table = slow.sincos(width, *grid(c)).float().double()
        drawn = {"mask_token": self.normal(1, 1, width, scale=0.3)}
        drawn["decoder_pos_embed"] = torch.cat([torch.zeros(1, 1, width), table[None]], dim=1)
        drawn |= self.linear("decoder_embed", c["embed_dim"], width)
        drawn |= self.blocks("decoder_blocks", width, c["decoder_depth"], qkv=qkv)
        return drawn | self.norm("decoder_norm", width) | self.linear("decoder_pred", width, out)


def grid(c: dict[str, Any]) -> tuple[int, int]:
    height, width = c["img_size"]
    return height // c["patch_size"], width // c["patch_size"]


def learning(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy whose weights take gradients; fixed tables do not."""
    return {
        name: t.clone().requires_grad_(not name.endswith("pos_embed")) for name, t in state.items()
    }


def gradients(
    loss: Tensor, state: dict[str, Tensor], names: Sequence[str], prefix: str
) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, [state[name] for name in names], retain_graph=True)
    return {f"{prefix}{name}": gradient for name, gradient in zip(names, found, strict=True)}


def save(folder: Path, file: str, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Numbers in float32, as the given files have them; keys in reverse order, which must not
    matter.
    """
    stored = {
        name: (t.detach().float() if t.is_floating_point() else t.detach()).contiguous().clone()
        for name, t in tensors.items()
    }
    shapes = {name: list(t.shape) for name, t in reversed(stored.items())}
    meta = {"tensors": shapes, **dict(reversed(meta.items()))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{file}.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    save_file(stored, folder / f"{file}.safetensors")


def named(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": t for name, t in state.items()}


def run_encoder(tokens: Tensor, state: dict[str, Tensor], heads: int, eps: float = 1e-6) -> Tensor:
    """Class token in front, all blocks, the final norm."""
    start = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(tokens), -1, -1)
    tokens, _ = slow.blocks(torch.cat([start, tokens], dim=1), state, "blocks", heads, eps)
    return slow.layer_norm(tokens, state, "norm", eps)


def run_decoder(
    tokens: Tensor, state: dict[str, Tensor], heads: int, eps: float = 1e-6, kind: str = ""
) -> Tensor:
    tokens, _ = slow.blocks(tokens, state, f"decoder_blocks{kind}", heads, eps)
    return slow.linear(
        slow.layer_norm(tokens, state, f"decoder_norm{kind}", eps), state, f"decoder_pred{kind}"
    )

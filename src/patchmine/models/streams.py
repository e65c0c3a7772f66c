"""Two streams over one sequence: content under a causal mask, and queries that attend to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from patchmine.backbones.blocks import run_parts
from patchmine.backbones.family import Encoder
from patchmine.backbones.tokens import turned
from patchmine.backbones.vit import initialise
from patchmine.errors import UserError


class QueryBlock(nn.Module):
    """Cross-attention from queries to content, then an MLP; both residual (SAIM, blocks.py)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        hidden: int,
        norm_eps: float = 1e-6,
        rotate_half: bool = False,
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.num_heads, self.rotate_half = num_heads, rotate_half
        self.norm1 = norm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = norm(width)
        self.mlp = Mlp(width, hidden, width)

    def initialise(self) -> None:
        """As everything else, but keys and values as if each had a matrix of its own."""
        initialise(self)
        for part in self.key_value.weight.detach().chunk(2):
            nn.init.xavier_uniform_(part)

    def forward(
        self,
        queries: Tensor,
        content: Tensor,
        mask: Tensor | None = None,
        angles: Tensor | None = None,
    ) -> Tensor:
        """(B, N, D), (B, M, D) -> (B, N, D); ``mask`` (1 or B, 1, N, M), None: causal, N = M.

        ``angles`` (1 or B, 1, N, A) turn queries, and keys behind the first.
        """
        query = _heads(self.query(self.norm1(queries)), self.num_heads)
        key, value = self.key_value(self.norm1(content)).chunk(2, dim=-1)
        key, value = (_heads(part, self.num_heads) for part in (key, value))
        if angles is not None:
            query = turned(query, angles, self.rotate_half)
            rest = turned(key[:, :, 1:], angles[:, :, : key.shape[2] - 1], self.rotate_half)
            key = torch.cat([key[:, :, :1], rest], dim=2)
        how: Any = dict(attn_mask=mask, is_causal=mask is None)
        mixed = F.scaled_dot_product_attention(query, key, value, **how)
        queries = queries + self.proj(_joined(mixed))
        return queries + self.mlp(self.norm2(queries))


def query_stream(encoder: Encoder, depth: int) -> nn.ModuleList:
    """``depth`` fresh query blocks of the sizes of the encoder's own."""
    block = encoder.blocks[0]
    sizes = (encoder.embed_dim, block.attn.num_heads, block.mlp.fc2.in_features, block.norm1.eps)
    half = getattr(block.attn, "rotate_half", False)
    blocks = [QueryBlock(*sizes, rotate_half=half) for _ in range(depth)]
    for each in blocks:
        each.initialise()
    return nn.ModuleList(blocks)


def content_block(
    block: Any, tokens: Tensor, mask: Tensor | None = None, angles: Tensor | None = None
) -> Tensor:
    """A stock block (B, N, D) -> (B, N, D) under ``mask`` (1 or B, 1, N, N); None: causal.

    ``angles`` (1 or B, 1, N - 1, A) of the patches behind the first token, which `EvaBlock` takes.
    """
    if isinstance(block, EvaBlock):
        if mask is None:
            mask = tokens.new_ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        taken: Tensor = block(tokens, rope=angles, attn_mask=mask)
        return taken
    # Written out because not every timm that we support lets a block be told so.
    attention = block.attn
    query, key, value = (
        _heads(part, attention.num_heads)
        for part in attention.qkv(block.norm1(tokens)).chunk(3, dim=-1)
    )
    mixed = F.scaled_dot_product_attention(
        attention.q_norm(query),
        attention.k_norm(key),
        value,
        attn_mask=mask,
        dropout_p=attention.attn_drop.p if block.training else 0.0,
        is_causal=mask is None,
    )
    tokens = tokens + block.drop_path1(
        block.ls1(attention.proj_drop(attention.proj(_joined(mixed))))
    )
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def two_streams(
    encoder: Encoder,
    query_blocks: Sequence[QueryBlock] | nn.ModuleList,
    content: Tensor,
    queries: Tensor,
    content_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    angles: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """What every block makes of content (B, M, D) and queries (B, N, D), before the last norm.

    ``angles`` (1 or B, 1, N, A) of the queries' patches, which those of content are the first of.
    """
    # The query blocks are spread evenly over the encoder's, each behind the block whose output it
    # reads.  Without masks both streams are in the order of ranks, content with one token before
    # it: query r reads the first r + 1 tokens.
    contents, answers = [encoder.norm_pre(content)], [queries]
    step = len(encoder.blocks) // len(query_blocks)
    told = None if angles is None else angles[:, :, : content.shape[1] - 1]
    for i, block in enumerate(encoder.blocks):
        contents.append(run_parts(block, content_block, contents[-1], content_mask, told))
        if (i + 1) % step == 0:
            query_block = query_blocks[i // step]
            answers.append(query_block(answers[-1], contents[-1], query_mask, angles))
    return contents[1:], answers[1:]


def check_causal(encoder: Encoder, method: str) -> None:
    """UserError for other blocks than `two_streams` runs, or another start than a class token."""
    prefix = encoder.num_prefix_tokens
    if encoder.cls_token is None or prefix != 1:
        wrong = f"method={method} starts from one class token, and this model has {prefix} tokens"
        registers = "num_reg_tokens" if type(encoder.blocks[0]) is EvaBlock else "reg_tokens"
        remedy = f"set model_args.class_token=true model_args.{registers}=0"
        raise UserError(f"{wrong} before its patches: {remedy}, or choose vit_base_patch16_224")
    if not all(map(_runs_under_masks, encoder.blocks)):
        wrong = f"needs blocks of a plain vision transformer, {type(encoder).__name__} has others"
        raise UserError(f"method={method} {wrong}: choose one such as vit_base_patch16_224")


def _runs_under_masks(block: Any) -> bool:
    """Whether `content_block` runs it."""
    return type(block) is EvaBlock or (type(block) is Block and _plain(block.attn))


def _plain(attention: nn.Module) -> bool:
    """No gate and no norm behind attention: timm's newer options, unknown to `content_block`."""
    extra = [getattr(attention, name, None) for name in ("gate", "norm")]
    return type(attention) is Attention and all(
        part is None or isinstance(part, nn.Identity) for part in extra
    )


@contextmanager
def without_learning(encoder: nn.Module, device: torch.device) -> Iterator[None]:
    """Run an encoder that also learns in this step: in eval mode, in the step's precision."""
    # Autocast must not keep the weights that it casts meanwhile: until pytorch's pull request
    # 165068 they stayed without gradients, and nothing would reach the weights from what learns.
    kind, training = device.type, encoder.training
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    autocast = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
    encoder.eval()
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        encoder.train(training)


def _heads(tokens: Tensor, count: int) -> Tensor:
    """(B, N, D) -> (B, heads, N, D / heads)."""
    return tokens.view(*tokens.shape[:2], count, -1).transpose(1, 2)


def _joined(mixed: Tensor) -> Tensor:
    """(B, heads, N, D / heads) -> (B, N, D)."""
    return mixed.transpose(1, 2).flatten(2)

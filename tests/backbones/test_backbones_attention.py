"""One row of attention against timm's whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchmine.backbones.attention import class_attention
from patchmine.backbones.family import Encoder, build_encoder
from patchmine.errors import UserError

TINY = dict(embed_dim=32, depth=3, num_heads=2)
MODELS = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"qk_norm": True}),
    ("vit_tiny_patch16_224", {"reg_tokens": 2, "qkv_bias": False}),
    ("beit_base_patch16_224", {"use_rel_pos_bias": True}),
    ("vit_small_patch16_dinov3", {}),
    ("vit_small_patch16_dinov3_qkvb", {}),
    ("eva02_tiny_patch14_224", {"qkv_fused": False}),
    ("vit_small_patch16_rope_ape_224", {}),
    (
        "beit_base_patch16_224",
        {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_abs_pos_emb": True},
    ),
]


def whole_matrix(encoder: Encoder, images: Tensor) -> Tensor:
    """The last block's attention (B, heads, N, N), as timm computes it without fused kernels."""
    attention = encoder.blocks[-1].attn
    attention.fused_attn = False
    seen = []
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encoder.forward_features(images)
    return seen[0]


@pytest.mark.parametrize(("model", "extra"), MODELS, ids=str)
def test_is_the_class_tokens_row(model: str, extra: dict[str, bool]) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(
        model, image_size=(16, 24), patch_size=4, model_args={**TINY, **extra}
    ).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        images = torch.randn(2, 3, 16, 24)
        torch.testing.assert_close(
            class_attention(encoder, images), whole_matrix(encoder, images)[:, :, 0]
        )


def test_needs_a_class_token() -> None:
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        image_size=(16, 16),
        patch_size=4,
        model_args={**TINY, "class_token": False},
    )
    with pytest.raises(UserError, match="class_token"):
        class_attention(encoder, torch.randn(1, 3, 16, 16))

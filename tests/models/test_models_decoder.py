"""The decoder of a masked autoencoder: its blocks are timm's, and what their settings say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from patchmine.backbones.family import build_encoder
from patchmine.errors import UserError
from patchmine.methods.amt import AMT
from patchmine.methods.droppos import DropPos
from patchmine.methods.emae import EMAE
from patchmine.methods.hpm import HPM
from patchmine.methods.mae import MAE
from patchmine.models.decoder import Decoder

SIZES = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
BLOCKS = dict(decoder_mlp_ratio=1.5, decoder_norm_eps=1e-3, decoder_qkv_bias=False)


@pytest.mark.parametrize(
    "options",
    [{}, dict(decoder_mlp_ratio=2.5, decoder_norm_eps=1e-3), dict(decoder_qkv_bias=False)],
    ids=str,
)
def test_the_last_rows_are_those_of_the_plain_blocks(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    decoder = Decoder(MAE.Config(**SIZES, **options), 5)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(3, 7, 16)
    plain = tokens
    for block in decoder.blocks:
        plain = block(plain)
    torch.testing.assert_close(
        decoder(tokens, 4), decoder.norm(plain)[:, -4:], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", [MAE, HPM, EMAE, DropPos, AMT])
def test_every_decoder_of_a_method_has_the_blocks_that_its_settings_ask_for(kind: Any) -> None:
    sizes = dict(embed_dim=16, depth=1, num_heads=2)
    encoder = build_encoder(
        "vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, model_args=sizes
    )
    more = dict(multi_task=True) if kind is DropPos else {}
    method = kind(kind.Config(**SIZES, **BLOCKS, **more), encoder)
    decoders = [module for module in method.modules() if isinstance(module, Decoder)]
    assert (
        len(decoders) == {MAE: 1, HPM: 3, EMAE: 1, DropPos: 2, AMT: 1}[kind]
    )  # HPM: the teacher's predictor too
    for decoder in decoders:
        for block in decoder.blocks:
            assert block.mlp.fc1.out_features == 24
            assert block.attn.qkv.bias is None
            assert (block.norm1.eps, block.norm2.eps, decoder.norm.eps) == (1e-3,) * 3


@pytest.mark.parametrize("kind", [MAE, HPM, EMAE, DropPos, AMT])
def test_the_blocks_are_those_of_mae_unless_asked_for_otherwise(kind: Any) -> None:
    config = kind.Config()
    assert (config.decoder_mlp_ratio, config.decoder_norm_eps, config.decoder_qkv_bias) == (
        4.0,
        1e-6,
        True,
    )


def test_a_perceptron_without_hidden_units_is_refused() -> None:
    settings = MAE.Config(decoder_embed_dim=16, decoder_num_heads=2, decoder_mlp_ratio=0.01)
    with pytest.raises(
        UserError, match=r"method\.decoder_mlp_ratio=0\.01 .*method\.decoder_embed_dim=16"
    ):
        Decoder(settings, 5)

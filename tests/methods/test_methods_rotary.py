"""Methods that order their patches themselves, on encoders whose attention turns queries and keys:
each patch keeps its own angles.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchmine.backbones.eva import EVA
from patchmine.backbones.family import build_encoder, encode
from patchmine.backbones.tokens import embed_patches, patch_positions, prefix_tokens
from patchmine.errors import UserError
from patchmine.methods import METHODS, method_class
from patchmine.models.streams import two_streams
from patchmine.ops.orders import visibility
from patchmine.types import Mask

TINY = dict(embed_dim=32, depth=2, num_heads=2)
DINOV3, EVA02 = "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"


def build(name: str, model: str, **options: Any) -> Any:
    torch.manual_seed(0)
    arguments = TINY | ({"init_values": 0.5, "num_reg_tokens": 0} if model == DINOV3 else {})
    encoder = build_encoder(model, image_size=(16, 24), patch_size=4, model_args=arguments)
    settings = METHODS[name]
    narrow = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    known = {key: value for key, value in narrow.items() if key in settings.model_fields}
    method = method_class(settings)(settings(**known, **options), encoder).double().eval()
    method.noise.begin(0)
    return method


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 16, 24, generator=generator, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("model", [DINOV3, EVA02])
def test_parts_of_emae_are_sequences_of_their_own(model: str, images: Tensor) -> None:
    method = build("emae", model)
    parts = method.draw_parts(images)  # (B, K, V)
    together = method.encode_parts(images, parts).unflatten(0, (2, -1))
    for number, part in enumerate(parts.unbind(dim=1)):
        torch.testing.assert_close(together[:, number], encode(method.encoder, images, part))


@torch.no_grad()
@pytest.mark.parametrize("model", [DINOV3, EVA02])
def test_amt_among_simmims_tokens_does_not_mind_their_order(model: str, images: Tensor) -> None:
    method = build("amt", model, host="simmim", mask_unit=4)
    mask = method.draw_mask(images, None)
    other = Mask(mask.visible.flip(1), mask.masked.flip(1), mask.num_patches)
    predicted = method.reconstruct(images, mask)
    torch.testing.assert_close(method.reconstruct(images, other).flip(1), predicted)
    # and each masked place is told from the others
    assert (predicted[:, 1:] - predicted[:, :-1]).abs().amax(dim=-1).min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"ties": "keep"}], ids=str)
@pytest.mark.parametrize("model", [DINOV3, EVA02])
def test_semaims_sorted_form_equals_its_masked_form(
    model: str, options: dict[str, Any], images: Tensor
) -> None:
    method = build("semaim", model, **options)
    encoder, patches = method.encoder, embed_patches(method.encoder, images)
    order, score = method.draw_order(images, method.judge(images, patches)[1])
    found = method.predict_patches(patches, order, score)

    ranks = torch.arange(24).expand_as(order) if score is None else score.expand_as(order)
    ranks = torch.zeros_like(ranks).scatter(1, order, ranks)  # (B, L), by patch
    table = patch_positions(encoder) if model == EVA02 else method.query_table
    masks = [mask[:, None] for mask in visibility(ranks)]
    angles = EVA.angles(encoder, (4, 6))
    assert angles is not None
    content = torch.cat([prefix_tokens(encoder, len(images)), patches], dim=1)
    queries = table.expand(len(images), -1, -1)
    streams = (content, queries, *masks, angles[None, None])
    _, answers = two_streams(encoder, method.query_blocks, *streams)
    slow = method.head(encoder.norm(answers[-1]))
    torch.testing.assert_close(found, slow.gather(1, order[:, :, None].expand_as(slow)))


def test_semaim_starts_from_one_class_token() -> None:
    encoder = build_encoder(DINOV3, image_size=(16, 24), patch_size=4, model_args=TINY)
    settings = METHODS["semaim"]()
    with pytest.raises(UserError, match=r"has 5 tokens.*model_args\.num_reg_tokens=0"):
        method_class(settings)(settings, encoder)

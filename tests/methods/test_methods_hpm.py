"""HPM's own promises (docs/methods/hpm.md)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from patchmine.backbones.family import build_encoder
from patchmine.methods import hpm as hpm_file
from patchmine.methods.hpm import HPM, predict_difficulty
from patchmine.methods.mae import MAE
from patchmine.types import Batch, Progress

EARLY, LATE = Progress(0, 200, 1), Progress(150, 200, 1)


def build(**options: Any) -> HPM:
    torch.manual_seed(0)
    args = dict(embed_dim=32, depth=2, num_heads=2)
    encoder = build_encoder(
        "vit_tiny_patch16_224", image_size=(32, 32), patch_size=4, model_args=args
    )
    settings = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2) | options
    return HPM(HPM.Config(**settings), encoder)


def batch_of(images: Tensor) -> Batch:
    rows = len(images)
    return Batch(
        [images], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool)
    )


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_teacher_has_no_pixel_decoder_and_takes_no_gradient(images: Tensor) -> None:
    method = build()
    assert {name for name, _ in method.teacher.named_children()} == {
        "encoder",
        "decoder_input",
        "predictor",
    }
    method(batch_of(images), LATE)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert not method.train().teacher.training


@pytest.mark.parametrize(
    ("options", "progress", "passes"),
    [
        ({}, EARLY, 0),
        ({}, LATE, 1),
        ({"target": "ema"}, EARLY, 1),
        ({"prediction": "none"}, LATE, 0),
    ],
)
def test_the_teacher_looks_only_when_asked(
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    progress: Progress,
    passes: int,
) -> None:
    method = build(**options)
    looked = []
    original = hpm_file.encode

    def counting(encoder: Any, *args: Any) -> Tensor:
        looked.append(encoder is not method.encoder)
        return original(encoder, *args)

    monkeypatch.setattr(hpm_file, "encode", counting)
    method(batch_of(images), progress)
    assert sum(looked) == passes
    assert len(looked) == passes + 1


def test_each_loss_teaches_its_own_decoder(images: Tensor) -> None:
    method = build()
    losses = method(batch_of(images), LATE)
    losses["prediction"].backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in method.decoder.parameters())
    assert method.encoder.blocks[0].attn.qkv.weight.grad.any()
    assert method.decoder_input.mask_token.grad.any()
    method.zero_grad()
    losses["reconstruction"].backward()
    assert all(p.grad is None or not p.grad.any() for p in method.predictor.parameters())
    assert method.encoder.blocks[0].attn.qkv.weight.grad.any()


def test_the_loss_of_predicting_has_a_weight(images: Tensor) -> None:
    def losses(**options: Any) -> dict[str, float]:
        found = build(**options)(batch_of(images), LATE)
        return {name: value.item() for name, value in found.items()}

    plain, light = losses(), losses(prediction_weight=0.1)
    assert light["loss"] == pytest.approx(light["reconstruction"] + 0.1 * light["prediction"])
    assert plain["loss"] == pytest.approx(plain["reconstruction"] + plain["prediction"])
    assert light["prediction"] == plain["prediction"]


def test_the_hardest_for_the_teacher_are_masked(images: Tensor) -> None:
    method = build()
    _, difficulty = method.ask_teachers(images, True)
    for epoch in (10, 100, 199):
        mask = method.draw_mask(images, difficulty, Progress(epoch, 200, 1))
        hard = int(48 * 0.5 * (epoch + 1) / 200)
        hardest = difficulty.argsort(dim=1)[:, -hard:]
        assert mask.as_bool().gather(1, hardest).all()
        assert mask.masked.shape == (3, 48)


def test_mean_row_equals_mean_of_outputs() -> None:
    method = build()
    tokens = torch.randn(2, 65, 16)
    slow = method.predictor.head(method.predictor(tokens, 64)).mean(dim=-1)
    torch.testing.assert_close(predict_difficulty(method.predictor, tokens, 64), slow)


def test_scalar_head_starts_where_the_published_one_does() -> None:
    published, scalar = build(), build(losspred_head="scalar")
    assert scalar.predictor.head.weight.shape == (1, 16)
    tokens = torch.randn(2, 65, 16)
    scalar.predictor.load_state_dict(
        {
            key: value
            for key, value in published.predictor.state_dict().items()
            if not key.startswith("head.")
        },
        strict=False,
    )
    found = predict_difficulty(scalar.predictor, tokens, 64)
    torch.testing.assert_close(found, predict_difficulty(published.predictor, tokens, 64))


def test_teacher_follows_the_closed_form() -> None:
    method = build(ema_start=0.9, ema_end=0.9)
    start = method.teacher.encoder.blocks[0].attn.qkv.weight.clone()
    with torch.no_grad():
        method.encoder.blocks[0].attn.qkv.weight.add_(1.0)
    student = method.encoder.blocks[0].attn.qkv.weight
    for step in range(5):
        method.after_step(Progress(step, 10, 1))
    expected = 0.9**5 * start + (1 - 0.9**5) * student
    torch.testing.assert_close(method.teacher.encoder.blocks[0].attn.qkv.weight, expected)


def test_micro_batches_leave_the_teacher_alone(images: Tensor) -> None:
    method = build()
    before = copy.deepcopy(method.teacher.state_dict())
    for _ in range(2):
        method(batch_of(images), LATE)["loss"].backward()
    assert all(
        torch.equal(value, before[key]) for key, value in method.teacher.state_dict().items()
    )


def test_without_prediction_it_is_mae(images: Tensor) -> None:
    method = build(prediction="none", norm_pix_loss=True)
    assert method.teacher is None
    sizes = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    mae = MAE(
        MAE.Config(**sizes),
        build_encoder(
            "vit_tiny_patch16_224",
            image_size=(32, 32),
            patch_size=4,
            model_args=dict(embed_dim=32, depth=2, num_heads=2),
        ),
    )
    mae.load_state_dict(method.state_dict())
    assert method(batch_of(images), LATE)["loss"].item() == pytest.approx(
        mae(batch_of(images), LATE)["loss"].item()
    )


def test_feature_targets_are_the_teachers_own(images: Tensor) -> None:
    method = build(target="ema")
    assert method.decoder.head.out_features == 32
    features, difficulty = method.ask_teachers(images, False)
    assert features.shape == (3, 64, 32)
    assert difficulty is None
    assert 0 < method(batch_of(images), EARLY)["reconstruction"].item() < 4


@pytest.mark.parametrize("prediction", ["relative", "absolute"])
def test_it_learns_where_the_noise_is(prediction: str) -> None:
    """Images half flat, half noise: the noisy half is hard, and after some steps the teacher says
    so.
    """
    method = build(prediction=prediction, ema_start=0.9, ema_end=0.9, decoder_embed_dim=32)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)

    def half_noisy(count: int) -> Tensor:
        pixels = torch.randn(count, 3, 32, 32, generator=generator)
        pixels[:, :, :, :16] = torch.randn(count, 3, 1, 1, generator=generator)
        return pixels

    for step in range(120):
        method.noise.begin(step)
        losses = method(batch_of(half_noisy(16)), Progress(step, 120, 1))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        method.after_step(Progress(step, 120, 1))
    _, difficulty = method.ask_teachers(half_noisy(16), True)
    columns = difficulty.argsort(dim=1)[:, -24:] % 8
    assert (columns >= 4).float().mean() > 0.8
    if prediction == "relative":
        assert losses["prediction"].item() < 0.6  # from ln 2 = 0.693

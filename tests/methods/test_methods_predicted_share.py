"""Part of the masked patches is predicted: which, how many, and that the rest costs nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from patchmine.backbones.family import build_encoder, encode
from patchmine.errors import UserError
from patchmine.methods.hpm import HPM, predict_difficulty
from patchmine.methods.mae import MAE
from patchmine.models.decoder import last_rows, predicted_part
from patchmine.models.noise import Noise
from patchmine.ops.losses import relative_difficulty_loss
from patchmine.types import Batch, Mask, Progress

EARLY, LATE = Progress(0, 400, 1), Progress(399, 400, 1)
CROSS = dict(decoder_attention="cross")


def build(kind: Any = MAE, clip: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    encoder = build_encoder(
        "video_vit_tiny_patch16" if clip else "vit_tiny_patch16_224",
        image_size=(32, 32),
        patch_size=4,
        model_args=dict(embed_dim=32, depth=2, num_heads=2),
        **(dict(clip=(4, 2)) if clip else {}),
    )
    decoder = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
    method = kind(kind.Config(**(decoder | options)), encoder).train()
    method.noise.begin(3)
    return method


def pictures(clip: bool = False, rows: int = 4) -> Tensor:
    size = (4, 32, 32) if clip else (32, 32)
    return torch.randn(rows, 3, *size, generator=torch.Generator().manual_seed(5))


def batch_of(images: Tensor) -> Batch:
    rows = torch.arange(len(images))
    return Batch([images], rows, torch.zeros(len(rows), 4), rows < 0)


@pytest.mark.parametrize("clip", [False, True])
def test_a_prediction_does_not_depend_on_what_else_is_predicted(clip: bool) -> None:
    method, images = build(clip=clip, **CROSS), pictures(clip)
    mask = method.draw_mask(images)
    part = predicted_part(mask, method.noise, 7)
    where = (mask.masked[:, None] == part.masked[:, :, None]).int().argmax(dim=2)
    everything = method.reconstruct(images, mask)
    expected = everything.gather(1, where[:, :, None].expand(-1, -1, everything.shape[2]))
    torch.testing.assert_close(method.reconstruct(images, part), expected, atol=1e-5, rtol=1e-5)
    alike = build(clip=clip).reconstruct(images, part)
    assert alike.shape == expected.shape
    other = build(clip=clip).reconstruct(images, mask).gather(1, where[:, :, None].expand_as(alike))
    assert (alike - other).abs().max() > 1e-3  # with self-attention it does


@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("clip", [False, True])
def test_the_loss_is_that_of_the_part_that_was_drawn(attention: str, clip: bool) -> None:
    method = build(clip=clip, decoder_attention=attention, predicted_share=1 / 3)
    images = pictures(clip)
    method.noise.begin(8)
    loss = method(batch_of(images), EARLY)["loss"]
    method.noise.begin(8)
    mask = method.draw_mask(images)
    noise = method.noise.uniform(*mask.masked.shape)
    count = round(mask.masked.shape[1] / 3)
    errors = []
    for row in range(len(images)):  # one image at a time, by Python's own sorting
        order = sorted(range(mask.masked.shape[1]), key=noise[row].tolist().__getitem__)
        chosen = mask.masked[row, sorted(order[:count])][None]
        one = Mask(mask.visible[row : row + 1], chosen, mask.num_patches)
        picture = images[row : row + 1]
        errors.append(method.error(method.reconstruct(picture, one), picture, one))
    torch.testing.assert_close(loss, torch.cat(errors).mean(), atol=1e-5, rtol=1e-5)


def test_all_masked_patches_are_predicted_alike_often() -> None:
    rows, count = 4000, 5
    noise = Noise(1)
    masked = torch.arange(3, 23).expand(rows, -1)  # 20 patches
    mask = Mask(torch.arange(3).expand(rows, -1), masked, 23)
    part = predicted_part(mask, noise, count)
    assert (part.masked.diff(dim=1) > 0).all()
    assert torch.equal(part.visible, mask.visible)
    often = part.as_bool()[:, 3:].sum(dim=0)
    assert often.sum() == rows * count
    share = count / 20
    spread = ((often - rows * share) ** 2 / (rows * share * (1 - share))).sum() * 19 / 20
    assert spread < 43.8  # 99.9 % point of chi-square for 19 degrees


def test_all_of_them_draw_no_further_noise() -> None:
    method, images = build(), pictures()
    method(batch_of(images), EARLY)
    assert method.noise.draws == 1
    mask = method.draw_mask(images)
    assert predicted_part(mask, method.noise, mask.masked.shape[1]) is mask


def test_parts_are_the_same_for_any_number_of_processes() -> None:
    def drawn(first: int, rows: int) -> Tensor:
        noise = Noise(2)
        noise.begin(6, first, 8)
        masked = torch.arange(30).expand(rows, -1)
        return predicted_part(Mask(masked[:, :0], masked, 30), noise, 11).masked

    whole = drawn(0, 8)
    for first in (0, 2, 4, 6):
        assert torch.equal(drawn(first, 2), whole[first : first + 2])


def test_every_weight_of_a_cross_decoder_learns() -> None:
    method = build(**CROSS, predicted_share=0.25)
    losses = []
    images = torch.linspace(-1, 1, 32)[None, None] * torch.randn(16, 3, 1, 1)
    images = images.expand(-1, -1, 32, -1)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    for step in range(80):
        method.noise.begin(step)
        loss = method(batch_of(images), EARLY)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("kind", [MAE, HPM])
def test_panels_show_all_masked_patches(kind: Any, clip: bool, attention: str) -> None:
    method = build(kind, clip, decoder_attention=attention, predicted_share=0.1)
    images = pictures(clip, 2)
    by_title = {panel.title: panel.data for panel in method.panels(batch_of(images), LATE)}
    visible = by_title["visible"].isnan()
    plain = by_title["plain reconstruction"].isnan()
    assert torch.equal(plain, ~visible)
    assert by_title["error"].isnan().float().mean() == pytest.approx(0.25)


def test_a_share_that_predicts_nothing_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"method\.predicted_share=0\.01 predicts 0 of 48 masked patches, and 1 are needed: raise",
    ):
        build(predicted_share=0.01)
    with pytest.raises(
        UserError, match=r"=0\.02 predicts 1 of 48 masked patches, and 2 are needed"
    ):
        build(HPM, predicted_share=0.02)


# ---- HPM ----


@pytest.mark.parametrize("predictor", [{}, dict(predictor="head", predictor_depth=1)], ids=str)
@pytest.mark.parametrize("attention", ["self", "cross"])
@pytest.mark.parametrize("clip", [False, True])
def test_hpm_ranks_the_part_that_was_drawn(
    clip: bool, attention: str, predictor: dict[str, Any]
) -> None:
    share = dict(decoder_attention=attention, predicted_share=0.25)
    method, images = build(HPM, clip, **share, **predictor), pictures(clip)
    found = method(batch_of(images), LATE)
    method.noise.begin(3)
    _, difficulty = method.ask_teachers(images, True)
    mask = method.draw_mask(images, difficulty, LATE)
    assert mask.masked.shape[1] == 48 * (2 if clip else 1)
    part = predicted_part(mask, method.noise, 12 * (2 if clip else 1))
    error = method.error(method_output(method, images, part), images, None, part)
    tokens = tokens_of(method, images, part)
    if not len(method.predictor.blocks):
        tokens = last_rows(method.decoder.blocks[:1], tokens, part.masked.shape[1])
    predicted = predict_difficulty(method.predictor, tokens, part.masked.shape[1])
    torch.testing.assert_close(found["reconstruction"], error.mean(), atol=1e-5, rtol=1e-5)
    expected = relative_difficulty_loss(predicted, error.detach())
    torch.testing.assert_close(found["prediction"], expected, atol=1e-5, rtol=1e-5)
    found["loss"].backward()
    learning = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learning)


def tokens_of(method: HPM, images: Tensor, mask: Mask) -> Tensor:
    return method.decoder_input(encode(method.encoder, images, mask.visible), mask)


def method_output(method: HPM, images: Tensor, mask: Mask) -> Tensor:
    tokens = tokens_of(method, images, mask)
    return method.decoder.head(method.decoder(tokens, mask.masked.shape[1]))


def test_of_what_hpm_masks_easy_and_hard_patches_are_predicted_alike_often() -> None:
    method = build(HPM, predicted_share=0.25, alpha_start=0.5, alpha_end=0.5, **CROSS)
    difficulty = torch.arange(64.0).expand(40, -1)
    drawn = {"masked": torch.zeros(64), "predicted": torch.zeros(64)}
    for step in range(50):
        method.noise.begin(step)
        mask = method.draw_mask(pictures(rows=40), difficulty, LATE)
        part = predicted_part(mask, method.noise, method.num_predicted)
        drawn["masked"] += mask.as_bool().sum(dim=0)
        drawn["predicted"] += part.as_bool().sum(dim=0)
    assert drawn["masked"][40:].eq(2000).all()  # the 24 hardest are always among the masked
    share = drawn["predicted"] / drawn["masked"]
    spread = 4 * (0.25 * 0.75 / drawn["masked"].min().item()) ** 0.5
    assert (share - 0.25).abs().max() < spread


@pytest.mark.parametrize("predictor", [{}, dict(predictor="head")], ids=str)
def test_a_teacher_that_sees_everything_is_asked_about_every_place(
    predictor: dict[str, Any],
) -> None:
    method, images = build(HPM, **CROSS, **predictor), pictures()
    _, difficulty = method.ask_teachers(images, True)
    assert difficulty.shape == (4, 64)
    every = torch.arange(64).expand(4, -1)
    tokens = tokens_of(method, images, Mask(every, every, 64))  # the teacher starts as a copy
    if not len(method.predictor.blocks):
        tokens = last_rows(method.decoder.blocks, tokens, 64)
    expected = predict_difficulty(method.predictor, tokens, 64)
    torch.testing.assert_close(difficulty, expected, atol=1e-5, rtol=1e-5)
    assert difficulty.std(dim=0).min() > 0  # of every place it differs between images

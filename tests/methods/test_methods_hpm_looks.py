"""Where HPM's difficulty comes from: looks through masks, loss heads, earlier visits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_methods_hpm import EARLY, LATE, batch_of, build
from torch import Tensor

from patchmine.backbones.family import build_encoder, encode
from patchmine.errors import UserError
from patchmine.methods import hpm as hpm_file
from patchmine.methods.hpm import HPM, predict_difficulty
from patchmine.types import Batch, Mask, Progress

# Every way to find difficulty that differs from the published one.
RUNGS: dict[str, dict[str, Any]] = {
    "masked": {"look": "masked"},
    "masked, head": {"look": "masked", "predictor": "head"},
    "observed": {"look": "masked", "score": "observed", "predictor": "head"},
    "memory": {"look": "memory", "predictor": "head"},
    "every second": {"look": "masked", "predictor": "head", "every": 2},
}
rungs = pytest.mark.parametrize("options", RUNGS.values(), ids=list(RUNGS))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def items(images: Tensor) -> Batch:
    """A batch of whole images, which maps of items can be kept of."""
    rows = len(images)
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(rows, 4)
    return Batch([images], torch.arange(rows), box, torch.zeros(rows, dtype=torch.bool))


def masks_of(method: HPM, looks: list[Tensor]) -> list[Mask]:
    return [method._mask_hardest(look, look, 0) for look in looks]


def drawn_looks(count: int, rows: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(rows, 64, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("predictor", ["decoder", "head"])
def test_a_look_through_a_mask_scores_what_is_hidden(images: Tensor, predictor: str) -> None:
    method = build(look="masked", predictor=predictor, decoder_depth=2)
    looks = drawn_looks(1)
    _, difficulty = method.ask_teachers(images, True, looks)
    (mask,) = masks_of(method, looks)
    assert torch.equal(difficulty.isneginf(), ~mask.as_bool())
    # Image by image, as the student would predict it: the teacher is its copy as yet.
    for row in range(3):
        one = Mask(mask.visible[row, None], mask.masked[row, None], 64)
        latent = encode(method.encoder, images[row, None], one.visible)
        _, expected = method.decode(method.decoder_input(latent, one))
        found = difficulty[row].gather(0, mask.masked[row])
        torch.testing.assert_close(found, expected[0], atol=1e-6, rtol=1e-5)


def test_several_looks_are_their_mean_where_a_patch_was_hidden(images: Tensor) -> None:
    method = build(look="masked")
    looks = drawn_looks(3)
    singles = torch.stack([method.ask_teachers(images, True, [look])[1] for look in looks])
    _, together = method.ask_teachers(images, True, looks)
    hidden = singles.isfinite()
    mean = singles.where(hidden, 0.0).sum(dim=0) / hidden.sum(dim=0)
    assert (hidden.sum(dim=0) == 0).any()
    expected = mean.where(hidden.any(dim=0), -torch.inf)
    torch.testing.assert_close(together, expected, atol=1e-6, rtol=1e-5)


def test_an_observed_score_is_the_error_itself(images: Tensor) -> None:
    method = build(look="masked", score="observed")
    looks = drawn_looks(1)
    _, difficulty = method.ask_teachers(images, True, looks)
    (mask,) = masks_of(method, looks)
    error = method.error(method._reconstruct(images, mask), images, None, mask)
    torch.testing.assert_close(difficulty.gather(1, mask.masked), error)
    names = {name for name, _ in method.teacher.named_children()}
    assert names == {"encoder", "decoder_input", "decoder"}


@pytest.mark.parametrize("depth", [1, 2, 3, None])
def test_a_head_judges_the_rows_of_its_block(depth: int | None, images: Tensor) -> None:
    method = build(predictor="head", decoder_depth=3, predictor_depth=depth)
    mask = method.draw_mask(images, None, EARLY)
    latent = encode(method.encoder, images, mask.visible)
    tokens = method.decoder_input(latent, mask)
    output, predicted = method.decode(tokens)
    everything = [tokens]
    for block in method.decoder.blocks:
        everything.append(block(everything[-1]))
    judged = everything[depth or 3]
    expected = method.predictor.head(method.predictor.norm(judged)).mean(dim=-1)[:, -48:]
    torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=1e-4)
    plain = method.decoder.head(method.decoder.norm(everything[3]))[:, -48:]
    torch.testing.assert_close(output, plain, atol=1e-5, rtol=1e-4)
    shared = method.teacher.shared
    assert len(shared) == (depth or 3)
    assert torch.equal(shared[0].attn.qkv.weight, method.decoder.blocks[0].attn.qkv.weight)


def test_with_a_head_prediction_teaches_the_blocks_before_it_alone(images: Tensor) -> None:
    method = build(predictor="head", decoder_depth=3, predictor_depth=2)
    method(items(images), LATE)["prediction"].backward()
    moved = [bool(block.attn.qkv.weight.grad is not None) for block in method.decoder.blocks]
    assert moved == [True, True, False]
    assert method.decoder.head.weight.grad is None


@rungs
def test_the_teacher_follows_what_it_copied(options: dict[str, Any]) -> None:
    method = build(ema_start=0.5, ema_end=0.5, **options)
    if options["look"] == "memory":
        assert method.teacher is None
        return
    before = {name: p.clone() for name, p in method.teacher.named_parameters()}
    with torch.no_grad():
        for _, parameter in method.learning():
            parameter.add_(1.0)
    method.after_step(Progress(0, 10, 1))
    for name, parameter in method.teacher.named_parameters():
        fixed = name == "encoder.pos_embed"
        expected = before[name] + (0.0 if fixed else 0.5)
        torch.testing.assert_close(parameter.data, expected, msg=name)


@rungs
def test_what_is_asked_for_is_masked_and_the_rest_is_drawn(
    options: dict[str, Any], images: Tensor
) -> None:
    method = build(**options)
    method.begin_epoch(EARLY, list(range(3)))
    method.noise.begin(0)
    _, difficulty = method.find_difficulty(items(images), LATE)
    mask = method.draw_mask(images, difficulty, LATE)
    hard = int(48 * 0.5 * 151 / 200)
    hardest = difficulty.argsort(dim=1, stable=True)[:, -hard:]
    assert difficulty.gather(1, hardest).isfinite().all()
    assert mask.as_bool().gather(1, hardest).all()
    assert mask.masked.shape == (3, 48)


@pytest.mark.parametrize(
    ("options", "epochs", "passes"),
    [
        (RUNGS["masked"], [150, 151], [1, 1]),
        ({**RUNGS["masked"], "num_looks": 3}, [150], [3]),
        (RUNGS["memory"], [150, 151], [0, 0]),
        (RUNGS["every second"], [150, 151, 152], [1, 0, 1]),
        ({"every": 3}, [149, 150, 151, 152], [0, 1, 0, 0]),
    ],
)
def test_how_often_the_teacher_looks(
    options: dict[str, Any],
    epochs: list[int],
    passes: list[int],
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = build(**options)
    method.begin_epoch(EARLY, list(range(3)))
    looked = []
    original = hpm_file.encode

    def counting(encoder: Any, *args: Any) -> Tensor:
        looked.append(encoder is not method.encoder)
        return original(encoder, *args)

    monkeypatch.setattr(hpm_file, "encode", counting)
    counts = [0]
    for epoch in epochs:
        method(items(images), Progress(epoch, 200, 1))
        counts.append(sum(looked))
    assert [after - before for before, after in pairwise(counts)] == passes


def test_memory_holds_the_errors_of_the_student(images: Tensor) -> None:
    method = build(look="memory")
    method.begin_epoch(EARLY, list(range(3)))
    for step in range(12):
        method.noise.begin(step)
        method(items(images), EARLY)
    found = method.maps(torch.arange(3))
    looks = drawn_looks(16)
    total, times = torch.zeros(3, 64), torch.zeros(3, 64)
    for mask in masks_of(method, looks):
        error = method.error(method._reconstruct(images, mask), images, None, mask)
        total.scatter_add_(1, mask.masked, error.detach())
        times.scatter_add_(1, mask.masked, torch.ones_like(error))
    true = total / times
    for row in range(3):
        assert torch.corrcoef(torch.stack([found[row], true[row]]))[0, 1] > 0.9


@rungs
def test_it_learns_where_the_noise_is(options: dict[str, Any]) -> None:
    """Images half flat, half noise: after some steps the noisy half is masked first."""
    method = build(ema_start=0.9, ema_end=0.9, decoder_embed_dim=32, **options)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    pixels = torch.randn(32, 3, 32, 32, generator=generator)
    left = torch.arange(32) % 2 == 0  # of these the left half is flat, of the others the right
    flat = torch.randn(32, 3, 1, 1, generator=generator).expand(32, 3, 32, 16)
    pixels[left, :, :, :16], pixels[~left, :, :, 16:] = flat[left], flat[~left]
    method.begin_epoch(EARLY, list(range(32)))
    for step in range(120):
        method.noise.begin(step)
        losses = method(items(pixels), Progress(step, 120, 1))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        method.after_step(Progress(step, 120, 1))
    _, difficulty = method.find_difficulty(items(pixels), Progress(118, 120, 1))
    hardest = difficulty.argsort(dim=1)[:, -20:] % 8
    noisy = torch.where(left[:, None], hardest >= 4, hardest < 4)
    assert noisy.float().mean() > 0.8
    assert losses["rank_correlation"] > 0.3
    assert losses["position_share"] < 0.3


@rungs
def test_numbers_on_mining_are_logged_while_it_mines(
    options: dict[str, Any], images: Tensor
) -> None:
    method = build(**options)
    method.begin_epoch(EARLY, list(range(3)))
    told = {"rank_correlation", "position_share"}
    assert told.isdisjoint(method(items(images), EARLY))
    assert told <= method(items(images), LATE).keys()


def test_pictures_and_difficulty_do_not_hang_on_the_batch(images: Tensor) -> None:
    method = build(look="masked", predictor="head")
    whole = method.difficulty(images)
    torch.testing.assert_close(method.difficulty(images[1:]), whole[1:])
    (panel,) = [
        panel
        for panel in method.panels(batch_of(images), LATE)
        if panel.title == "predicted difficulty"
    ]
    assert panel.data.isfinite().all()
    assert build(look="memory").difficulty(images) is None


@pytest.mark.parametrize("score", ["predicted", "observed"])
def test_pictures_say_whether_errors_are_predicted_or_observed(score: str, images: Tensor) -> None:
    panels = build(look="masked", score=score).panels(batch_of(images), LATE)
    assert [panel.title for panel in panels][1] == f"{score} difficulty"


@pytest.mark.parametrize(("end", "said"), [(0.5, True), (0.0, False)])
def test_pictures_say_whether_what_is_hard_is_masked(
    end: float, said: bool, images: Tensor
) -> None:
    panels = build(look="masked", predictor="head", alpha_end=end).panels(batch_of(images), LATE)
    assert ("light is masked first" in panels[1].note) is said


def test_where_nothing_is_mined_the_look_changes_no_step(images: Tensor) -> None:
    def steps(look: str) -> list[Tensor]:
        torch.manual_seed(0)
        method = build(look=look, predictor="head", alpha_end=0.0)
        learning = torch.optim.SGD(method.parameters(), lr=0.1)
        for step in range(3):
            method.noise.begin(step)
            learning.zero_grad()
            method(batch_of(images), LATE)["loss"].backward()
            learning.step()
            method.after_step(LATE)
        return [value for _, value in sorted(method.state_dict().items())]

    same = zip(steps("full"), steps("masked"), strict=True)
    assert all(torch.equal(one, other) for one, other in same)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"score": "observed"}, "method.score=observed"),
        ({"score": "observed", "look": "memory"}, "method.score=observed"),
        ({"predictor": "head", "predictor_depth": 2}, "method.predictor_depth=2"),
    ],
)
def test_looks_that_cannot_be_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        build(**options)


def test_maps_of_clips_are_refused_and_masked_looks_are_not() -> None:
    args = dict(embed_dim=32, depth=1, num_heads=2)

    def video(**options: Any) -> HPM:
        encoder = build_encoder(
            "video_vit_small_patch16",
            image_size=(32, 32),
            patch_size=8,
            model_args=args,
            clip=(4, 2),
        )
        sizes = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
        return HPM(HPM.Config(**sizes, **options), encoder)

    for options in ({"look": "memory"}, {"every": 2}):
        with pytest.raises(UserError, match="maps of images, not of clips"):
            video(**options)
    method = video(look="masked", predictor="head", alpha_end=1.0)
    clips = torch.randn(2, 3, 4, 32, 32)
    method.noise.begin(0)
    _, difficulty = method.find_difficulty(batch_of(clips), LATE)
    hidden = difficulty.isfinite().reshape(2, 2, 16)
    assert torch.equal(hidden[:, 0], hidden[:, 1])  # whole tubes
    assert method(batch_of(clips), LATE)["loss"].isfinite()


def test_the_mean_row_is_the_head_of_a_loss_head_too() -> None:
    method = build(predictor="head")
    tokens = torch.randn(2, 65, 16)
    slow = method.predictor.head(method.predictor(tokens, 64)).mean(dim=-1)
    torch.testing.assert_close(predict_difficulty(method.predictor, tokens, 64), slow)

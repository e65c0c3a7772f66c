"""DropPos's own promises (docs/methods/droppos.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from patchmine.backbones.family import build_encoder
from patchmine.backbones.tokens import patch_positions, project_patches
from patchmine.errors import UserError
from patchmine.methods.droppos import DropPos, attentive_weights
from patchmine.models.puzzles import Puzzle
from patchmine.ops.pictures import hide_masked
from patchmine.train.optim import build_optimizers, clip_gradients
from patchmine.types import Batch, Progress

START, LATE = Progress(0, 200, 1), Progress(199, 200, 1)
SIZES = dict(embed_dim=32, depth=2, num_heads=2)


def build(
    model: str = "vit_tiny_patch16_224",
    size: tuple[int, int] = (32, 32),
    patch: int = 4,
    args: dict[str, Any] | None = None,
    **options: Any,
) -> DropPos:
    torch.manual_seed(0)
    encoder = build_encoder(
        model, image_size=size, patch_size=patch, model_args=SIZES | (args or {})
    )
    settings = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2) | options
    return DropPos(DropPos.Config(**settings), encoder)


def batch_of(images: Tensor) -> Batch:
    rows = len(images)
    return Batch(
        [images], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool)
    )


def run(
    method: DropPos,
    images: Tensor,
    progress: Progress = START,
    first_row: int = 0,
    rows: int | None = None,
) -> Any:
    method.noise.begin(progress.step, first_row, rows)
    return method(batch_of(images), progress)


def draw(method: DropPos, images: Tensor) -> Puzzle:
    method.noise.begin(0)
    return method.draw_puzzle(images)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# The draw


@pytest.mark.parametrize(
    ("ratios", "counts"),
    [
        ((0.75, 0.75), (4, 12, 48)),
        ((0.75, 1.0), (0, 16, 48)),
        ((0.0, 0.5), (32, 32, 0)),
        ((0.9, 0.9), (0, 6, 58)),
    ],
)
def test_every_image_has_the_same_counts(
    ratios: tuple[float, float], counts: tuple[int, int, int]
) -> None:
    method = build(mask_ratio=ratios[0], pos_mask_ratio=ratios[1])
    puzzle = draw(method, torch.zeros(5, 3, 32, 32))
    parts = (puzzle.kept, puzzle.dropped, puzzle.removed)
    assert tuple(part.shape[1] for part in parts) == counts
    together = torch.cat(parts, dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(64).expand(5, -1))
    again = draw(method, torch.zeros(5, 3, 32, 32))
    assert torch.equal(again.dropped, puzzle.dropped)


def test_which_positions_are_withheld_does_not_depend_on_which_patches_are_left() -> None:
    puzzle = draw(build(), torch.zeros(4000, 1, 1, 1))
    for chosen in (puzzle.kept, puzzle.dropped, puzzle.removed):
        share = (
            torch.zeros(64).scatter_add(0, chosen.flatten(), torch.ones(chosen.numel()))
            / chosen.numel()
        )
        assert (share * 64 - 1).abs().max() < 5 / (chosen.numel() / 64) ** 0.5


def test_only_visible_patches_go_through_encoder_and_decoder(images: Tensor) -> None:
    method = build(attentive=False)
    lengths: dict[str, list[int]] = {"encoder": [], "decoder": []}
    method.encoder.blocks[0].register_forward_pre_hook(
        lambda _, x: lengths["encoder"].append(x[0].shape[1])
    )
    method.decoder_embed.register_forward_pre_hook(
        lambda _, x: lengths["decoder"].append(x[0].shape[1])
    )
    run(method, images)
    assert lengths == {"encoder": [17], "decoder": [17]}
    assert [name for name, _ in method.decoder.named_buffers()] == []  # no position table there


# What stands in for a withheld position


def added(method: DropPos, images: Tensor) -> tuple[Puzzle, Tensor]:
    """What was added to the dropped patches before they entered the first block, (B, Q, D)."""
    entered: list[Tensor] = []
    method.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    puzzle = draw(method, images)
    method.encode(images, puzzle)
    content = project_patches(method.encoder, images, puzzle.visible)
    return puzzle, (entered[0][:, 1:] - content)


def test_kept_patches_have_their_position_and_dropped_ones_the_token(images: Tensor) -> None:
    method = build()
    puzzle, positions = added(method, images)
    kept, dropped = positions.split([4, 12], dim=1)
    torch.testing.assert_close(
        kept, patch_positions(method.encoder)[puzzle.kept], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(dropped, method.position_token.expand(3, 12, -1), atol=1e-5, rtol=0)


def test_wrong_positions_are_those_of_the_others(images: Tensor) -> None:
    method = build(mask_token_type="wrong_pos")
    puzzle, positions = added(method, images)
    table = patch_positions(method.encoder)
    given = torch.cdist(positions[:, 4:], table).argmin(dim=2)
    assert torch.equal(given.sort(dim=1).values, puzzle.dropped.sort(dim=1).values)
    assert not torch.equal(given, puzzle.dropped)
    assert not torch.equal(
        given.argsort(dim=1)[0], given.argsort(dim=1)[1]
    )  # each image has its own permutation
    assert method.position_token is None


def test_zeros_are_nothing(images: Tensor) -> None:
    method = build(mask_token_type="zeros")
    _, positions = added(method, images)
    assert positions[:, 4:].abs().max() < 1e-5
    assert "position_token" not in method.state_dict()


# Nothing tells the answer


def with_contents_swapped(images: Tensor, first: int, second: int) -> Tensor:
    """The one image (1, C, 32, 32) with two patches of 4 pixels exchanged."""
    swapped = images.clone()
    areas = []
    for number in (first, second):
        top, left = number // 8 * 4, number % 8 * 4
        areas.append((slice(None), slice(None), slice(top, top + 4), slice(left, left + 4)))
    swapped[areas[0]], swapped[areas[1]] = images[areas[1]], images[areas[0]]
    return swapped


@pytest.mark.parametrize(("pos_mask_ratio", "blind"), [(1.0, True), (0.75, False)])
def test_without_positions_contents_carry_the_logits_with_them(
    images: Tensor, pos_mask_ratio: float, blind: bool
) -> None:
    method = build(pos_mask_ratio=pos_mask_ratio)
    one = images[:1]
    puzzle = draw(method, one)
    before = method.locate(method.encode(one, puzzle), method.num_dropped)
    with torch.no_grad():
        swapped = with_contents_swapped(
            one, int(puzzle.dropped[0, 0]), int(puzzle.visible[0, 0 if not blind else 5])
        )
    after = method.locate(method.encode(swapped, puzzle), method.num_dropped)
    if blind:
        expected = before[:, [5, 1, 2, 3, 4, 0, *range(6, before.shape[1])]]
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)
    else:  # a patch without position changed places with one that has one
        assert (after[:, 1:] - before[:, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize("attentive", [True, False])
def test_what_takes_no_gradient(images: Tensor, attentive: bool) -> None:
    method = build(attentive=attentive)
    pixels = images.clone().requires_grad_()
    run(method, pixels)["loss"].backward()
    shown = ~hide_masked(images, draw(method, images).mask, method.grid).isnan()
    assert (pixels.grad[~shown] == 0).all()
    assert pixels.grad[shown].any()
    assert method.encoder.pos_embed.grad is None
    assert method.position_token.grad.any()


def test_the_weights_take_no_gradient(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    method = build()
    weights = method.weigh(images, draw(method, images))
    run(method, images)["loss"].backward()
    found = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    monkeypatch.setattr(method, "weigh", lambda *_: weights.clone())
    run(method, images)["loss"].backward()
    for name, gradient in found.items():
        # Sums over a view and over its clone may run in another order, by the width of the
        # processor's vectors.
        torch.testing.assert_close(
            gradient, method.get_parameter(name).grad, rtol=1e-5, atol=1e-7, msg=name
        )


# The loss


def drawn_logits(method: DropPos, puzzle: Puzzle) -> Tensor:
    shape = (*puzzle.dropped.shape, method.grid.num_patches)
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).requires_grad_()


@pytest.mark.parametrize("conf_ignore", [False, True])
@pytest.mark.parametrize("norm", ["column", "row"])
@pytest.mark.parametrize("attentive", [False, True])
def test_losses_equal_a_loop_over_patches(
    images: Tensor, norm: str, attentive: bool, conf_ignore: bool
) -> None:
    method = build(smoothing_norm=norm, attentive=attentive, conf_ignore=conf_ignore)
    puzzle = draw(method, images)
    weights = method.weigh(images, puzzle)
    logits = drawn_logits(method, puzzle).detach()
    logits[0, 0, puzzle.dropped[0, 0]] = 12.0  # surer than the target
    losses = method.position_losses(logits, puzzle.dropped, weights, START)
    smoothed = method.smoothed_places(START, torch.device("cpu"))
    total, loss, floor, right, plain = 0.0, 0.0, 0.0, 0.0, 0.0
    for row in range(3):
        for slot in range(12):
            place = int(puzzle.dropped[row, slot])
            shares = logits[row, slot].double().softmax(dim=0)
            target = smoothed[place].double()
            weight = 1.0 if weights is None else weights[row, slot].item()
            if conf_ignore and shares[place] >= target[place]:
                weight = 0.0
            best = target / target.sum()
            total += weight
            loss += weight * -(target * shares.log()).sum().item()
            floor += weight * -torch.where(target > 0, target * best.log(), 0.0).sum().item()
            hit = float(shares.argmax() == place)
            right, plain = right + weight * hit, plain + hit
    assert losses["loss"].item() == pytest.approx(loss / total, rel=1e-5)
    assert losses["above_floor"].item() == pytest.approx((loss - floor) / total, rel=1e-4)
    assert losses["accuracy"].item() == pytest.approx(plain / 36)
    assert losses.get("weighted_accuracy", losses["accuracy"]).item() == pytest.approx(
        right / total, rel=1e-5
    )


def test_the_gradient_of_each_patchs_logits_sums_to_nothing(images: Tensor) -> None:
    method = build(smoothing_norm="column")  # whose rows of targets do not sum to one
    puzzle = draw(method, images)
    logits = drawn_logits(method, puzzle)
    method.position_losses(logits, puzzle.dropped, method.weigh(images, puzzle), START)[
        "loss"
    ].backward()
    assert logits.grad.abs().sum(dim=2).min() > 1e-5
    assert logits.grad.sum(dim=2).abs().max() < 1e-7


def test_the_order_of_patches_does_not_matter(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build()
    loss = run(method, images)["loss"]
    puzzle = draw(method, images)
    turned = Puzzle(puzzle.kept.flip(1), puzzle.dropped.roll(5, 1), puzzle.removed)
    monkeypatch.setattr(method, "draw_puzzle", lambda _: turned)
    torch.testing.assert_close(run(method, images)["loss"], loss, atol=1e-6, rtol=0)


def test_weights_sum_to_one_over_what_is_visible() -> None:
    generator = torch.Generator().manual_seed(0)
    whole, patches = (
        torch.randn(4, 8, generator=generator),
        torch.randn(4, 9, 8, generator=generator),
    )
    found = attentive_weights(whole, patches, 0.1)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4))
    assert (found > 0).all()
    cosine = (
        torch.nn.functional.normalize(patches, dim=2)
        @ torch.nn.functional.normalize(whole, dim=1)[:, :, None]
    )
    assert torch.equal(found.argsort(dim=1), cosine.squeeze(2).argsort(dim=1))
    alike = attentive_weights(whole, torch.ones(4, 9, 8), 0.1)
    torch.testing.assert_close(alike, torch.full((4, 9), 1 / 9))
    # Of all patches first and of the visible ones then, as the reference does it, is the same.
    of_five = found[:, :5] / found[:, :5].sum(dim=1, keepdim=True)
    torch.testing.assert_close(of_five, attentive_weights(whole, patches[:, :5], 0.1))


def test_equal_weights_are_no_weights(images: Tensor) -> None:
    method = build()
    puzzle = draw(method, images)
    logits = drawn_logits(method, puzzle).detach()
    plain = method.position_losses(logits, puzzle.dropped, None, START)
    equal = method.position_losses(logits, puzzle.dropped, torch.full((3, 12), 1 / 16), START)
    torch.testing.assert_close(equal["loss"], plain["loss"])
    torch.testing.assert_close(equal["weighted_accuracy"], plain["accuracy"])


def test_one_ratio_over_the_batch(images: Tensor) -> None:
    """Images whose withheld patches weigh more count more; without weights a batch may be divided."""
    batch = torch.cat([images, images[:1] * 3])
    for options, averages in (
        ({}, False),
        ({"conf_ignore": True, "attentive": False}, False),
        ({"attentive": False}, True),
    ):
        method = build(temperature=0.02, **options)
        assert method.averages_rows is averages
        whole = run(method, batch)["loss"]
        halves = torch.stack([run(method, batch[i : i + 2], START, i, 4)["loss"] for i in (0, 2)])
        if averages:
            torch.testing.assert_close(halves.mean(), whole)
        elif method.config.attentive:
            sums = method.weigh(batch, draw(method, batch)).reshape(2, -1).sum(dim=1)
            assert sums[0] != sums[1]
            torch.testing.assert_close((halves * sums).sum() / sums.sum(), whole)


def test_nothing_left_to_learn_is_no_division_by_zero() -> None:
    method = build(conf_ignore=True, attentive=False)
    places = torch.arange(12)[None]
    logits = (50.0 * torch.eye(64)[:12])[None].requires_grad_()
    losses = method.position_losses(logits, places, None, START)
    losses["loss"].backward()
    assert losses["loss"].item() == 0
    assert losses["accuracy"].item() == 1
    assert not logits.grad.any()


def test_the_first_loss_is_that_of_guessing(images: Tensor) -> None:
    losses = run(build(smoothing=0.0), images)
    assert losses["loss"].item() == pytest.approx(math.log(64), abs=0.5)
    assert torch.equal(losses["above_floor"], losses["loss"])


def test_the_weight_of_positions_counts_beside_pixels_only(images: Tensor) -> None:
    alone, weighted = (run(build(pos_weight=weight), images)["loss"] for weight in (0.05, 0.5))
    assert torch.equal(alone, weighted)
    losses = run(build(pos_weight=0.5, multi_task=True), images)
    torch.testing.assert_close(losses["loss"], 0.5 * losses["position"] + losses["pixels"])


# Targets


def test_targets_are_on_the_patch_grid_and_sharpen() -> None:
    cpu = torch.device("cpu")
    for size, patch, grid in (((32, 32), 4, (8, 8)), ((32, 16), 2, (16, 8)), ((16, 48), 8, (2, 6))):
        method = build(size=size, patch=patch)
        assert method.smoothing_size == grid
        wide = method.smoothed_places(START, cpu)
        assert wide.shape == (grid[0] * grid[1],) * 2
        assert (
            wide[0, 1] > wide[0, grid[1] + 1]
        )  # the neighbour beside it is closer than that across the corner
    method = build()
    own = [method.smoothed_places(Progress(e, 10, 1), cpu)[27, 27] for e in range(10)]
    assert own == sorted(own)
    assert torch.equal(method.smoothed_places(LATE, cpu), torch.eye(64))
    steady = build(smoothing_decay=False)
    assert torch.equal(steady.smoothed_places(LATE, cpu), steady.smoothed_places(START, cpu))


def test_the_published_grid_is_as_wide_as_a_patch_has_pixels() -> None:
    method = build(size=(24, 24), patch=8, smoothing_grid="as_run")
    assert method.grid.size == (3, 3)
    assert method.smoothing_size == (8, 8)
    full = method.smoothed_places(START, torch.device("cpu"))
    assert full.shape == (9, 9)
    assert full[0, 8] > full[0, 3]  # place 8 counts as the one below place 0


def test_each_parameter_is_clipped_by_itself(images: Tensor) -> None:
    method = build(clip_grad=0.1)
    optimizers = build_optimizers(
        method.param_groups(), weight_decay=0.05, blr=1e-3, betas=(0.9, 0.95)
    )
    run(method, images)["loss"].backward()
    before = {name: p.grad.clone() for name, p in method.learning()}
    clip_gradients(optimizers, START)
    norms = [gradient.norm().item() for gradient in before.values()]
    assert min(norms) < 0.1 < max(norms)
    for name, parameter in method.learning():
        norm = before[name].norm()
        torch.testing.assert_close(
            parameter.grad, before[name] * (0.1 / (norm + 1e-6)).clamp(max=1.0)
        )


# Pictures


def test_a_right_answer_is_drawn_as_the_truth(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build().eval()
    puzzle = draw(method, images)
    answer = torch.nn.functional.one_hot(puzzle.dropped, 64).float() * 20
    monkeypatch.setattr(method, "locate", lambda *_: answer)
    method.noise.begin(0)
    pictures = {
        panel.title.split("(")[0].split(",")[0].strip(): panel
        for panel in method.panels(batch_of(images), START)
    }
    true, predicted = (
        pictures["true places as colours"],
        pictures["predicted places in the same colours"],
    )
    assert true.kind == predicted.kind == "colour"
    torch.testing.assert_close(true.data, predicted.data, equal_nan=True)
    assert true.data.isnan().float().mean() == 48 / 64
    put, visible = pictures["patches put where predicted"].data, pictures["visible"].data
    torch.testing.assert_close(put, visible, equal_nan=True)
    weights = pictures["weight in the loss"].data
    assert (~weights.isnan()).sum() == 36


def test_of_two_patches_at_one_place_the_surer_is_on_top(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build().eval()
    puzzle = draw(method, images)
    place = int(puzzle.removed[0, 0])
    answer = torch.zeros(3, 12, 64)
    answer[:, :, place] = torch.arange(12.0)
    monkeypatch.setattr(method, "locate", lambda *_: answer)
    method.noise.begin(0)
    put = method.panels(batch_of(images), START)[-1].data
    cells = put.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # (B, C, L, 4, 4)
    pixels = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)
    assert torch.equal(cells[0, :, place], pixels[0, :, int(puzzle.dropped[0, 11])])
    assert int((~cells[0, 0, :, 0, 0].isnan()).sum()) == 5  # four at home and one there


# Mistakes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: build("beit_base_patch16_224"),
            ["relative positions", "the answer", "use_rel_pos_bias"],
        ),
        (
            lambda: build(
                "beit_base_patch16_224",
                args=dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
            ),
            ["relative positions", "use_shared_rel_pos_bias"],
        ),
        (
            lambda: build("beit_base_patch16_224", args=dict(use_rel_pos_bias=False)),
            ["none to withhold"],
        ),
        (
            lambda: build(args=dict(class_token=False)),
            ["method.attentive=true", "class_token=true"],
        ),
        (lambda: build(pos_mask_ratio=1e-19), ["method.pos_mask_ratio=1e-19", "raise it"]),
        (lambda: build(mask_ratio=0.99), ["method.mask_ratio=0.99", "lower it"]),
        (
            lambda: build(mask_ratio=0.0, multi_task=True),
            ["method.multi_task=true", "method.mask_ratio=0.0"],
        ),
        (
            lambda: build(smoothing_grid="as_run"),
            ["method.smoothing_grid=as_run", "8x8", "smoothing_grid=patches"],
        ),
        (
            lambda: build(size=(32, 16), patch=8, smoothing_grid="as_run"),
            ["method.smoothing_grid=as_run", "4x2", "smoothing_grid=patches"],
        ),
    ],
    ids=[
        "relative",
        "shared",
        "none",
        "no class",
        "nothing asked",
        "nothing seen",
        "no pixels",
        "side",
        "square",
    ],
)
def test_settings_that_cannot_be(make: Callable[[], DropPos], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("vit_relpos_small_patch16_224", ["relative positions", "withheld"]),
        ("vit_tiny_r_s16_p8_224", ["convolutional stem", "overlap"]),
    ],
)
def test_encoders_that_know_places_otherwise(model: str, words: list[str]) -> None:
    """Refused for every method, before one is asked."""
    with pytest.raises(UserError) as caught:
        build_encoder(model, image_size=(224, 224), model_args=dict(depth=1))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("model", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_224"])
def test_rotary_positions_cannot_be_withheld(model: str) -> None:
    with pytest.raises(UserError, match=r"rotary positions .* withheld: choose model=vit_small"):
        build(model)


@pytest.mark.parametrize(
    "args",
    [dict(reg_tokens=2), dict(reg_tokens=2, no_embed_class=True), dict(pre_norm=True)],
    ids=str,
)
def test_other_plain_encoders(images: Tensor, args: dict[str, Any]) -> None:
    assert run(build(args=args), images)["loss"].isfinite()


def test_a_beit_with_positions_in_a_table_only(images: Tensor) -> None:
    method = build("beit_base_patch16_224", args=dict(use_rel_pos_bias=False, use_abs_pos_emb=True))
    run(method, images)["loss"].backward()
    assert all(p.grad is not None for _, p in method.learning())


def test_without_class_token_nor_weights(images: Tensor) -> None:
    assert run(build(args=dict(class_token=False), attentive=False), images)["loss"].isfinite()


# Whether it learns


def layout(count: int, generator: torch.Generator) -> Tensor:
    """Images that tell where a patch is: each channel is a coordinate or their product, in its own
    scale and shade.
    """
    line = torch.linspace(-1, 1, 32)
    planes = torch.stack([line[:, None].expand(32, 32), line.expand(32, 32), line[:, None] * line])
    scale = 0.7 + 0.6 * torch.rand(count, 3, 1, 1, generator=generator)
    shade = 0.3 * torch.randn(count, 3, 1, 1, generator=generator)
    return planes * scale + shade + 0.05 * torch.randn(count, 3, 32, 32, generator=generator)


def noise(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=generator)


def train(
    kind: Callable[[int, torch.Generator], Tensor], *, steps: int, rows: int, **options: Any
) -> list[dict[str, float]]:
    """Losses of every step of a short run at the sizes of the specification, in ten epochs."""
    args = dict(embed_dim=48, depth=2, num_heads=3)
    method = build(args=args, decoder_embed_dim=32, **options)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(
        [p for _, p in method.learning()], lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05
    )
    lines = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / (steps / 10))
        losses = run(method, kind(rows, generator), Progress(step, steps, steps // 10))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        lines.append({name: value.item() for name, value in losses.items()})
    return lines


def mean(lines: list[dict[str, float]], name: str) -> float:
    return sum(line[name] for line in lines) / len(lines)


@pytest.mark.parametrize("attentive", [False, True])
def test_it_finds_places_where_images_tell_them(attentive: bool) -> None:
    lines = train(layout, steps=80, rows=32, attentive=attentive)
    assert mean(lines[-8:], "accuracy") > 0.12  # chance: 1 / 60
    assert mean(lines[-8:], "loss") < 0.8 * math.log(
        60
    )  # that of guessing, with targets as good as sharp by then


def test_it_finds_nothing_in_noise() -> None:
    lines = train(noise, steps=50, rows=32, attentive=False, smoothing=0.0)
    assert mean(lines[20:], "accuracy") < 0.03
    assert math.log(60) - 0.02 < mean(lines[-10:], "loss") < math.log(64) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("attentive", [False, True])
def test_it_finds_places_at_the_scale_of_the_specification(attentive: bool) -> None:
    """With weights, the specification's number is the weighted accuracy: what hardly counts is
    hardly learnt.
    """
    lines = train(layout, steps=400, rows=64, attentive=attentive)
    assert mean(lines[-50:], "weighted_accuracy" if attentive else "accuracy") > 0.85
    assert mean(lines[-50:], "accuracy") > 0.75


@pytest.mark.slow
def test_it_finds_nothing_in_noise_at_the_scale_of_the_specification() -> None:
    lines = train(noise, steps=400, rows=64, attentive=False, smoothing=0.0)
    assert mean(lines[-50:], "accuracy") < 0.03
    assert math.log(60) - 0.02 < mean(lines[-50:], "loss") < math.log(64) + 0.05

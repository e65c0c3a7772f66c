"""SemAIM's own promises (docs/methods/semaim.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.backbones.family import build_encoder
from patchmine.backbones.tokens import embed_patches, patch_positions, prefix_tokens
from patchmine.errors import UserError
from patchmine.methods import semaim as semaim_file
from patchmine.methods.semaim import SemAIM
from patchmine.models.streams import two_streams
from patchmine.ops.orders import take, visibility
from patchmine.types import Batch, Progress

START = Progress(0, 200, 1)
ARGS: dict[str, Any] = dict(embed_dim=32, depth=2, num_heads=2)
L = 64


def build(*, model_args: dict[str, Any] = ARGS, channels: int = 3, **options: Any) -> SemAIM:
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        image_size=(32, 32),
        patch_size=4,
        channels=channels,
        model_args=model_args,
    )
    method = SemAIM(SemAIM.Config(**options), encoder)
    method.noise.begin(0)
    return method


def batch_of(images: Tensor) -> Batch:
    rows = len(images)
    return Batch(
        [images], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool)
    )


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def predict(method: SemAIM, images: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Predictions by rank and the order."""
    method.noise.begin(0)
    patches = embed_patches(method.encoder, images)
    score = None
    if order is None:
        order, score = method.draw_order(images, method.judge(images, patches)[1])
    return method.predict_patches(patches, order, score), order


def masked_form(method: SemAIM, images: Tensor, score: Tensor) -> Tensor:
    """The slow twin: every token in its place, all of them, under masks.  (B, L, T) in raster
    order.
    """
    content = torch.cat(
        [prefix_tokens(method.encoder, len(images)), embed_patches(method.encoder, images)], dim=1
    )
    queries = patch_positions(method.encoder).expand(len(images), -1, -1)
    masks = (mask[:, None] for mask in visibility(score))
    _, answers = two_streams(method.encoder, method.query_blocks, content, queries, *masks)
    return method.head(method.encoder.norm(answers[-1]))


# ---- the fast form and its slow twin ----


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        *(
            ({}, True),
            ({"query_depth": 1}, True),
            ({"order": "stochastic"}, True),
            ({"ties": "keep"}, False),
        ),
        *(({"group_size": 5}, False), ({"order": "out2center", "ties": "keep"}, False)),
    ],
)
def test_sorted_form_equals_masked_form(
    images: Tensor, options: dict[str, Any], plain: bool
) -> None:
    fast, slow = (build(**options).double() for _ in range(2))
    images = images.double()
    patches = embed_patches(fast.encoder, images)
    order, score = fast.draw_order(images, fast.judge(images, patches)[1])
    assert (score is None) == plain  # follows from the settings alone
    ranks = torch.arange(L).expand_as(order) if score is None else score.expand_as(order)
    found = fast.predict_patches(patches, order, score)
    expected = take(masked_form(slow, images, ranks.gather(1, order.argsort(dim=1))), order)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    for method, predicted in ((fast, found), (slow, expected)):
        predicted.square().mean().backward()
        assert method.encoder.pos_embed.grad is None
    for (name, ours), theirs in zip(fast.named_parameters(), slow.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=0, msg=name)


def test_a_group_of_one_is_no_group(images: Tensor) -> None:
    order = build(order="rowmajor").draw_order(images, None)[0]
    patches = embed_patches(build().encoder, images)
    one_by_one = build().predict_patches(patches, order, torch.arange(L)[None])
    torch.testing.assert_close(one_by_one, build().predict_patches(patches, order, None))


def test_the_plain_form_asks_for_causal_attention_without_a_mask(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = F.scaled_dot_product_attention

    def watching(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(
            (kwargs.get("attn_mask") is not None, kwargs.get("is_causal", False), args[0].shape[2])
        )
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watching)
    build()(batch_of(images), START)
    assert (
        calls == [(False, False, 1 + L)] * 2 + [(False, True, L)] * 4
    )  # the look at the whole image, then two streams
    calls.clear()
    build(group_size=2, order="stochastic")(batch_of(images), START)
    assert calls == [(True, False, L)] * 4


# ---- who sees what ----


def test_a_prediction_depends_on_earlier_patches_only(images: Tensor) -> None:
    method = build().double()
    pixels = images[:1].double().requires_grad_()
    order = torch.randperm(L, generator=torch.Generator().manual_seed(0))[None]
    predicted, _ = predict(method, pixels, order)
    for rank in (0, 1, 5, 40, 63):
        (slope,) = torch.autograd.grad(
            predicted[0, rank].sum(), pixels, retain_graph=True, allow_unused=True
        )
        patches = slope[0].reshape(3, 8, 4, 8, 4).abs().amax(dim=(0, 2, 4)).flatten()[order[0]]
        assert (patches[rank:] == 0).all()
        assert (patches[:rank] > 0).all()


def test_the_first_patch_is_known_from_its_position_only(images: Tensor) -> None:
    order = torch.arange(L).expand(3, -1)
    predicted, _ = predict(build(), images, order)
    assert torch.equal(predicted[0, 0], predicted[1, 0])
    assert not torch.equal(predicted[0, 1], predicted[1, 1])


def test_nobody_reads_the_last_patch(images: Tensor) -> None:
    method = build()
    pixels = images.clone().requires_grad_()
    predicted, order = predict(method, pixels)
    error = method.error(
        predicted, images, None, order
    )  # the target is other pixels: no gradient through it
    (slope,) = torch.autograd.grad(error.mean(), pixels)
    patches = slope.reshape(3, 3, 8, 4, 8, 4).abs().amax(dim=(1, 3, 5)).flatten(1).gather(1, order)
    assert (patches[:, -1] == 0).all()
    assert (patches[:, :-1] > 0).all()


def test_the_class_token_of_content_is_the_same_for_every_image(images: Tensor) -> None:
    method = build()
    content = torch.cat(
        [prefix_tokens(method.encoder, 3), embed_patches(method.encoder, images)[:, :-1]], dim=1
    )
    contents, _ = two_streams(
        method.encoder,
        method.query_blocks,
        content,
        patch_positions(method.encoder).expand(3, -1, -1),
    )
    for tokens in contents:
        torch.testing.assert_close(tokens[:, 0], tokens[:1, 0].expand(3, -1))


@pytest.mark.parametrize(
    "options", [{}, {"target": "own"}, {"target": "ema"}, {"semantic_source": "ema"}], ids=str
)
@pytest.mark.parametrize("autocast", [False, True])
def test_everything_learns_and_teachers_do_not(
    images: Tensor, options: dict[str, Any], autocast: bool
) -> None:
    method = build(**options).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = method(batch_of(images), START)["loss"]
    loss.backward()
    for name, parameter in method.named_parameters():
        if name.startswith("teacher.") or name.endswith("pos_embed"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.any(), name
    assert method.encoder.training  # the look at the whole image was in eval mode


def test_the_look_at_the_image_is_without_dropout(images: Tensor) -> None:
    method = build(model_args=ARGS | dict(drop_path_rate=0.5, proj_drop_rate=0.5)).train()
    patches = embed_patches(method.encoder, images)
    assert torch.equal(method.judge(images, patches)[1], method.judge(images, patches)[1])
    assert not torch.equal(predict(method, images)[0], predict(method, images)[0])


# ---- orders ----


def test_the_centre_comes_first_and_rings_follow(images: Tensor) -> None:
    method = build()
    similarity = method.judge(images, embed_patches(method.encoder, images))[1]
    order, _ = method.draw_order(images, similarity)
    assert torch.equal(order[:, 0], similarity.argmax(dim=1))
    distance = ((order // 8 - order[:, :1] // 8) ** 2 + (order % 8 - order[:, :1] % 8) ** 2).float()
    assert (distance.diff(dim=1) >= 0).all()
    method.noise.begin(1)
    other, _ = method.draw_order(images, similarity)
    assert not torch.equal(order, other)
    again = ((other // 8 - order[:, :1] // 8) ** 2 + (other % 8 - order[:, :1] % 8) ** 2).float()
    assert torch.equal(distance, again)  # noise permutes within rings


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        *(({}, 1), ({"order": "stochastic"}, 0), ({"similarity": "self"}, 0)),
        *(
            ({"order": "rowmajor", "target": "own"}, 1),
            ({"order": "rowmajor", "semantic_source": "ema"}, 0),
        ),
        ({"semantic_source": "ema"}, 0),
    ],
)
def test_nothing_is_looked_at_that_nobody_asks_for(
    images: Tensor, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], passes: int
) -> None:
    seen = []
    original = semaim_file.transform

    def counting(*args: Any) -> Tensor:
        seen.append(args)
        return original(*args)

    monkeypatch.setattr(semaim_file, "transform", counting)
    method = build(**options)
    method(batch_of(images), START)
    assert len(seen) == passes
    assert (method.teacher is not None) == (options == {"semantic_source": "ema"})


@pytest.mark.parametrize("similarity", ["cls", "gap", "self"])
def test_the_slow_copy_judges_where_asked(images: Tensor, similarity: str) -> None:
    online, ema = build(similarity=similarity), build(similarity=similarity, semantic_source="ema")
    patches = embed_patches(online.encoder, images)
    expected = online.judge(images, patches)[1]
    torch.testing.assert_close(ema.judge(images, patches)[1], expected)
    with torch.no_grad():
        ema.encoder.blocks[0].attn.qkv.weight.mul_(2)
    torch.testing.assert_close(ema.judge(images, patches)[1], expected)
    ema.after_step(START)
    assert not torch.equal(ema.judge(images, patches)[1], expected)


def test_slow_copy_moves_at_the_published_pace() -> None:
    for epoch, decay in ((0, 0.999), (50, 0.99945), (100, 0.9999), (700, 0.9999)):
        method = build(target="ema")
        with torch.no_grad():
            method.encoder.cls_token.add_(1)
        before = method.teacher.encoder.cls_token.clone()
        method.after_step(Progress(epoch * 10, 8000, 10))
        moved = method.teacher.encoder.cls_token - before
        torch.testing.assert_close(moved, torch.full_like(moved, 1 - decay), atol=1e-6, rtol=0)


# ---- targets ----


@pytest.fixture
def dino(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    teacher = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=1, num_classes=0
    )
    torch.save(teacher.state_dict(), tmp_path / "dino.pth")
    return tmp_path / "dino.pth"


@pytest.mark.parametrize("similarity", ["cls", "gap"])
def test_a_foreign_network_gives_targets_and_similarity(
    images: Tensor, dino: Path, similarity: str
) -> None:
    method = build(target="dino", target_file=str(dino), similarity=similarity)
    tokens = method.foreign.tower.forward_features(images)
    anchor = tokens[:, 0] if similarity == "cls" else tokens[:, 1:].mean(dim=1)
    features, found = method.judge(images, embed_patches(method.encoder, images))
    assert torch.equal(features, tokens[:, 1:])
    torch.testing.assert_close(found, F.cosine_similarity(anchor[:, None], tokens[:, 1:], dim=-1))
    losses = method(batch_of(images), START)
    assert 0 < losses["loss"].item() < 4
    losses["loss"].backward()
    assert all(p.grad is None for p in method.foreign.parameters())


def test_feature_loss_knows_directions_only(images: Tensor) -> None:
    method = build(target="own")
    predicted, features = torch.randn(3, L, 32), torch.randn(3, L, 32)
    order = torch.arange(L).expand(3, -1)
    error = method.error(predicted, images, features, order)
    assert ((error >= 0) & (error <= 4)).all()
    torch.testing.assert_close(error, method.error(7 * predicted, images, features / 3, order))


def test_losses_by_rank_belong_to_the_loss(images: Tensor) -> None:
    losses = build()(batch_of(images), START)
    assert set(losses) == {"loss", "first_patch", "first_tenth", "last_half"}
    assert not any(
        losses[name].requires_grad for name in ("first_patch", "first_tenth", "last_half")
    )


def test_keys_and_values_start_as_if_each_had_its_own_matrix() -> None:
    block = build(model_args=ARGS | dict(embed_dim=128)).query_blocks[0]
    bound = (6 / 256) ** 0.5
    for part in (block.query.weight, *block.key_value.weight.chunk(2)):
        assert 0.95 * bound < part.abs().max() <= bound


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"query_depth": 3}, r"method.query_depth=3 does not divide the 2 blocks.*1, 2"),
        ({"blur_kernel": 8}, r"method.blur_kernel=8.*method.blur_kernel=9"),
        (
            {"ties": "keep", "order": "stochastic"},
            r"method.ties=keep.*method.order=stochastic.*method.group_size",
        ),
        ({"ties": "keep", "group_size": 4}, r"method.ties=keep and method.group_size=4"),
        (
            {"target": "own", "semantic_source": "ema"},
            r"method.semantic_source=ema.*method.target=own",
        ),
        (
            {"target": "dino", "similarity": "self"},
            r"method.similarity=self.*method.similarity=cls",
        ),
        ({"target": "clip"}, r"method.target_file is not set.*method.target=clip"),
        ({"target": "clip", "channels": 5}, r"method.target=clip.*channels=5"),
        (
            {"model_args": ARGS | dict(class_token=False)},
            r"method=semaim.*0 tokens.*model_args.class_token=true",
        ),
        (
            {"model_args": ARGS | dict(reg_tokens=2)},
            r"method=semaim.*3 tokens.*model_args.reg_tokens=0",
        ),
        ({"model_args": ARGS | dict(block_fn="parallel")}, r"method=semaim.*plain"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(options: dict[str, Any], expected: str) -> None:
    if options.get("model_args", {}).get("block_fn") == "parallel":
        options = {"model_args": ARGS | dict(block_fn=timm.models.vision_transformer.ResPostBlock)}
    with pytest.raises(UserError, match=expected):
        build(**options)


def test_an_encoder_with_relative_positions_is_refused() -> None:
    encoder = build_encoder(
        "beit_base_patch16_224", image_size=(32, 32), model_args=ARGS | dict(use_rel_pos_bias=True)
    )
    with pytest.raises(UserError, match=r"method=semaim.*relative"):
        SemAIM(SemAIM.Config(), encoder)
    encoder = build_encoder(
        "beit_base_patch16_224",
        image_size=(32, 32),
        model_args=ARGS
        | dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=False, use_abs_pos_emb=True),
    )
    with pytest.raises(UserError, match=r"method=semaim.*Beit"):
        SemAIM(SemAIM.Config(), encoder)


def test_a_foreign_network_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    other = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=0
    )
    torch.save(other.state_dict(), tmp_path / "eight.pth")
    with pytest.raises(
        UserError, match=r"method.target_file=.*eight.pth.*patches of 8x8.*patch_size"
    ):
        build(target="dino", target_file=str(tmp_path / "eight.pth"))
    bare = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        depth=1,
        num_classes=0,
        class_token=False,
        global_pool="avg",
    )
    torch.save(bare.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"bare.pth has no class token.*method.similarity=gap"):
        build(target="dino", target_file=str(tmp_path / "bare.pth"))
    assert (
        build(target="dino", target_file=str(tmp_path / "bare.pth"), similarity="gap").foreign.width
        == 192
    )


# ---- behaviour ----


def test_it_learns_from_what_came_before() -> None:
    """Each image has one colour under noise: what came before tells it, and nothing tells the first
    patch.
    """
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224", image_size=(16, 16), patch_size=4, model_args=ARGS
    )
    method = SemAIM(SemAIM.Config(norm_pix_loss=False), encoder).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    for step in range(80):
        method.noise.begin(step)
        colour = torch.randn(32, 3, 1, 1, generator=generator)
        images = colour + 0.3 * torch.randn(32, 3, 16, 16, generator=generator)
        losses = method(batch_of(images), Progress(step, 80, 1))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["first_patch"] > 0.6
    assert losses["last_half"] < 0.3
    assert losses["first_tenth"] > losses["last_half"]

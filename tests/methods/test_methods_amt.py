"""AMT's own promises (docs/methods/amt.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from patchmine.backbones.family import build_encoder
from patchmine.data.views.images import crop_box
from patchmine.errors import UserError
from patchmine.methods.amt import AMT, probe
from patchmine.methods.mae import MAE
from patchmine.methods.simmim import SimMIM
from patchmine.types import Batch, Mask, Progress

ARGS = dict(embed_dim=32, depth=2, num_heads=2)
NARROW = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
WARM, GUIDED = Progress(40, 400, 1), Progress(41, 400, 1)
HOSTS = ["mae", "simmim"]


def encoder(**args: Any) -> Any:
    torch.manual_seed(0)
    name = "beit_base_patch16_224" if "use_abs_pos_emb" in args else "vit_tiny_patch16_224"
    return build_encoder(name, image_size=(32, 48), patch_size=4, model_args=ARGS | args)


def build(**options: Any) -> AMT:
    """A grid of 8 x 12 patches."""
    return AMT(AMT.Config(**(NARROW | options)), encoder()).train()


def batch_of(images: Tensor, index: Tensor | None = None, box: Tensor | None = None) -> Batch:
    rows = len(images)
    index = torch.arange(rows) if index is None else index
    box = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(rows, 4) if box is None else box
    return Batch([images], index, box, torch.zeros(rows, dtype=torch.bool))


def images(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def thrown(mask: Mask) -> Tensor:
    """(B, L) bool."""
    kept = torch.zeros(len(mask.visible), mask.num_patches, dtype=torch.bool)
    return ~kept.scatter(1, mask.visible, True).scatter(1, mask.masked, True)


def on_pixels(patches: Tensor) -> Tensor:
    """(B, L) -> (B, 1, H, W)."""
    return patches.reshape(-1, 1, 8, 12).repeat_interleave(4, 2).repeat_interleave(4, 3)


# ---- counts ----


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (dict(), (43, 38, 15)),  # floor(96 * 0.45), floor(96 * 0.85) - 43
        (dict(mask_ratio=0.75, throw_ratio=0.0), (72, 0, 24)),
        (dict(mask_ratio=0.1, throw_ratio=0.8), (9, 77, 10)),
        (
            dict(host="simmim"),
            (11 * 4, 7 * 4, 6 * 4),
        ),  # ceil(24 * 0.44), ceil(24 * 0.26) units of four patches
        (dict(host="simmim", mask_unit=16, throw_ratio=0.0), (3 * 16, 0, 3 * 16)),
    ],
    ids=str,
)
def test_counts(options: dict[str, Any], counts: tuple[int, int, int]) -> None:
    method = build(**options)
    mask = method.draw_mask(images(), torch.rand(3, 96))
    assert (mask.masked.shape[1], thrown(mask).sum(dim=1).tolist(), mask.visible.shape[1]) == (
        counts[0],
        [counts[1]] * 3,
        counts[2],
    )
    everything = torch.cat([mask.masked, mask.visible], dim=1).sort(dim=1).values
    assert (everything.diff(dim=1) > 0).all()


def test_published_counts_at_full_size() -> None:
    for options, counts in ((dict(), (88, 78)), (dict(mask_ratio=0.75, throw_ratio=0.0), (147, 0))):
        model = build_encoder("vit_tiny_patch16_224", model_args=ARGS)
        method = AMT(AMT.Config(**NARROW, **options), model)
        assert (method.num_masked, method.num_thrown) == counts
    on_simmim = AMT(
        AMT.Config(host="simmim"), build_encoder("vit_tiny_patch16_224", model_args=ARGS)
    )
    assert (on_simmim.num_units, on_simmim.num_masked, on_simmim.num_thrown) == (49, 22, 13)
    assert on_simmim.num_warmup == 22


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(mask_ratio=0.6, throw_ratio=0.4),
            r"method\.mask_ratio=0\.6 and method\.throw_ratio=0\.4 leave none",
        ),
        (dict(mask_ratio=0.9), r"method\.mask_ratio=0\.9 and method\.throw_ratio=0\.4 leave none"),
        (dict(host="simmim", mask_ratio=0.5, throw_ratio=0.49), r"leave none of 24 .* lower one"),
        (dict(mask_ratio=0.001), r"method\.mask_ratio=0\.001 .* mask none or all"),
        (dict(warmup_mask_ratio=0.999), r"method\.warmup_mask_ratio=0\.999 mask none or all"),
        (dict(decoder_embed_dim=18, decoder_num_heads=3), r"method\.decoder_embed_dim=18 must be"),
        (dict(host="simmim", mask_unit=6), r"method\.mask_unit=6 is not a multiple"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


def test_encoders_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"method=amt leaves patches out"):
        AMT(AMT.Config(host="simmim"), encoder(use_abs_pos_emb=False, use_rel_pos_bias=True))
    with pytest.raises(UserError, match=r"method=amt follows the class token"):
        AMT(AMT.Config(), encoder(class_token=False))


# ---- schedule ----


def refreshes(total: int, **options: Any) -> list[int]:
    """Epochs before which a run renews its maps."""
    method, found = build(**options), []
    method.maps.replace = lambda parts: found.append(epoch)
    for epoch in range(total):
        method.begin_epoch(Progress(epoch * 5, total * 5, 5), [])
    return found


def test_published_schedule() -> None:
    assert refreshes(400) == [41, 81, 121, 161, 201, 241, 281, 321, 361]
    assert len(refreshes(800)) == 19
    assert refreshes(200) == [41, 81, 121, 161]
    method = build()
    assert [method.guided(Progress(epoch * 5, 2000, 5)) for epoch in (0, 40, 41, 399)] == [
        False,
        False,
        True,
        True,
    ]


def test_short_schedules() -> None:
    assert refreshes(20) == list(range(2, 20, 2))
    assert refreshes(4) == [1, 2, 3]
    assert refreshes(1) == []
    assert refreshes(20, start_epoch=3, refresh_every=8) == [3, 11, 19]
    assert build(maps="online").begin_epoch(Progress(41, 400, 1), []) is None


def test_the_random_phase_is_mae_and_simmim_to_the_bit() -> None:
    for host, kind, options in (
        ("mae", MAE, NARROW | dict(norm_pix_loss=False)),
        ("simmim", SimMIM, dict(mask_ratio=0.44)),
    ):
        plain, own = kind(kind.Config(**options), encoder()), build(host=host)
        missing = own.load_state_dict(plain.state_dict(), strict=False)
        assert missing.missing_keys == ["maps.values"]
        losses = []
        for method in (plain, own):
            method.noise.begin(7)
            losses.append(method(batch_of(images()), WARM)["loss"])
            mask = (
                method.draw_mask(images()) if method is plain else method.draw_mask(images(), None)
            )
            losses.append(mask.masked)
        assert torch.equal(losses[1], losses[3])
        if host == "mae":
            assert losses[0] == losses[2]
        else:  # the order of tokens differs, and so does rounding
            assert losses[0].item() == pytest.approx(losses[2].item(), rel=1e-5)


def test_nothing_is_thrown_without_throw_ratio() -> None:
    """The decoder then works on as many tokens as MAE's."""
    method = build(mask_ratio=0.75, throw_ratio=0.0)
    lengths: list[int] = []
    method.decoder.blocks[0].register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1])
    )
    method.decoder.register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1])
    )
    method(batch_of(images()), GUIDED)
    assert lengths[0] == 97


# ---- what is thrown is gone ----


@pytest.mark.parametrize("host", HOSTS)
def test_thrown_pixels_change_nothing(host: str) -> None:
    method = build(host=host)
    method.maps.replace([(torch.arange(3), torch.rand(3, 96))])
    method.noise.begin(0)
    pixels = images()
    gone = on_pixels(thrown(method.draw_mask(pixels, method.attend(batch_of(pixels)))))
    assert gone.any()
    found = []
    for shown in (pixels, torch.where(gone, images(seed=1), pixels)):
        shown = shown.clone().requires_grad_()
        method.zero_grad()
        method.noise.begin(0)
        loss = method(batch_of(shown), GUIDED)["loss"]
        loss.backward()
        assert not shown.grad[gone.expand_as(shown)].any()
        assert shown.grad[~gone.expand_as(shown)].any()
        found.append([loss.detach()] + [p.grad.clone() for _, p in method.learning()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("host", HOSTS)
def test_reconstruction_against_placeholders(host: str) -> None:
    """The obvious way: a full sequence in raster order, from which thrown tokens are taken out
    image by image.
    """
    method = build(host=host).eval()
    pixels = images()
    mask = method.draw_mask(pixels, torch.rand(3, 96))
    found = method.reconstruct(pixels, mask)
    for row in range(3):
        one = Mask(mask.visible[row : row + 1], mask.masked[row : row + 1], 96)
        expected = (
            slow_mae(method, pixels[row], one)
            if host == "mae"
            else slow_simmim(method, pixels[row], one)
        )
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


def slow_mae(method: AMT, pixels: Tensor, mask: Mask) -> Tensor:
    vit = method.encoder
    patches = vit.patch_embed(pixels[None]) + vit.pos_embed[:, 1:]
    seen = torch.cat([vit.cls_token + vit.pos_embed[:, :1], patches[:, mask.visible[0]]], dim=1)
    latent = method.decoder_input.embed(vit.norm(vit.blocks(seen)))
    full = method.decoder_input.mask_token.repeat(1, 96, 1)
    full[:, mask.visible[0]] = latent[:, 1:]
    full = full + method.decoder_input.pos_embed
    kept = torch.cat([mask.visible, mask.masked], dim=1)[0].sort().values
    decoder = method.decoder
    tokens = torch.cat([latent[:, :1], full[:, kept]], dim=1)
    for block in decoder.blocks:
        tokens = block(tokens)
    painted = decoder.head(decoder.norm(tokens))[0, 1:]
    return painted[torch.isin(kept, mask.masked)]


def slow_simmim(method: AMT, pixels: Tensor, mask: Mask) -> Tensor:
    vit = method.encoder
    patches = vit.patch_embed(pixels[None])
    patches = torch.where(mask.as_bool()[:, :, None], method.mask_token, patches)
    full = torch.cat([vit.cls_token, patches], dim=1) + vit.pos_embed
    kept = torch.cat([mask.visible, mask.masked], dim=1)[0].sort().values
    latent = vit.norm(vit.blocks(torch.cat([full[:, :1], full[:, 1:][:, kept]], dim=1)))
    return method.head(latent)[0, 1:][torch.isin(kept, mask.masked)]


@pytest.mark.parametrize(
    "options", [dict(use_abs_pos_emb=True, use_rel_pos_bias=False, drop_path_rate=0.5)]
)
def test_beit_with_learned_positions_and_dropped_paths(options: dict[str, Any]) -> None:
    method = AMT(AMT.Config(host="simmim"), encoder(**options)).train()
    losses = []
    for _ in range(2):
        method.noise.begin(3)
        losses.append(method(batch_of(images()), GUIDED)["loss"])
    assert losses[0] == losses[1]  # dropped paths come from the step's own noise
    losses[0].backward()
    spared = method.param_groups()[1]
    assert {name for name, _ in spared.params} == {"encoder.cls_token", "encoder.pos_embed"}
    assert spared.weight_decay == 0
    assert [group.clip_norm for group in method.param_groups()] == [5.0, 5.0]
    assert all(p.grad is not None for _, p in method.learning())


# ---- maps ----


def plain(count: int) -> list[Batch]:
    whole = batch_of(images(count))
    return [
        Batch([part], index, whole.box[: len(index)], whole.flip[: len(index)])
        for part, index in zip(whole.views[0].split(2), whole.index.split(2), strict=True)
    ]


@pytest.mark.parametrize("host", HOSTS)
def test_a_refresh_keeps_what_the_encoder_looks_at(host: str) -> None:
    method = build(host=host)
    before = torch.get_rng_state()
    method.begin_epoch(GUIDED, plain(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert method.encoder.training
    expected = probe(method.encoder, images(5))
    torch.testing.assert_close(
        method.maps(torch.arange(5)), expected, atol=0.5 / 255 + 1e-5, rtol=0
    )
    assert method.maps.values.shape == (5, 96)
    weights = method.attend(batch_of(images(2), index=torch.tensor([4, 1])))
    torch.testing.assert_close(weights, expected[[4, 1]], atol=0.5 / 255 + 1e-5, rtol=0)
    method.begin_epoch(Progress(42, 400, 1), [])  # nothing to be done
    assert method.maps.values.shape == (5, 96)


def test_a_refresh_without_images_is_no_silent_uniform_draw() -> None:
    with pytest.raises(ValueError, match="no image"):
        build().begin_epoch(GUIDED, [])


def test_images_without_a_map_are_drawn_uniformly() -> None:
    method = build()
    method.maps.replace([(torch.tensor([0]), torch.rand(1, 96))])
    weights = method.attend(batch_of(images(3), index=torch.tensor([0, 1, 70])))
    assert weights[0].any()
    assert not weights[1:].any()
    mask = method.draw_mask(images(3), weights)
    assert thrown(mask).sum(dim=1).tolist() == [38] * 3


def test_online_maps_follow_the_slow_copy_on_the_crop_itself() -> None:
    method = build(maps="online", ema=0.5)
    assert method.maps is None
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    assert not torch.equal(method.attend(batch_of(images())), probe(method.encoder, images()))
    for _ in range(40):
        method.after_step(GUIDED)
    torch.testing.assert_close(
        method.attend(batch_of(images())), probe(method.encoder, images()), atol=1e-4, rtol=1e-4
    )
    assert not any("teacher" in name for name, _ in method.learning())


# ---- behaviour ----


def bright(count: int) -> tuple[Tensor, Tensor]:
    """Noise with one bright square of 3 x 3 patches each: images, and where it is (B, L) bool."""
    generator = torch.Generator().manual_seed(5)
    top = torch.randint(0, 6, (count,), generator=generator)
    left = torch.randint(0, 10, (count,), generator=generator)
    down = torch.arange(8) - top[:, None]  # (B, rows)
    across = torch.arange(12) - left[:, None]
    inside = ((down >= 0) & (down < 3))[:, :, None] & ((across >= 0) & (across < 3))[:, None]
    pixels = 0.3 * torch.randn(count, 3, 32, 48, generator=generator)
    return pixels + 2 * on_pixels(inside.flatten(1)), inside.flatten(1)


@pytest.mark.parametrize(
    ("how", "follows"), [("area", True), ("bilinear", True), ("released", False)]
)
def test_what_is_looked_at_is_masked_wherever_the_crop_moves_it(how: str, follows: bool) -> None:
    """Stored maps that know the object; in crops and mirrored views it must be masked more often
    than seen.
    """
    _, inside = bright(400)
    method = build(alignment=how)
    method.maps.replace([(torch.arange(400), 0.05 + 0.95 * inside.float())])
    generator = np.random.default_rng(0)
    cuts = [crop_box(96, 144, (0.2, 0.6), (1.2, 1.8), generator) for _ in range(400)]
    box = torch.tensor(cuts) / torch.tensor([96, 144, 96, 144])
    flip = torch.from_numpy(generator.random(400) < 0.5)
    batch = Batch([torch.zeros(400, 3, 32, 48)], torch.arange(400), box, flip)
    mask = method.draw_mask(batch.views[0], method.attend(batch))
    shown = pixel_truth(inside, cuts, flip)
    masked = mask.as_bool()
    visible = ~masked & ~thrown(mask)
    inside_masked, inside_visible = (
        part[shown].float().mean().item() for part in (masked, visible)
    )
    if follows:
        assert inside_masked > 0.85
        assert inside_visible < 0.05
    else:  # what its authors ran is near to chance: 0.45 and 0.16
        assert 0.35 < inside_masked < 0.6
        assert inside_visible > 0.08


def pixel_truth(inside: Tensor, cuts: list[tuple[int, int, int, int]], flip: Tensor) -> Tensor:
    """Which patches of each view show mostly the object, from the pixels of a picture of it: (B, L)
    bool.
    """
    found = []
    for cells, (top, left, height, width), mirrored in zip(
        inside, cuts, flip.tolist(), strict=True
    ):
        picture = (
            cells.reshape(1, 1, 8, 12).float().repeat_interleave(12, 2).repeat_interleave(12, 3)
        )
        crop = picture[..., top : top + height, left : left + width]
        crop = crop.flip(-1) if mirrored else crop
        found.append(torch.nn.functional.interpolate(crop, (8, 12), mode="area").flatten() > 0.9)
    return torch.stack(found)


@pytest.mark.parametrize("host", HOSTS)
def test_panels_show_three_roles(host: str) -> None:
    method = build(host=host).eval()
    panels = {
        panel.title: panel
        for panel in method.panels(batch_of(images(), index=torch.arange(3) + 9), GUIDED)
    }
    roles = panels["drawn by attention: masked orange, thrown grey, visible white"].data
    white = (roles == 1).all(dim=1)
    grey = (roles == roles[:, :1]).all(dim=1) & ~white
    visible = ~panels["visible"].data.isnan().any(dim=1)
    assert torch.equal(white, visible)
    together = next(panel for title, panel in panels.items() if "with visible patches" in title)
    assert torch.equal(together.data.isnan().any(dim=1), grey)
    plain = panels["plain reconstruction"].data.isnan().any(dim=1)
    assert torch.equal(plain, grey | visible)
    assert torch.equal(on_pixels(panels["error"].data.isnan().flatten(1))[:, 0], white | grey)
    assert "attention" in panels
    early = [panel.title for panel in method.panels(batch_of(images()), WARM)]
    assert "drawn at random: masked orange, thrown grey, visible white" in early

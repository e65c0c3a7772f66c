"""SimMIM's own promises (docs/methods/simmim.md)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.backbones.family import build_encoder, encode
from patchmine.errors import UserError
from patchmine.methods.simmim import SimMIM
from patchmine.train.optim import build_optimizers
from patchmine.types import Batch, Mask, Progress

START = Progress(0, 10, 1)
SHARED = dict(use_abs_pos_emb=False, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
MODELS: dict[str, dict[str, Any]] = {
    "shared": dict(model="beit_base_patch16_224", model_args=SHARED),
    "per block": dict(model="beit_base_patch16_224", model_args={}),
    "absolute": dict(
        model="beit_base_patch16_224", model_args=dict(use_abs_pos_emb=True, use_rel_pos_bias=False)
    ),
    "plain": dict(model="vit_tiny_patch16_224", model_args={}),
}


def build(kind: str = "shared", size: int = 32, **options: Any) -> SimMIM:
    torch.manual_seed(0)
    args = dict(embed_dim=32, depth=2, num_heads=2) | MODELS[kind]["model_args"]
    encoder = build_encoder(
        MODELS[kind]["model"], image_size=(size, size), patch_size=4, model_args=args
    )
    return SimMIM(SimMIM.Config(**options), encoder).train()


def perturb(method: SimMIM) -> SimMIM:
    """Every part matters: fresh biases, tables and layer scales would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return method


def batch_of(images: Tensor) -> Batch:
    rows = len(images)
    return Batch(
        [images], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool)
    )


def pictures(seed: int = 1, rows: int = 3, size: int = 32) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


def in_pixels(mask: Mask, side: int = 4) -> Tensor:
    """(B, 1, H, W) bool, True where masked."""
    rows = math.isqrt(mask.num_patches)
    full = mask.as_bool().reshape(-1, 1, rows, rows)
    return full.repeat_interleave(side, 2).repeat_interleave(side, 3)


@pytest.mark.parametrize(
    ("size", "unit", "ratio", "units", "hidden"),
    [
        (32, None, 0.6, 16, 10),
        (32, 16, 0.5, 4, 2),
        (32, 4, 0.01, 64, 1),
        (56, 8, 0.6, 49, 30),
        (48, 12, 0.75, 16, 12),
    ],
)
def test_whole_units_in_a_fixed_number(
    size: int, unit: int | None, ratio: float, units: int, hidden: int
) -> None:
    method = build(size=size, mask_unit=unit, mask_ratio=ratio)
    assert (method.num_units, method.num_masked_units) == (units, hidden)
    mask = method.draw_mask(torch.empty(50, 3, size, size))
    per_unit = (unit or 8) // 4
    grid = size // 4
    squares = mask.as_bool().reshape(50, grid // per_unit, per_unit, grid // per_unit, per_unit)
    inside = squares.float().mean(dim=(2, 4))  # (B, units, units), share of each unit
    assert set(inside.unique().tolist()) <= {0.0, 1.0}
    assert torch.all(inside.sum(dim=(1, 2)) == hidden)
    together = torch.cat([mask.visible, mask.masked], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(grid**2).expand(50, -1))


def test_every_unit_is_hidden_equally_often() -> None:
    method = build()
    draws, share = 2000, 10 / 16
    count = method.draw_mask(torch.empty(draws, 3, 32, 32)).as_bool().sum(dim=0).float()
    assert (count - draws * share).abs().max() < 4 * math.sqrt(draws * share * (1 - share))


@pytest.mark.parametrize("kind", MODELS)
def test_masked_pixels_do_not_reach_the_encoder(kind: str) -> None:
    method = perturb(build(kind))
    images = pictures()
    mask = method.draw_mask(images)
    changed = torch.where(in_pixels(mask), pictures(seed=2), images)
    assert not torch.equal(changed, images)
    assert torch.equal(method.encode(changed, mask), method.encode(images, mask))
    assert not torch.equal(method.target(changed, mask), method.target(images, mask))
    visible = torch.where(in_pixels(mask), images, pictures(seed=2))
    assert torch.equal(method.target(visible, mask), method.target(images, mask))


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_masked_is_the_encoders_own_forward(kind: str) -> None:
    method = perturb(build(kind)).eval()
    images = pictures()
    everything = torch.arange(64).expand(3, -1)
    nothing = Mask(everything, everything[:, :0], 64)
    latent = method.encode(images, nothing)
    assert torch.equal(latent, encode(method.encoder, images))
    torch.testing.assert_close(
        latent, method.encoder.forward_features(images), atol=1e-5, rtol=1e-5
    )
    method.draw_mask = lambda images: nothing  # type: ignore[method-assign]
    loss = method(batch_of(images), START)["loss"]
    assert loss.item() == 0


@pytest.mark.parametrize(
    ("kind", "same"), [("shared", True), ("per block", True), ("absolute", False), ("plain", False)]
)
def test_everything_masked_leaves_only_positions(kind: str, same: bool) -> None:
    method = perturb(build(kind))
    everything = torch.arange(64).expand(2, -1)
    entered: list[Tensor] = []
    method.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    method.encode(pictures(rows=2), Mask(everything[:, :0], everything, 64))
    patches = entered[0][:, 1:]
    assert torch.equal(patches, patches[:1, :1].expand_as(patches)) is same
    if same:
        torch.testing.assert_close(patches[0, 0], method.mask_token[0, 0])


def test_only_masked_tokens_go_through_the_head() -> None:
    method = build()
    rows: list[Tensor] = []
    method.head.register_forward_hook(lambda _, inputs, output: rows.append(inputs[0]))
    method(batch_of(pictures()), START)["loss"].backward()
    assert [tuple(part.shape) for part in rows] == [(3, 40, 32)]
    assert method.mask_token.grad.any()


def test_a_row_of_the_head_paints_one_place_of_the_patch() -> None:
    """Channel c at (ry, rx) is output c p^2 + ry p + rx; its loss teaches that row and no other."""
    method = build()
    images = pictures()
    mask = method.draw_mask(images)
    painted = method.reconstruct(images, mask)
    colour, down, across = 2, 1, 3
    row = colour * 16 + down * 4 + across
    folded = torch.zeros(3, 64, 48).scatter(1, mask.masked[:, :, None].expand(-1, -1, 48), painted)
    whole = F.pixel_shuffle(folded.transpose(1, 2).reshape(3, 48, 8, 8), 4)  # the reference's head
    whole[:, colour, down::4, across::4].sum().backward()
    touched = method.head.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert touched == [row]
    expected = images[:, colour, down::4, across::4].flatten(1).gather(1, mask.masked)
    assert torch.equal(method.target(images, mask)[:, :, row], expected)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_decayed_and_clipped(kind: str) -> None:
    method = build(kind)
    optimizers = build_optimizers(
        method.param_groups(), weight_decay=0.05, blr=1e-3, betas=(0.9, 0.999)
    )
    names = {parameter: name for name, parameter in method.named_parameters()}
    decayed, spared = set(), set()
    for group in optimizers.by_name["adamw"].param_groups:
        (decayed if group["weight_decay"] else spared).update(names[p] for p in group["params"])
    assert all(parameter.ndim > 1 for parameter, name in names.items() if name in decayed)
    assert {"mask_token", "head.weight"} <= decayed
    assert not {"encoder.cls_token", "encoder.pos_embed", "head.bias"} & decayed
    tables = {name for name in names.values() if name.endswith("relative_position_bias_table")}
    assert tables <= decayed
    assert len(tables) == {"shared": 1, "per block": 2}.get(kind, 0)
    assert ("encoder.pos_embed" in spared) is (kind == "absolute")  # a plain ViT's are fixed
    (clip,) = optimizers.clips
    assert (clip.norm, clip.each) == (5.0, False)
    assert len(clip.params) == len(optimizers.params)


def test_start_of_mask_token_and_head() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(
        "vit_tiny_patch16_224", image_size=(64, 64), patch_size=16, model_args={"depth": 1}
    )
    method = SimMIM(SimMIM.Config(), encoder)
    assert method.mask_token.abs().max() <= 0.02
    assert method.mask_token.std().item() == pytest.approx(0.0108, rel=0.15)
    bound = 192**-0.5
    for part in (method.head.weight, method.head.bias):
        assert bound * 0.99 < part.abs().max() <= bound
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16_comes_near(kind: str) -> None:
    method = perturb(build(kind))
    method.noise.begin(0)
    exact = method(batch_of(pictures()), START)["loss"]
    method.noise.begin(0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(batch_of(pictures()), START)["loss"]
    rough.backward()
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.isfinite().all() for _, p in method.learning())


def learn(steps: int, **options: Any) -> float:
    """Error of the last steps on images that are linear ramps, against that of painting each
    image's mean colour.
    """
    method = build("plain", size=16, mask_ratio=0.5, **options)
    optimizer = torch.optim.AdamW([p for _, p in method.learning()], lr=5e-3)
    ramp = torch.linspace(-1, 1, 16)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for step in range(steps):
        slopes = torch.randn(16, 3, 2, 1, 1, generator=generator)
        images = slopes[:, :, 0] * ramp[:, None] + slopes[:, :, 1] * ramp
        method.noise.begin(step)
        loss = method(batch_of(images), START)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(
            loss.item() / (images - images.mean(dim=(2, 3), keepdim=True)).abs().mean().item()
        )
    return sum(shares[-20:]) / 20


def test_it_learns_to_draw_and_larger_units_are_harder() -> None:
    large, small = learn(150), learn(150, mask_unit=4)
    assert large < 0.75
    assert small < large - 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(mask_unit=6),
            r"method\.mask_unit=6 is not a multiple of the patch, 4x4 pixels: try "
            r"method\.mask_unit=8",
        ),
        (dict(mask_unit=2), r"method\.mask_unit=2 is not a multiple .* try method\.mask_unit=4"),
        (
            dict(mask_unit=12),
            r"method\.mask_unit=12 makes units of 12x12 pixels, which do not fill image_size=32x32",
        ),
        (
            dict(mask_unit=64),
            r"method\.mask_unit=64 .* do not fill image_size=32x32: try method\.mask_unit=4",
        ),
        (
            dict(mask_unit=16, mask_ratio=0.8),
            r"method\.mask_ratio=0\.8 hides all 4 mask units .* method\.mask_unit=4",
        ),
        (dict(mask_unit=32), r"hides all 1 mask units"),
    ],
)
def test_units_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


def test_a_grid_of_odd_size_needs_a_unit_that_is_given() -> None:
    with pytest.raises(
        UserError, match=r"method\.mask_unit=null, two patches, .* image_size=36x36: try .*=4"
    ):
        build(size=36)
    assert build(size=36, mask_unit=12).num_units == 9

"""EMAE's own promises (docs/methods/emae.md)."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from patchmine.backbones.family import Encoder, build_encoder
from patchmine.errors import UserError
from patchmine.methods import emae as emae_file
from patchmine.methods.emae import EMAE
from patchmine.methods.mae import MAE
from patchmine.types import Batch, Progress

START = Progress(0, 10, 1)
NARROW = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


def encoder(side: int = 16) -> Encoder:
    args = dict(embed_dim=32, depth=2, num_heads=2)
    return build_encoder(
        "vit_tiny_patch16_224", image_size=(side, side), patch_size=4, model_args=args
    )


def build(side: int = 16, **options: Any) -> EMAE:
    torch.manual_seed(0)
    return EMAE(EMAE.Config(**(NARROW | options)), encoder(side))


def batch_of(images: Tensor) -> Batch:
    rows = len(images)
    return Batch(
        [images], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool)
    )


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fed() -> type:
    class Fed:
        """Stands in for a method's noise and gives what it was made with."""

        def __init__(self, noise: Tensor) -> None:
            self.noise = noise

        def uniform(self, rows: int, *shape: int, device: Any = "cpu") -> Tensor:
            return self.noise

    return Fed


def gradients(method: EMAE | MAE) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def run(
    method: EMAE | MAE, images: Tensor, key: str = "loss"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses and the gradients of one of them."""
    method.zero_grad()
    losses = method(batch_of(images), START)
    losses[key].backward()
    return {name: value.detach() for name, value in losses.items()}, gradients(method)


def alike(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = relative * value.abs().max().item() + 1e-7
        torch.testing.assert_close(
            found[name], value, atol=bound, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_one_part_in_use_is_mae(images: Tensor, parts: int) -> None:
    method = build(parts=parts, parts_used=1)
    mae = MAE(MAE.Config(mask_ratio=1 - 1 / parts, **NARROW), encoder())
    mae.load_state_dict(method.state_dict())  # strictly: an EMAE has the parameters of an MAE
    found, expected = run(method, images), run(mae, images)
    assert found[0].keys() == {"loss"}
    torch.testing.assert_close(found[0]["loss"], expected[0]["loss"])
    alike(found[1], expected[1])


def test_reconstruction_is_the_mean_of_as_many_maes(images: Tensor, fed: Any) -> None:
    method = build()
    mae = MAE(MAE.Config(**NARROW), encoder())
    mae.load_state_dict(method.state_dict())
    noise = method.noise.uniform(4, 16)
    method.noise = fed(noise)
    losses, slopes = run(method, images, "reconstruction")
    values, sums = [], {}
    rank = noise.argsort(dim=1, stable=True).argsort(dim=1)
    for part in range(4):
        mae.noise = fed(((rank - 4 * part) % 16) / 16)
        value, each = run(mae, images)
        values.append(value["loss"])
        sums = {name: sums.get(name, 0) + slope / 4 for name, slope in each.items()}
    torch.testing.assert_close(losses["reconstruction"], torch.stack(values).mean())
    alike(slopes, sums)


def test_parts_and_images_see_nothing_of_each_other(images: Tensor) -> None:
    method = build()
    parts = method.draw_parts(images)
    images.requires_grad_()
    tokens, unseen = method.decoder_tokens(images, parts)
    latent = method.encode_parts(images, parts)
    features = method.decoder(tokens, unseen)
    weights = torch.randn(
        32, generator=torch.Generator().manual_seed(3)
    )  # a plain sum is constant after a norm
    for row, part in ((0, 0), (2, 3)):
        seen = torch.zeros(16).scatter_(0, parts[row, part], 1.0).reshape(4, 4)
        seen = seen.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, -1, -1)
        for made in (latent, features):
            value = (
                made.reshape(4, 4, *made.shape[1:])[row, part] * weights[: made.shape[-1]]
            ).sum()
            (slope,) = torch.autograd.grad(value, images, retain_graph=True)
            assert ((slope[row] != 0) == seen.bool()).all()
            assert not slope[[other for other in range(4) if other != row]].any()


def test_every_patch_is_embedded_once(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = []
    original = emae_file.embed_patches

    def counting(encoder: Any, images: Tensor, index: Tensor) -> Tensor:
        embedded.append((len(images), index.sort(dim=1).values))
        return original(encoder, images, index)

    monkeypatch.setattr(emae_file, "embed_patches", counting)
    build()(batch_of(images), START)
    ((rows, index),) = embedded
    assert rows == 4
    assert torch.equal(index, torch.arange(16).expand(4, -1))
    build(parts_used=2)(batch_of(images), START)
    assert embedded[1][1].shape == (4, 8)


def test_the_factors_of_consistency(images: Tensor) -> None:
    losses, slopes = run(build(), images, "consistency")
    torch.testing.assert_close(losses["consistency"], 2 * (1 - 2 / 4) * losses["disagreement"])
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + losses["consistency"])
    for options, value, slope in (
        ({"sc_norm": "overlap"}, 2, 2),
        ({"sc_pairs": "sum"}, 6, 6),
        ({"sc_grad": "none"}, 0.5, 1),
        ({"sc_weight": 0.3}, 1, 1),
    ):
        found, found_slopes = run(build(**options), images, "consistency")
        torch.testing.assert_close(found["consistency"], value * losses["consistency"])
        torch.testing.assert_close(found["disagreement"], losses["disagreement"])
        alike(found_slopes, {name: slope * each for name, each in slopes.items()})
    found, _ = run(build(sc_weight=0.3), images)
    torch.testing.assert_close(found["loss"], found["reconstruction"] + 0.3 * found["consistency"])
    found, _ = run(build(sc_dist="l2"), images)
    torch.testing.assert_close(found["disagreement"], losses["disagreement"])


def test_consistency_does_not_move_the_bias_of_the_head(images: Tensor) -> None:
    _, slopes = run(build(), images, "consistency")
    assert slopes["decoder.head.bias"].abs().max() <= 1e-7
    assert slopes["decoder.head.weight"].abs().max() > 1e-5


@pytest.mark.parametrize("sc_norm", ["all", "overlap"])
def test_two_parts_have_nothing_in_common(images: Tensor, sc_norm: str) -> None:
    losses, slopes = run(build(parts=2, sc_norm=sc_norm), images)
    assert losses.keys() == {"loss"}
    assert all(slope.isfinite().all() for slope in slopes.values())


def test_accumulated_images_make_the_same_step(images: Tensor) -> None:
    method = build()
    method.noise.begin(0)
    whole, slopes = run(method, images)
    method.zero_grad()
    values = []
    for row in range(4):
        method.noise.begin(0, row, 4)
        loss = method(batch_of(images[row : row + 1]), START)["loss"] / 4
        loss.backward()
        values.append(loss.detach())
    torch.testing.assert_close(torch.stack(values).sum(), whole["loss"], rtol=1e-6, atol=0)
    alike(gradients(method), slopes, 1e-5)


def test_zeros_in_place_of_the_mask_token(images: Tensor) -> None:
    method = build(mask_token="zeros")
    assert not method.decoder_input.mask_token.any()
    assert "decoder_input.mask_token" not in dict(method.learning())
    method.load_state_dict(
        build().state_dict() | {"decoder_input.mask_token": torch.zeros(1, 1, 16)}
    )
    _, slopes = run(method, images)
    assert "decoder_input.mask_token" not in slopes


@pytest.mark.parametrize(
    ("options", "shown"), [({}, 4), ({"parts": 8}, 4), ({"parts_used": 2}, 2), ({"parts": 2}, 2)]
)
def test_pictures_show_the_parts(images: Tensor, options: dict[str, int], shown: int) -> None:
    method = build(**options).eval()
    panels = {panel.title: panel for panel in method.panels(batch_of(images), START)}
    seen = [
        panel.data[:, 0].isnan()
        for title, panel in panels.items()
        if title.startswith("part") and ":" not in title
    ]
    assert len(seen) == shown
    if shown == method.num_parts:
        assert (
            torch.stack(seen).sum(dim=0).eq(shown - 1).all()
        )  # every pixel is seen by exactly one part
    assert ("disagreement" in panels) is (method.num_parts > 2)
    plain = panels.pop(f"part 1 of {method.num_parts}: plain reconstruction").data
    assert torch.equal(plain.isfinite()[:, 0], seen[0])  # what the part does not know
    for panel in panels.values():
        if ":" in panel.title:
            assert panel.data.isfinite().all()
    # A part in use knows its own patches, so that only the others speak of them: of two, one, and
    # it has no other side.
    assert panels["error"].data.isfinite().all()
    if options.get("parts_used") == 2:
        assert panels["disagreement"].data.isnan().sum(dim=(1, 2)).eq(8).all()


def bowls(count: int, generator: torch.Generator) -> Tensor:
    """Round bowls with random centres: what is hidden can soon be told from what is seen."""
    axis = torch.linspace(-1, 1, 16)
    centre = 2 * torch.rand(count, 1, 2, 1, 1, generator=generator) - 1
    return ((axis[:, None] - centre[:, :, 0]) ** 2 + (axis - centre[:, :, 1]) ** 2).expand(
        -1, 3, -1, -1
    )


@cache
def trained(name: str, weight: float = 0.0) -> dict[str, float]:
    """What held-out images look like to a small model after a short training."""
    sizes = NARROW | dict(decoder_embed_dim=32)
    torch.manual_seed(0)
    method: MAE | EMAE = (
        MAE(MAE.Config(**sizes), encoder())
        if name == "mae"
        else EMAE(EMAE.Config(sc_weight=weight, **sizes), encoder())
    )
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for _, p in method.learning()], lr=3e-3)
    for step in range(150):
        method.noise.begin(step)
        loss = method(batch_of(bowls(16, generator)), START)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    judge = build(decoder_embed_dim=32)
    judge.load_state_dict(method.state_dict())
    with torch.no_grad():
        held_out = bowls(256, torch.Generator().manual_seed(1))
        losses = judge(batch_of(held_out), START)
        spread = judge.reconstruct(held_out, judge.draw_parts(held_out)).std()
    return {name: losses[name].item() for name in ("reconstruction", "disagreement")} | {
        "std": spread.item()
    }


def test_consistency_makes_parts_agree() -> None:
    free, default, strong = (trained("emae", weight) for weight in (0.0, 1.0, 4.0))
    assert default["disagreement"] < 0.7 * free["disagreement"]
    assert strong["disagreement"] < default["disagreement"]
    assert default["std"] > 0.95 * free["std"]


def test_as_good_as_mae_at_equal_steps() -> None:
    assert trained("emae")["reconstruction"] < trained("mae")["reconstruction"] + 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"parts": 5},
            r"method\.parts=5 does not divide the 16 patches of a 4x4 grid: set .*method\.parts=4 ",
        ),
        (
            {"parts_used": 5},
            r"method\.parts_used=5 is more than method\.parts=4: set it to 4 or less",
        ),
        ({"decoder_embed_dim": 18}, r"method\.decoder_embed_dim=18 must be a multiple of 4"),
    ],
)
def test_settings_that_no_network_can_be_built_from(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


def test_an_image_of_one_patch() -> None:
    with pytest.raises(UserError, match="a smaller patch_size"):
        build(side=4)


def test_relative_positions_are_refused() -> None:
    relative = build_encoder(
        "beit_base_patch16_224",
        image_size=(16, 16),
        patch_size=4,
        model_args=dict(embed_dim=32, depth=1, num_heads=2, use_rel_pos_bias=True),
    )
    with pytest.raises(UserError, match="method=emae leaves patches out"):
        EMAE(EMAE.Config(**NARROW), relative)

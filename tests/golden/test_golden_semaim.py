"""SemAIM against numbers of the reference implementation (spec semaim.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchmine.methods import semaim as semaim_file
from patchmine.methods.semaim import SemAIM
from patchmine.models.attention import class_attention
from patchmine.models.streams import two_streams
from patchmine.models.vit import build_encoder, embed_patches, encode, patch_positions, prefix_tokens
from patchmine.ops.losses import direction_error, squared_error
from patchmine.ops.orders import squared_distances, visibility
from patchmine.ops.patches import pixel_targets
from patchmine.types import Batch, Progress

pytestmark = pytest.mark.golden
START = Progress(0, 1, 1)

# The reference's names of orders -> ours; its zigzag is plain row-major (spec, section 8).
ORDERS = {"attention_center": "attention_center", "attention": "similarity", "stochastic": "stochastic"} | {
    "zigzag": "rowmajor"
}
PIXEL_CASES = ["main", "gap", "self", "sim_order", "stochastic", "noblur", "rowmajor", "rings"]
BY_CONTENT = ["main", "gap", "self", "sim_order", "noblur", "rings"]


@pytest.fixture(scope="module")
def golden(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("semaim")


class StoredTeacher(nn.Module):
    """Stands in for a frozen foreign network: its tokens are the stored ones."""

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self.stored, self.width = stored, stored.shape[-1]
        self.tower = nn.Module()
        self.tower.cls_token, self.tower.num_prefix_tokens = stored[:1, :1], 1

    def tokens(self, images: Tensor) -> Tensor:
        assert len(images) == len(self.stored)
        return self.stored


def settings(golden: Any, case: str) -> dict[str, Any]:
    """Our settings for a stored case; every option is the JSON's."""
    c, of_case = golden.config, golden.meta["cases"][case]
    options = dict(
        order=ORDERS[of_case["permutation_type"]],
        head=c["prediction_head_type"].lower(),
        query_depth=c["query_depth"],
        ties="keep" if case == "rings" else "break",
    )
    if case == "feat":
        return options | dict(target="clip")
    kernel, sigma = of_case["blur"] or (c["gaussian_kernel_size"], None)
    return options | dict(
        similarity=of_case["attention_type"],
        target=of_case["target"],
        pixel_loss=of_case["loss"].lower(),
        norm_pix_loss=of_case["norm_pix"],
        blur_kernel=kernel,
        blur_sigma=sigma,
    )


def own_state(golden: Any, case: str) -> dict[str, Tensor]:
    """The stored weights under our names: keys and values of a query block are one matrix here."""
    stored = {name.removeprefix("sd."): t for name, t in golden.tensors.items() if name.startswith("sd.")}
    if case == "feat":
        prefix = "sd_feat."
        stored |= {name.removeprefix(prefix): t for name, t in golden.tensors.items() if name.startswith(prefix)}
    state = {}
    for name, tensor in stored.items():
        if name.endswith((".attn.v.weight", ".attn.v.bias")) or name == "gaussian_blur.weight":
            continue
        if name.startswith("query_blocks.") and ".attn.k." in name:
            tensor = torch.cat([tensor, stored[name.replace(".attn.k.", ".attn.v.")]])
        state[own_name(name)] = tensor
    return state


def own_name(name: str) -> str:
    if name.startswith("query_blocks."):
        for theirs, ours in ((".attn.q.", ".query."), (".attn.k.", ".key_value."), (".attn.proj.", ".proj.")):
            name = name.replace(theirs, ours)
        return name
    if name.startswith("prediction_head."):
        return name.replace("prediction_head.", "head.")
    return f"encoder.{name}"


def build(golden: Any, case: str, monkeypatch: pytest.MonkeyPatch | None = None) -> SemAIM:
    c = golden.config
    encoder = build_encoder(
        "vit_tiny_patch16_224",
        image_size=(c["img_size"],) * 2,
        patch_size=c["patch_size"],
        model_args=dict(embed_dim=c["embed_dim"], depth=c["depth"], num_heads=c["num_heads"]),
    )
    if monkeypatch is not None:
        teacher = StoredTeacher(golden.tensors["feat.teacher_tokens"])
        monkeypatch.setattr(semaim_file, "ForeignTeacher", lambda *_, **__: teacher)
    method = SemAIM(SemAIM.Config(**settings(golden, case)), encoder)
    method.load_state_dict(own_state(golden, case))
    return method.train()


def batch(golden: Any) -> Batch:
    images = golden.tensors["images"]
    rows = len(images)
    return Batch([images], torch.arange(rows), torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.bool))


def look(golden: Any, method: SemAIM) -> tuple[Tensor | None, Tensor | None]:
    images = golden.tensors["images"]
    return method.look(images, embed_patches(method.encoder, images))


def stored_masks(golden: Any, case: str) -> tuple[Tensor, Tensor]:
    """Content (B, 1 + L, 1 + L), and queries (B, L, 1 + L) without the class token's row, which nobody reads."""
    content, query = (golden.tensors[f"{case}.{kind}_mask"].bool() for kind in ("content", "query"))
    assert torch.equal(query[:, 0], content[:, 0])
    return content, query[:, 1:]


def gradient_norm(method: SemAIM) -> float:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]).norm().item()


def assert_gradients(method: SemAIM, stored: dict[str, Tensor]) -> None:
    """Relative norm of the difference below 1e-4."""
    assert stored
    parameters = dict(method.named_parameters())
    for name, expected in stored.items():
        found = parameters[own_name(name)].grad
        if found.shape != expected.shape:  # keys are the first half of keys and values
            found = found[: len(expected)]
        assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-8, name


def test_fixed_positions_and_blur(golden: Any) -> None:
    c = golden.config
    fresh = build_encoder(
        "vit_tiny_patch16_224",
        image_size=(c["img_size"],) * 2,
        patch_size=c["patch_size"],
        model_args=dict(embed_dim=c["embed_dim"], depth=1, num_heads=c["num_heads"]),
    )
    torch.testing.assert_close(fresh.pos_embed.data, golden.tensors["sd.pos_embed"], atol=1e-6, rtol=0)
    method = build(golden, "main")
    blurred = method.soften(golden.tensors["images"])
    torch.testing.assert_close(blurred, golden.tensors["main.blurred"], atol=1e-6, rtol=0)
    window = golden.tensors["sd.gaussian_blur.weight"][0, 0]
    middle = len(method.blur_rows) // 2
    reach = len(window) // 2
    line = method.blur_rows[middle, middle - reach : middle + reach + 1]
    torch.testing.assert_close(torch.outer(line, line), window, atol=1e-7, rtol=0)


def test_the_unmasked_pass_and_its_maps(golden: Any) -> None:
    method = build(golden, "main")
    images = golden.tensors["images"]
    torch.testing.assert_close(encode(method.encoder, images), golden.tensors["main.enc_tokens"], atol=1e-4, rtol=0)
    for case in ("main", "gap"):
        _, similarity = look(golden, build(golden, case))
        expected = golden.tensors[f"{case}.feature_attention"]
        torch.testing.assert_close(similarity.softmax(dim=1), expected, atol=1e-6, rtol=0)
    attention = class_attention(method.encoder, images)[:, :, 1:].mean(dim=1)
    torch.testing.assert_close(attention, golden.tensors["main.self_attention"], atol=1e-6, rtol=0)
    _, similarity = look(golden, build(golden, "self"))
    assert torch.equal(similarity, attention)


def test_the_similarity_of_a_foreign_network(golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    features, similarity = look(golden, build(golden, "feat", monkeypatch))
    assert torch.equal(features, golden.tensors["feat.teacher_tokens"][:, 1:])
    low, high = similarity.amin(dim=1, keepdim=True), similarity.amax(dim=1, keepdim=True)
    scaled = (similarity - low) / (high - low + 1e-6)
    torch.testing.assert_close(scaled, golden.tensors["feat.teacher_similarity"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [*BY_CONTENT, "feat"])
def test_centre(golden: Any, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    _, similarity = look(golden, build(golden, case, monkeypatch if case == "feat" else None))
    centre = similarity.argmax(dim=1)
    assert torch.equal(centre, golden.tensors[f"{case}.center_index"])
    if golden.meta["cases"][case]["permutation_type"] == "attention_center":
        noise = 0 if case == "rings" else golden.tensors["noise"]
        score = squared_distances(centre, (8, 8)).float().sqrt() + 1e-3 * noise
    else:
        score = 1 - similarity.softmax(dim=1)
    torch.testing.assert_close(score, golden.tensors[f"{case}.permutation"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", [*PIXEL_CASES, "feat"])
def test_order_and_masks(
    golden: Any, monkeypatch: pytest.MonkeyPatch, fed_noise: Callable[[Tensor], Any], case: str
) -> None:
    method = build(golden, case, monkeypatch if case == "feat" else None)
    method.noise = fed_noise(golden.tensors["noise"])
    order, score = method.draw_order(golden.tensors["images"], look(golden, method)[1])
    assert (score is not None) == (case == "rings")
    stored = golden.tensors[f"{case}.permutation"]
    if score is None:
        assert torch.equal(order, stored.argsort(dim=1, stable=True))
        score = torch.arange(order.shape[1]).expand_as(order)
    in_raster = score.gather(1, order.argsort(dim=1))
    for ours, theirs, direct in zip(visibility(in_raster), stored_masks(golden, case), visibility(stored), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(direct, theirs)


def test_streams_in_raster_order(golden: Any) -> None:
    """The masked form with every token in its place, as the reference computes it."""
    method = build(golden, "main")
    images = golden.tensors["images"]
    content = torch.cat([prefix_tokens(method.encoder, len(images)), embed_patches(method.encoder, images)], dim=1)
    queries = patch_positions(method.encoder).expand(len(images), -1, -1)
    masks = (mask[:, None] for mask in stored_masks(golden, "main"))
    contents, answers = two_streams(method.encoder, method.query_blocks, content, queries, *masks)
    for i, (h, g) in enumerate(zip(contents, answers, strict=True)):
        torch.testing.assert_close(h, golden.tensors[f"main.h.{i}"], atol=1e-4, rtol=0)
        torch.testing.assert_close(g, golden.tensors[f"main.g.{i}"][:, 1:], atol=1e-4, rtol=0)
    predicted = method.head(method.encoder.norm(answers[-1]))
    torch.testing.assert_close(predicted, golden.tensors["main.pred"][:, 1:], atol=1e-4, rtol=0)


def test_pixel_target(golden: Any) -> None:
    method = build(golden, "main")
    images = golden.tensors["images"]
    everything = torch.arange(method.grid.num_patches).expand(len(images), -1)
    target = pixel_targets(method.soften(images), everything, method.grid.patch, norm_pix_loss=True)
    torch.testing.assert_close(target, golden.tensors["main.target"], atol=1e-5, rtol=1e-5)
    error = squared_error(golden.tensors["main.pred"][:, 1:], target)
    torch.testing.assert_close(error, golden.tensors["main.loss_map"], atol=1e-5, rtol=1e-5)
    teacher = golden.tensors["feat.teacher_tokens"][:, 1:]
    error = direction_error(golden.tensors["feat.pred"][:, 1:], teacher)
    torch.testing.assert_close(error, golden.tensors["feat.loss_map"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [*PIXEL_CASES, "feat"])
def test_loss_and_gradients(
    golden: Any, monkeypatch: pytest.MonkeyPatch, fed_noise: Callable[[Tensor], Any], case: str
) -> None:
    method = build(golden, case, monkeypatch if case == "feat" else None)
    method.noise = fed_noise(golden.tensors["noise"])
    images = golden.tensors["images"]
    patches = embed_patches(method.encoder, images)
    features, similarity = method.look(images, patches)
    order, score = method.draw_order(images, similarity)
    predicted = method.predict(patches, order, score)
    back = order.argsort(dim=1)
    if f"{case}.pred" in golden.tensors:
        in_raster = predicted.gather(1, back[:, :, None].expand_as(predicted))
        torch.testing.assert_close(in_raster, golden.tensors[f"{case}.pred"][:, 1:], atol=1e-4, rtol=0)
    error = method.error(predicted, images, features, order).gather(1, back)
    torch.testing.assert_close(error, golden.tensors[f"{case}.loss_map"], atol=1e-4, rtol=1e-4)

    loss = method(batch(golden), START)["loss"]
    assert loss.item() == pytest.approx(golden.scalar(f"{case}.loss"), abs=1e-5)
    assert loss.item() == pytest.approx(golden.meta["cases"][case]["result"][0], abs=1e-5)
    loss.backward()
    assert gradient_norm(method) == pytest.approx(golden.scalar(f"{case}.grad_norm"), rel=1e-4)
    stored = golden.gradients(case)
    assert bool(stored) == (case in ("main", "feat"))
    if stored:
        assert_gradients(method, stored)
    assert method.encoder.pos_embed.grad is None


def test_breaking_ties_is_another_model(golden: Any, fed_noise: Callable[[Tensor], Any]) -> None:
    """Patches predicted at once do not see each other; one after the other they do, in whatever order."""
    method = build(golden, "main")
    method.noise = fed_noise(torch.zeros_like(golden.tensors["noise"]))
    broken = method(batch(golden), START)["loss"].item()
    assert abs(broken - golden.scalar("rings.loss")) > 1e-3


def test_every_stored_tensor_is_known(golden: Any) -> None:
    """A new kind of tensor in the file would be one that no test here compares."""
    shared = ("sd", "images", "noise")
    kinds = {name.split(".")[1] for name in golden.tensors if not name.startswith(shared)}
    assert kinds == {
        *("enc_tokens", "feature_attention", "self_attention", "center_index", "permutation", "content_mask"),
        *("query_mask", "h", "g", "pred", "blurred", "target", "loss", "loss_map", "grad", "grad_norm"),
        *("teacher_tokens", "teacher_similarity"),
    }

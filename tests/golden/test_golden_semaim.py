"""SemAIM against numbers of the reference implementation.

The reference adds noise to scores in float32, where two patches may come out equal, and are then
predicted at once; and its ``1 - softmax`` may order close similarities either way.  So orders are
compared up to such ties, and what follows from an order is worked out for the stored one where they
make ours another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_vectors import FedNoise, Golden, batch_of, described, load_golden, stored_names
from torch import Tensor, nn

from patchmine.backbones.attention import class_attention
from patchmine.backbones.family import encode
from patchmine.backbones.tokens import embed_patches, patch_positions, prefix_tokens
from patchmine.methods import semaim as semaim_file
from patchmine.methods.semaim import SemAIM
from patchmine.models.streams import two_streams
from patchmine.ops.orders import squared_distances, visibility
from patchmine.ops.patches import pixel_targets
from patchmine.types import Progress

pytestmark = pytest.mark.golden
START = Progress(0, 1, 1)

# The reference's names of orders -> ours; its zigzag is plain row-major.
ORDERS = {
    "attention_center": "attention_center",
    "attention": "similarity",
    "stochastic": "stochastic",
}
ORDERS |= {
    "zigzag": "rowmajor",
    "raster": "serpentine",
    "center2out": "center2out",
    "out2center": "out2center",
}
CASES: dict[str, dict[str, Any]] = described("semaim").get("cases", {})
FEATURES = [name for name, case in CASES.items() if case["target"].startswith("feature")]
BY_CONTENT = [
    name
    for name, case in CASES.items()
    if case["permutation_type"] in ("attention_center", "attention")
]


def with_stored(kind: str) -> list[str]:
    """Cases of which the file keeps a tensor of this kind."""
    return [name for name in CASES if f"{name}.{kind}" in stored_names("semaim")]


@pytest.fixture(scope="module")
def golden() -> Golden:
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


def settings(golden: Golden, case: str) -> dict[str, Any]:
    """Our settings for a stored case; every option is the JSON's."""
    c, of_case = golden.config, CASES[case]
    options = dict(
        order=ORDERS[of_case["permutation_type"]],
        head=c["prediction_head_type"].lower(),
        query_depth=c["query_depth"],
        ties="keep" if without_noise(golden, case) else "break",
    )
    if case in FEATURES:
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


def grid_of(golden: Golden) -> tuple[int, ...]:
    return tuple(golden.encoder(depth=1).patch_embed.grid_size)


def without_noise(golden: Golden, case: str) -> bool:
    """Whether a case orders patches by distance alone, so that whole rings are predicted at once."""
    if CASES[case]["permutation_type"] != "attention_center":
        return False
    distances = squared_distances(golden[f"{case}.center_index"], grid_of(golden)).float().sqrt()
    # The square root of some processors is one bit off; noise is up to a thousandth.
    return torch.allclose(golden[f"{case}.permutation"], distances, rtol=0, atol=1e-6)


def noise_of(golden: Golden, case: str) -> Tensor:
    return torch.zeros_like(golden["noise"]) if without_noise(golden, case) else golden["noise"]


def own_state(golden: Golden, case: str) -> dict[str, Tensor]:
    """The stored weights under our names: keys and values of a query block are one matrix here."""
    stored = golden.under("sd.")
    if case in FEATURES:
        own = golden.under(f"sd_{case}.") or golden.under("sd_feat.")
        head = {name for name in stored if name.startswith("prediction_head.")}
        stored = {name: t for name, t in stored.items() if name not in head} | own
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
        parts = {
            ".attn.q.": ".query.",
            ".attn.k.": ".key_value.",
            ".attn.v.": ".key_value.",
            ".attn.proj.": ".proj.",
        }
        for theirs, ours in parts.items():
            name = name.replace(theirs, ours)
        return name
    if name.startswith("prediction_head."):
        return name.replace("prediction_head.", "head.")
    return f"encoder.{name}"


def build(golden: Golden, case: str, monkeypatch: pytest.MonkeyPatch) -> SemAIM:
    if case in FEATURES:
        teacher = StoredTeacher(golden[f"{case}.teacher_tokens"])
        monkeypatch.setattr(semaim_file, "foreign_teacher", lambda *_: teacher)
    method = SemAIM(SemAIM.Config(**settings(golden, case)), golden.encoder())
    method.load_state_dict(own_state(golden, case))
    method.noise = FedNoise(noise_of(golden, case))
    return method.train()


def look(golden: Golden, method: SemAIM) -> tuple[Tensor | None, Tensor | None]:
    images = golden["images"]
    return method.judge(images, embed_patches(method.encoder, images))


def stored_masks(golden: Golden, case: str) -> tuple[Tensor, Tensor]:
    """Content (B, 1 + L, 1 + L), and queries (B, L, 1 + L) without the class token's row, which
    nobody reads.
    """
    content, query = (golden[f"{case}.{kind}_mask"].bool() for kind in ("content", "query"))
    assert torch.equal(query[:, 0], content[:, 0])
    return content, query[:, 1:]


def own_masks(order: Tensor, score: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of an order (B, L), and the score of each rank where some are predicted at once."""
    ranks = torch.arange(order.shape[1]).expand_as(order) if score is None else score
    return visibility(ranks.gather(1, order.argsort(dim=1)))


def follow(golden: Golden, case: str, method: SemAIM) -> None:
    """Let a method visit patches in the stored order where a tie makes its own another."""
    order, score = method.draw_order(golden["images"], look(golden, method)[1])
    pairs = zip(own_masks(order, score), stored_masks(golden, case), strict=True)
    if all(torch.equal(ours, theirs) for ours, theirs in pairs):
        return
    stored = golden[f"{case}.permutation"].double()
    by_score = stored.argsort(dim=1, stable=True)
    method.draw_order = lambda images, similarity: (by_score, stored.gather(1, by_score))


def check_gradients(golden: Golden, method: SemAIM, stored: dict[str, Tensor]) -> None:
    """The norm of the difference, relative to the norm."""
    bound = golden.tolerance("gradient")
    parameters = dict(method.named_parameters())
    for name, expected in stored.items():
        found = parameters[own_name(name)].grad
        if ".attn.k." in name or ".attn.v." in name:
            found = found.chunk(2)[".attn.v." in name]
        assert (found - expected).norm() <= bound.relative * expected.norm() + bound.absolute, name


def test_fixed_positions(golden: Golden) -> None:
    golden.check(golden.encoder(depth=1).pos_embed.data, "sd.pos_embed", "table")


@pytest.mark.parametrize("case", with_stored("blurred"))
def test_blur(golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    method, c = build(golden, case, monkeypatch), golden.config
    golden.check(method.soften(golden["images"]), f"{case}.blurred", "table")
    if CASES[case]["blur"] == [c["gaussian_kernel_size"], c["gaussian_sigma"]]:
        window = golden["sd.gaussian_blur.weight"][0, 0]
        middle, reach = len(method.blur_rows) // 2, len(window) // 2
        line = method.blur_rows[middle, middle - reach : middle + reach + 1]
        golden.check(torch.outer(line, line), window, "window")


@pytest.mark.parametrize("case", with_stored("enc_tokens"))
def test_the_unmasked_pass(golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    found = encode(build(golden, case, monkeypatch).encoder, golden["images"])
    golden.check(found, f"{case}.enc_tokens", "tokens")


@pytest.mark.parametrize("case", with_stored("feature_attention"))
def test_similarity(golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    _, similarity = look(golden, build(golden, case, monkeypatch))
    golden.check(similarity.softmax(dim=1), f"{case}.feature_attention", "map")


@pytest.mark.parametrize("case", with_stored("self_attention"))
def test_attention_of_the_class_token(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    attention = class_attention(build(golden, case, monkeypatch).encoder, golden["images"])[
        :, :, 1:
    ].mean(dim=1)
    golden.check(attention, f"{case}.self_attention", "map")
    for other in (name for name in BY_CONTENT if CASES[name].get("attention_type") == "self"):
        _, similarity = look(golden, build(golden, other, monkeypatch))
        assert torch.equal(similarity, attention)


@pytest.mark.parametrize("case", FEATURES)
def test_the_similarity_of_a_foreign_network(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    features, similarity = look(golden, build(golden, case, monkeypatch))
    assert torch.equal(features, golden[f"{case}.teacher_tokens"][:, 1:])
    low, high = similarity.amin(dim=1, keepdim=True), similarity.amax(dim=1, keepdim=True)
    golden.check(
        (similarity - low) / (high - low + 1e-6), f"{case}.teacher_similarity", "teacher map"
    )


@pytest.mark.parametrize("case", BY_CONTENT)
def test_centre(golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    method = build(golden, case, monkeypatch)
    _, similarity = look(golden, method)
    centre = golden[f"{case}.center_index"]
    short = similarity.amax(dim=1) - similarity.gather(1, centre[:, None]).squeeze(1)
    assert (short <= golden.tolerance("order").absolute).all()
    if CASES[case]["permutation_type"] == "attention_center":
        score = squared_distances(centre, method.grid.size).float().sqrt() + 1e-3 * noise_of(
            golden, case
        )
    else:
        score = 1 - similarity.softmax(dim=1)
    golden.check(score, f"{case}.permutation", "map")


@pytest.mark.parametrize("case", CASES)
def test_order_and_masks(golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    method = build(golden, case, monkeypatch)
    stored, theirs = golden[f"{case}.permutation"], stored_masks(golden, case)
    for direct, mask in zip(visibility(stored), theirs, strict=True):
        assert torch.equal(direct, mask)
    _, similarity = look(golden, method)
    order, score = method.draw_order(golden["images"], similarity)
    assert (score is not None) == without_noise(golden, case)
    same = torch.ones(len(stored), dtype=torch.bool)
    if (
        CASES[case]["permutation_type"] == "attention_center"
    ):  # of two greatest similarities either may be the centre
        same = similarity.argmax(dim=1) == golden[f"{case}.center_index"]
    # Noise is added in float64 here: it orders all that float32 tells apart in the same way.
    by_similarity = CASES[case]["permutation_type"] == "attention"
    slack = golden.tolerance("order").absolute if by_similarity else 0.0
    assert (stored.gather(1, order).double()[same].diff(dim=1) >= -slack).all()
    if score is None:  # where float32 tells all apart, who sees whom follows
        apart = stored.sort(dim=1).values.double().diff(dim=1).amin(dim=1) > slack
        same = same & apart
    for ours, mask in zip(own_masks(order, score), theirs, strict=True):
        assert torch.equal(ours[same], mask[same])


@pytest.mark.parametrize("case", with_stored("h.0"))
def test_streams_in_raster_order(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """The masked form with every token in its place, as the reference computes it."""
    method = build(golden, case, monkeypatch)
    images = golden["images"]
    content = torch.cat(
        [prefix_tokens(method.encoder, len(images)), embed_patches(method.encoder, images)], dim=1
    )
    queries = patch_positions(method.encoder).expand(len(images), -1, -1)
    masks = (mask[:, None] for mask in stored_masks(golden, case))
    contents, answers = two_streams(method.encoder, method.query_blocks, content, queries, *masks)
    assert (len(contents), len(answers)) == (golden.config["depth"], golden.config["query_depth"])
    for i, h in enumerate(contents):
        golden.check(h, f"{case}.h.{i}", "tokens")
    for i, g in enumerate(answers):
        golden.check(g, golden[f"{case}.g.{i}"][:, 1:], "tokens")
    predicted = method.head(method.encoder.norm(answers[-1]))
    golden.check(predicted, golden[f"{case}.pred"][:, 1:], "tokens")


@pytest.mark.parametrize("case", with_stored("target"))
def test_pixel_target(golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    method, images = build(golden, case, monkeypatch), golden["images"]
    everything = torch.arange(method.grid.num_patches).expand(len(images), -1)
    norm_pix_loss = CASES[case]["norm_pix"]
    target = pixel_targets(
        method.soften(images), everything, method.grid.patch, norm_pix_loss=norm_pix_loss
    )
    golden.check(target, f"{case}.target", "target")


@pytest.mark.parametrize("case", with_stored("pred"))
def test_error_of_stored_predictions(
    golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    method, images = build(golden, case, monkeypatch), golden["images"]
    everything = torch.arange(method.grid.num_patches).expand(len(images), -1)
    features = golden[f"{case}.teacher_tokens"][:, 1:] if case in FEATURES else None
    error = method.error(golden[f"{case}.pred"][:, 1:], images, features, everything)
    golden.check(error, f"{case}.loss_map", "target")


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(golden: Golden, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    method = build(golden, case, monkeypatch)
    follow(golden, case, method)
    images = golden["images"]
    patches = embed_patches(method.encoder, images)
    features, similarity = method.judge(images, patches)
    order, score = method.draw_order(images, similarity)
    predicted = method.predict_patches(patches, order, score)
    back = order.argsort(dim=1)
    if f"{case}.pred" in golden:
        in_raster = predicted.gather(1, back[:, :, None].expand_as(predicted))
        golden.check(in_raster, golden[f"{case}.pred"][:, 1:], "tokens")
    error = method.error(predicted, images, features, order).gather(1, back)
    golden.check(error, f"{case}.loss_map", "loss_map")

    loss = method(batch_of(images), START)["loss"]
    golden.check_number(loss, golden.scalar(f"{case}.loss"))
    golden.check_number(loss, CASES[case]["result"][0])
    loss.backward()
    gradients = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
    golden.check_number(
        torch.cat(gradients).norm(), golden.scalar(f"{case}.grad_norm"), "gradient norm"
    )
    check_gradients(golden, method, golden.under(f"{case}.grad."))
    assert method.encoder.pos_embed.grad is None


@pytest.mark.parametrize("case", CASES)
def test_number_of_ties(golden: Golden, case: str) -> None:
    """The JSON says of each image how many scores several patches share."""
    counts = [row.unique(return_counts=True)[1] for row in golden[f"{case}.permutation"]]
    assert [int((count > 1).sum()) for count in counts] == CASES[case]["result"][1]


def test_breaking_ties_is_another_model(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches predicted at once do not see each other; one after the other they do, in whatever
    order.
    """
    in_rings = [case for case in BY_CONTENT if without_noise(golden, case)]
    if not in_rings:
        pytest.skip("the file has no case without noise")
    for case in in_rings:
        method = build(golden, case, monkeypatch)
        method.config = method.config.model_copy(update={"ties": "break"})
        images = golden["images"]
        patches = embed_patches(method.encoder, images)
        features, similarity = method.judge(images, patches)
        order, score = method.draw_order(images, similarity)
        broken = method.error(
            method.predict_patches(patches, order, score), images, features, order
        )
        assert score is None
        assert (
            broken.gather(1, order.argsort(dim=1)) - golden[f"{case}.loss_map"]
        ).abs().max() > 1e-2
        loss = method(batch_of(images), START)["loss"].item()
        assert abs(loss - golden.scalar(f"{case}.loss")) > 10 * golden.tolerance("loss").absolute


def test_every_stored_tensor_is_known(golden: Golden) -> None:
    """A new kind of tensor in the file would be one that no test here compares."""
    kinds = {
        name.removeprefix(f"{case}.").split(".")[0]
        for case in CASES
        for name in golden.tensors
        if name.startswith(f"{case}.")
    }
    others = {
        name
        for name in golden.tensors
        if not name.startswith(("sd.", "sd_", *(f"{case}." for case in CASES)))
    }
    assert others == {"images", "noise"}
    assert kinds <= {
        *(
            "enc_tokens",
            "feature_attention",
            "self_attention",
            "center_index",
            "permutation",
            "content_mask",
        ),
        *(
            "query_mask",
            "h",
            "g",
            "pred",
            "blurred",
            "target",
            "loss",
            "loss_map",
            "grad",
            "grad_norm",
        ),
        *("teacher_tokens", "teacher_similarity"),
    }

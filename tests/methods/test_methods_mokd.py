"""MOKD's own promises (docs/methods/mokd.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from patchmine.backbones.family import Encoder, build_encoder
from patchmine.errors import UserError
from patchmine.methods.mokd import MOKD
from patchmine.models.networks import outputs_of, search
from patchmine.ops.distill import search_cross_entropy, sharpen
from patchmine.ops.schedules import LrSchedule
from patchmine.train.optim import Optimizers, build_optimizers, clip_gradients, set_rates, update
from patchmine.types import Batch, Losses, Progress

IMAGES, LOCALS = 4, 3
EARLY, LATE = Progress(0, 200, 2), Progress(150, 200, 2)
RESNET = dict(layers=[1, 1, 1, 1], channels=[8, 12, 16, 20])
VIT = dict(embed_dim=24, depth=2, num_heads=2, patch_size=4)
NARROW = dict(out_dim=32, head_hidden=16, head_bottleneck=8, thead_depth=2, thead_heads=2)
PAIRS = [("vit", "resnet"), ("resnet", "vit"), ("resnet", "resnet"), ("vit", "vit")]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def encoder(kind: str, **sizes: Any) -> Encoder:
    model, args = ("resnet18", RESNET) if kind == "resnet" else ("vit_tiny_patch16_224", VIT)
    return build_encoder(model, image_size=(32, 32), model_args=args | sizes)


def build(own: str = "vit", partner: str = "resnet", seed: int = 0, **options: Any) -> MOKD:
    """A small pair whose teachers are no copies, as they are after some steps."""
    model, args = ("resnet18", RESNET) if partner == "resnet" else ("vit_tiny_patch16_224", VIT)
    torch.manual_seed(seed)
    given = dict(partner_model=model, partner_args=args, **NARROW) | options
    method = MOKD(MOKD.Config(**given), encoder(own))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for teacher in (method.teacher, method.partner_teacher):
            for p in teacher.parameters():
                p += 0.02 * torch.randn(p.shape, generator=generator)
    method.noise.begin(0)
    return method.train()


def batch_of(views: list[Tensor]) -> Batch:
    rows, count = len(views[0]), len(views)
    return Batch(
        views,
        torch.arange(rows),
        torch.zeros(rows, count, 4),
        torch.zeros(rows, count, dtype=torch.bool),
    )


@pytest.fixture
def views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(IMAGES, 3, side, side, generator=generator) for side in (32, 32, *[16] * LOCALS)
    ]


def run(method: MOKD, views: list[Tensor], progress: Progress = LATE) -> Losses:
    method.noise.begin(progress.step)
    return method(batch_of(views), progress)


def optimizers_of(method: MOKD) -> Optimizers:
    return build_optimizers(method.param_groups(), weight_decay=0.04, blr=0.01, betas=(0.9, 0.999))


def step(method: MOKD, optimizers: Optimizers, views: list[Tensor], progress: Progress) -> Losses:
    set_rates(
        optimizers, progress, batch_size=256, schedule=LrSchedule(warmup_epochs=0, min_lr=1e-5)
    )
    optimizers.zero_grad()
    losses = run(method, views, progress)
    losses["loss"].backward()
    clip_gradients(optimizers, progress)
    update(optimizers, torch.zeros(()))
    method.after_step(progress)
    return losses


def own_part(name: str) -> bool:
    """Whether a parameter or buffer belongs to the first network and not to its partner."""
    return not name.removeprefix("centres.").startswith("partner")


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_each_loss_pulls_at_its_own_student(views: list[Tensor], pair: tuple[str, str]) -> None:
    method = build(*pair)
    large, small = torch.cat(views[:2]), torch.cat(views[2:])
    seen = [
        (method.study(n, large, crops=2), method.study(n, small, crops=LOCALS)) for n in range(2)
    ]
    known = [outputs_of(teacher, large) for teacher in method.teachers()]
    learning = {name for name, _ in method.learning()}
    for number in range(2):
        method.zero_grad()
        method.distil(number, *seen[number], known, LATE)["loss"].backward(retain_graph=True)
        moved = {name for name, p in method.named_parameters() if p.grad is not None}
        assert moved == {name for name in learning if own_part(name) is (number == 0)}


def test_the_loss_is_the_weighted_sum(views: list[Tensor]) -> None:
    losses = run(build(cross_weight=0.3, partner_cross_weight=2.0), views)
    expected = torch.zeros(())
    for name, weight in (("", 0.3), ("partner_", 2.0)):
        expected = expected + losses[f"{name}self_head"] + losses[f"{name}self_thead"]
        expected = expected + weight * (losses[f"{name}cross_head"] + losses[f"{name}cross_search"])
    torch.testing.assert_close(losses["loss"], expected)


def test_the_resnet_of_a_pair_listens_more() -> None:
    assert [build(*pair).cross_weights for pair in PAIRS] == [
        [0.1, 1.0],
        [1.0, 0.1],
        [1.0, 1.0],
        [0.1, 0.1],
    ]
    assert build(cross_weight=0.5, partner_cross_weight=0).cross_weights == [0.5, 0]


def test_without_cross_weights_each_trains_as_if_alone(views: list[Tensor]) -> None:
    """Another partner, or another network to be the partner of, changes no bit of a network's
    training.
    """
    alone = dict(cross_weight=0, partner_cross_weight=0, thead_width=24)
    pairs = [
        build("vit", "resnet", **alone),
        build("vit", "vit", **alone),
        build("resnet", "resnet", **alone),
    ]
    pairs[1].load_state_dict(
        {n: v for n, v in pairs[0].state_dict().items() if own_part(n)}, strict=False
    )
    pairs[2].load_state_dict(
        {n: v for n, v in pairs[0].state_dict().items() if not own_part(n)}, strict=False
    )
    logged: list[Losses] = []
    for method in pairs:
        optimizers = optimizers_of(method)
        for number in range(3):
            losses = step(
                method,
                optimizers,
                [view.roll(number, 0) for view in views],
                Progress(100 + number, 200, 2),
            )
        logged.append(losses)
    assert not [name for name in logged[0] if "cross" in name]
    for other, is_own in ((1, True), (2, False)):
        names = [name for name in pairs[0].state_dict() if own_part(name) is is_own]
        assert len(names) > 50
        for name in names:
            assert torch.equal(pairs[0].state_dict()[name], pairs[other].state_dict()[name]), name
        for name in ("self_head", "self_thead", "entropy", "feature_spread"):
            name = name if is_own else f"partner_{name}"
            assert torch.equal(logged[0][name], logged[other][name]), name


def test_with_cross_weights_the_partner_matters(views: list[Tensor]) -> None:
    first, second = build(seed=0), build(seed=1)
    second.load_state_dict(
        {n: v for n, v in first.state_dict().items() if own_part(n)}, strict=False
    )
    found, other = run(first, views), run(second, views)
    for name in ("self_head", "self_thead"):
        assert torch.equal(found[name], other[name])
    for name in ("cross_head", "cross_search"):
        assert (found[name] - other[name]).abs() > 1e-4


def test_only_global_crop_0_is_searched() -> None:
    method = build()
    teacher = method.teachers()[1].thead
    maps = torch.randn(2 * IMAGES, 20, 2, 2, generator=torch.Generator().manual_seed(2))
    queries = torch.randn(LOCALS * IMAGES, 24, generator=torch.Generator().manual_seed(3))
    found = search(teacher, maps, queries)
    assert found.shape == (LOCALS * IMAGES, 32)
    for rows, same in ((slice(IMAGES, None), True), (slice(0, IMAGES), False)):
        other = maps.clone()
        other[rows] += 1
        assert torch.equal(search(teacher, other, queries), found) is same


def test_a_search_is_paired_with_its_own_image(views: list[Tensor]) -> None:
    """The order of the images matters to nothing; a query of another image finds something else."""
    method = build(drop_path=0)
    first = run(method, views)
    moved = run(method, [view.roll(1, 0) for view in views])
    for name in first:
        torch.testing.assert_close(moved[name], first[name], atol=1e-4, rtol=1e-4)
    large, small = torch.cat(views[:2]), torch.cat(views[2:])
    student, teacher = method.students()[0], method.teachers()[1]
    local, known = outputs_of(student, small), outputs_of(teacher, large)
    query = student.thead.query(local.pooled)
    right, wrong = (search(teacher.thead, known.maps, q) for q in (query, query.roll(1, 0)))
    assert (right - wrong).abs().max() > 1e-5
    expected = search_cross_entropy(local.thead, sharpen(right, None, 0.07))
    torch.testing.assert_close(first["cross_search"], expected, atol=1e-4, rtol=1e-4)


def test_the_swap_of_global_crops_changes_the_search_only(views: list[Tensor]) -> None:
    method = build(drop_path=0)
    first, swapped = run(method, views), run(method, [views[1], views[0], *views[2:]])
    for name in ("", "partner_"):
        for term in ("self_head", "self_thead", "cross_head"):
            torch.testing.assert_close(
                swapped[name + term], first[name + term], atol=1e-4, rtol=1e-4
            )
        assert (swapped[f"{name}cross_search"] - first[f"{name}cross_search"]).abs() > 1e-4


def test_centres(views: list[Tensor]) -> None:
    method = build()
    before = run(method, views)
    assert torch.equal(
        run(method, views)["self_head"], before["self_head"]
    )  # the loss uses the centre of before
    large = torch.cat(views[:2])
    with torch.no_grad():
        expected = [
            0.1 * out.mean(dim=0)
            for t in method.teachers()
            for out in (outputs_of(t, large).head, outputs_of(t, large).thead)
        ]
    method.after_step(LATE)
    for name, mean in zip(
        ("head", "thead", "partner_head", "partner_thead"), expected, strict=True
    ):
        torch.testing.assert_close(method.centres[name].mean, mean)
    # A network's centre moves the targets that are made of its teacher's logits, for whomever they
    # are, and no search.
    method = build()
    with torch.no_grad():
        method.centres["partner_head"].mean += torch.linspace(0, 1, 32)
    after = run(method, views)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {"loss", "cross_head", "partner_self_head", "partner_entropy"}


def test_a_teacher_that_stands_still_gathers_statistics(views: list[Tensor]) -> None:
    method = build(ema_start=1.0, ema_end=1.0)
    kept = {name: v.clone() for name, v in method.state_dict().items() if "teacher." in name}
    step(method, optimizers_of(method), views, LATE)
    for name, value in kept.items():
        assert torch.equal(method.state_dict()[name], value) is not name.endswith(STATISTICS), name


def test_teachers_follow_their_students(views: list[Tensor]) -> None:
    method = build(ema_start=0.5, ema_end=0.5)
    kept = {name: p.clone() for name, p in method.named_parameters() if "teacher." in name}
    step(method, optimizers_of(method), views, LATE)
    state = method.state_dict()
    for name, value in kept.items():
        student = name.replace("partner_teacher.encoder.", "partner.").replace(
            "partner_teacher.", "partner_"
        )
        expected = 0.5 * value + 0.5 * state[student.replace("teacher.", "", 1)]
        torch.testing.assert_close(
            state[name], expected, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_prototypes_wait_for_the_second_epoch(views: list[Tensor]) -> None:
    method = build()
    optimizers = optimizers_of(method)
    start = {name: p.clone() for name, p in method.named_parameters()}

    def still() -> set[str]:
        learning = dict(method.learning())
        return {
            name
            for name, value in start.items()
            if "teacher" not in name and torch.equal(value, learning.get(name, value))
        }

    step(method, optimizers, views, EARLY)
    prototypes = {name for name in start if "last_layer" in name and "teacher" not in name}
    assert len(prototypes) == 8
    assert still() == prototypes
    step(method, optimizers, views, Progress(2, 200, 2))
    assert still() == {"partner_head.last_layer.weight_g"}  # of the ResNet's head, fixed for ever


@pytest.mark.parametrize("own", ["vit", "resnet"])
def test_rates_and_decay(own: str) -> None:
    """Spec, section 4: at the start, at the end of the warm-up and at the end of the run."""
    method = build(own, "resnet" if own == "vit" else "vit")
    optimizers = build_optimizers(
        method.param_groups(), weight_decay=0.04, blr=3e-4, betas=(0.9, 0.999)
    )
    assert set(optimizers.by_name) == {"adamw", "sgd"}
    names = {p: name for name, p in optimizers.params.items()}
    vit, cnn = ("", "partner_") if own == "vit" else ("partner_", "")
    body = cnn.removesuffix("_") or "encoder"
    table = {  # rate, decay; of the ResNet, its T-Head and the ViT
        0: ((0, 1e-4), (0, 0.04), (0, 0.04)),
        100: ((0.1, 1e-4), (3e-4, None), (3e-4, None)),
        1000: ((0.0048, 1e-4), (1e-5, 0.4), (1e-5, 0.4)),
    }
    for at, expected in table.items():
        set_rates(
            optimizers,
            Progress(at, 1000, 10),
            batch_size=256,
            schedule=LrSchedule(warmup_epochs=10, min_lr=1e-5),
        )
        decayed: dict[str, set[bool]] = {"cnn": set(), "thead": set(), "vit": set()}
        for optimizer, groups in ((name, o.param_groups) for name, o in optimizers.by_name.items()):
            for group in groups:
                for p in group["params"]:
                    name = names[p]
                    is_thead = name.startswith(f"{cnn}thead.")
                    is_cnn = not is_thead and name.startswith((f"{body}.", f"{cnn}head."))
                    kind = "thead" if is_thead else "cnn" if is_cnn else "vit"
                    rate, decay = dict(zip(("cnn", "thead", "vit"), expected, strict=True))[kind]
                    assert optimizer == ("adamw" if kind == "vit" else "sgd"), name
                    assert group["lr"] == pytest.approx(rate, abs=1e-12), name
                    plain = kind != "thead" and (p.ndim == 1 or name.endswith(".bias"))
                    decayed[kind].add(plain)
                    if plain:
                        assert group["weight_decay"] == 0, name
                    elif decay is not None:
                        assert group["weight_decay"] == pytest.approx(decay), name
        assert decayed == {"cnn": {True, False}, "thead": {False}, "vit": {True, False}}
    assert all(group.clip_each and group.clip_norm == 3.0 for group in method.param_groups())
    assert vit != cnn


def test_the_thead_of_a_resnet_may_have_adamw() -> None:
    method = build(cnn_thead_optimizer="adamw")
    kinds = {name: group.optimizer for group in method.param_groups() for name, _ in group.params}
    assert kinds["partner_thead.pos_embed"] == "adamw"
    assert kinds["partner.conv1.weight"] == "sgd"
    assert not any(group.decay_all for group in method.param_groups())


def test_positions_of_a_vit_are_learned_and_teachers_drop_nothing() -> None:
    method = build("vit", "vit", drop_path=0.5)
    names = {name for name, _ in method.learning()}
    assert {"encoder.pos_embed", "partner.pos_embed", "thead.pos_embed"} <= names
    images = torch.randn(8, 3, 32, 32)
    for network, same in ((method.teachers()[0], True), (method.students()[0], False)):
        made = []
        for number in range(2):
            method.noise.begin(number)
            if not same:
                method.study(0, images, crops=2)
            made.append(outputs_of(network, images).head)
        assert torch.equal(*made) is same


def test_monitors_see_a_collapse(views: list[Tensor]) -> None:
    method = build(centre_momentum=0)
    run(method, views)
    method.after_step(LATE)  # now the centres are the mean of this very batch
    healthy = run(method, views)
    with torch.no_grad():
        for name in ("head", "partner_head"):
            method.centres[name].mean[0] = -100.0
    collapsed = run(method, [view[:1].expand_as(view) for view in (views[0], views[0], *views[2:])])
    for name in ("", "partner_"):
        assert collapsed[f"{name}entropy"] < 0.01 < 0.1 < healthy[f"{name}entropy"]
        assert collapsed[f"{name}feature_spread"] < 1e-4 < 1e-3 < healthy[f"{name}feature_spread"]
    assert 0 <= healthy["agreement"] <= 1


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pictures_show_what_both_searches_heed(views: list[Tensor], pair: tuple[str, str]) -> None:
    method = build(*pair).eval()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    panels = method.panels(
        Batch(views[:1], torch.arange(4), torch.zeros(4, 4), torch.zeros(4).bool()), LATE
    )
    side = 8 if "vit" in pair else 1
    heat = {panel.title: panel.data for panel in panels if panel.kind == "heat"}
    assert set(heat) == {
        f"{place} part sought by {who}"
        for place in ("middle", "upper left")
        for who in ("model", "partner")
    }
    assert all(
        data.shape == (4, side, side) and data.gt(0).all() and data.lt(1).all()
        for data in heat.values()
    )
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


@pytest.mark.parametrize(
    ("own", "options", "sentence"),
    [
        (
            "vit",
            dict(partner_model="vit_tiny_patch16_224", partner_args=VIT | dict(embed_dim=36)),
            "model is 24 wide and method.partner_model=vit_tiny_patch16_224 is 36 wide",
        ),
        (
            "vit",
            dict(thead_width=48),
            r"method\.thead_width=48, but the tokens of the vision transformer are 24 wide",
        ),
        (
            "vit",
            dict(thead_heads=5),
            r"method\.thead_heads=5 does not divide .* width 24: set method\.thead_heads=4",
        ),
        ("vit", dict(partner_model="resnet17"), r"method\.partner_model=resnet17 .*near: "),
        ("vit", dict(partner_args=dict(depth=3)), r"method\.partner_args.*check model_args"),
        (
            "resnet",
            dict(partner_model="vit_tiny_patch16_224", partner_args=VIT | dict(patch_size=5)),
            "method.partner_model=vit_tiny_patch16_224 .*not a multiple",
        ),
    ],
)
def test_settings_that_do_not_fit(own: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(own, **options)


def test_width_of_two_resnets() -> None:
    assert build("resnet", "resnet", thead_width=18).partner_thead.pos_embed.shape[-1] == 18
    assert build("resnet", "resnet").thead.pos_embed.shape == (1, 1, 384)


def test_a_single_image_is_refused_where_batch_norms_need_two(views: list[Tensor]) -> None:
    alone = [view[:1] for view in views]
    with pytest.raises(
        UserError, match="need 2 images or more at a time, and gets 1: raise batch_size"
    ):
        run(build(), alone)
    assert run(build("vit", "vit"), alone)["loss"].isfinite()


def test_local_crops_are_needed(views: list[Tensor]) -> None:
    with pytest.raises(UserError, match=r"set crops\.num_local=1 or more"):
        run(build(), views[:2])


def test_local_crops_that_patches_do_not_fill(views: list[Tensor]) -> None:
    with pytest.raises(UserError, match=r"not filled by patches of 4x4.*crops\.local_size"):
        run(build(), [*views[:2], torch.randn(IMAGES, 3, 18, 18)])


def test_networks_are_the_encoders_that_are_exported() -> None:
    method = build()
    assert isinstance(method.partner, ResNet)
    assert isinstance(method.get_submodule("partner"), nn.Module)
    assert {name.split(".")[0] for name in method.state_dict()} == {
        *("encoder", "head", "thead", "teacher"),
        *("partner", "partner_head", "partner_thead", "partner_teacher", "centres"),
    }

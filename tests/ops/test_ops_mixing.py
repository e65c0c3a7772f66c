"""Mixed images and targets against timm's Mixup and against loops over rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch import Tensor

from patchmine.models.mixing import draw_mixing, mixing_generator
from patchmine.ops.mixing import Mixing, mix_images, mix_targets, partners, smoothed

SIZE = (18, 30)
CHOICES = [
    {"mixup": 0.8, "cutmix": 0.0, "prob": 1.0, "switch_prob": 0.5},
    {"mixup": 0.0, "cutmix": 1.0, "prob": 1.0, "switch_prob": 0.5},
    {"mixup": 0.8, "cutmix": 1.0, "prob": 0.7, "switch_prob": 0.5},
]


def pictures(rows: int, *shape: int) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows))


def as_timm_pairs(rows: int) -> list[int]:
    """The order of rows whose reversal gives our pairs: 0, 2, 4, ..., 5, 3, 1."""
    return [*range(0, rows, 2), *range(rows - 1, 0, -2)]


@pytest.mark.parametrize("values", CHOICES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_images_and_targets_are_those_of_timm(values: dict[str, float], smoothing: float) -> None:
    images, labels = pictures(6, 3, *SIZE), torch.tensor([3, 0, 4, 4, 1, 2])
    order = as_timm_pairs(6)
    peer = Mixup(
        values["mixup"],
        values["cutmix"],
        prob=values["prob"],
        switch_prob=values["switch_prob"],
        label_smoothing=smoothing,
        num_classes=5,
    )
    kinds = set()
    for seed in range(24):
        np.random.seed(seed)  # noqa: NPY002 - where timm draws from
        expected, shares = peer(images[order].clone(), labels[order])
        mixing = draw_mixing(np.random.RandomState(seed), SIZE, **values)
        assert torch.equal(mix_images(images, mixing)[order], expected)
        found = mix_targets(smoothed(labels, 5, smoothing), mixing)[order]
        torch.testing.assert_close(found, shares, rtol=0, atol=1e-7)
        kinds.add("none" if mixing.lam == 1 else "mixup" if mixing.box is None else "cutmix")
    # CutMix of a box without pixels is none
    assert kinds >= {name for name in ("mixup", "cutmix") if values[name]}
    assert "none" in kinds or values["prob"] == 1


def test_nothing_is_mixed_where_nothing_is_asked_for() -> None:
    still = draw_mixing(
        mixing_generator(0, 0), SIZE, mixup=0, cutmix=0, prob=1, switch_prob=0.5, repeats=2
    )
    assert still == Mixing(1.0, None, 2)
    images, targets = pictures(4, 3, *SIZE), pictures(4, 7)
    assert torch.equal(mix_images(images, still), images)
    assert torch.equal(mix_targets(targets, still), targets)


def test_a_step_draws_the_same_again_and_another_step_something_else() -> None:
    def drawn(seed: int, step: int) -> Mixing:
        return draw_mixing(mixing_generator(seed, step), SIZE, **CHOICES[2] | {"prob": 1.0})

    assert drawn(3, 7) == drawn(3, 7)
    assert len({drawn(seed, step) for seed in range(3) for step in range(5)}) == 15
    assert drawn(2**62, 10**9).lam != drawn(2**62, 10**9 - 1).lam


@pytest.mark.parametrize("mixing", [Mixing(0.3), Mixing(0.75, (2, 5, 9, 25))])
def test_parts_of_a_batch_mix_the_pairs_of_the_whole(mixing: Mixing) -> None:
    images, targets = pictures(12, 3, *SIZE), pictures(12, 5).softmax(1)
    for rows in (2, 4, 6):
        parts = [mix_images(part, mixing) for part in images.split(rows)]
        assert torch.equal(torch.cat(parts), mix_images(images, mixing))
        shares = [mix_targets(part, mixing) for part in targets.split(rows)]
        assert torch.equal(torch.cat(shares), mix_targets(targets, mixing))


@pytest.mark.parametrize("box", [None, (2, 5, 9, 25)])
def test_frames_of_a_clip_are_mixed_alike(box: tuple[int, int, int, int] | None) -> None:
    clips, mixing = pictures(4, 3, 5, *SIZE), Mixing(0.6, box)
    frames = [mix_images(clips[:, :, frame], mixing) for frame in range(5)]
    assert torch.equal(mix_images(clips, mixing), torch.stack(frames, 2))


def test_repeated_samples_are_mixed_with_those_of_another_item() -> None:
    rows = torch.arange(12.0)[:, None]
    assert partners(rows).flatten().tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]
    assert partners(rows, 2).flatten().tolist() == [2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9]
    assert partners(rows, 3).flatten().tolist() == [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]
    mixed = mix_targets(rows, Mixing(0.75, repeats=2)).flatten().tolist()
    assert mixed == [0.5, 1.5, 1.5, 2.5, 4.5, 5.5, 5.5, 6.5, 8.5, 9.5, 9.5, 10.5]
    assert draw_mixing(mixing_generator(0, 0), SIZE, **CHOICES[0], repeats=3).repeats == 3

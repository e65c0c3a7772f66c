"""What is said of a run's health, and that nothing is said of runs that are well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from patchmine.report.health import findings_of
from patchmine.report.page import write_report
from patchmine.report.series import Series

LOOKS = 21
STEPS = np.linspace(0, 2000, LOOKS)
DONE = STEPS / 2000


def noisy(values: Sequence[float] | np.ndarray, share: float = 0.004, seed: int = 0) -> Series:
    noise = np.random.default_rng(seed).standard_normal(LOOKS)
    return Series(STEPS, np.asarray(values) * (1 + share * noise))


def trained(values: np.ndarray) -> Series:
    """A training loss, logged every ten steps with the noise of batches."""
    steps = np.arange(10.0, 2001, 10)
    noise = np.random.default_rng(1).standard_normal(len(steps))
    return Series(steps, np.interp(steps, STEPS, values) * (1 + 0.02 * noise))


FALLING = 0.4 + 0.5 * np.exp(-5 * DONE)
WELL = {
    "loss": trained(FALLING),
    # Features narrow before they spread, as those of an MAE do.
    "monitor.rankme": noisy(20 + 40 * DONE - 60 * DONE * np.exp(-6 * DONE), 0.05),
    "monitor.feature_std": noisy(0.03 + 0.04 * DONE, 0.05),
    "monitor.neighbours_kept": noisy(100 * np.exp(-4 * DONE), 0.02),
    "monitor.held_out_loss": noisy(FALLING + 0.01),
}


def said(series: dict[str, Series], *, is_adapted: bool = False) -> list[str]:
    return [found.text for found in findings_of(WELL | series, 100, is_adapted=is_adapted)]


def first(series: Series, count: int) -> Series:
    return Series(series.steps[:count], series.values[:count])


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_said_of_a_noisy_run_that_is_well(seed: int) -> None:
    held_out = {
        "falls": FALLING + 0.01,
        "stays": np.maximum(FALLING, 0.45),
        "jumps": FALLING + 0.05 * (np.arange(LOOKS) % 5 == 0),
    }
    for values in held_out.values():
        whole = {**WELL, "monitor.held_out_loss": noisy(values, seed=seed)}
        for made in range(1, LOOKS + 1):  # at no time
            series = {name: first(one, made) for name, one in whole.items() if name != "loss"}
            assert said(series) == []


def test_a_run_without_monitors_says_nothing() -> None:
    assert findings_of({"loss": WELL["loss"]}, 100, is_adapted=True) == []
    assert findings_of({}, None, is_adapted=True) == []


@pytest.mark.parametrize("end", [1.2, 4.0])
def test_a_rank_that_falls_to_one_or_to_a_small_share_is_a_collapse(end: float) -> None:
    values = np.where(DONE < 0.5, 50.0, end)
    (text,) = said({"monitor.rankme": noisy(values, 0.01)})
    assert text.startswith("The features collapsed: RankMe is ")
    assert "and was 5" in text


@pytest.mark.parametrize(("end", "is_told"), [(1.72, False), (1.1, True)])
def test_where_images_look_alike_a_rank_below_two_is_no_collapse(end: float, is_told: bool) -> None:
    values = np.where(DONE < 0.5, 2.3, end)  # an HPM on dark pictures of nuclei fell so far
    assert bool(said({"monitor.rankme": noisy(values, 0.0)})) == is_told


def test_directions_that_no_longer_differ_are_a_collapse() -> None:
    values = np.where(DONE < 0.5, 0.05, 0.0004)
    (text,) = said({"monitor.feature_std": noisy(values)})
    assert text.startswith("The features collapsed: their standard deviation is 4e-4")


def test_a_single_bad_look_is_no_collapse() -> None:
    values = np.where(np.arange(LOOKS) == LOOKS - 1, 1.0, 50.0)
    assert said({"monitor.rankme": noisy(values)}) == []


def test_a_held_out_loss_that_rises_while_the_other_falls_is_over_fitting() -> None:
    values = np.where(DONE < 0.4, FALLING, FALLING[8] + 0.2 * (DONE - 0.4))
    (text,) = said({"monitor.held_out_loss": noisy(values, 0.001)})
    assert text.startswith("The run over-fits since epoch 8: the held-out loss rises (0.46")
    assert "while the training loss falls (0.4" in text


def test_losses_that_rise_together_are_not() -> None:
    values = np.where(DONE < 0.4, FALLING, FALLING[8] + 0.2 * (DONE - 0.4))
    assert said({"monitor.held_out_loss": noisy(values, 0.001), "loss": trained(values)}) == []


def test_only_trained_weights_can_be_moved_away_from() -> None:
    assert said({}) == []
    (text,) = said({}, is_adapted=True)
    assert text.startswith("The features have moved far from the start: 1.")
    near = noisy(100 - 50 * DONE, 0.01)
    assert said({"monitor.neighbours_kept": near}, is_adapted=True) == []


def test_the_report_says_it_above_the_curves(make_run: Callable[..., Path], tmp_path: Path) -> None:
    ill, well = make_run("ill", over_fitted=True), make_run("well", over_fitted=False)
    page = write_report([ill, well], tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("over-fits since epoch") == 1
    assert page.index("ill: The run over-fits since epoch") < page.index('id="curves"')
    for title in ("RankMe", "Deviation of features", "Neighbours kept", "Held-out loss"):
        assert page.count(f"<h3>{title}</h3>") == 1
    assert page.index("<h3>kNN top-1</h3>") < page.index("<h3>RankMe</h3>")
    assert '<p class="note">Nearest neighbours at step 0 that are neighbours still. A fall' in page
    assert page.count("compare the shapes, not the heights") == 0  # one method
    assert "over-fits" not in write_report([well], tmp_path / "well.html").read_text("utf-8")


# Of HPM on dark pictures of nuclei, and of a run on CIFAR-10 that began like it.
BY_POSITION = {"position_share": (0.92, 0.95), "rank_correlation": (0.0, 0.17)}
FOLLOWING = {"position_share": (0.95, 0.2), "rank_correlation": (0.0, 0.6)}


def mined(ends: dict[str, tuple[float, float]]) -> dict[str, Series]:
    return {name: Series(STEPS, np.linspace(*both, LOOKS)) for name, both in ends.items()}


def test_hard_masks_that_follow_the_position_are_told() -> None:
    (text,) = said(mined(BY_POSITION))
    assert text.startswith("Hard masks do not follow the images: the place in the picture")
    assert "explains 95.0 % of the maps of difficulty" in text
    assert "the errors is 0.17" in text
    assert "method.prediction_weight=0.1" in text


def test_maps_that_come_to_follow_the_images_are_not_complained_of() -> None:
    whole = mined(FOLLOWING)
    for made in range(1, LOOKS + 1):
        assert said({name: first(one, made) for name, one in whole.items()}) == []
    assert said(mined(BY_POSITION | {"rank_correlation": (0.0, 0.5)})) == []

"""What the golden tests share: tolerances that a file states, settings under their several names,
what a file lacks.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_vectors import (
    TOLERANCES,
    Golden,
    Tolerance,
    cut,
    pair,
    repeating,
    setting_of,
    stated_tolerances,
)

IMAGES = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)


def golden(**meta: Any) -> Golden:
    return Golden("mae", meta, {"latent": torch.tensor([1.0, 100.0])})


def test_a_sentence_of_the_file_states_tolerances() -> None:
    sentence = "float32: 1e-5 relative on losses, 2e-5 absolute on pred, 1e-4 relative on gradients; masks exact"
    assert stated_tolerances({"tolerance": sentence}) == {
        "loss": Tolerance(relative=1e-5),
        "tokens": Tolerance(absolute=2e-5),
        "gradient": Tolerance(of_largest=1e-4),
    }


def test_tolerances_of_the_file_go_before_the_usual_ones() -> None:
    stated = golden(tolerances={"tokens": 0.5, "loss": {"relative": 0.1}})
    assert stated.tolerance("tokens") == Tolerance(0.5)
    assert stated.tolerance("loss") == Tolerance(relative=0.1)
    assert stated.tolerance("gradient") == TOLERANCES["mae"]["gradient"]
    stated.check(torch.tensor([1.4, 100.0]), "latent", "tokens")
    with pytest.raises(AssertionError, match="latent"):
        golden().check(torch.tensor([1.4, 100.0]), "latent", "tokens")


@pytest.mark.parametrize(
    ("tolerance", "passes"),
    [
        (Tolerance(0.2), True),
        (Tolerance(0.05), False),
        (Tolerance(of_largest=2e-3), True),
        (Tolerance(), False),
    ],
)
def test_a_number_further_off_than_its_tolerance_fails(tolerance: Tolerance, passes: bool) -> None:
    found, expected = torch.tensor([1.1, 100.0]), torch.tensor([1.0, 100.0])
    if passes:
        tolerance.check(found, expected, "x")
    else:
        with pytest.raises(AssertionError, match="x"):
            tolerance.check(found, expected, "x")


def test_what_a_file_lacks_is_not_demanded() -> None:
    with pytest.raises(pytest.skip.Exception, match="mae stores no pred"):
        golden()["pred"]
    with pytest.raises(AssertionError, match="no gradients are stored"):
        golden().check_gradients({}, {}, str)


def test_settings_have_several_names_and_stand_in_or_beside_the_configuration() -> None:
    assert setting_of({"img": 32}, {}, "image_size") == 32
    assert setting_of({}, {"eps_layernorm": 1e-5}, "norm_eps", 1e-6) == 1e-5
    assert setting_of({}, {}, "qkv_bias", True) is True
    assert setting_of({"norm_pix": False}, {}, "norm_pix_loss") is False
    with pytest.raises(AssertionError, match="names no embed_dim"):
        setting_of({}, {}, "embed_dim")
    assert (pair(4), pair([4, 6])) == ((4, 4), (4, 6))


def test_patches_are_cut_in_raster_order() -> None:
    patches = cut(IMAGES, (2, 3))
    assert patches.shape == (2, 4, 18)
    assert torch.equal(patches[1, 2], IMAGES[1, :, 2:4, :3].flatten())


def test_noise_that_repeats_an_order() -> None:
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert torch.equal(repeating(order).argsort(dim=1), order)

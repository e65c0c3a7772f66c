"""What may be named as the thing to measure, and what is refused."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from patchmine.backbones.family import build_encoder
from patchmine.errors import UserError
from patchmine.evaluate.evaluated import open_evaluated


def test_a_run_brings_its_own_preparation_and_weights(run_folder):
    target = open_evaluated(run_folder)
    export = timm.create_model(f"local-dir:{run_folder / 'export'}", pretrained=True)
    images = torch.randn(2, 3, 16, 16)
    assert (target.input.image_size, target.input.channels, target.crop_pct, target.folder) == (
        (16, 16),
        3,
        0.875,
        run_folder,
    )
    assert target.input.mean == pytest.approx((0.485, 0.456, 0.406))
    torch.testing.assert_close(target.encoder.eval()(images), export.eval()(images))


def test_an_export_is_the_same_target_without_a_folder_for_results(run_folder):
    run, export = open_evaluated(run_folder), open_evaluated(run_folder / "export")
    assert (export.input.image_size, export.input.mean, export.input.std, export.crop_pct) == (
        run.input.image_size,
        run.input.mean,
        run.input.std,
        0.875,
    )
    assert export.folder is None


def test_a_random_init_shares_the_architecture_and_no_weight(run_folder):
    target = open_evaluated(run_folder)
    twin, again, other = (target.random_init(seed) for seed in (0, 0, 1))
    own, drawn = target.encoder.state_dict(), twin.encoder.state_dict()
    assert own.keys() == drawn.keys()
    same = {name for name in own if torch.equal(own[name], drawn[name])}
    constant = {name for name in own if own[name].std() == 0}  # norms and biases
    assert same - constant == {"pos_embed"}  # the fixed table
    assert all(torch.equal(drawn[name], again.encoder.state_dict()[name]) for name in drawn)
    assert not torch.equal(drawn["cls_token"], other.encoder.state_dict()["cls_token"])


def test_a_resnet_and_its_random_init(resnet_folder):
    target = open_evaluated(resnet_folder, image_size=(24, 40))
    assert (target.input.image_size, target.input.channels, target.folder) == (
        (24, 40),
        3,
        resnet_folder,
    )
    export = open_evaluated(resnet_folder / "export")
    assert (export.input.image_size, export.input.mean, export.crop_pct) == (
        (16, 16),
        target.input.mean,
        0.875,
    )
    twin = target.random_init()
    own, drawn = target.encoder.state_dict(), twin.encoder.state_dict()
    assert {name for name in own if torch.equal(own[name], drawn[name])} == {
        name for name in own if own[name].ndim < 2
    }
    for name, value in own.items():
        if value.ndim == 4 and value.numel() > 500:  # both are drawn alike
            assert drawn[name].std().item() == pytest.approx(value.std().item(), rel=0.15), name
    assert twin.encoder.eval()(torch.randn(1, 3, 24, 40)).shape == (1, 16)


def test_a_file_of_a_resnet_is_a_target(tmp_path):
    encoder = build_encoder("resnet18", channels=2, model_args={"cifar_stem": True}).eval()
    save_file(encoder.state_dict(), tmp_path / "w.safetensors")
    target = open_evaluated(tmp_path / "w.safetensors", image_size=(32, 40))
    assert (target.input.image_size, target.input.channels, len(target.input.mean)) == (
        (32, 40),
        2,
        2,
    )
    images = torch.randn(1, 2, 32, 40)
    with torch.no_grad():
        assert torch.equal(target.encoder.eval()(images), encoder(images))


def test_a_file_without_a_name_is_normalised_as_its_authors_did(tmp_path):
    model = build_encoder("vit_tiny_patch16_224", image_size=(32, 32), model_args={"depth": 1})
    save_file(model.state_dict(), tmp_path / "dino.safetensors")
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)  # timm's, of other weights
    found = open_evaluated(tmp_path / "dino.safetensors")
    assert found.input.mean == [0.485, 0.456, 0.406]
    assert found.input.std == [0.229, 0.224, 0.225]
    assert "ImageNet's mean and std" in found.note


def test_drawing_at_random_leaves_the_random_state_alone(run_folder):
    target = open_evaluated(run_folder)
    before = torch.get_rng_state()
    target.random_init()
    assert torch.equal(before, torch.get_rng_state())


def test_random_init_and_raw_pixels_by_name(run_folder):
    twin = open_evaluated(f"random-init:{run_folder}")
    pixels = open_evaluated(f"raw-pixels:{run_folder}")
    assert twin.folder is None
    assert (pixels.encoder, pixels.input.image_size, pixels.input.mean) == (
        None,
        (16, 16),
        twin.input.mean,
    )
    assert open_evaluated("raw-pixels", image_size=(8, 8), channels=1).input.mean == [0.5]


def test_a_timm_name_without_weights_says_so():
    target = open_evaluated("resnet10t", seed=1)
    assert "no weights were loaded" in target.note
    assert target.input.channels == 3
    assert target.folder is None


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_a_timm_name_with_a_local_file(tmp_path, name):
    torch.manual_seed(5)
    model = timm.create_model(name, num_classes=7)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    target = open_evaluated(name, weights=str(tmp_path / "w.safetensors"))
    images = torch.randn(2, 3, *target.input.image_size)
    with torch.no_grad():
        wanted = model.eval().forward_features(images)
        torch.testing.assert_close(target.encoder.eval().forward_features(images), wanted)
    assert not target.note


def test_another_image_size_resamples_positions(run_folder):
    target = open_evaluated(run_folder, image_size=(24, 32))
    assert target.encoder(torch.randn(1, 3, 24, 32)).shape == (1, 24)


@pytest.mark.parametrize(
    ("spec", "settings", "words"),
    [
        ("vit_smal_patch16_224", {}, "vit_small_patch16_224"),
        ("runs/nothing", {}, "no run"),
        ("random-init", {}, "random-init:RUN"),
        ("random-init:raw-pixels", {}, "no weights"),
        ("RUN", {"weights": "best"}, "weights=best: .* an encoder only"),
        ("RUN", {"image_size": (20, 20)}, "20x20"),
        ("RUN", {"channels": 1}, "channels=1"),
        ("EMPTY", {}, "neither a run"),
    ],
)
def test_mistakes_are_explained(run_folder, tmp_path, spec, settings, words):
    (tmp_path / "empty").mkdir()
    spec = {"RUN": run_folder, "EMPTY": tmp_path / "empty"}.get(spec, spec)
    with pytest.raises(UserError, match=words):
        open_evaluated(spec, **settings)


def test_weights_of_a_target_that_holds_one_encoder_are_refused(run_folder, tmp_path):
    """`weights=teacher` of an export was the student, in silence."""
    with pytest.raises(
        UserError, match=r"weights=teacher: .*export is an export, which holds one encoder"
    ):
        open_evaluated(run_folder / "export", weights="teacher")
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).state_dict(),
        tmp_path / "w.safetensors",
    )
    with pytest.raises(UserError, match=r"weights=partner: of the file .* auto or student or raw"):
        open_evaluated(tmp_path / "w.safetensors", weights="partner")
    with pytest.raises(UserError, match=r"channels=5, but .* was made for 3"):
        open_evaluated(tmp_path / "w.safetensors", channels=5)
    assert open_evaluated("test_vit", channels=5).input.channels == 5


@pytest.mark.parametrize("name", ["n" * 5000, "a\0b", "caf\udce9", "nowhere/x"])
def test_a_name_that_no_target_has_is_one_printable_sentence(name):
    with pytest.raises(UserError) as caught:
        open_evaluated(name)
    assert str(caught.value).isprintable()
    assert "is no run, export or file that exists" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "change",
    [
        {"mean": "text"},
        {"mean": [0.5, float("nan"), 0.5]},
        {"std": [0, 1, 1]},
        {"std": {"a": 1}},
        {"crop_pct": -1},
        {"crop_pct": "wide"},
    ],
)
def test_an_export_that_tells_no_preparation_is_refused(change, run_folder):
    file = run_folder / "export" / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="export"):
        open_evaluated(run_folder / "export")


def test_an_export_cannot_make_timm_read_other_files(run_folder, tmp_path):
    file = run_folder / "export" / "config.json"
    config = json.loads(file.read_text())
    config["model_args"]["checkpoint_path"] = str(tmp_path / "pickle.pth")
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="checkpoint_path would make timm read"):
        open_evaluated(run_folder / "export")


def test_of_a_file_with_two_networks_the_wanted_one_is_measured(tmp_path):
    def tensors(value):
        state = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).state_dict()
        return {name: torch.full_like(tensor, value) for name, tensor in state.items()}

    torch.save({"model": tensors(0.25), "model_ema": tensors(0.5)}, tmp_path / "two.pth")
    for weights, value in (("raw", 0.25), ("ema", 0.5)):
        target = open_evaluated(tmp_path / "two.pth", weights=weights)
        assert target.encoder.cls_token.flatten()[0] == value

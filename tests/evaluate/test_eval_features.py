"""Features against the obvious way to compute them, one image at a time."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import v2

from patchmine.data.settings import InputSettings
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError
from patchmine.evaluate.evaluated import Evaluated, in_eval_mode, open_evaluated
from patchmine.evaluate.features import Reader, extract

HALF = [0.5, 0.5, 0.5]


def vit(**settings):
    return timm.create_model("test_vit", img_size=32, num_classes=0, **settings).eval()


def evaluated(encoder, size=(32, 32)):
    settings = InputSettings(image_size=size, mean=HALF, std=HALF)
    return Evaluated("it", encoder, settings)


def columns(reader, images, pooling):
    with torch.no_grad():
        return reader(images)[:, reader.poolings[pooling]].flatten(1)


def test_features_equal_torchvision_and_timm_one_image_at_a_time(run_folder, image_folder):
    it = open_evaluated(run_folder)
    source = open_source(image_folder)
    found = extract(it, source, batch_size=7, workers=0)
    chain = v2.Compose(
        [v2.Resize(18, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(16)]
    )
    for i in range(0, 36, 5):
        pixels = v2.functional.pil_to_tensor(Image.open(io.BytesIO(source.read(i))).convert("RGB"))
        x = chain(pixels).float() / 255
        x = (x - torch.tensor(it.input.mean)[:, None, None]) / torch.tensor(it.input.std)[
            :, None, None
        ]
        wanted = it.encoder.forward_features(x[None])[0, 0]
        torch.testing.assert_close(
            found.x[i], wanted, rtol=0.05, atol=0.05
        )  # rounding of resized bytes
    assert found.index.tolist() == list(range(36))
    assert torch.equal(found.labels, torch.from_numpy(source.labels().ids))


def test_batch_size_and_workers_change_nothing(run_folder, image_folder):
    it, source = open_evaluated(run_folder), open_source(image_folder)
    one = extract(it, source, batch_size=36, workers=0)
    two = extract(it, source, batch_size=5, workers=1)
    torch.testing.assert_close(one.x, two.x, rtol=1e-5, atol=1e-5)


def test_columns_of_the_last_blocks_equal_hooks():
    encoder = vit(depth=6)
    reader = Reader(evaluated(encoder), blocks=4)
    images = torch.randn(2, 3, 32, 32)
    seen = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(encoder.norm(out)))
    with torch.no_grad():
        encoder.forward_features(images)
    last, cls = seen[5], [tokens[:, 0] for tokens in seen[2:6]]
    torch.testing.assert_close(columns(reader, images, "cls"), last[:, 0])
    torch.testing.assert_close(columns(reader, images, "mean"), last[:, 1:].mean(1))
    torch.testing.assert_close(
        columns(reader, images, "cls+mean"), torch.cat([last[:, 0], last[:, 1:].mean(1)], 1)
    )
    torch.testing.assert_close(columns(reader, images, "cls, last 4 blocks"), torch.cat(cls, 1))
    assert columns(reader, images, "cls+mean, last 4 blocks").shape == (2, 8 * encoder.embed_dim)


def test_registers_are_no_patches():
    encoder = vit(reg_tokens=3)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = encoder.forward_features(images)
    for blocks in (1, 2):
        reader = Reader(evaluated(encoder), blocks)
        torch.testing.assert_close(columns(reader, images, "mean"), tokens[:, 4:].mean(1))
        torch.testing.assert_close(columns(reader, images, "cls"), tokens[:, 0])


@pytest.mark.parametrize("blocks", [1, 3])
def test_without_a_class_token_the_mean_stands_in(blocks):
    encoder = vit(class_token=False, global_pool="")
    reader = Reader(evaluated(encoder), blocks)
    images = torch.randn(2, 3, 32, 32)
    assert reader.choose("cls") == "mean"
    with torch.no_grad():
        torch.testing.assert_close(
            columns(reader, images, "mean"), encoder.forward_features(images).mean(1)
        )
    with pytest.raises(UserError, match="pooling='cls\\+mean'"):
        reader.choose("cls+mean")


def test_a_convolutional_network_gives_its_own_pooling():
    encoder = timm.create_model("resnet10t", num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    reader = Reader(evaluated(encoder), blocks=4)
    with torch.no_grad():
        torch.testing.assert_close(columns(reader, images, reader.choose("cls")), encoder(images))


def test_raw_pixels_are_the_image_up_to_32_pixels_and_shrunk_above():
    reader = Reader(evaluated(None))
    small, large = torch.randn(2, 3, 32, 24), torch.randn(2, 3, 64, 128)
    assert torch.equal(columns(reader, small, "pixels"), small.flatten(1))
    shrunk = F.interpolate(large, size=(16, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(columns(reader, large, "pixels"), shrunk.flatten(1))


def test_broken_images_are_skipped_and_too_many_are_refused(run_folder, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    broken = tmp_path / "images" / "circle" / "0003.png"
    broken.write_bytes(b"no image")
    said = []
    found = extract(
        open_evaluated(run_folder),
        open_source(tmp_path / "images"),
        batch_size=8,
        workers=0,
        say=said.append,
    )
    assert found.index.tolist() == [i for i in range(36) if i != 3]
    assert any("1 of 36" in line for line in said)
    for number in range(4):
        (
            tmp_path / "images" / "square" / f"{number:04d}.{'png' if number % 2 else 'jpg'}"
        ).write_bytes(b"")
    with pytest.raises(UserError, match="5 of 36"):
        extract(open_evaluated(run_folder), open_source(tmp_path / "images"), workers=0)


def test_weights_that_give_nan_are_refused(run_folder, image_folder):
    it = open_evaluated(run_folder)
    with torch.no_grad():
        it.encoder.cls_token.fill_(np.nan)
    with pytest.raises(UserError, match="not finite"):
        extract(it, open_source(image_folder), workers=0)


def test_in_eval_mode_restores_the_mode_of_every_part():
    encoder = vit().train()
    encoder.blocks[0].eval()
    modes = [module.training for module in encoder.modules()]
    with in_eval_mode(encoder):
        assert not any(module.training for module in encoder.modules())
    assert [module.training for module in encoder.modules()] == modes


def spoil(run_folder, name="blocks.1.attn.qkv.weight"):
    """One value of a tensor of the run's export becomes infinite."""
    file = run_folder / "export" / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name].view(-1)[5] = np.inf
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("spec", ["run", "export", "file", "timm"])
def test_weights_that_are_not_finite_are_refused_with_the_tensors_name(spec, run_folder, tmp_path):
    spoil(run_folder)
    for name, more in (("test_vit", {}), ("vit_tiny_patch16_224", {"depth": 2})):
        own = timm.create_model(name, num_classes=0, **more).state_dict()
        own["blocks.1.attn.qkv.weight"].view(-1)[0] = np.nan
        save_file(own, tmp_path / f"{name}.safetensors")
    target, weights = {
        "run": (str(run_folder), "student"),
        "export": (str(run_folder / "export"), "student"),
        "file": (str(tmp_path / "vit_tiny_patch16_224.safetensors"), "student"),
        "timm": ("test_vit", str(tmp_path / "test_vit.safetensors")),
    }[spec]
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv\.weight"):
        open_evaluated(target, weights=weights)


def test_features_that_overflow_name_the_first_image_and_the_count(run_folder, image_folder):
    it = open_evaluated(run_folder)
    with torch.no_grad():
        it.encoder.patch_embed.proj.weight.fill_(3e38)  # finite, but no sum of such is
    with pytest.raises(
        UserError,
        match=r"not finite for 36 of 36 images, the first of them .*circle/0000\.jpg.*blr",
    ):
        extract(it, open_source(image_folder), workers=0)


def test_pixels_that_are_not_finite_are_told_apart_from_weights(run_folder):
    class Pixels(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            image = torch.full((3, 16, 16), 0.5)
            image[0, 0, 0] = np.nan if index == 4 else 0
            return image

    with pytest.raises(UserError) as caught:
        extract(open_evaluated(run_folder), open_source(Pixels()), workers=0)
    assert "blr" not in str(caught.value)

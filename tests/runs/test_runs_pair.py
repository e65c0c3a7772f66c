"""The whole road with a pair of networks: pre-train, stop and go on, look, evaluate, embed, export,
start from it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer

import patchmine
from patchmine.errors import UserError
from patchmine.evaluate.evaluated import open_evaluated
from patchmine.runs.folder import RunFolder
from spoken import patchmine_says

pytestmark = [pytest.mark.bitwise, pytest.mark.slow]

WORDS = [
    *(
        "method=mokd",
        "model=vit_tiny_patch16_224",
        "model_args={embed_dim: 32, depth: 2, num_heads: 2}",
    ),
    *(
        "image_size=32",
        "patch_size=4",
        "crops.local_size=16",
        "crops.num_local=2",
        "batch_size=8",
        "warmup_epochs=0",
    ),
    *(
        "method.partner_model=resnet18",
        "method.partner_args={cifar_stem: true, layers: [1, 1, 1, 1]}",
    ),
    *(
        "method.out_dim=32",
        "method.head_hidden=16",
        "method.head_bottleneck=8",
        "method.freeze_last_layer=0",
    ),
    *(
        "method.thead_depth=1",
        "method.thead_heads=2",
        "workers=0",
        "tensorboard=false",
        "device=cpu",
    ),
]


@pytest.fixture(scope="module")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, a checkpoint every two."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    patchmine_says(
        "pretrain", f"data={image_folder}", f"out={folder}", *WORDS, "steps=4", "checkpoint_every=2"
    )
    return folder


def test_going_on_from_the_middle_arrives_at_the_same_bits(
    run: Path, tmp_path: Path, weights: Any
) -> None:
    again = tmp_path / "again"
    shutil.copytree(run, again, symlinks=True)
    (again / "checkpoints" / "step-00000004.safetensors").unlink()
    torch.manual_seed(1234)  # whatever the process did before
    patchmine_says("resume", str(again))
    whole, resumed = weights(run), weights(again)
    assert whole.keys() == resumed.keys()
    # All four networks, four centres, and what AdamW and SGD remember.
    for part in ("encoder.", "partner.", "teacher.", "partner_teacher.", "centres.partner_thead."):
        assert any(name.startswith(f"model.{part}") for name in whole), part
    assert any(name.endswith(".exp_avg") for name in whole)
    assert any(name.endswith(".momentum_buffer") for name in whole)
    assert not [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])]


def test_all_four_encoders_can_be_had(run: Path) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    method = RunFolder(run).method()
    places = {"student": "encoder", "teacher": "teacher.encoder"}
    places |= {"partner": "partner", "partner-teacher": "partner_teacher.encoder"}
    for which, place in places.items():
        encoder = RunFolder(run).encoder(which)  # type: ignore[arg-type]
        assert isinstance(encoder, ResNet if "partner" in which else VisionTransformer)
        assert not encoder.training
        with torch.no_grad():
            expected = method.get_submodule(place).forward_features(images)
            assert torch.equal(encoder.forward_features(images), expected), which
        measured = open_evaluated(run, weights=which)
        assert type(measured.encoder) is type(encoder)
    with pytest.raises(
        UserError, match=r"no friend.*weights=student or teacher or partner or partner-teacher"
    ):
        open_evaluated(run, weights="friend")


def test_both_are_exported(run: Path, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval()
    second = patchmine.load_encoder(
        run / "export-partner"
    )  # timm cannot know the stem for small images
    with torch.no_grad():
        assert torch.equal(
            first.forward_features(images), RunFolder(run).encoder().forward_features(images)
        )
        assert torch.equal(
            second.forward_features(images),
            RunFolder(run).encoder("partner").forward_features(images),
        )
    patchmine_says("export", str(run), f"out={tmp_path / 'x'}", "weights=partner-teacher")
    third = patchmine.load_encoder(tmp_path / "x")
    assert torch.equal(third.conv1.weight, RunFolder(run).encoder("partner-teacher").conv1.weight)
    assert not torch.equal(third.conv1.weight, second.conv1.weight)


def test_a_run_of_one_network_has_no_partner(image_folder: Path, tmp_path: Path) -> None:
    words = [word for word in WORDS if not word.startswith(("method", "crops"))]
    small = ("method.decoder_embed_dim=16", "method.decoder_depth=1", "method.decoder_num_heads=2")
    patchmine_says(
        "pretrain",
        f"data={image_folder}",
        f"out={tmp_path / 'r'}",
        *words,
        *small,
        "method=mae",
        "steps=1",
    )
    assert not (tmp_path / "r" / "export-partner").exists()
    for command in (
        ("export", str(tmp_path / "r")),
        ("embed", str(tmp_path / "r"), f"data={image_folder}", "out=x.parquet"),
    ):
        said = patchmine_says(*command, "weights=partner", code=2)
        assert "holds no partner: method=mae keeps none; use weights=student" in said


def test_embed_evaluate_and_show(run: Path, image_folder: Path, tmp_path: Path) -> None:
    for which in ("student", "partner-teacher"):
        out = tmp_path / f"{which}.parquet"
        patchmine_says(
            "embed", str(run), f"data={image_folder}", f"out={out}", f"weights={which}", "workers=0"
        )
        assert out.is_file()
    patchmine_says(
        "eval",
        "knn",
        str(run),
        f"data={image_folder}",
        "weights=partner",
        "name=knn-partner",
        "workers=0",
    )
    assert (run / "eval" / "knn-partner.json").is_file()
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 50), "orange").save(picture)
    patchmine_says("show", str(run), str(picture), f"out={tmp_path / 'panel.png'}")
    assert (tmp_path / "panel.png").stat().st_size > 1000


def test_a_run_may_start_from_the_partner_of_another(
    run: Path, image_folder: Path, tmp_path: Path
) -> None:
    """``init`` fills the first network; the exported partner of one run may be that."""
    words = [
        word
        for word in WORDS
        if not word.startswith(("model", "patch_size", "method.partner", "crops"))
    ]
    swapped = (
        *(
            "model=resnet18",
            "model_args={cifar_stem: true, layers: [1, 1, 1, 1]}",
            "crops.local_size=16",
        ),
        *("method.partner_model=vit_tiny_patch16_224", "crops.num_local=2"),
        "method.partner_args={embed_dim: 32, depth: 1, num_heads: 2, patch_size: 4}",
    )
    out = tmp_path / "next"
    start = f"init={run / 'export-partner'}"
    patchmine_says(
        "pretrain",
        f"data={image_folder}",
        f"out={out}",
        *words,
        *swapped,
        start,
        "steps=1",
        "blr=1e-9",
        "method.sgd_blr=1e-9",
        "method.sgd_min_lr=0",
    )
    found, expected = RunFolder(out).encoder(), RunFolder(run).encoder("partner")
    torch.testing.assert_close(found.conv1.weight, expected.conv1.weight, atol=1e-5, rtol=0)
    assert isinstance(RunFolder(out).encoder("partner"), VisionTransformer)

"""The whole road with a BEiT-style encoder: pre-train, stop and go on, look, evaluate, export,
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

import patchmine
from patchmine.evaluate.evaluated import open_evaluated
from patchmine.runs.folder import RunFolder
from spoken import patchmine_says

pytestmark = [pytest.mark.bitwise, pytest.mark.slow]

SHARED = "use_abs_pos_emb: false, use_rel_pos_bias: false, use_shared_rel_pos_bias: true"
SIZES = "embed_dim: 32, depth: 2, num_heads: 2"
WORDS = [
    *(
        "method=simmim",
        "model=beit_base_patch16_224",
        "patch_size=4",
        "batch_size=8",
        "blr=1e-2",
        "warmup_epochs=0",
    ),
    *("workers=0", "tensorboard=false", "device=cpu"),
]


def pretrain(data: Path, out: Path, *words: str, args: str = SHARED, code: int = 0) -> str:
    sizes = f"model_args={{{SIZES}, {args}}}"
    size = [] if any(word.startswith("image_size=") for word in words) else ["image_size=16"]
    return patchmine_says(
        "pretrain", f"data={data}", f"out={out}", *WORDS, sizes, *size, *words, code=code
    )


@pytest.fixture(scope="module")
def run(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with stochastic depth, a checkpoint every three."""
    folder = tmp_path_factory.mktemp("beit") / "run"
    pretrain(
        image_folder, folder, "steps=6", "checkpoint_every=3", args=f"{SHARED}, drop_path_rate: 0.3"
    )
    return folder


def test_going_on_from_the_middle_arrives_at_the_same_bits(
    run: Path, tmp_path: Path, weights: Any
) -> None:
    again = tmp_path / "again"
    shutil.copytree(run, again, symlinks=True)
    (again / "checkpoints" / "step-00000006.safetensors").unlink()
    torch.manual_seed(1234)  # whatever the process did before
    patchmine_says("resume", str(again))
    whole, resumed = weights(run), weights(again)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert whole["model.encoder.rel_pos_bias.relative_position_bias_table"].any()


def test_the_export_opens_in_timm(run: Path, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 16, 16)
    patchmine_says("export", str(run), f"out={tmp_path / 'export'}")
    with torch.no_grad():
        expected = RunFolder(run).encoder().forward_features(images)
        for folder in (run / "export", tmp_path / "export"):
            opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            assert isinstance(opened, timm.models.beit.Beit)
            assert torch.equal(opened.forward_features(images), expected)
            assert torch.equal(patchmine.load_encoder(folder).forward_features(images), expected)


def test_it_is_shown_and_evaluated(run: Path, image_folder: Path, tmp_path: Path) -> None:
    pictures = [str(path) for path in sorted(image_folder.rglob("*.png"))[:2]]
    patchmine_says("show", str(run), *pictures, f"out={tmp_path / 'panel.png'}")
    with Image.open(tmp_path / "panel.png") as sheet:
        assert sheet.width > 4 * 100  # input, visible, reconstruction, error
    said = patchmine_says("eval", "knn", str(run), f"data={image_folder}", "baselines=true")
    assert "top-1" in said
    assert (run / "eval").is_dir()


def test_its_random_twin_starts_as_it_did(run: Path) -> None:
    twin = open_evaluated(f"random-init:{run}").encoder
    assert twin is not None
    assert not twin.get_parameter("rel_pos_bias.relative_position_bias_table").any()
    assert twin.get_parameter("blocks.0.attn.qkv.weight").abs().max() <= 0.02
    assert torch.all(twin.get_parameter("blocks.0.gamma_1") == 0.1)


@pytest.mark.parametrize("size", [16, 24])
def test_another_run_starts_from_it(
    run: Path, image_folder: Path, tmp_path: Path, size: int
) -> None:
    pretrain(
        image_folder, tmp_path / "next", "steps=1", "blr=1e-9", f"init={run}", f"image_size={size}"
    )
    before, after = RunFolder(run).encoder(), RunFolder(tmp_path / "next").encoder()
    name = "blocks.1.attn.qkv.weight"
    torch.testing.assert_close(after.get_parameter(name), before.get_parameter(name))
    table = after.get_parameter("rel_pos_bias.relative_position_bias_table")
    assert len(table) == (2 * size // 4 - 1) ** 2 + 3
    assert table.any()


def test_fine_tuning_as_published_gives_each_block_its_table(
    run: Path, image_folder: Path, tmp_path: Path
) -> None:
    said = patchmine_says(
        "finetune",
        str(run),
        f"data={image_folder}",
        f"out={tmp_path / 'run'}",
        "recipe=finetune-simmim-vit-b",
        *("steps=2", "epochs=null", "batch_size=8", "blr=0.1", "warmup_epochs=0"),
        *("workers=0", "tensorboard=false", "device=cpu"),
    )
    assert "blocks.*.attn.relative_position_bias_table from the shared table" in said
    tuned = patchmine.Run(tmp_path / "run")
    args = tuned.config.model_args
    assert (args["embed_dim"], args["use_abs_pos_emb"], args["use_shared_rel_pos_bias"]) == (
        *(32, False, False),
    )
    tables = [block.attn.relative_position_bias_table for block in tuned.encoder().blocks]
    assert not torch.equal(tables[0], tables[1])
    exported = timm.create_model(f"local-dir:{tuned.export_dir}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(exported(images), tuned.classifier()(images))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method.mask_unit=6"], ["method.mask_unit=6", "4x4", "method.mask_unit=8"]),
        (
            ["method.mask_unit=12"],
            ["method.mask_unit=12", "image_size=16x16", "method.mask_unit=4"],
        ),
        (["method.mask_ratio=0.9"], ["method.mask_ratio=0.9", "4 mask units", "lower"]),
        (["image_size=20"], ["method.mask_unit=null", "image_size=20x20"]),
        (["method=mae"], ["use_rel_pos_bias=false"]),
    ],
)
def test_mistakes(
    words: list[str], expected: list[str], image_folder: Path, tmp_path: Path
) -> None:
    message: Any = pretrain(image_folder, tmp_path / "run", "steps=1", *words, code=2)
    for part in expected:
        assert part in message, message
    assert not (tmp_path / "run").exists()

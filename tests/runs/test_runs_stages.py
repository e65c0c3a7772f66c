"""Runs on ConvNeXts and Swin Transformers: exact when resumed, looked at, and built on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from drawn import draw_images
from PIL import Image

import patchmine
from fixtures.boxes import write_boxes
from fixtures.label_maps import write_label_maps
from fixtures.small_runs import SMALL
from fixtures.stages import MODELS, TINY
from patchmine.train.checkpoint import load
from spoken import patchmine_says

pytestmark = pytest.mark.bitwise

KINDS = ["convnext", "swin"]
HEADS = dict(
    **dict(name="scfs", out_dim=32, head_hidden=16, head_bottleneck=8),
    **dict(stage_out_dim=12, stage_hidden=16, stage_bottleneck=8, freeze_last_layer=0),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data") / "images", 16, ("cat", "dog"))


def pretrain(kind: str, data: Path, out: Path, **more: Any) -> patchmine.Run:
    arguments = {**TINY[kind], "drop_path_rate": 0.3}
    settings: dict[str, Any] = {
        **dict(model=MODELS[kind], model_args=arguments, image_size=64, batch_size=8, steps=4),
        **dict(blr=1e-2, method=HEADS, crops={"local_size": 32, "num_local": 2}),
        **SMALL,
        **more,
    }
    return patchmine.pretrain(data=str(data), out=str(out), **settings)


@pytest.fixture(scope="module", params=KINDS)
def run(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> patchmine.Run:
    return pretrain(request.param, images, tmp_path_factory.mktemp("runs") / request.param)


def kind_of(run: patchmine.Run) -> str:
    return run.path.name


def test_a_run_resumes_exactly_and_leaves_for_timm(
    run: patchmine.Run, images: Path, tmp_path: Path
) -> None:
    parts = pretrain(
        kind_of(run), images, tmp_path / "parts", checkpoint_every=2, keep_checkpoints=9
    )
    newest = parts.checkpoints[-1]
    newest.unlink()
    assert load(parts.checkpoints[-1]).step == 2
    patchmine.resume(parts.path, say=lambda _: None)
    first, second = load(run.checkpoint_dir / "last").model, load(newest).model
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())

    exported = timm.create_model(f"local-dir:{run.export_dir}", pretrained=True).eval()
    with torch.no_grad():
        for side in (64, 96):
            taken = torch.randn(2, 3, side, side)
            torch.testing.assert_close(exported(taken), run.encoder().eval()(taken))


def test_embed_evaluate_and_show(run: patchmine.Run, images: Path, tmp_path: Path) -> None:
    table = tmp_path / "a.parquet"
    patchmine_says("embed", str(run.path), f"data={images}", f"out={table}", "workers=0")
    assert table.is_file()
    patchmine_says("eval", "knn", str(run.path), f"data={images}", "workers=0")
    assert (run.path / "eval" / "knn.json").is_file()
    Image.new("RGB", (90, 80), "orange").save(tmp_path / "a.png")
    patchmine_says("show", str(run.path), str(tmp_path / "a.png"), f"out={tmp_path / 'p.png'}")
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_another_size_starts_from_it(run: patchmine.Run, images: Path, tmp_path: Path) -> None:
    """From the run, and from the checkpoint as a bare file."""
    for number, start in enumerate((run.path, run.export_dir / "model.safetensors")):
        more = dict(image_size=96, steps=1, init=str(start), blr=1e-9)
        begun = pretrain(kind_of(run), images, tmp_path / str(number), **more)
        taken = torch.randn(2, 3, 96, 96)
        wanted = patchmine.load_encoder(run.export_dir, image_size=(96, 96)).eval()
        with torch.no_grad():
            found = begun.encoder().eval()(taken)
            torch.testing.assert_close(found, wanted(taken), rtol=1e-3, atol=1e-3)


def test_it_classifies_and_predicts(run: patchmine.Run, images: Path, tmp_path: Path) -> None:
    tuned = patchmine.finetune(
        run.path, data=images, out=tmp_path / "run", steps=3, batch_size=8, layer_decay=0.7, **SMALL
    )
    assert 0 <= json.loads((tuned.eval_dir / "test.json").read_text())["top1"] <= 100
    theirs = timm.create_model(f"local-dir:{tuned.export_dir}", pretrained=True).eval()
    taken = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(taken), tuned.classifier().eval()(taken))
    out = tmp_path / "predictions"
    patchmine_says("predict", str(tuned.path), str(images), f"out={out}", "workers=0")
    assert any(out.iterdir())


@pytest.mark.parametrize("settings", [{}, {"trainable": "bias"}, {"head": "dpt", "head_width": 16}])
def test_it_segments(settings: dict[str, Any], run: patchmine.Run, tmp_path: Path) -> None:
    data = write_label_maps(tmp_path / "maps", {"train": 4, "val": 2, "test": 2})
    taught = patchmine.segment(
        run.path, data=str(data), out=tmp_path / "run", steps=2, batch_size=2, **settings, **SMALL
    )
    assert 0 <= json.loads((taught.eval_dir / "test.json").read_text())["miou"] <= 100


def test_it_detects(run: patchmine.Run, tmp_path: Path) -> None:
    data = write_boxes(tmp_path / "boxes", {"train": 4, "val": 2, "test": 2})
    more: dict[str, Any] = dict(width=16, proposals=50, samples=32, scale=[0.8, 1.2], masks=True)
    taught = patchmine.detect(
        run.path, data=str(data), out=tmp_path / "run", steps=1, batch_size=2, **more, **SMALL
    )
    assert 0 <= json.loads((taught.eval_dir / "test.json").read_text())["map"] <= 100
    taught.detector()

"""Run folders as training leaves them, made up: enough of every file for a report, and nothing
trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from patchmine.runs.folder import RunFolder, build_method
from patchmine.train.checkpoint import save


def write_run(
    folder: Path,
    *,
    method: str = "hpm",
    steps: int = 2000,
    made: int | None = None,
    knn: bool = True,
    evals: bool = True,
    samples: int = 0,
    lines: int = 200,
    seed: int = 0,
    over_fitted: bool | None = None,
    **settings: object,
) -> Path:
    """A run of ``steps`` steps of which ``made`` are done, with ``lines`` lines of metrics for the
    whole.  ``over_fitted``: None: without monitors.
    """
    folder.mkdir(parents=True)
    config = {
        "data": "photos/train",
        "model": "vit_tiny_patch16_224",
        "model_args": {"depth": 4, "embed_dim": 128},
        "method": {"name": method, "mask_ratio": 0.75, "norm_pix_loss": True},
        "image_size": [32, 32],
        "epochs": None,
        "steps": steps,
        "batch_size": 128,
        "blr": 1.5e-4,
        "seed": seed,
        "out": str(folder),
        "workers": "auto",
    } | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    written = _training_lines(method, steps, made or steps, lines, seed, knn)
    if over_fitted is not None:
        written += _monitor_lines(made or steps, steps, over_fitted)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    if evals:
        _write_evals(folder / "eval", method)
    for k in range(samples):
        step = round(steps * k / max(1, samples - 1))
        (folder / "samples").mkdir(exist_ok=True)
        hue = int(255 * k / max(1, samples - 1))
        Image.new("RGB", (60, 40), (hue, 80, 160)).save(folder / "samples" / f"step-{step:08d}.png")
    return folder


def _training_lines(
    method: str, steps: int, made: int, count: int, seed: int, knn: bool
) -> list[dict[str, object]]:
    draw = np.random.default_rng(seed)
    written: list[dict[str, object]] = []
    every = max(1, steps // count)
    for step in range(every, made + 1, every):
        done = step / steps
        loss = (
            0.42
            + 0.6 * math.exp(-6 * done)
            + 0.02 * draw.standard_normal() * (1 + 4 * math.exp(-8 * done))
        )
        line: dict[str, object] = {
            "step": step,
            "epoch": step * 128 / 50000,
            "samples": step * 128,
            "loss": loss,
        }
        if method == "hpm":
            line |= {
                "loss_pixel": loss * 0.8,
                "loss_rank": 0.69 - 0.3 * done + 0.01 * draw.standard_normal(),
            }
            line |= {"hard_share": 0.5 * done}
        warm = min(1.0, done / 0.1)
        lr = 1.5e-4 * (warm if warm < 1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9)))
        line |= {
            "lr": lr,
            "images_per_second": 480 + 25 * draw.standard_normal(),
            "data_wait": abs(0.03 * draw.standard_normal()),
        }
        written.append(line)
        if knn and step % (every * max(1, count // 10)) == 0:
            top1 = (
                27
                + 17 * (1 - math.exp(-3 * done))
                + 0.4 * draw.standard_normal()
                + (method == "hpm")
            )
            written.append({"step": step, "eval": {"name": "knn", "top1": top1, "top5": top1 + 31}})
    return written


def _monitor_lines(made: int, steps: int, over_fitted: bool) -> list[dict[str, object]]:
    """Twenty looks at held-out images, whose loss rises from half of the run on."""
    written: list[dict[str, object]] = []
    for step in range(0, made + 1, max(1, steps // 20)):
        done = step / steps
        loss = 0.44 + 0.6 * math.exp(-6 * done)
        numbers = {
            "held_out_loss": loss + (0.3 * max(0.0, done - 0.5) if over_fitted else 0.0),
            "rankme": 20 + 30 * done,
            "feature_std": 0.03 + 0.03 * done,
            "neighbours_kept": 100 * math.exp(-3 * done),
        }
        written.append({"step": step, "eval": {"name": "monitor", **numbers}})
    return written


def _write_evals(folder: Path, method: str) -> None:
    folder.mkdir()
    better = 3.1 if method == "hpm" else 0.0
    baselines = {
        "random_init": {"top1": 32.4, "top5": 71.0},
        "raw_pixels": {"top1": 27.9, "top5": 66.2},
    }
    knn = {
        "name": "knn",
        "top1": 42.6 + better,
        "top5": 79.5,
        "k": 20,
        "temperature": 0.07,
        "data": "photos/test",
    }
    linear = {"name": "linear", "top1": 51.2 + better, "top5": 91.3}
    (folder / "knn.json").write_text(json.dumps(knn | {"baselines": baselines}))
    (folder / "linear.json").write_text(
        json.dumps(linear | {"floors": {"random_init": {"top1": 39.8, "top5": 84.1}}})
    )


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run("hpm", method="hpm", ...)`` writes a run folder of that name."""
    return lambda name="hpm", **options: write_run(tmp_path / name, **options)


@pytest.fixture(scope="session")
def hpm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of HPM with settings and a checkpoint of random weights, and no more."""
    folder = tmp_path_factory.mktemp("runs") / "hpm"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        "data: photos\nmodel: vit_tiny_patch16_224\nimage_size: 32\npatch_size: 8\n"
        "model_args: {depth: 1, embed_dim: 32, num_heads: 2}\n"
        "method: {name: hpm, decoder_embed_dim: 32, decoder_depth: 1, decoder_num_heads: 2}\n"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = build_method(RunFolder(folder).config)
    save(folder / "checkpoints", 50, method.state_dict(), {}, {}, keep=1)
    return folder

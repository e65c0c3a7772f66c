"""Twenty steps of the small recipe of every method: their settings, and the losses that are kept.

``python tests/losses/small.py`` measures them here and writes losses.json anew, which accepts them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
KEPT = FOLDER / "losses.json"
STEPS = 20

sys.path.insert(0, str(FOLDER.parent / "fixtures"))

from drawn import draw_clips, draw_images  # noqa: E402

TINY = {"model_args.depth": 2, "model_args.embed_dim": 32, "model_args.num_heads": 2}
RESNET = {"cifar_stem": True, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
DECODER = {"method.decoder_embed_dim": 32, "method.decoder_num_heads": 2}
HEADS = {"method.out_dim": 64, "method.head_hidden": 32, "method.head_bottleneck": 16}
STAGES = {"method.stage_out_dim": 16, "method.stage_hidden": 32, "method.stage_bottleneck": 16}
CALM = {"blr": 3e-3, "method.teacher_temp_start": 0.07}  # or roundings of other processors grow
THEADS = {"method.thead_heads": 2, "method.partner_args": RESNET}
CLIPS = {"recipe": "moving-photos", "clip.frames": 4, "clip.stride": 1, "patch_size": 8}

SHARED: dict[str, Any] = dict(
    recipe="cifar10-tiny",
    steps=STEPS,
    batch_size=8,
    blr=3e-2,  # of 8 images 1e-3, at which losses of twenty steps show what an update does
    log_every=1,
    sample_every=STEPS,
    workers=0,
    tensorboard=False,
    device="cpu",
    precision="fp32",
)
# A row for each method, named as it is, and rows for what else is trained by other code.
ROWS: dict[str, dict[str, Any]] = {
    "mae": {**TINY, **DECODER},
    "simmim": {**TINY},
    "hpm": {**TINY, **DECODER},
    "amt": {**TINY, **DECODER},
    "emae": {**TINY, **DECODER},
    "droppos": {**TINY, **DECODER},
    "semaim": {**TINY},
    "scfs": {**TINY, **HEADS, **STAGES, **CALM},
    "mokd": {**TINY, **HEADS, **THEADS, **CALM, "method.sgd_blr": 3e-3, "method.sgd_min_lr": 0},
    "mae on clips": {"method": "mae", **CLIPS, **TINY, **DECODER},
    "hpm on clips": {"method": "hpm", **CLIPS, **TINY, **DECODER},
    "hpm, own features": {"method": "hpm", "method.target": "ema", **TINY, **DECODER},
    "amt on simmim": {"method": "amt", "method.host": "simmim", **TINY},
    "amt, online": {"method": "amt", "method.maps": "online", **TINY, **DECODER},
    "semaim, own features": {"method": "semaim", "method.target": "ema", **TINY},
    "scfs on a resnet": {
        "method": "scfs",
        "model": "resnet18",
        "patch_size": None,
        "model_args": RESNET,
        **HEADS,
        **STAGES,
        **CALM,
    },
}


def train(name: str, room: Path) -> Path:
    """Make the run of a row in ``room``; returns its folder."""
    import patchmine

    data = draw_clips(room / "clips") if "clips" in name else draw_images(room / "images")
    out = room / name.replace(" ", "-")
    settings = {"method": name, **SHARED, **ROWS[name], "data": str(data), "out": str(out)}
    patchmine.pretrain(say=lambda _: None, **settings)
    return out


def lines_of(run: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says of each step."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if "loss" in line]


def main() -> None:
    """Measure all rows and keep their losses."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as room:
        runs = {name: train(name, Path(room)) for name in ROWS}
        losses = {name: [line["loss"] for line in lines_of(run)] for name, run in runs.items()}
    KEPT.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

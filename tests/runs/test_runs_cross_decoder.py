"""MAE with coloured masks and a cross-attention decoder in a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import patchmine
from fixtures.small_runs import DECODER, SMALL, VIT, assert_resumes
from patchmine.models.cross_decoder import CrossBlock

pytestmark = [pytest.mark.bitwise, pytest.mark.slow]

CHEAP = {
    "method": "mae",
    "method.decoder_attention": "cross",
    "method.predicted_share": 0.5,
    "method.mask_noise": "green",
}


def test_it_resumes_exactly_and_leaves_an_encoder_only(
    image_folder: Path, tmp_path: Path, weights: Any
) -> None:
    settings = {**SMALL, **VIT, **DECODER, **CHEAP, "steps": 6, "checkpoint_every": 2}
    run = patchmine.pretrain(
        data=image_folder, out=tmp_path / "run", keep_checkpoints=20, **settings
    )
    assert_resumes(run, 2, weights)
    assert all(isinstance(block, CrossBlock) for block in run.method().decoder.blocks)
    run.export(tmp_path / "encoder")
    assert (tmp_path / "encoder" / "model.safetensors").exists()
    with pytest.raises(
        patchmine.UserError,
        match=r"what=full writes files for the authors' code, whose decoder attends to all tokens, "
        r"and .*run has method\.decoder_attention=cross: use what=encoder",
    ):
        run.export(tmp_path / "full.safetensors", what="full")

"""Runs on clips into VideoMAE's files and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from patchmine.backbones.video import VideoTransformer
from patchmine.backbones.weights import load_encoder
from patchmine.config.resolve import parse
from patchmine.errors import UserError
from patchmine.runs.exporting import export_run
from patchmine.runs.folder import RunFolder, build_method
from patchmine.runs.transfer import import_file
from patchmine.task import Method
from patchmine.train import checkpoint
from patchmine.types import Batch, Progress

WORDS = [
    *(
        "data=videos",
        "model=video_vit_tiny_patch16",
        "model_args.depth=1",
        "image_size=32",
        "patch_size=8",
    ),
    *("clip.frames=16", "clip.tubelet=2", "method.norm_pix_loss=true", "method.mask_ratio=0.9"),
    *("method.decoder_embed_dim=192", "method.decoder_depth=1", "method.decoder_num_heads=3"),
]


def make_run(folder: Path, method: str) -> tuple[RunFolder, Method]:
    config = parse(None, [*WORDS, f"method={method}"])
    torch.manual_seed(1)
    built = build_method(config)
    for name, parameter in built.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.01)
        if name.endswith("qkv.bias"):
            parameter.data.chunk(3)[1].zero_()  # VideoMAE's keys have no bias
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    checkpoint.save(folder / "checkpoints", 7, built.state_dict(), {}, {}, keep=3)
    return RunFolder(folder), built


@pytest.mark.parametrize("name", ["mae", "hpm"])
def test_a_full_export_is_a_file_of_videomae_and_is_read_back(name: str, tmp_path: Path) -> None:
    run, built = make_run(tmp_path / "run", name)
    path = export_run(run.path, str(tmp_path / "full.safetensors"), what="full", weights="student")
    names = load_file(path).keys()
    assert {
        "encoder.blocks.0.attn.q_bias",
        "encoder_to_decoder.weight",
        "decoder.head.bias",
        "mask_token",
    } <= names
    assert not {"decoder_pos_embed", "encoder_to_decoder.bias"} & names
    assert any(key.startswith("losspred.") for key in names) is (name == "hpm")
    assert any(key.startswith("ema.losspred.") for key in names) is (name == "hpm")
    said: list[str] = []
    again = import_file(
        str(path),
        str(tmp_path / "imported"),
        image_size=32,
        num_heads=3,
        decoder_num_heads=3,
        say=said.append,
    )
    assert "clips of" not in said[-1]  # our files tell their size
    assert again.config.method.name == name
    assert again.config.clip.frames == 16
    state, expected = again.method().state_dict(), built.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_the_export_folder_is_opened_by_load_encoder_and_starts_a_run(tmp_path: Path) -> None:
    run, built = make_run(tmp_path / "run", "hpm")
    for weights, encoder in (
        ("student", built.encoder),
        ("teacher", built.get_submodule("teacher.encoder")),
    ):
        folder = export_run(run.path, str(tmp_path / weights), what="encoder", weights=weights)  # type: ignore[arg-type]
        opened = load_encoder(folder)
        assert isinstance(opened, VideoTransformer)
        assert opened.patch_embed.grid_size == (8, 4, 4)
        clips = torch.randn(1, 3, 16, 32, 32)
        assert torch.equal(opened.eval()(clips), encoder.eval()(clips))
    config = parse(
        None, [*WORDS, "clip.frames=8", "method=mae"]
    )  # positions are no part of the weights
    started = build_method(config, start_from=str(tmp_path / "student"))
    assert torch.equal(
        started.encoder.patch_embed.proj.weight, built.encoder.patch_embed.proj.weight
    )
    assert torch.equal(
        run.encoder("teacher").norm.bias, built.get_submodule("teacher.encoder").norm.bias
    )


def test_an_encoder_alone_becomes_a_run_with_an_encoder(tmp_path: Path) -> None:
    run, built = make_run(tmp_path / "run", "mae")
    path = export_run(run.path, str(tmp_path / "full.safetensors"), what="full", weights="student")
    said: list[str] = []
    again = import_file(
        str(path),
        str(tmp_path / "encoder"),
        what="encoder",
        image_size=32,
        num_heads=3,
        say=said.append,
    )
    assert "serves for eval, embed, and init=" in said[-1]
    state = again.encoder().state_dict()
    assert all(
        torch.equal(state[key], tensor) for key, tensor in built.encoder.state_dict().items()
    )
    batch = Batch(
        [torch.randn(1, 3, 16, 32, 32)],
        torch.zeros(1),
        torch.zeros(1, 4),
        torch.zeros(1, dtype=torch.bool),
    )
    assert run.method()(batch, Progress(0, 1, 1))["loss"].isfinite()


def test_transformers_has_no_network_for_clips(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", "mae")
    with pytest.raises(UserError, match=r"to=transformers: .*for videos.*use to=onnx, or to=timm"):
        export_run(run.path, None, what="encoder", weights="student", to="transformers")
    assert not run.export_dir.exists()

"""Position tables travel with their grid: equal to timm's resampling from the true one, whoever
opens the weights.
"""

from __future__ import annotations

import json
import shutil
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor

import patchmine
from patchmine.backbones.export import Preprocessing, export_encoder
from patchmine.backbones.family import Encoder, build_encoder
from patchmine.backbones.foreign import ForeignTeacher
from patchmine.backbones.positions import grid_of_fixed_table, move_positions, sincos_table
from patchmine.backbones.record import Blueprint
from patchmine.backbones.weights import load_encoder
from patchmine.config.resolve import parse
from patchmine.errors import UserError
from patchmine.evaluate.evaluated import open_evaluated
from patchmine.runs.exporting import export_run
from patchmine.runs.folder import RunFolder, build_method
from patchmine.runs.transfer import import_file
from patchmine.train import checkpoint
from patchmine.types import Grid

MODEL = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"depth": 1}
WIDE, SQUARE = (32, 128), (64, 64)  # 4x16 and 8x8 patches of 8 pixels: as many, at other places
BEIT = "beit_base_patch16_224"
BEIT_ARGS: dict[str, Any] = {"embed_dim": 48, "depth": 1, "num_heads": 3}


def learned(size: tuple[int, int], model: str = MODEL, args: dict[str, Any] = TINY) -> Encoder:
    """An encoder whose positions were trained, so that nothing but a description tells their grid."""
    torch.manual_seed(0)
    encoder = build_encoder(model, image_size=size, patch_size=8, model_args=args).eval()
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name == "pos_embed" or name.endswith("bias_table"):
                tensor.copy_(torch.randn_like(tensor))
    return encoder


def export(
    encoder: Encoder,
    folder: Path,
    size: tuple[int, int],
    model: str = MODEL,
    args: dict[str, Any] = TINY,
) -> Path:
    encoder.built_from = Blueprint(model, size, model_args=args)
    return export_encoder(encoder, folder, Preprocessing([0.5] * 3, [0.5] * 3))


def timms(table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 1) -> Tensor:
    return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=prefix)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [((8, 8), (4, 16)), ((4, 16), (8, 8)), ((4, 6), (6, 4)), ((3, 5), (3, 5)), ((1, 8), (2, 4))],
)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_moved_tables_are_timms(
    source: tuple[int, int], wanted: tuple[int, int], prefix: int
) -> None:
    table = torch.randn(1, prefix + source[0] * source[1], 12)
    moved = move_positions(table, source, wanted, prefix)
    assert torch.equal(moved, timms(table, source, wanted, prefix))
    assert torch.equal(moved, table) is (source == wanted)
    with pytest.raises(ValueError, match="rows is not one of"):
        move_positions(table, (source[0] + 1, source[1]), wanted, prefix)


@pytest.mark.parametrize(
    ("source", "wanted"), [((8, 8), (4, 16)), ((4, 16), (8, 8)), ((2, 3), (5, 7))]
)
def test_moved_tables_of_distances_are_timms(
    source: tuple[int, int], wanted: tuple[int, int]
) -> None:
    rows = [(2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 for grid in (source, wanted)]
    table = torch.randn(rows[0], 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about timm's own indexing
        expected = resize_rel_pos_bias_table(table, wanted, (rows[1], 3), old_window_size=source)
    assert torch.equal(move_positions(table, source, wanted), expected)


def test_a_fixed_table_tells_its_grid() -> None:
    for grid in ((4, 16), (16, 4), (8, 8), (1, 5)):
        assert grid_of_fixed_table(sincos_table(192, grid)) == grid
    assert grid_of_fixed_table(torch.randn(64, 192)) is None


@pytest.mark.parametrize(("trained", "wanted"), [(SQUARE, WIDE), (WIDE, SQUARE), (WIDE, (16, 32))])
def test_an_export_is_moved_from_its_own_grid(
    trained: tuple[int, int], wanted: tuple[int, int], tmp_path: Path
) -> None:
    encoder = learned(trained)
    folder = export(encoder, tmp_path / "export", trained)
    old, new = ((size[0] // 8, size[1] // 8) for size in (trained, wanted))
    expected = timms(encoder.pos_embed, old, new)
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    for path in (folder, folder / "model.safetensors", tmp_path / "alone.safetensors"):
        opened = patchmine.load_encoder(path, image_size=wanted)
        assert opened.patch_embed.grid_size == new
        assert torch.equal(opened.pos_embed, expected), path
        assert torch.equal(patchmine.load_encoder(path).pos_embed, encoder.pos_embed)
        teacher = ForeignTeacher("dino", path, grid=Grid(new, (8, 8)))
        assert torch.equal(teacher.tower.pos_embed, expected)
        run = import_file(
            str(path), str(tmp_path / f"run-{path.parent.name}-{path.name}"), image_size=wanted
        )
        assert torch.equal(run.encoder().pos_embed, expected)
        assert run.config.image_size == wanted
        again = timm.create_model(f"local-dir:{run.export_dir}", pretrained=True)
        assert torch.equal(again.pos_embed, expected)
    assert torch.equal(open_evaluated(folder, image_size=wanted).encoder.pos_embed, expected)  # type: ignore[union-attr]


def made_run(folder: Path, size: tuple[int, int], method: str = "mae") -> tuple[RunFolder, Any]:
    small = ["method.decoder_embed_dim=32", "method.decoder_depth=1", "method.decoder_num_heads=2"]
    words = [
        "data=x",
        f"model={MODEL}",
        "model_args.depth=1",
        "patch_size=8",
        f"image_size={list(size)}",
    ]
    config = parse(None, [*words, f"method={method}", *(small if method in ("mae", "hpm") else [])])
    built = build_method(config)
    with torch.no_grad():
        built.encoder.pos_embed.copy_(torch.randn_like(built.encoder.pos_embed))
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    checkpoint.save(folder / "checkpoints", 7, built.state_dict(), {}, {}, keep=3)
    return RunFolder(folder), built


def test_a_run_is_moved_from_its_own_grid(tmp_path: Path) -> None:
    run, built = made_run(tmp_path / "run", WIDE, "hpm")
    before = built.encoder.pos_embed
    expected = timms(before, (4, 16), (8, 8))
    assert torch.equal(patchmine.load_encoder(run.path, image_size=64).pos_embed, expected)
    assert torch.equal(
        patchmine.load_encoder(run.checkpoints[-1], image_size=64).pos_embed, expected
    )
    config = run.config.model_copy(update={"image_size": SQUARE})
    for start in (run.path, run.checkpoints[-1]):
        said: list[str] = []
        started = build_method(config, start_from=str(start), say=said.append)
        assert torch.equal(started.encoder.pos_embed, expected)
        assert "pos_embed from 4x16 to 8x8 patches" in said[0]
        assert f"loaded{len(started.encoder.state_dict()):>9}" in said[0]  # type: ignore[arg-type]
        assert "left random" in said[0]
        assert "decoder_input" in said[0]
        assert "teacher." not in said[0].split("left random")[1]
    teacher = patchmine.load_encoder(run.checkpoints[-1], weights="ema")
    assert torch.equal(teacher.pos_embed, built.get_submodule("teacher.encoder").pos_embed)


def test_a_full_file_tells_its_size_and_is_moved(tmp_path: Path) -> None:
    run, built = made_run(tmp_path / "run", WIDE)
    path = export_run(run.path, str(tmp_path / "full.safetensors"), what="full", weights="student")
    for size, grid in ((None, (4, 16)), (SQUARE, (8, 8))):
        again = import_file(str(path), str(tmp_path / f"again-{size}"), image_size=size)
        method = again.method()
        assert torch.equal(method.encoder.pos_embed, timms(built.encoder.pos_embed, (4, 16), grid))  # type: ignore[union-attr]
        assert torch.equal(method.get_buffer("decoder_input.pos_embed"), sincos_table(32, grid))
        assert torch.equal(method.get_parameter("decoder.head.weight"), built.decoder.head.weight)


def test_a_bare_file_is_taken_as_square_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = learned(WIDE)
    save_file(encoder.state_dict(), tmp_path / "bare.safetensors")
    opened = patchmine.load_encoder(tmp_path / "bare.safetensors")
    assert opened.patch_embed.grid_size == (8, 8)
    assert "a square, 8x8 patches (64x64 pixels), because nothing says" in caplog.text
    assert "source_size=[height,width]" in caplog.text
    told = patchmine.load_encoder(tmp_path / "bare.safetensors", source_size=WIDE)
    assert told.patch_embed.grid_size == (4, 16)
    assert torch.equal(told.pos_embed, encoder.pos_embed)
    told = patchmine.load_encoder(
        tmp_path / "bare.safetensors", image_size=SQUARE, source_size=WIDE
    )
    assert torch.equal(told.pos_embed, timms(encoder.pos_embed, (4, 16), (8, 8)))
    said: list[str] = []
    import_file(
        str(tmp_path / "bare.safetensors"), str(tmp_path / "run"), image_size=WIDE, say=said.append
    )
    assert "pos_embed from 8x8 to 4x16 patches" in said[-1]
    assert "taken as those of a square" in said[-1]
    with pytest.raises(
        UserError,
        match=r"source_size says that it was trained at 32x64 pixels, 4x8 patches, but .* 65",
    ):
        patchmine.load_encoder(tmp_path / "bare.safetensors", source_size=(32, 64))


def test_what_is_no_square_asks_for_the_size(tmp_path: Path) -> None:
    save_file(learned((24, 32)).state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(
        UserError, match=r"12 patches form no square grid: .*source_size=\[height,width\]"
    ):
        patchmine.load_encoder(tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match=r"no square grid"):
        build_method(
            parse(None, ["data=x", "method=mae", f"model={MODEL}"]),
            start_from=str(tmp_path / "bare.safetensors"),
        )
    run = import_file(
        str(tmp_path / "bare.safetensors"), str(tmp_path / "run"), source_size=(24, 32)
    )
    assert run.encoder().patch_embed.grid_size == (3, 4)


def test_fixed_positions_need_no_description(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = build_encoder(MODEL, image_size=WIDE, patch_size=8, model_args=TINY)
    torch.save({"model": encoder.state_dict()}, tmp_path / "mae.pth")
    opened = patchmine.load_encoder(tmp_path / "mae.pth", image_size=SQUARE)
    assert torch.equal(opened.pos_embed, timms(encoder.pos_embed, (4, 16), (8, 8)))
    assert "square" not in caplog.text


@pytest.mark.parametrize(
    "extra",
    [
        {"reg_tokens": 3},
        {"reg_tokens": 3, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg"},
    ],
)
def test_prefix_tokens_stay_where_they_are(extra: dict[str, Any], tmp_path: Path) -> None:
    args = {**TINY, **extra}
    encoder = learned(WIDE, args=args)
    prefix = 0 if "reg_tokens" not in extra or "no_embed_class" in extra else 4
    expected = timms(encoder.pos_embed, (4, 16), (8, 8), prefix)
    export(encoder, tmp_path / "export", WIDE, args=args)
    assert torch.equal(
        patchmine.load_encoder(tmp_path / "export", image_size=64).pos_embed, expected
    )
    save_file(encoder.state_dict(), tmp_path / "bare.safetensors")
    opened = patchmine.load_encoder(tmp_path / "bare.safetensors", source_size=WIDE, image_size=64)
    assert torch.equal(opened.pos_embed, expected)
    images = torch.randn(1, 3, 32, 128)
    again = patchmine.load_encoder(tmp_path / "bare.safetensors", source_size=WIDE)
    torch.testing.assert_close(again.forward_features(images), encoder.forward_features(images))


def test_relative_tables_are_moved_from_their_own_grid(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = learned(WIDE, BEIT, BEIT_ARGS)
    folder = export(encoder, tmp_path / "export", WIDE, BEIT, BEIT_ARGS)
    name = "blocks.0.attn.relative_position_bias_table"
    table = encoder.state_dict()[name]
    expected = move_positions(table, (4, 16), (8, 8))
    assert torch.equal(patchmine.load_encoder(folder, image_size=64).state_dict()[name], expected)
    words = ["data=x", "method=simmim", f"model={BEIT}", "patch_size=8", "image_size=64"]
    config = parse(
        None, [*words, *(f"model_args.{key}={value}" for key, value in BEIT_ARGS.items())]
    )
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")  # with our note in it
    for start in (folder, tmp_path / "alone.safetensors"):
        assert torch.equal(
            build_method(config, start_from=str(start)).encoder.state_dict()[name], expected
        )
    assert torch.equal(
        open_evaluated(folder, image_size=SQUARE).encoder.state_dict()[name], expected
    )  # type: ignore[union-attr]
    square = learned((40, 40), BEIT, BEIT_ARGS)  # 9x9 distances
    save_file(square.state_dict(), tmp_path / "bare.safetensors")
    args = {**BEIT_ARGS, "patch_size": 8}
    opened = load_encoder(
        tmp_path / "bare.safetensors", model=BEIT, model_args=args, image_size=WIDE
    )
    assert torch.equal(
        opened.state_dict()[name], move_positions(square.state_dict()[name], (5, 5), (4, 16))
    )
    assert "5x5" not in caplog.text or "square" in caplog.text


def test_patches_of_another_size_are_not_taken_for_the_models(tmp_path: Path) -> None:
    folder = export(learned(SQUARE), tmp_path / "export", SQUARE)
    config = parse(
        None,
        [
            "data=x",
            "method=mae",
            f"model={MODEL}",
            "model_args.depth=1",
            "patch_size=16",
            "image_size=64",
        ],
    )
    with pytest.raises(UserError, match=r"patch_embed.proj.weight has shape .*set patch_size=8"):
        build_method(config, start_from=str(folder))
    with pytest.raises(UserError, match="image_size=30x30 is not a multiple of the patch size 8"):
        patchmine.load_encoder(folder, image_size=30)


def test_a_description_that_contradicts_the_table_is_named(tmp_path: Path) -> None:
    folder = export(learned(WIDE), tmp_path / "export", WIDE)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["img_size"] = [32, 64]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"config.json says that it was trained at 32x64 pixels, 4x8 patches, but"
    ):
        patchmine.load_encoder(folder)


def test_a_full_file_is_whole_or_absent(tmp_path: Path) -> None:
    run, _ = made_run(tmp_path / "run", WIDE)
    path = export_run(run.path, str(tmp_path / "full.safetensors"), what="full", weights="student")
    assert load_file(path)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_the_newest_checkpoint_opens_by_its_pointer(tmp_path: Path) -> None:
    run, built = made_run(tmp_path / "run", WIDE)
    last = run.checkpoint_dir / "last"
    for is_link in (True, False):
        if not is_link:
            last.unlink()
            last.write_text(run.checkpoints[-1].name + "\n", encoding="utf-8")
        opened = patchmine.load_encoder(last)
        assert torch.equal(opened.pos_embed, built.encoder.pos_embed)
        assert opened.patch_embed.grid_size == (4, 16)


def test_arguments_of_a_script_count_where_they_fit(tmp_path: Path) -> None:
    encoder = learned(SQUARE)
    for size in (64, 224, 31, 65):
        torch.save(
            {"model": encoder.state_dict(), "args": Namespace(input_size=size)},
            tmp_path / "mae.pth",
        )
        assert patchmine.load_encoder(tmp_path / "mae.pth").patch_embed.grid_size == (8, 8)

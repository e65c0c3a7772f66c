"""Weights out of runs and into runs, through files laid out like those of the reference code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from patchmine.backbones.reference import to_reference_names
from patchmine.config.resolve import parse
from patchmine.errors import UserError
from patchmine.methods.settings.mae import MaeSettings
from patchmine.runs.exporting import export_run
from patchmine.runs.folder import RunFolder, build_method
from patchmine.runs.lock import lock
from patchmine.runs.transfer import import_file
from patchmine.task import Method
from patchmine.train import checkpoint
from patchmine.types import Batch, Progress

WORDS = [
    "data=photos",
    "model=vit_tiny_patch16_224",
    "model_args.depth=2",
    "image_size=32",
    "patch_size=8",
]
OFFICIAL = ["mae", "hpm"]  # whose files are read and written whole
DECODER = ["method.decoder_embed_dim=512", "method.decoder_depth=1", "method.decoder_num_heads=16"]


def make_run(folder: Path, method: str) -> tuple[RunFolder, Method]:
    config = parse(None, [*WORDS, *DECODER, f"method={method}"])
    torch.manual_seed(1)
    built = build_method(config)
    for parameter in built.parameters():
        # So that the teacher is not the student
        parameter.data.add_(torch.randn_like(parameter) * 0.01)
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    checkpoint.save(folder / "checkpoints", 7, built.state_dict(), {}, {}, keep=3)
    return RunFolder(folder), built


def reference_state(method: Method) -> dict[str, Tensor]:
    state = to_reference_names(method.state_dict())
    table = method.get_submodule("decoder_input").get_buffer("pos_embed")
    return state | {"decoder_pos_embed": torch.cat([torch.zeros(1, table.shape[1]), table])[None]}


def official_file(folder: Path, method: Method, name: str) -> Path:
    state = reference_state(method)
    path = folder / "official.pth"
    if name == "mae":
        torch.save({"model": state, "epoch": 3}, path)
    else:
        ddp = {f"module.{key}": tensor for key, tensor in state.items()}
        ema = to_reference_names(method.state_dict(), teacher=True)
        torch.save({"epoch": 3, "state_dict": ddp, "ema_state_dict": ema}, path)
    return path


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_full_official_file_becomes_the_same_method(name: str, tmp_path: Path) -> None:
    _, built = make_run(tmp_path / "run", name)
    said: list[str] = []
    run = import_file(
        str(official_file(tmp_path, built, name)), str(tmp_path / "imported"), say=said.append
    )
    assert equal(run.method().state_dict(), built.state_dict())
    assert run.config.method.name == name
    assert "unexpected    0" in said[-1]
    exported = timm.create_model(f"local-dir:{run.export_dir}", pretrained=True)
    images = torch.randn(2, 3, 32, 32)
    built.eval()
    torch.testing.assert_close(
        exported.eval().forward_features(images), built.encoder.forward_features(images)
    )  # type: ignore[operator]


def test_an_encoder_only_file_becomes_a_run_with_an_encoder(tmp_path: Path) -> None:
    _, built = make_run(tmp_path / "run", "mae")
    path = tmp_path / "encoder.pth"
    torch.save({"model": built.encoder.state_dict()}, path)
    run = import_file(str(path), str(tmp_path / "imported"))
    assert equal(run.encoder().state_dict(), built.encoder.state_dict())
    with pytest.raises(UserError, match="imported as an encoder only"):
        run.method()
    with pytest.raises(UserError, match="holds an encoder only: use what=encoder"):
        import_file(str(path), str(tmp_path / "other"), what="full")


def test_the_decoder_may_be_left_behind(tmp_path: Path) -> None:
    _, built = make_run(tmp_path / "run", "hpm")
    run = import_file(
        str(official_file(tmp_path, built, "hpm")), str(tmp_path / "imported"), what="encoder"
    )
    assert run.checkpoints == []
    assert equal(run.encoder().state_dict(), built.encoder.state_dict())


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_full_export_is_read_back_by_import(name: str, tmp_path: Path) -> None:
    run, built = make_run(tmp_path / "run", name)
    path = export_run(run.path, str(tmp_path / "full.safetensors"), what="full", weights="student")
    assert equal(load_file(path), reference_state(built))
    again = import_file(str(path), str(tmp_path / "imported")).method().state_dict()
    students = {
        key: tensor for key, tensor in built.state_dict().items() if not key.startswith("teacher.")
    }
    assert equal({key: again[key] for key in students}, students)


def test_exports_of_student_and_teacher_open_in_timm(tmp_path: Path) -> None:
    run, built = make_run(tmp_path / "run", "hpm")
    student = export_run(run.path, None, what="encoder", weights="student")
    teacher = export_run(run.path, str(tmp_path / "teacher"), what="encoder", weights="teacher")
    assert student == run.export_dir
    expected = {
        student: built.encoder,
        teacher: built.get_submodule("teacher").get_submodule("encoder"),
    }
    for folder, encoder in expected.items():
        opened = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert equal(opened.state_dict(), encoder.state_dict())


def test_what_cannot_be_transferred_is_refused_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    run, built = make_run(tmp_path / "run", "mae")
    with pytest.raises(UserError, match="already holds a run"):
        import_file("x.pth", str(run.path))
    with pytest.raises(UserError, match="holds no teacher"):
        export_run(run.path, None, what="full", weights="teacher")
    with pytest.raises(UserError, match=r"write for example out=.*folder.safetensors"):
        export_run(run.path, str(tmp_path / "folder"), what="full", weights="student")
    (tmp_path / "other").mkdir()
    other = parse(None, [*WORDS, "method=simmim"])
    (tmp_path / "other" / "config.yaml").write_text(other.to_yaml(), encoding="utf-8")
    with pytest.raises(UserError, match=r"is of method=simmim: use what=encoder"):
        export_run(tmp_path / "other", None, what="full", weights="student")
    state = reference_state(built)
    del state["decoder_blocks.0.norm1.bias"]
    torch.save({"model": state | {"surprise": torch.zeros(3)}}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="missing tensor"):
        import_file(str(tmp_path / "odd.pth"), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_another_image_size_is_imported_with_resampled_positions(tmp_path: Path) -> None:
    _, built = make_run(tmp_path / "run", "hpm")
    said: list[str] = []
    file = official_file(tmp_path, built, "hpm")
    run = import_file(str(file), str(tmp_path / "imported"), image_size=64, say=said.append)
    assert run.config.image_size == (64, 64)
    assert run.encoder().patch_embed.grid_size == (8, 8)
    assert run.encoder("teacher").pos_embed.shape == (1, 65, 192)
    assert "pos_embed from 4x4 to 8x8 patches" in said[-1]
    assert (
        "assumed in config.yaml, because the file does not tell: method.mask_ratio=0.75" in said[-1]
    )
    batch = Batch(
        [torch.randn(1, 3, 64, 64)],
        torch.zeros(1),
        torch.zeros(1, 4),
        torch.zeros(1, dtype=torch.bool),
    )
    assert len(run.method().panels(batch, Progress(0, 1, 1))) > 3


@pytest.mark.parametrize(
    ("name", "normalised"),
    [
        ("mae_pretrain_vit_base_full.pth", True),
        ("mae_visualize_vit_large.pth", False),
        ("checkpoint-9.pth", None),
    ],
)
def test_what_is_known_of_published_files_is_set_and_said(
    name: str, normalised: bool | None, tmp_path: Path
) -> None:
    _, built = make_run(tmp_path / "run", "mae")
    official_file(tmp_path, built, "mae").rename(tmp_path / name)
    said: list[str] = []
    run = import_file(str(tmp_path / name), str(tmp_path / "imported"), say=said.append)
    usual = MaeSettings().norm_pix_loss
    found = run.config.method.model_dump()["norm_pix_loss"]
    assert found == (usual if normalised is None else normalised)
    assert ("as its authors say of the file" in said[-1]) == (normalised is not None)
    assert ("norm_pix_loss" in said[-1].split("assumed")[1]) == (normalised is None)


def test_surprises_are_passed_over_where_they_are_named(tmp_path: Path) -> None:
    _, built = make_run(tmp_path / "run", "mae")
    torch.save(
        {"model": reference_state(built) | {"surprise": torch.zeros(3)}}, tmp_path / "odd.pth"
    )
    with pytest.raises(UserError, match=r"unexpected tensor.*surprise.*allow=\[encoder.surprise\]"):
        import_file(str(tmp_path / "odd.pth"), str(tmp_path / "new"))
    said: list[str] = []
    import_file(
        str(tmp_path / "odd.pth"), str(tmp_path / "new"), allow=["*surprise"], say=said.append
    )
    assert "unexpected    1  encoder.surprise" in said[-1]


def test_allow_passes_over_nothing_that_an_encoder_computes_with(tmp_path: Path) -> None:
    _, built = make_run(tmp_path / "run", "mae")
    odd = {"blocks.0.attn.extra_norm.weight": torch.zeros(3), "prompt_tokens": torch.zeros(3)}
    for name, tensor in odd.items():
        torch.save({"model": reference_state(built) | {name: tensor}}, tmp_path / "odd.pth")
        for what in ("encoder", "full"):
            with pytest.raises(UserError, match=rf"{name} first.*allow does not pass over them"):
                import_file(
                    str(tmp_path / "odd.pth"), str(tmp_path / "new"), what=what, allow=["*"]
                )  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_fine_tuned_classifier_becomes_a_run_with_its_encoder(tmp_path: Path) -> None:
    _, built = make_run(tmp_path / "run", "mae")
    state = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t
        for name, t in built.encoder.state_dict().items()
    }
    torch.save(
        {"model": state | {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}},
        tmp_path / "f.pth",
    )
    run = import_file(str(tmp_path / "f.pth"), str(tmp_path / "imported"))
    assert equal(run.encoder().state_dict(), state)
    opened = timm.create_model(f"local-dir:{run.export_dir}", pretrained=True)
    assert opened.global_pool == "avg"


def test_a_decoder_that_predicts_features_is_left_to_the_user(tmp_path: Path) -> None:
    _, built = make_run(tmp_path / "run", "hpm")
    state = reference_state(built)
    state |= {"decoder_pred.weight": torch.zeros(512, 512), "decoder_pred.bias": torch.zeros(512)}
    torch.save({"state_dict": state, "ema_state_dict": state}, tmp_path / "clip.pth")
    with pytest.raises(
        UserError, match=r"predicts 512 numbers a patch, not its 192 pixel values.*what=encoder"
    ):
        import_file(str(tmp_path / "clip.pth"), str(tmp_path / "imported"))
    assert (
        import_file(
            str(tmp_path / "clip.pth"), str(tmp_path / "imported"), what="encoder"
        ).checkpoints
        == []
    )


def test_an_import_has_its_folder_for_itself_and_leaves_none_behind_a_mistake(
    tmp_path: Path,
) -> None:
    out = tmp_path / "runs" / "imported"
    with lock(out), pytest.raises(UserError, match=f"{out} is being written by process"):
        import_file(str(tmp_path / "mae.pth"), str(out))
    with pytest.raises(UserError, match=r"mae\.pth does not exist"):
        import_file(str(tmp_path / "mae.pth"), str(out))
    assert list(tmp_path.iterdir()) == []


def test_onnx_and_transformers_are_written_where_the_folder_would_be(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="`export` is not installed")
    pytest.importorskip("transformers", reason="the extra `export` is not installed")
    run, built = make_run(tmp_path / "run", "hpm")
    said: list[str] = []
    how: dict[str, Any] = {"what": "encoder", "say": said.append}
    file = export_run(run.path, None, weights="teacher", to="onnx", **how)
    folder = export_run(run.path, None, weights="student", to="transformers", **how)
    assert (file, folder) == (run.path / "export.onnx", run.export_dir)
    assert ["onnxruntime" in said[0], "transformers" in said[1], len(said)] == [True, True, 2]
    images = torch.randn(2, 3, 32, 32)
    (found,) = onnxruntime.InferenceSession(file).run(None, {"images": images.numpy()})
    teacher = built.eval().get_submodule("teacher").get_submodule("encoder")
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), teacher(images), rtol=1e-4, atol=1e-5)
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert equal(opened.state_dict(), built.encoder.state_dict())

"""What does not fit together is told before data are read, all of it in one message; batches are
fitted to the data.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from patchmine.cli.app import app
from patchmine.config.missing import missing_files
from patchmine.config.recipes import list_recipes
from patchmine.config.resolve import fit_batch, from_settings, parse, resolve_size
from patchmine.errors import UserError
from patchmine.methods import METHODS
from patchmine.runs.checking import checks_of, misfits
from patchmine.runs.folder import RunFolder

RECIPES = [recipe.name for recipe in list_recipes()]
TINY = [
    "model=vit_tiny_patch16_224",
    "model_args.depth=1",
    "image_size=32",
    "workers=0",
    "device=cpu",
]


def complaint(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(None, words, also=(missing_files, misfits))
    return str(caught.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits(recipe: str) -> None:
    start = {"model": "video_vit_base_patch16"} if recipe.startswith("finetune-video") else {}
    words = ["data=x", "init=x"] if recipe == "adapt" else ["data=x"]
    config = parse(recipe, words, base=start)  # which the run to start from says
    look = checks_of(config.kind)[1]
    rows = [
        resolve_size(config, row.up_to or 10**9, on=row.device or "cuda") for row in config.by_size
    ] or [config]
    for sized in rows if len(rows) == 1 else (rows[0], rows[-1]):
        assert look(sized) == []


@pytest.mark.parametrize("method", METHODS)
def test_looking_at_a_method_takes_no_memory_and_draws_nothing(method: str) -> None:
    before = torch.get_rng_state()
    config = from_settings(data="x", method=method, model="vit_base_patch16_224", out="x")
    assert misfits(config) == []
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["model=vit_smal_patch16_224"],
            ["model='vit_smal_patch16_224' is no architecture", "vit_small_patch16_224"],
        ),
        (["model=resnet18"], ["method=mae hides patches, which a ResNet does not have"]),
        (["model=mixer_b16_224"], ["plain vision transformer"]),
        (["model=swin_tiny_patch4_window7_224"], ["method=mae hides patches, which a Swin"]),
        (["model=video_vit_small_patch16", "method=amt"], ["method=amt does not train on videos"]),
        (["model_args.num_heads=7"], ["model_args"]),
        (["model_args.num_heads=0"], ["model_args"]),
        (["model_args.act_layer=foo"], ["model_args"]),
        (
            ["model_args.checkpoint_path=x.pth"],
            ["checkpoint_path would make timm read or download other weights"],
        ),
        (
            ["model_args.pretrained=true"],
            ["pretrained would make timm read or download other weights"],
        ),
        (["model_args.nonsense=1"], ["nonsense", "model_args"]),
        (["patch_size=32", "image_size=32"], ["method.mask_ratio=0.75 leaves no patch visible"]),
        (["method.mask_ratio=1e-300"], ["method.mask_ratio=1e-300 hides none of 196 patches"]),
        (
            ["method.mask_ratio=1e-3", "model=video_vit_small_patch16"],
            ["method.mask_ratio=0.001 hides none of 196"],
        ),
        (
            ["method=hpm", "method.mask_ratio=1e-3", "model=video_vit_small_patch16"],
            ["hides none of 196 patches"],
        ),
        (
            ["method.decoder_num_heads=7"],
            ["method.decoder_num_heads=7", "try method.decoder_embed_dim="],
        ),
        (["method=mokd", "method.partner_model=resnet5"], ["resnet5", "resnet50"]),
        (["method=hpm", "method.target=dino"], ["method.target_file"]),
        (
            [
                "method=mokd",
                "model=resnet50",
                "method.partner_model=vit_small_patch16_224",
                "crops.local_size=90",
            ],
            ["crops.local_size"],
        ),
        (["init=nowhere.pth"], ["init: given 'nowhere.pth'; there is no such run, export or file"]),
        (
            ["eval_every=1", "eval_data=nowhere"],
            ["eval_data: given 'nowhere'; there is no such file or folder"],
        ),
        (
            ["eval_every=1", "eval_data=embedded:photos", "eval_test=nowhere"],
            ["eval_test: given 'nowhere'"],
        ),
        (
            ["model_args.depth=8", "model_args.embed_dim=65536", "model_args.num_heads=64"],
            ["GiB of memory"],
        ),
    ],
)
def test_what_does_not_fit_is_one_message(
    words: list[str], parts: list[str], tmp_path: Path
) -> None:
    text = complaint(f"data={tmp_path}", *words)
    assert all(part in text for part in parts), text
    assert len(text.splitlines()) == 1


def test_the_model_that_was_refused_is_not_proposed(tmp_path: Path) -> None:
    data = f"data={tmp_path}"
    assert complaint(data, "model_args.num_heads=7").endswith("check model_args")
    assert complaint(data, "model_args.num_heads=7", "model=vit_tiny_patch16_224").endswith(
        "vit_small_patch16_224"
    )


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device=cuda, but torch sees no GPU: give device=cpu" in complaint(
        "data=embedded:photos", "device=cuda"
    )


def test_all_mistakes_stand_in_one_message() -> None:
    text = complaint(
        *(
            "data=nowhere",
            "model=vit_smal_patch16_224",
            "method.decoder_num_heads=7",
            "init=gone",
            "epoch=3",
        ),
        *("eval_every=2", "eval_data=lost", "blr=fast", "flip=3"),
    )
    assert text.startswith("6 errors in the settings:")
    assert "data: given 'nowhere'" in text
    assert "init: given 'gone'" in text
    for part in (
        "epoch: no such setting",
        "eval_data: given 'lost'",
        "blr: given 'fast'",
        "flip: given 3",
    ):
        assert part in text


def test_what_needs_torch_is_told_once_the_settings_are_right(tmp_path: Path) -> None:
    words = ["model=vit_smal_patch16_224", "method.decoder_num_heads=7"]
    text = complaint(f"data={tmp_path}", *words)
    assert text.startswith("2 errors in the settings:")
    assert "vit_small_patch16_224" in text
    assert "method.decoder_num_heads=7" in text
    assert "vit_small" not in complaint("data=nowhere", *words)


def test_a_missing_folder_names_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert f"did you mean {tmp_path / 'photos'}?" in complaint(f"data={tmp_path / 'photo'}")


def test_a_row_of_a_recipe_is_looked_at_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "data: x\nby_size:\n  - {up_to: null, use: {model: vit_smal_patch16_224}}\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError, match="vit_small_patch16_224"):
        parse(file, [f"data={tmp_path}"], also=(missing_files, misfits))


def test_no_data_are_opened_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("data were opened")

    monkeypatch.setattr("patchmine.runs.preparing.open_data", opened)
    (tmp_path / "data").mkdir()
    words = [f"data={tmp_path / 'data'}", f"out={tmp_path / 'x'}", "model=vit_smal_patch16"]
    result = CliRunner().invoke(app, ["pretrain", *words])
    assert result.exit_code == 2
    assert "vit_small_patch16" in result.stderr
    assert not (tmp_path / "x").exists()


def test_what_only_real_tensors_allow_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_values(_: object) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr("patchmine.runs.folder.build_method", needs_values)
    assert misfits(from_settings(data="x")) == []


# The batch


def test_a_batch_that_nobody_chose_is_lowered_to_the_data() -> None:
    said: list[str] = []
    assert fit_batch(parse(None, ["data=x"]), 7, "images of data=x", said.append).batch_size == 7
    assert said == ["batch_size=256 is more than the 7 images of data=x: it is lowered to 7."]
    assert fit_batch(parse(None, ["data=x"]), 256, "images").batch_size == 256
    config = parse(None, ["data=x", "accumulate=2", "devices=2"])
    assert fit_batch(config, 11, "images").batch_size == 8
    video = ["data=x", "model=video_vit_small_patch16", "clip.repeats=4", "accumulate=2"]
    assert fit_batch(parse(None, video), 5 * 4, "clips").batch_size == 16


def test_a_batch_that_nobody_chose_is_shared_out(tmp_path: Path) -> None:
    said: list[str] = []
    config = parse(None, ["data=x", "devices=3", "accumulate=2"], said.append)
    assert config.batch_size == 252
    assert said == [
        "batch_size=256 is changed to 252, a multiple of the 6 parts that a batch is cut into."
    ]
    assert fit_batch(config, 13, "images").batch_size == 12
    assert parse(None, ["data=x", "accumulate=300"]).batch_size == 300
    assert resolve_size(parse("my-images", ["data=x", "devices=3"]), 500).batch_size == 63
    assert parse("cifar10-tiny", ["data=x", "devices=3"]).batch_size % 3 == 0
    video = parse(None, ["data=x", "model=video_vit_small_patch16", "clip.repeats=3"])
    assert video.batch_size == 255
    (tmp_path / "mine.yaml").write_text("data: x\nbatch_size: 64\n", encoding="utf-8")
    with pytest.raises(UserError, match="must be a multiple of 3"):
        parse(tmp_path / "mine.yaml", ["devices=3"])
    with pytest.raises(UserError, match="must be a multiple of 3"):
        parse("my-images", ["data=x", "devices=3", "batch_size=64"])


def test_a_batch_that_was_chosen_is_refused_with_one_that_fits(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"batch_size=64 is more than the 10 images: set batch_size=8 or lower"
    ):
        fit_batch(parse(None, ["data=x", "batch_size=64", "accumulate=4"]), 10, "images")
    (tmp_path / "mine.yaml").write_text("data: x\nbatch_size: 64\n", encoding="utf-8")
    with pytest.raises(UserError, match="set batch_size=10 or lower"):
        fit_batch(parse(tmp_path / "mine.yaml", []), 10, "images")
    with pytest.raises(UserError, match="set batch_size=10 or lower"):
        fit_batch(from_settings(data="x", batch_size=64), 10, "images")
    with pytest.raises(
        UserError,
        match=r"fewer than the 8 parts of a batch \(accumulate=8 \* devices=1 \* num_nodes=1\)",
    ):
        fit_batch(parse(None, ["data=x", "accumulate=8"]), 7, "images")


def test_a_recipes_batch_is_advice_and_the_users_is_not() -> None:
    said: list[str] = []
    for words in ([], ["epochs=3"]):
        config = resolve_size(parse("my-images", ["data=x", *words]), 7)
        assert fit_batch(config, 7, "images", said.append).batch_size == 7
    assert "batch_size=64 is more than the 7 images: it is lowered to 7." in said
    assert fit_batch(parse("cifar10-tiny", ["data=x"]), 50, "images").batch_size == 50
    mine = resolve_size(parse("my-images", ["data=x", "batch_size=32"]), 7)
    with pytest.raises(UserError, match="set batch_size=7 or lower"):
        fit_batch(mine, 7, "images")


@pytest.mark.slow
def test_my_images_trains_on_seven_and_resumes(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "seven").mkdir()
    for path in sorted(image_folder.rglob("*.jpg"))[:7]:
        shutil.copy(path, tmp_path / "seven" / f"{path.parent.name}-{path.name}")
    out = tmp_path / "run"
    words = [
        "my-images",
        f"data={tmp_path / 'seven'}",
        f"out={out}",
        *TINY,
        "steps=2",
        "tensorboard=false",
        "method.decoder_depth=1",
    ]
    result = CliRunner().invoke(app, ["pretrain", *words])
    assert result.exit_code == 0, result.output
    assert "batch_size=64 is more than the 7 images" in result.stderr
    assert RunFolder(out).config.batch_size == 7
    assert CliRunner().invoke(app, ["resume", str(out)]).exit_code == 0
    assert RunFolder(out).config.batch_size == 7

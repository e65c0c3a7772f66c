"""The recipes that come with patchmine: complete heads, settings that are valid for every method
they serve.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from patchmine.config.recipes import ABOUT, list_recipes, load_recipe, recipe_names
from patchmine.config.resolve import parse, resolve_size, start_of
from patchmine.config.schema import DetectConfig, FinetuneConfig, PretrainConfig, SegmentConfig
from patchmine.errors import UserError
from patchmine.methods import METHODS
from patchmine.ops.schedules import learning_rate
from patchmine.runs.folder import build_method
from patchmine.train.optim import schedule_of
from patchmine.types import Progress

TINY = {"cifar10-tiny", "cifar10-tiny-samples", "photos-demo"}
PUBLISHED = {"mae-vit-b-imagenet", "mae-vit-l-imagenet", "hpm-vit-b-imagenet", "hpm-vit-l-imagenet"}
VIDEO = {  # encoder, epochs, frames between two that are taken, decoder's width and heads
    "video-vit-s-kinetics400": ("video_vit_small_patch16", 1600, 4, 192, 3),
    "video-vit-b-kinetics400": ("video_vit_base_patch16", 800, 4, 384, 6),
    "video-vit-b-ssv2": ("video_vit_base_patch16", 800, 2, 384, 6),
}
ALL = {recipe.name: recipe for recipe in list_recipes()}
FINETUNE = {name: each for name, each in ALL.items() if each.settings.get("kind") == "classify"}
TAUGHT = {"classify": "finetune", "segment": "segment", "detect": "detect"}  # their commands
SEGMENT = {name: each for name, each in ALL.items() if each.settings.get("kind") == "segment"}
DETECT = {name: each for name, each in ALL.items() if each.settings.get("kind") == "detect"}
RECIPES = {name: each for name, each in ALL.items() if each.settings.get("kind") not in TAUGHT}
ROWS = [(recipe.name, method) for recipe in RECIPES.values() for method in recipe.method_names]


def test_all_promised_recipes_are_there() -> None:
    assert set(recipe_names()) >= (
        TINY | PUBLISHED | set(VIDEO) | {"adapt", "my-images", "moving-photos"}
    )


@pytest.mark.parametrize("name", ALL)
def test_the_head_states_what_a_reader_needs(name: str) -> None:
    about = ALL[name].about
    assert set(about) == set(ABOUT)
    assert all(about.values())
    command = TAUGHT.get(ALL[name].settings.get("kind", ""))
    if command is not None:
        assert about["command"].startswith(f"patchmine {command} runs/")
        assert f" recipe={name}" in about["command"]
    else:
        assert about["command"].startswith(f"patchmine pretrain {name} ")


@pytest.mark.parametrize("name", FINETUNE)
def test_the_command_of_fine_tuning_parses(name: str) -> None:
    words = [word for word in ALL[name].about["command"].split()[3:] if "recipe=" not in word]
    config = parse(name, words, base={"kind": "classify"})
    assert isinstance(config, FinetuneConfig)
    sized = resolve_size(config, 300)
    assert sized.epochs == (200 if name == "small-labels" else config.epochs)
    assert (sized.weight_decay, sized.betas) == (0.05, (0.9, 0.999))


# Epochs, batch, rate for 256 images, layer decay, drop path, warm-up: the specs' sections 6.
TUNED = {
    "finetune-mae-vit-b": (100, 1024, 5e-4, 0.65, 0.1, 5),
    "finetune-mae-vit-l": (50, 1024, 1e-3, 0.75, 0.2, 5),
    "finetune-mae-vit-h": (50, 1024, 1e-3, 0.75, 0.3, 5),
    "finetune-hpm-vit-b": (100, 384, 5e-4, 0.8, 0.1, 5),
    "finetune-hpm-vit-l": (50, 512, 5e-4, 0.8, 0.1, 5),
    "finetune-droppos-vit-b": (100, 1024, 1e-3, 0.75, 0.1, 5),
    "finetune-droppos-vit-l": (50, 1024, 1e-3, 0.75, 0.1, 5),
    "finetune-semaim-vit-b": (100, 1024, 5e-4, 0.65, 0.1, 20),
    "finetune-simmim-vit-b": (100, 2048, 6.25e-4, 0.65, 0.1, 20),
    "finetune-amt-vit-b": (100, 1024, 1e-3, 0.75, 0.1, 5),
    "finetune-videomae-vit-b-kinetics400": (100, 512, 1e-3, 0.75, 0.1, 5),
}


@pytest.mark.parametrize("name", TUNED)
def test_published_fine_tuning_holds_the_published_numbers(name: str) -> None:
    config = parse(name, ["data=x"])
    assert isinstance(config, FinetuneConfig)
    names = ("epochs", "batch_size", "blr", "layer_decay", "drop_path", "warmup_epochs")
    assert tuple(getattr(config, each) for each in names) == TUNED[name]
    assert (config.mixup, config.cutmix, config.erase_prob) == (0.8, 1.0, 0.25)
    assert config.positions == ("frozen" if "droppos" in name else "learned")


@pytest.mark.parametrize("name", SEGMENT)
def test_the_command_of_segmentation_parses(name: str) -> None:
    words = [word for word in ALL[name].about["command"].split()[3:] if "recipe=" not in word]
    config = parse(name, words, base={"kind": "segment"})
    assert isinstance(config, SegmentConfig)


def test_segmentation_on_ade20k_holds_the_published_numbers() -> None:
    config = parse("segment-mae-vit-b-ade20k", ["data=x"])
    assert isinstance(config, SegmentConfig)
    assert (config.image_size, config.short_side, config.test_stride) == ((512, 512), 512, 256)
    assert (config.head, config.head_width, config.aux_weight) == ("upernet", 768, 0.4)
    assert (config.layer_decay, config.drop_path, config.weight_decay) == (0.65, 0.1, 0.05)
    assert (config.batch_size, config.steps) == (16, 160_000)
    # ADE20K's 20,210 images; mmengine's LinearLR over 1,500 steps, then PolyLR of power 1.
    expected = {0: 1e-10, 750: 5e-5, 1500: 1e-4, 80_750: 5e-5, 159_999: 1e-4 / 158_500}
    for step, rate in expected.items():
        now = Progress(step, 160_000, 20_210 // 16)
        peak = config.blr * config.batch_size / 256
        assert learning_rate(now, peak, schedule_of(config)) == pytest.approx(rate, rel=1e-4)
    assert [name for name in config.palette if name != "ignore"] == [
        str(number) for number in range(1, 151)
    ]


@pytest.mark.parametrize("name", DETECT)
def test_the_command_of_detection_parses(name: str) -> None:
    words = [word for word in ALL[name].about["command"].split()[3:] if "recipe=" not in word]
    assert isinstance(parse(name, words, base={"kind": "detect"}), DetectConfig)


@pytest.mark.parametrize(("size", "decay", "drop"), [("b", 0.7, 0.1), ("l", 0.8, 0.4)])
def test_detection_on_coco_holds_the_published_numbers(
    size: str, decay: float, drop: float
) -> None:
    config = parse(f"detect-vitdet-vit-{size}-coco", ["data=x"])
    assert isinstance(config, DetectConfig)
    assert (config.image_size, config.scale, config.window) == ((1024, 1024), (0.1, 2.0), 14)
    assert (config.batch_size, config.steps, config.weight_decay) == (64, 184_375, 0.1)
    assert (config.layer_decay, config.drop_path, config.head) == (decay, drop, "vitdet")
    # COCO's 118,287 images; detectron2's warm-up over 250 steps, then cuts at two of them.
    expected = {0: 1e-7, 250: 1e-4, 163_888: 1e-4, 163_890: 1e-5, 177_545: 1e-5, 177_547: 1e-6}
    for step, rate in expected.items():
        now = Progress(step, 184_375, 118_287 // 64)
        peak = config.blr * config.batch_size / 256
        assert learning_rate(now, peak, schedule_of(config)) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(("name", "method"), ROWS)
def test_the_command_in_the_head_and_every_method_parse(name: str, method: str) -> None:
    words = RECIPES[name].about["command"].split()[3:]
    assert parse(name, [*words, f"method={method}"]).method.name == method


@pytest.mark.parametrize("name", sorted(TINY | {"adapt", "my-images"}))
def test_small_recipes_serve_every_method(name: str) -> None:
    assert set(RECIPES[name].method_names) == set(METHODS)


@pytest.mark.parametrize(("name", "method"), [row for row in ROWS if row[0] in TINY])
def test_tiny_recipes_can_be_built(name: str, method: str) -> None:
    built = build_method(parse(name, ["data=x", f"method={method}"]))
    assert sum(p.numel() for p in built.encoder.parameters()) < 2e6


@pytest.mark.parametrize(
    ("name", "epochs", "batch"),
    [(n, 1600, 4096) if "mae" in n else (n, 800, 2048) for n in sorted(PUBLISHED)],
)
def test_published_recipes_hold_the_published_numbers(name: str, epochs: int, batch: int) -> None:
    config = parse(name, ["data=x"])
    assert (config.epochs, config.batch_size, config.warmup_epochs) == (epochs, batch, 40)
    assert (config.blr, config.weight_decay, config.betas, config.min_lr) == (
        1.5e-4,
        0.05,
        (0.9, 0.95),
        0,
    )
    assert (config.image_size, config.crop_scale, config.flip) == ((224, 224), (0.2, 1.0), 0.5)
    method = config.method.model_dump()
    assert method["norm_pix_loss"] is (method["name"] == "mae")
    assert method["clip_grad"] == (None if method["name"] == "mae" else 5.0)
    decoder = (method["decoder_embed_dim"], method["decoder_depth"], method["decoder_num_heads"])
    assert (method["mask_ratio"], *decoder) == (0.75, 512, 8, 16)


# The rate at these epochs, from the authors' schedulers: microsoft/SimMIM, lr_scheduler.py with its
# 800-epoch setting; timm's CosineLRScheduler(t_initial=200, lr_min=2e-5, warmup_t=10,
# warmup_lr_init=2e-6) for AMT on SimMIM.
RATES = {
    "simmim-vit-b-imagenet": {
        0: 2e-6,
        5: 2.01e-4,
        10: 4e-4,
        400: 4e-4,
        699: 4e-4,
        700: 4e-5,
        799: 4e-5,
    },
    "amt-simmim-vit-b-imagenet": {
        0: 2e-6,
        5: 2.01e-4,
        10: 3.976608417e-4,
        100: 2.1e-4,
        150: 7.564971157e-5,
    },
}


@pytest.mark.parametrize("name", RATES)
def test_rates_are_those_of_the_published_schedulers(name: str) -> None:
    config = parse(name, ["data=x"])
    assert config.epochs is not None
    for epoch, expected in RATES[name].items():
        now = Progress(epoch * 625, config.epochs * 625, 625)
        assert learning_rate(
            now, config.blr * config.batch_size / 256, schedule_of(config)
        ) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["droppos-vit-b-imagenet", "droppos-vit-l-imagenet"])
def test_droppos_as_published_has_the_published_grid_of_targets(name: str) -> None:
    assert parse(name, ["data=x"]).method.model_dump()["smoothing_grid"] == "as_run"


@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.parametrize("method", ["mae", "hpm"])
def test_recipes_of_videos_hold_what_is_published_for_videomae(name: str, method: str) -> None:
    config = parse(name, ["data=x", f"method={method}"])
    model, epochs, stride, width, heads = VIDEO[name]
    assert (config.model, config.epochs, config.batch_size, config.warmup_epochs) == (
        model,
        epochs,
        2048,
        40,
    )
    assert (config.blr, config.weight_decay, config.betas) == (1.5e-4, 0.05, (0.9, 0.95))
    assert config.min_lr == pytest.approx(1e-5 * config.batch_size / 256)
    assert (config.clip.frames, config.clip.stride, config.clip.tubelet, config.clip.repeats) == (
        16,
        stride,
        2,
        1,
    )
    assert (config.clip.short, config.clip.scales, config.flip) == (
        "hold",
        [1.0, 0.875, 0.75, 0.66],
        0,
    )
    settings = config.method.model_dump()
    decoder = (
        settings["decoder_embed_dim"],
        settings["decoder_depth"],
        settings["decoder_num_heads"],
    )
    assert (settings["mask_ratio"], settings["norm_pix_loss"], settings["clip_grad"]) == (
        0.9,
        True,
        None,
    )
    assert decoder == (width, 4, heads)


@pytest.mark.parametrize("method", ["mae", "hpm"])
def test_moving_photos_can_be_built(method: str) -> None:
    config = parse("moving-photos", [f"method={method}"])
    assert (config.clip.frames, config.clip.stride, config.image_size, config.flip) == (
        8,
        2,
        (32, 32),
        0,
    )
    built = build_method(config)
    assert "video" in built.config.families
    assert sum(p.numel() for p in built.encoder.parameters()) < 2e6


@pytest.mark.parametrize("method", METHODS)
def test_equal_samples_and_equal_compute_differ_in_length_only(method: str) -> None:
    compute, samples = (
        parse(name, ["data=x", f"method={method}"]).model_dump(exclude={"epochs", "warmup_epochs"})
        for name in ("cifar10-tiny", "cifar10-tiny-samples")
    )
    assert compute == samples
    assert parse("cifar10-tiny-samples", ["data=x", f"method={method}"]).epochs == 10


def test_my_images_chooses_more_for_more_images() -> None:
    config = parse("my-images", ["data=x"])
    sized = [resolve_size(config, count) for count in (500, 10_000, 100_000, 1_000_000, 50_000_000)]
    epochs = [each.epochs for each in sized]
    assert epochs == sorted(epochs, reverse=True)  # type: ignore[type-var]
    assert [each.batch_size for each in sized] == sorted(each.batch_size for each in sized)
    assert all(
        each.batch_size * 4 <= count
        for each, count in zip(sized, (500, 10_000, 100_000), strict=False)
    )


def test_my_images_are_fewer_pixels_on_a_cpu_however_many_they_are() -> None:
    config = parse("my-images", ["data=x"])
    for count in (100, 4_000, 1_000_000):
        slow, fast = (resolve_size(config, count, on=on) for on in ("cpu", "cuda"))
        assert slow.image_size < fast.image_size
        assert slow.epochs < fast.epochs  # type: ignore[operator]


def test_adaptation_is_short_and_bounded_whatever_the_number_of_images() -> None:
    config = parse("adapt", ["data=x", "init=y"])
    assert isinstance(config, PretrainConfig)
    assert (config.trainable, config.layer_decay, config.ema_decay) == ("last:25%", 0.75, 0.999)
    for count in (300, 2_000, 20_000, 200_000, 2_000_000):
        sized = resolve_size(config, count)
        assert sized.epochs is not None
        assert sized.warmup_epochs <= 0.05 * sized.epochs
        assert 1_500 < sized.epochs * count / sized.batch_size < 40_000


def test_adaptation_needs_weights() -> None:
    with pytest.raises(UserError, match=r"^Error in .*: init: not given; this recipe goes on from"):
        parse("adapt", ["data=x"])


def test_my_images_with_weights_is_adaptation() -> None:
    heard: list[str] = []
    words = ["data=x", "init=y", "method=hpm", "epochs=7", "layer_decay=0.9"]
    assert parse("my-images", words, heard.append) == parse("adapt", words)
    assert "With init= the recipe my-images is adapt." in heard
    own = resolve_size(parse("my-images", words), 300)
    assert isinstance(own, PretrainConfig)
    assert (own.epochs, own.layer_decay, own.trainable) == (7, 0.9, "last:25%")
    without = parse("my-images", ["data=x"])
    assert isinstance(without, PretrainConfig)
    assert (without.layer_decay, without.ema_decay, without.freeze_encoder) == (None, None, 0)


def test_a_model_that_is_named_anywhere_is_not_that_of_the_weights(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.touch()
    given = {"data": "x", "init": weights}
    for recipe in (None, "adapt", "my-images"):
        assert start_of(recipe, given) == str(weights)
        assert start_of(recipe, {**given, "model": "vit_base_patch16_224"}) is None
    assert start_of("cifar10-tiny", given) is None
    assert start_of(None, {"data": "x"}) is None
    assert start_of("adapt", {"init": tmp_path / "absent"}) is None


def test_a_misspelt_recipe_names_the_nearest() -> None:
    with pytest.raises(
        UserError, match="No recipe 'cifar-tiny', and no such file; did you mean cifar10-tiny"
    ):
        load_recipe("cifar-tiny")
    with pytest.raises(
        UserError,
        match="there are my-images, adapt, amt-simmim-vit-b-imagenet, amt-vit-b-imagenet, cifar10",
    ):
        load_recipe("xyz")


def test_a_folder_is_no_recipe_and_the_message_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images are data=.*`patchmine resume"):
        load_recipe(tmp_path)


def test_a_file_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: photos\nblr: 1e-3\n", encoding="utf-8")
    config = parse(path, [])
    assert (config.data, config.blr) == ("photos", 1e-3)

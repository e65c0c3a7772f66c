"""Settings: every way of giving them ends in the same model, every mistake is told, and told in one
message.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from patchmine.config.describe import describe_method, describe_run
from patchmine.config.explain import nearest
from patchmine.config.overrides import parse_value, put, split_setting
from patchmine.config.resolve import changed_results, from_settings, parse, resolve_size, results_of
from patchmine.config.schema import PretrainConfig, names_of, names_of_a_machine
from patchmine.errors import UserError
from patchmine.methods import METHODS
from patchmine.models.settings import MethodSettings
from patchmine.strict import seconds_in


def complaint(*words: str, recipe: str | Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        parse(recipe, words)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        ("-3", -3),
        ("1_000", 1000),
        (".5", 0.5),
        ("0x10", 16),
        ("true", True),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("007", "007"),
        ("2024-05-01", "2024-05-01"),
        ("12:30:45", "12:30:45"),
        ("[1, 2e-3]", [1, 2e-3]),
        ("{depth: 4}", {"depth": 4}),
        ("embedded:photos", "embedded:photos"),
        ("*.tar", "*.tar"),
        ("a: b", "a: b"),
        ("dir #1/x", "dir #1/x"),
        ("{a,b}/*.tar", "{a,b}/*.tar"),
        ("s-{000..099}.tar", "s-{000..099}.tar"),
        ("[broken", "[broken"),
    ],
)
def test_values_mean_what_people_expect(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_every_number_that_python_prints_is_read_back(number: float) -> None:
    assert parse_value(repr(number)) == number


def test_a_path_with_an_equals_sign_is_no_setting() -> None:
    assert split_setting("./a=b.jpg") is None
    assert split_setting("data=a=b/c") == ("data", "a=b/c")
    assert split_setting("checkpoint-every=5") == ("checkpoint_every", 5)


def test_put_does_not_go_through_a_value() -> None:
    tree = {"a": 1}
    assert "no parts" in str(put(tree, "a.b", 2))
    assert tree == {"a": 1}


def test_nearest_finds_nested_names_by_their_last_part() -> None:
    assert nearest("mask_ratoi", ["epochs", "method.mask_ratio"]) == ["method.mask_ratio"]
    assert nearest("xyz", ["epochs"]) == []


# From words to settings


def test_words_arrive_typed_and_nested() -> None:
    words = [
        "data=photos",
        "method=hpm",
        "method.mask_ratio=0.8",
        "blr=1e-4",
        "image_size=[64,32]",
        "out=2024",
    ]
    config = parse(None, [*words, "model_args.depth=4", "model_args.num_heads=2"])
    assert (config.method.name, config.method.mask_ratio) == ("hpm", 0.8)
    assert (config.blr, config.image_size, config.out) == (1e-4, (64, 32), "2024")
    assert config.model_args == {"depth": 4, "num_heads": 2}


def test_short_and_long_method_mean_the_same_in_any_order() -> None:
    short = parse(None, ["data=x", "method.mask_ratio=0.6", "method=hpm"])
    long = parse(None, ["data=x", "method.name=hpm", "method.mask_ratio=0.6"])
    table = parse(None, ["data=x", "method={name: hpm, mask_ratio: 0.6}"])
    assert short == long == table


def test_python_and_words_give_the_same_run() -> None:
    words = parse(
        None,
        ["data=[a,b]", "method=hpm", "method.alpha_end=0.3", "betas=[0.9,0.99]", "image_size=64"],
    )
    python = from_settings(
        data=[Path("a"), "b"],
        method="hpm",
        betas=(0.9, 0.99),
        image_size=64,
        **{"method.alpha_end": 0.3},
    )
    settings = METHODS["hpm"](alpha_end=0.3)  # type: ignore[attr-defined]
    assert (
        words
        == python
        == from_settings(data=["a", "b"], method=settings, betas=[0.9, 0.99], image_size=64)
    )


def test_statistics_are_imagenets_for_three_channels_and_unknown_otherwise() -> None:
    assert from_settings(data="x").mean == [0.485, 0.456, 0.406]
    assert from_settings(data="x", mean=None).std == [0.229, 0.224, 0.225]
    assert from_settings(data="x", channels=4).mean is None
    assert from_settings(data="x", channels=1, mean=[0.5], std=[0.2]).std == [0.2]


@pytest.mark.parametrize("method", METHODS)
def test_yaml_is_complete_and_reads_back_equal(method: str, tmp_path: Path) -> None:
    config = parse(
        None,
        [
            "data=[a,b]",
            f"method={method}",
            "blr=1e-6",
            "out=1e5",
            "channels=2",
            "model_args.depth=2",
        ],
    )
    text = config.to_yaml()
    assert parse(write(tmp_path, text), []) == config
    assert all(
        f"\n{name}:" in f"\n{text}" for name in set(PretrainConfig.model_fields) - {"by_size"}
    )


def test_every_setting_is_either_a_result_or_not() -> None:
    results, running = (names_of(PretrainConfig, decide_weights=decide) for decide in (True, False))
    assert not set(results) & set(running)
    assert {*results, *running, "by_size"} == set(PretrainConfig.model_fields)
    assert {"data", "method", "model", "batch_size", "seed", "precision", "init"} < set(results)
    assert {"out", "devices", "workers", "compile", "eval_every", "crop_pct"} < set(running)


def test_what_may_differ_between_machines_is_said_at_the_setting() -> None:
    of_a_machine = {"data", "out", "device", "devices", "num_nodes", "workers", "init"}
    assert names_of_a_machine() == of_a_machine | {
        "annotations",
        "cache",
        "eval_data",
        "eval_test",
        "monitor_data",
        "labels",
        "val",
        "test",
    }


def test_schema_names_every_setting_and_its_meaning() -> None:
    text = "\n".join(describe_run())
    for name, field in PretrainConfig.model_fields.items():
        if name == "by_size":
            continue
        assert f"\n{name}=" in text or f"\n{name}.*" in text
        assert str(field.description) in text
    assert "\ncrops.num_local=8 " in text
    assert "method.mask_ratio=0.75" in "\n".join(describe_method("hpm"))
    with pytest.raises(UserError, match="did you mean hpm"):
        describe_method("hmp")


# Mistakes


def test_one_message_lists_every_mistake_with_path_value_and_what_is_allowed() -> None:
    words = [
        "method=hpm",
        "method.mask_ratio=1.2",
        "method.mask_ratoi=0.5",
        "epoch=3",
        "batch_size=many",
        "workers=-1",
    ]
    text = complaint(
        *words, "precision=fp16", "betas=[0.9,1.2]", "image_size=big", "photos", "--lr=3"
    )
    for part in (
        "data: missing; give a folder",
        "method.mask_ratio: given 1.2; must be above 0 and below 1",
        "method.mask_ratoi: no such setting (given 0.5); did you mean method.mask_ratio?",
        "epoch: no such setting (given 3); did you mean epochs?",
        "batch_size: given 'many'; must be a whole number",
        "workers: given -1; must be",
        "precision: given 'fp16'; must be auto, fp32 or bf16",
        "betas[1]: given 1.2; must be less than 1",
        "image_size: given 'big'; must be one whole number or [height, width]",
        "photos: is no setting; settings are written key=value",
        "--lr=3: settings are written without dashes, as in lr=3",
    ):
        assert part in text
    assert text.startswith("11 errors in the settings:\n")
    assert len(text.splitlines()) == 12


def test_a_single_mistake_is_a_single_sentence() -> None:
    text = complaint("data=x", "method.mask_ratio=1.2")
    assert (
        text == "Error in the settings: method.mask_ratio: given 1.2; must be above 0 and below 1"
    )


def test_crops_that_cannot_be_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        parse(None, ["data=x", "crops.num_local=6", "crops.local_size=50"]).crops.local_size == 50
    )
    monkeypatch.setattr(METHODS["mae"], "multi_crop", True)
    assert (
        "crops.local_size: given 50; must be a multiple of 16, the patch of model vit_small"
        in complaint("data=x", "crops.local_size=50")
    )
    assert parse(None, ["data=x", "crops.local_size=50", "model=resnet18"]).crops.local_size == 50
    assert "crops.num_global: given 1; must be 2" in complaint("data=x", "crops.num_global=1")
    assert "crops.local_scale: given [0.5, 0.1]; must be [smallest" in complaint(
        "data=x", "crops.local_scale=[.5,.1]"
    )
    assert "did you mean crops.num_local" in complaint("data=x", "crops.num_locl=1")


def test_a_misspelt_method_does_not_hide_the_mistakes_in_its_settings() -> None:
    text = complaint("data=x", "method=hmp", "method.alpha_edn=3", "method.mask_ratio=7")
    assert (
        f"method.name: given 'hmp'; must be one of {', '.join(sorted(METHODS))}; did you mean hpm?"
        in text
    )
    assert "method.alpha_edn: no such setting (given 3); did you mean method.alpha_end" in text
    assert "method.mask_ratio: given 7; must be above 0 and below 1" in text


def test_a_setting_of_the_method_is_found_from_the_top() -> None:
    assert "did you mean method.mask_ratio or method.pos_mask_ratio" in complaint(
        "data=x", "mask_ratio=0.8"
    )


def test_an_unknown_name_that_resembles_nothing_says_where_all_are() -> None:
    assert "`patchmine config schema` lists all" in complaint("data=x", "zzzz=1")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["image_size=225"], "image_size: given 225x225; must be a multiple of 16"),
        (
            ["image_size=[224,30]", "patch_size=8"],
            "must be a multiple of 8, the patch of patch_size: try image_size=",
        ),
        (["batch_size=30", "accumulate=4"], "batch_size: given 30; must be a multiple of 4"),
        (["batch_size=32", "devices=3"], "try devices=2 or 4, or in a new run batch_size=33"),
        (["epochs=null"], "epochs: given null, and no steps either"),
        (["channels=4", "mean=[1,2]"], "std: given null while mean is set"),
        (
            ["channels=2", "mean=[1,2]", "std=[1,2,3]"],
            "std: given 3 numbers; must be one for each of channels=2",
        ),
        (["crop_scale=[0.5,0.2]"], "crop_scale: given [0.5, 0.2]; must be [smallest, largest]"),
        (["eval_every=2"], "eval_every: given 2, but eval_data is not set"),
        (["betas=[0.9]"], "betas: given [0.9]; must be a list with as many values as [0.9, 0.95]"),
        (
            ["image_size=[1,2,3]"],
            "image_size: given [1, 2, 3]; must be a list with as many values as [224, 224]",
        ),
        (["crop_scale=3"], "crop_scale: given 3; must be a list such as [0.2, 1.0]"),
        (["method=3"], "method: given 3; must be a method's name"),
        (["epochs.x=3", "data.x=1"], "data.x: no such setting; data is 'x' and has no parts"),
        (["epochs=2", "warmup_epochs=5"], "warmup_epochs: given 5; must be below epochs=2"),
        (
            ["lr_schedule=multi_step"],
            "lr_milestones: not given; lr_schedule=multi_step needs it, as in [0.875]",
        ),
        (["lr_milestones=[0.5]"], "lr_milestones: given [0.5]; of no use with lr_schedule=cosine"),
        (["lr_schedule=multi_step", "lr_milestones=[700]"], "lr_milestones"),
        (
            ["lr_schedule=multi_step", "lr_milestones=[0.7,0.5]"],
            "given [0.7, 0.5]; must rise, as in [0.5, 0.7]",
        ),
        (
            ["lr_schedule=constant", "min_lr=1e-5"],
            "min_lr: given 1e-05; of no use with lr_schedule=constant",
        ),
        (["warmup_lr=1"], "warmup_lr: given 1; must not be above the highest rate"),
        (["lr_schedule=step"], "lr_schedule: given 'step'; must be"),
        (["flip=2"], "flip: given 2; must be at least 0 and at most 1"),
        (["compile=maybe"], "compile: given 'maybe'; must be true or false"),
    ],
)
def test_mistakes(words: list[str], part: str) -> None:
    assert part in complaint("data=x", *words)


def test_mistakes_in_single_settings_do_not_hide_those_between_settings() -> None:
    text = complaint("epochs=many", "batch_size=30", "accumulate=4", "image_size=225")
    assert text.startswith("4 errors")
    assert "batch_size: given 30" in text
    assert "image_size: given 225x225" in text


def test_a_folder_where_settings_are_expected_is_offered_as_data(tmp_path: Path) -> None:
    assert f"as in data={tmp_path}" in complaint("data=x", str(tmp_path))


def test_python_gets_the_same_message() -> None:
    with pytest.raises(UserError, match="epoch: no such setting"):
        from_settings(data="x", epoch=3)
    with pytest.raises(ValueError, match="multiple of 16"):
        PretrainConfig(data="x", image_size=225)  # any way of building one is checked


# A method from elsewhere


class ToySettings(MethodSettings):
    """A method that is not in the package."""

    implementation: ClassVar[str] = "elsewhere:Toy"
    name: Literal["toy"] = "toy"
    sharpness: float = Field(0.5, gt=0, description="how sharp it looks")


def test_a_tenth_method_is_known_once_it_is_registered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "given 'toy'; must be one of amt" in complaint("data=x", "method=toy")
    monkeypatch.setitem(METHODS, "toy", ToySettings)
    config = parse(None, ["data=x", "method=toy", "method.sharpness=0.8"])
    assert config.method == ToySettings(sharpness=0.8)
    assert parse(write(tmp_path, config.to_yaml()), []) == config
    assert from_settings(data="x", method=ToySettings()).method == ToySettings()
    assert "must be above 0" in complaint("data=x", "method=toy", "method.sharpness=-1")
    assert "did you mean method.sharpness?" in complaint(
        "data=x", "method=toy", "method.sharpnes=1"
    )
    assert "it is one of method=toy" in complaint("data=x", "method.sharpness=1")
    assert "method.sharpness=0.5" in "\n".join(describe_run())


# Warm-up


def test_a_shortened_run_gets_a_shortened_warmup_and_hears_of_one_that_somebody_set(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    assert parse(None, ["data=x", "epochs=4"], said.append).warmup_epochs == pytest.approx(0.4)
    assert said == []
    path = write(tmp_path, "data: x\nepochs: 100\nwarmup_epochs: 20\n")
    assert parse(path, ["epochs=4"], said.append).warmup_epochs == pytest.approx(0.4)
    assert "warmup_epochs=20 is shortened to 0.4" in said[0]
    assert parse(None, ["data=x", "epochs=4", "warmup_epochs=3"]).warmup_epochs == 3
    assert parse(None, ["data=x", "steps=4"]).warmup_epochs == 10


def test_a_stored_warmup_is_never_touched(tmp_path: Path) -> None:
    config = parse(None, ["data=x", "epochs=4", "warmup_epochs=3"])
    assert parse(write(tmp_path, config.to_yaml()), ["workers=2"]).warmup_epochs == 3


# Recipes and overrides


RECIPE = """
about: {title: a test}
data: x
model: vit_tiny_patch16_224
model_args: {depth: 2}
epochs: 40
method: mae
methods:
  mae: {warmup_epochs: 4, method: {norm_pix_loss: false}}
  hpm: {epochs: 20, warmup_epochs: 2, method: {decoder_depth: 1}}
"""


def test_the_chosen_methods_row_is_used_and_words_come_last(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    mae, hpm = parse(path, []), parse(path, ["method=hpm", "warmup_epochs=1"])
    assert (mae.epochs, mae.warmup_epochs, mae.method.norm_pix_loss) == (40, 4, False)
    assert (hpm.epochs, hpm.warmup_epochs, hpm.method.decoder_depth) == (20, 1, 1)


def test_a_method_without_row_uses_its_defaults_and_says_so(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        RECIPE.replace("  hpm: {epochs: 20, warmup_epochs: 2, method: {decoder_depth: 1}}\n", ""),
    )
    said: list[str] = []
    config = parse(path, ["method=hpm"], said.append)
    assert config.method == METHODS["hpm"]()  # type: ignore[attr-defined]
    assert "no settings for method=hpm" in said[0]


def test_settings_of_a_nameless_method_are_for_the_wanted_one(tmp_path: Path) -> None:
    path, said = (
        write(tmp_path, "data: photos/\nout: run\nmethod: {decoder_depth: 3}\n"),
        list[str](),
    )
    config = parse(path, ["method=mae", "method.decoder_num_heads=4"], said.append)
    method = config.method  # type: ignore[attr-defined]
    assert (method.name, method.decoder_depth, method.decoder_num_heads) == ("mae", 3, 4)
    assert not said


def test_another_model_does_not_inherit_the_recipes_model_args(tmp_path: Path) -> None:
    said: list[str] = []
    config = parse(write(tmp_path, RECIPE), ["model=vit_base_patch16_224"], said.append)
    assert config.model_args == {}
    assert "model_args {'depth': 2} are not used" in said[0]
    assert parse(write(tmp_path, RECIPE), ["model=vit_tiny_patch16_224"]).model_args == {"depth": 2}


def test_mistakes_in_a_recipe_name_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, "data: x\nepoch: 3\n")
    assert f"Error in the settings (with {path}): epoch: no such setting" in complaint(recipe=path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "holds no settings"),
        ("a: [1\n", "is not valid YAML"),
        ("methods: [mae]\n", "methods must hold one table"),
        ("methods: {mae: 3}\n", "methods must hold one table"),
        ("by_size: 3\n", "by_size must be a list of rows"),
        ("about: 3\n", "about must be a table"),
        ("data: x\nby_size: [{upto: 3}]\n", "by_size"),
    ],
)
def test_a_broken_recipe_is_refused(text: str, part: str, tmp_path: Path) -> None:
    assert part in complaint(recipe=write(tmp_path, text))


# By size


BY_SIZE = """
data: x
warmup_epochs: 1
by_size:
  - up_to: 100
    use: {model: vit_tiny_patch16_224, model_args: {depth: 2}, epochs: 50, method: {mask_ratio: 0.6}}
  - {up_to: null, use: {model: vit_base_patch16_224, epochs: 10, batch_size: 1024}}
"""


def test_settings_follow_the_number_of_images_but_not_against_the_user(tmp_path: Path) -> None:
    path = write(tmp_path, BY_SIZE)
    said: list[str] = []
    small, large = (resolve_size(parse(path, []), count, said.append) for count in (100, 101))
    assert (small.model, small.epochs, small.method.mask_ratio, small.by_size) == (
        "vit_tiny_patch16_224",
        50,
        0.6,
        [],
    )
    assert (large.model, large.epochs, large.batch_size) == ("vit_base_patch16_224", 10, 1024)
    assert "101 images: model='vit_base_patch16_224'" in said[1]
    mine = resolve_size(
        parse(path, ["epochs=7", "model=vit_small_patch16_224", "method.mask_ratio=0.9"]), 100
    )
    assert (mine.model, mine.model_args, mine.epochs) == ("vit_small_patch16_224", {}, 7)
    assert mine.method.mask_ratio == 0.9


def test_a_row_of_one_device_is_for_runs_on_it(tmp_path: Path) -> None:
    row = "by_size:\n  - {up_to: 200, device: cpu, use: {image_size: 96, epochs: 20}}\n"
    config = parse(write(tmp_path, BY_SIZE.replace("by_size:\n", row)), [])
    said: list[str] = []
    cpu, cuda, many = (
        resolve_size(config, count, said.append, on)
        for count, on in ((100, "cpu"), (100, "cuda"), (201, "cpu"))
    )
    assert (cpu.image_size, cpu.epochs) == ((96, 96), 20)
    assert (cuda.image_size, cuda.epochs) == ((224, 224), 50)
    assert many.epochs == 10
    assert "100 images with device=cpu: image_size=96, epochs=20." in said
    own = parse(tmp_path / "recipe.yaml", ["image_size=64"])
    assert resolve_size(own, 100, on="cpu").image_size == (64, 64)


def test_without_rows_nothing_depends_on_the_number_of_images() -> None:
    config = parse(None, ["data=x"])
    assert resolve_size(config, 5) is config


def test_a_mistake_in_a_row_is_told_before_the_images_are_counted(tmp_path: Path) -> None:
    assert "epoch: no such setting" in complaint(
        recipe=write(tmp_path, BY_SIZE.replace("epochs: 10", "epoch: 10"))
    )


def test_a_count_that_no_row_covers_is_an_error(tmp_path: Path) -> None:
    config = parse(write(tmp_path, BY_SIZE.replace("up_to: null", "up_to: 200")), [])
    with pytest.raises(UserError, match="no row for 201 images"):
        resolve_size(config, 201)


# A budget of time


@pytest.mark.parametrize(
    ("span", "seconds"), [("30s", 30), ("10m", 600), ("1.5h", 5400), ("1d", 86_400)]
)
def test_a_budget_is_a_span_of_time(span: str, seconds: float) -> None:
    config = parse(None, ["data=x", f"budget={span}"])
    assert isinstance(config, PretrainConfig)
    assert config.budget == span
    assert seconds_in(span) == seconds


@pytest.mark.parametrize("span", ["10", "2 hours", "0s", "-1m", "1e3s", "h", "30000000000d"])
def test_what_is_no_span_of_time_is_refused_in_a_sentence(span: str) -> None:
    text = complaint("data=x", f"budget={span}")
    assert text.endswith("must be a span of time with its unit, as in 30s, 10m, 2h or 1d")
    assert "budget: given" in text
    assert "\n" not in text


@pytest.mark.parametrize("length", ["epochs=3", "steps=3"])
def test_a_budget_beside_another_length_is_refused(length: str) -> None:
    text = complaint("data=x", "budget=2h", length, recipe="my-images")
    name = length.split("=")[0]
    assert text.endswith(f"leave one of the two out, budget or {name}")
    assert "budget" in complaint("data=x", "budget=2h", "kind=classify")


# What a resumed run must keep


def changed(old: PretrainConfig, new: PretrainConfig) -> list[str]:
    return changed_results(results_of(old), results_of(new))


def test_changed_results_names_what_decides_weights_and_nothing_else() -> None:
    old = parse(None, ["data=x", "method=hpm"])
    new = parse(
        None,
        ["data=x", "method=hpm", "method.mask_ratio=0.8", "batch_size=64", "workers=3", "out=y"],
    )
    assert changed(old, new) == [
        "batch_size (was 256, now 64)",
        "method.mask_ratio (was 0.75, now 0.8)",
    ]
    assert changed(old, parse(None, ["data=x", "method=hpm", "compile=true", "device=cpu"])) == []
    other = changed(old, parse(None, ["data=x", "method=mae"]))
    assert "method.name (was 'hpm', now 'mae')" in other
    assert "method.alpha_end (was 0.5, now not set)" in other

"""Rows of by_size beside a user's choices: what is left of smaller settings for short budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from patchmine.config.resolve import parse, row_of, with_smaller
from patchmine.config.rows import rows_beside
from patchmine.config.schema import PretrainConfig
from patchmine.errors import UserError

SIZE = {"image_size": 64, "patch_size": 8}
NETWORK = {"model_args": {"depth": 6}}
CROPS = {"crops": {"local_size": 32}}
DECODER = {"method": {"decoder_depth": 1, "decoder_embed_dim": 128}}
SMALLER = {**SIZE, **NETWORK, **CROPS, **DECODER}


@pytest.mark.parametrize(
    ("wanted", "method", "left"),
    [
        ({}, "mae", {**SIZE, **NETWORK, **DECODER}),
        ({"method": "mae", "epochs": 3}, "mae", {**SIZE, **NETWORK, **DECODER}),
        ({"image_size": 96}, "mae", {**NETWORK, **DECODER}),
        ({"patch_size": 4}, "mae", {**NETWORK, **DECODER}),
        ({"model": "vit_small_patch16_224"}, "mae", DECODER),
        ({"model_args": {"depth": 3}}, "mae", DECODER),
        (
            {"method": {"decoder_depth": 3}},
            "mae",
            {**SIZE, **NETWORK, "method": {"decoder_embed_dim": 128}},
        ),
        ({}, "simmim", {**SIZE, **NETWORK}),  # which has no decoder
        ({}, "scfs", {**SIZE, **NETWORK, **CROPS}),
        ({"crops": {"local_size": 48}}, "scfs", NETWORK),
    ],
)
def test_what_the_user_chose_is_not_made_smaller(
    wanted: dict[str, Any], method: str, left: dict[str, Any]
) -> None:
    (row,) = rows_beside(wanted, [{"up_to": None, "use": {}, "smaller": [SMALLER]}], method)
    assert row["smaller"] == [left]


def test_smaller_settings_of_which_nothing_is_left_are_no_choice() -> None:
    rows = [{"up_to": None, "smaller": [SIZE, NETWORK]}]
    assert rows_beside({"image_size": 96}, rows, "mae")[0]["smaller"] == [NETWORK]
    assert rows_beside({"model": "resnet18"}, rows, "mae")[0]["smaller"] == []


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"smaller": [SIZE]}, "min_epochs: not given; smaller needs it"),
        ({"min_epochs": 5, "smaller": [{"imgae_size": 64}]}, "imgae_size"),
        ({"min_epochs": 5, "smaller": [{"method": {"decoder_dpeth": 1}}]}, "decoder_dpeth"),
        ({"min_epochs": 5, "smaller": 3}, "smaller"),
        ({"min_epochs": 5, "smaller": [3]}, "smaller"),
    ],
)
def test_a_mistake_in_smaller_settings_is_told_before_anything_is_timed(
    row: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"by_size": [{"up_to": None, "use": {}, **row}]}))
    with pytest.raises(UserError, match=complaint) as error:
        parse(path, ["data=x", "budget=1m"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("images", [100, 5_000, 50_000])
@pytest.mark.parametrize("method", ["mae", "hpm", "simmim", "scfs", "mokd", "semaim", "droppos"])
def test_my_images_has_smaller_settings_for_cpus_which_keep_64_patches(
    images: int, method: str
) -> None:
    config = parse("my-images", ["data=x", "budget=10m", f"method={method}"])
    row = row_of(config, images, "cpu")
    assert row is not None
    assert row.min_epochs == row.use["epochs"] // 2
    sized = with_smaller(config, row, "row")
    assert sized
    for each in sized:
        assert isinstance(each, PretrainConfig)
        assert each.image_size[0] // (each.patch_size or 16) >= 8
        assert each.method.name == method
    on_gpu = row_of(config, images, "cuda")
    assert on_gpu is not None
    assert on_gpu.smaller == []

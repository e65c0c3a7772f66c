"""The step benchmark: it counts what it says it counts, and its contestants are of one size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from patchmine.bench import step as bench_module
from patchmine.bench.measure import count_flops, peak_bytes
from patchmine.bench.profile import KINDS, kind_of
from patchmine.bench.settings import BenchStepSettings
from patchmine.bench.step import bench_step, build_method, contestants
from patchmine.cli.commands import read_words
from patchmine.errors import UserError
from patchmine.models.onednn import onednn_linear, onednn_usable
from patchmine.train.engine import Engine

CPU = torch.device("cpu")
TINY: dict[str, Any] = dict(
    model="vit_tiny_patch16_224",
    model_args={"depth": 2, "embed_dim": 32, "num_heads": 2},
    image_size=32,
    patch_size=4,
    batch_size=2,
    device="cpu",
    rounds=2,
)
SMALL_DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}


def run(**settings: Any) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    return bench_step(say=lines.append, **{**TINY, **settings}), lines


def test_work_of_an_mae_step_is_that_of_the_formula() -> None:
    result, _ = run(method={"name": "mae", **SMALL_DECODER})
    images, patches, visible, width, narrow = 2, 64, 16, 32, 16

    def products(tokens: int, queries: int, width: int) -> int:
        """Multiply-adds of a block that answers for ``queries`` of its tokens."""
        attention = 2 * width * width * (tokens + queries) + 2 * tokens * queries * width
        return attention + 8 * width * width * queries

    embedding = visible * 48 * width
    encoder = 2 * products(visible + 1, visible + 1, width)
    narrowing = (visible + 1) * width * narrow
    masked = patches - visible
    decoder = products(patches + 1, patches + 1, narrow) + products(patches + 1, masked, narrow)
    head = masked * narrow * 48
    forward = embedding + encoder + narrowing + decoder + head
    # Backward costs twice the forward, but pixels need no gradient.
    expected = 2 * images * (3 * forward - embedding)
    assert result["contestants"][0]["gflop_per_step"] * 1e9 == pytest.approx(expected, rel=1e-3)


def test_a_method_that_starts_differently_is_timed_at_both_ends(tmp_path: Path) -> None:
    out = tmp_path / "new" / "step.json"
    result, lines = run(method={"name": "mae,hpm", **SMALL_DECODER}, out=out)
    rows = {row["name"]: row for row in result["contestants"]}
    assert list(rows) == ["mae", "hpm (mid-training)", "hpm (first step)"]
    assert rows["hpm (first step)"]["gflop_per_step"] < rows["hpm (mid-training)"]["gflop_per_step"]
    assert list(result["ratios"]) == ["hpm (mid-training) / mae", "hpm (first step) / mae"]
    assert all(len(row["ms_of_each_round"]) == 2 for row in rows.values())
    assert json.loads(out.read_text()) == result
    assert "method=mae,hpm method.decoder_embed_dim=16" in result["command"]
    text = "\n".join(lines)
    assert "GFLOP/step" in text
    assert "times as long as mae" in text


def test_a_profile_tells_where_the_time_goes() -> None:
    result, lines = run(method={"name": "mae", **SMALL_DECODER}, profile=True)
    (row,) = result["contestants"]
    shares = row["time_by_kind"]
    assert list(shares) == [*KINDS, "rest"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert all(shares[kind] > 0 for kind in KINDS)  # an MAE step has some of each
    head = next(line for line in lines if line.startswith("time in operators"))
    assert head.split()[3:] == list(shares)
    without, lines = run(method={"name": "mae", **SMALL_DECODER})
    assert "time_by_kind" not in without["contestants"][0]
    assert not any(line.startswith("time in operators") for line in lines)


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("aten::convolution_backward", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_softmax", "attention"),
        ("aten::copy_", "copies"),
        ("aten::_index_put_impl_", "copies"),
        ("aten::gelu_backward", "activation"),
        ("aten::native_layer_norm_backward", "norm"),
        ("aten::_fused_adamw_", "update"),
        ("aten::linalg_vector_norm", "update"),
        ("aten::add", "rest"),
        ("aten::norm_of_nothing", "rest"),
    ],
)
def test_operators_have_their_kind(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


def test_transformers_competes_at_the_same_size(script: Callable[[str], ModuleType]) -> None:
    pytest.importorskip("transformers")
    theirs = script("step_against").RIVALS["transformers"]
    result, _ = run(method={"name": "mae", **SMALL_DECODER}, rivals=theirs)
    ours, theirs = result["contestants"]
    assert theirs["name"] == "transformers"
    assert theirs["trained_parameters"] == ours["trained_parameters"]
    # Theirs embeds every patch and finishes the last decoder block for tokens that nobody reads.
    assert ours["gflop_per_step"] < theirs["gflop_per_step"] < 1.3 * ours["gflop_per_step"]
    assert list(result["ratios"]) == ["mae / transformers"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "hmp"}, ["method=hmp", "hpm"]),
        (
            {"method": {"name": "mae", "decoder_dept": 3}},
            ["method.decoder_dept=3", "decoder_depth"],
        ),
        ({"method": {"name": "mae", "mask_ratio": 1.2}}, ["mask_ratio", "1.2"]),
        ({"batch_sise": 3}, ["batch_sise", "batch_size"]),
        ({"model": "vit_smal_patch16_224"}, ["vit_smal_patch16_224", "vit_small_patch16_224"]),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        run(**settings)
    assert all(word in str(caught.value) for word in words)


def test_flops_of_products_and_attention() -> None:
    x, w = torch.randn(5, 7), torch.randn(7, 11, requires_grad=True)
    assert count_flops(lambda: (x @ w).sum().backward()) == 2 * 2 * 5 * 7 * 11
    if onednn_usable():
        x.requires_grad_()
        assert count_flops(lambda: onednn_linear(x, w.t()).sum().backward()) == 3 * 2 * 5 * 7 * 11
    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    forward = 2 * 2 * 2 * 6 * 6 * 8
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(q, q, q).sum().backward()) == 3 * forward


def test_peak_memory_counts_what_lives_at_one_time() -> None:
    def one_after_another() -> None:
        for _ in range(5):
            torch.empty(1000)

    def all_at_once() -> None:
        kept = [torch.empty(1000) for _ in range(5)]
        views = [tensor[:10] for tensor in kept]
        del kept, views

    assert peak_bytes(one_after_another, CPU) <= 2 * 4000
    assert peak_bytes(all_at_once, CPU) == 5 * 4000
    weight = torch.randn(50, 50, requires_grad=True)

    def deep() -> None:
        hidden = torch.zeros(50, 50)
        for _ in range(10):
            hidden = torch.sin(hidden @ weight)  # both results are kept for the way back
        hidden.sum().backward()
        weight.grad = None

    assert 20 * 10_000 < peak_bytes(deep, CPU) < 25 * 10_000


def test_words_of_the_command_line_reach_every_method() -> None:
    words = ["method=mae,hpm", "method.decoder_depth=1", "rounds=3"]
    given = read_words(BenchStepSettings, words, command="bench step")
    assert given.method == {"name": "mae,hpm", "decoder_depth": 1}
    assert read_words(BenchStepSettings, ["method=[mae,hpm]"], command="bench step").method == {
        "name": ["mae", "hpm"]
    }


def test_steps_on_clips() -> None:
    clips = dict(model="video_vit_tiny_patch16", frames=4, image_size=16, rounds=1)
    result, _ = run(method={"name": "mae,hpm", "mask_ratio": 0.5, **SMALL_DECODER}, **clips)
    work = {row["name"]: row["gflop_per_step"] for row in result["contestants"]}
    assert work["hpm (mid-training)"] > work["hpm (first step)"] > work["mae"] > 0
    with pytest.raises(UserError, match=r"clips of 4 frames .*clip.tubelet"):
        run(method="mae", tubelet=3, **clips)


@pytest.mark.slow
def test_methods_with_several_crops_are_compared_with_dino_of_the_same_blocks(
    script: Callable[[str], ModuleType],
) -> None:
    heads = {
        "out_dim": 64,
        "head_hidden": 16,
        "head_bottleneck": 8,
        "stage_out_dim": 16,
        "stage_hidden": 16,
    }
    own = {"thead_depth": 1, "thead_heads": 2, "partner_model": "resnet18", "stage_bottleneck": 8}
    own["partner_args"] = {"cifar_stem": True, "layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
    crops = {"num_local": 3, "local_size": 16}
    dino = script("step_against").RIVALS["dino"]
    result, lines = run(method={"name": "scfs,mokd", **heads, **own}, crops=crops, rivals=dino)
    work = {row["name"]: row["gflop_per_step"] for row in result["contestants"]}
    assert list(work) == ["scfs", "mokd", "dino"]
    assert work["dino"] < work["scfs"]
    assert work["dino"] < work["mokd"]
    assert result["ratios"].keys() == {"mokd / scfs", "scfs / dino", "mokd / dino"}
    assert any("times as long as dino" in line for line in lines)
    fewer, _ = run(
        method={"name": "scfs", **heads, "stage_bottleneck": 8}, crops={**crops, "num_local": 1}
    )
    assert fewer["contestants"][0]["gflop_per_step"] < work["scfs"]


@pytest.mark.skipif(not onednn_usable(), reason="this build of torch has no oneDNN product")
@pytest.mark.parametrize("product", ["torch", "onednn"])
def test_matrices_are_multiplied_as_a_run_would(
    product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "measured_product", lambda: product)
    by: list[str] = []

    def rivals(methods: Mapping[str, Any], config: BenchStepSettings, engine: Engine) -> list[Any]:
        (own,) = contestants("again", methods["mae"], config, engine)
        with torch.profiler.profile() as profiled:
            own.step()
        by.extend(event.key for event in profiled.key_averages())
        return [own]

    result = bench_step(say=by.append, rivals=rivals, **{**TINY, "rounds": 1, "precision": "fp32"})
    assert ("mkldnn::_linear_pointwise" in by) == (product == "onednn")
    assert result["settings"]["product"] == product
    assert any("matrices by oneDNN" in line for line in by) == (product == "onednn")


def test_a_script_that_builds_an_unknown_method_is_told_so() -> None:
    with pytest.raises(UserError, match=r"method=mea: there is no such method.*did you mean mae"):
        build_method("mea", {}, BenchStepSettings())

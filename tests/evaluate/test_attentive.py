"""The attentive probes: their arithmetic the slow way, their tokens, and from settings to file."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from patchmine.errors import UserError, silent
from patchmine.evaluate.attentive import (
    EfficientPool,
    evaluate_attentive,
    new_probe,
    num_queries,
    train_probes,
)
from patchmine.evaluate.evaluated import open_evaluated
from patchmine.evaluate.settings import AttentiveSettings
from patchmine.evaluate.tokens import TokenReader, token_tables


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """A red or a blue square somewhere: 20 training and 6 test images of each."""
    root = tmp_path_factory.mktemp("squares")
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 6)):
        for name, channel in (("blue", 2), ("red", 0)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 90, (16, 16, 3), dtype=np.uint8)
                row, column = generator.integers(0, 9, 2)
                pixels[row : row + 8, column : column + 8, channel] = 250
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def given(run, data, **more):
    values = dict(iterations=40, rates=(1e-3, 1e-2), train_batch=32) | more
    return AttentiveSettings(target=str(run), data=str(data), workers=0, crop_pct=1.0, **values)


# ---- the pooling ----


def test_pooling_equals_values_first_and_one_query_at_a_time():
    torch.manual_seed(0)
    pool, tokens = EfficientPool(12, 3), torch.randn(5, 7, 12)
    torch.nn.init.normal_(pool.queries)
    values = pool.value(tokens)  # (B, L, D)
    slow = []
    for number, query in enumerate(pool.queries):
        weights = torch.softmax(tokens @ query / 12**0.5, dim=1)  # (B, L)
        own = values[..., 4 * number : 4 * number + 4]  # its part of the values
        slow.append((weights[..., None] * own).sum(1))
    torch.testing.assert_close(pool(tokens), torch.cat(slow, dim=1))


def test_the_probe_has_queries_values_and_a_classifier_only():
    settings = AttentiveSettings(target="x", data="y")
    probe = new_probe(settings, 64, 10)
    assert sum(p.numel() for p in probe.parameters()) == 32 * 64 + 64 * 64 + 64 * 10 + 10


@pytest.mark.parametrize(
    ("width", "queries"), [(384, 32), (768, 32), (192, 32), (24, 24), (33, 11)]
)
def test_queries_by_the_width(width, queries):
    assert num_queries(None, width) == queries
    with pytest.raises(UserError, match=rf"queries=5 does not divide .* {width}"):
        num_queries(5, width)


@pytest.mark.parametrize("probe", ["efficient", "latent"])
def test_probes_that_are_trained_together_equal_each_trained_alone(probe):
    settings = AttentiveSettings(target="x", data="y", probe=probe)
    g = torch.Generator().manual_seed(0)
    table, labels = torch.randn(40, 3, 8, generator=g), torch.arange(40) % 2
    rates, rows = (1e-3, 1e-2), torch.arange(4, 40)

    together = [new_probe(settings, 8, 2) for _ in rates]
    train_probes(together, table, labels, rates, rows=rows, iterations=6, batch_size=8)
    for rate, found in zip(rates, together, strict=True):
        alone = new_probe(settings, 8, 2)
        train_probes([alone], table, labels, [rate], rows=rows, iterations=6, batch_size=8)
        for name, wanted in alone.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], wanted)
        assert not found.training


def test_a_token_that_decides_is_found_among_many():
    g = torch.Generator().manual_seed(0)
    tokens, labels = torch.randn(400, 20, 16, generator=g), torch.arange(400) % 2
    place = torch.randint(20, (400,), generator=g)
    mark = torch.zeros(16)
    mark[0] = 12.0  # what a query can look for
    tokens[torch.arange(400), place] += mark
    tokens[torch.arange(400), place, 1] = 8.0 * (labels * 2 - 1)
    settings = AttentiveSettings(target="x", data="y")
    probe = new_probe(settings, 16, 2)
    rows = torch.arange(300)
    train_probes([probe], tokens, labels, [1e-2], rows=rows, iterations=150, batch_size=100)
    with torch.no_grad():
        right = (probe(tokens[300:]).argmax(1) == labels[300:]).float().mean()
    assert right > 0.95


# ---- tokens ----


def test_tokens_are_those_of_the_patches_after_the_norm(run_folder, resnet_folder, video_folder):
    target = open_evaluated(run_folder)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = target.encoder.forward_features(images)
        torch.testing.assert_close(TokenReader(target)(images), wanted[:, 1:])
        convolutional = open_evaluated(resnet_folder)
        found = TokenReader(convolutional)(images)
        pooled = convolutional.encoder.forward_head(
            convolutional.encoder.forward_features(images), pre_logits=True
        )
        torch.testing.assert_close(found.mean(1), pooled)
        video = open_evaluated(video_folder)
        assert TokenReader(video)(torch.randn(1, 3, 4, 16, 16)).shape == (1, 2 * 4, 24)


def test_tables_beyond_the_bound_lie_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = []
    empty = token_tables(1e-6, said.append)  # one kB
    small, large = empty(10, 5, 8), empty(10, 50, 8)
    assert "10 x 5 x 8 in bfloat16" in said[0]
    assert "held in memory" in said[0]
    assert f"held in a temporary file in {tmp_path}" in said[1]
    assert list(tmp_path.iterdir()) == []
    rows = torch.randn(10, 50, 8)
    for table, some in ((small, rows[:, :5]), (large, rows)):
        table[2:] = some[2:]
        assert torch.equal(table[2:], some[2:].bfloat16())


def test_a_disk_that_is_too_small_is_one_sentence(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    with pytest.raises(UserError, match=r"10 x 50 x 8,000 .*token_memory=0, .* set TMPDIR"):
        token_tables(0.0, silent)(10, 50, 8_000)


# ---- from settings to the file ----


@pytest.mark.parametrize("probe", ["efficient", "latent"])
def test_a_run_is_measured_beside_random_weights_and_filed(run_folder, squares, probe):
    said = []
    asked = given(run_folder, squares, probe=probe, baselines=True)
    result = evaluate_attentive(asked, said.append)
    assert json.loads((run_folder / "eval" / "attentive.json").read_text()) == result
    assert result["top1"] > 80
    assert result["baselines"].keys() == {"random_init"}  # raw pixels have no tokens
    assert result["chosen"]["pooling"].startswith(probe)
    assert result["settings"]["trained_on"] == 36
    assert result["settings"]["chosen_on"] == 4
    (accuracies,) = result["held_out_top1"].values()
    assert accuracies.keys() == {"0.001", "0.01"}
    assert any("40 x 4 x 24 in bfloat16" in line for line in said)


def test_where_the_tokens_lie_changes_nothing(run_folder, squares):
    memory, file = (
        evaluate_attentive(given(run_folder, squares, token_memory=bound)) for bound in (1.0, 0.0)
    )
    for key in ("top1", "chosen", "held_out_top1"):
        assert memory[key] == file[key]


def test_what_has_no_tokens_is_refused(squares):
    with pytest.raises(UserError, match="raw-pixels has no patch tokens"):
        evaluate_attentive(given("raw-pixels", squares))


def test_random_numbers_of_others_stay_as_they_are():
    before = torch.get_rng_state()
    new_probe(AttentiveSettings(target="x", data="y"), 8, 2)
    assert torch.equal(before, torch.get_rng_state())

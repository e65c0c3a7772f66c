"""The protocols on pooled features: their arithmetic the slow way, and from settings to the file."""

from __future__ import annotations

import io
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from patchmine.errors import UserError
from patchmine.evaluate import retrieval
from patchmine.evaluate.clustering import agreement, evaluate_cluster
from patchmine.evaluate.fewshot import drawn, evaluate_fewshot
from patchmine.evaluate.heads import train_logistic
from patchmine.evaluate.measure import show_result
from patchmine.evaluate.quality import alpha, evaluate_quality, moments, rankme
from patchmine.evaluate.retrieval import evaluate_retrieval, search
from patchmine.evaluate.settings import (
    ClusterSettings,
    FewshotSettings,
    QualitySettings,
    RetrievalSettings,
)


@pytest.fixture(scope="session")
def two_colours(tmp_path_factory):
    """Two classes that differ by colour: 12 training and 4 test images of each."""
    root = tmp_path_factory.mktemp("two-colours")
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name, channel in (("blue", 2), ("red", 0)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 40, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += np.uint8(generator.integers(120, 200))
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def given(kind, run, data, **more):
    return kind(target=str(run), data=str(data), workers=0, **more)


# ---- agreement of clusters and classes ----


def slow_ari(first, second):
    """The adjusted Rand index from all pairs of items."""
    pairs = list(itertools.combinations(range(len(first)), 2))
    a = [first[i] == first[j] for i, j in pairs]
    b = [second[i] == second[j] for i, j in pairs]
    both, expected = sum(x and y for x, y in zip(a, b, strict=True)), sum(a) * sum(b) / len(pairs)
    return (both - expected) / ((sum(a) + sum(b)) / 2 - expected)


def slow_nmi(first, second):
    """Mutual information over the mean of the entropies, term by term."""

    def share(groups):
        return {group: groups.count(group) / len(groups) for group in set(groups)}

    a, b, both = share(first), share(second), share(list(zip(first, second, strict=True)))
    mutual = sum(p * math.log(p / (a[x] * b[y])) for (x, y), p in both.items())
    entropies = [-sum(p * math.log(p) for p in each.values()) for each in (a, b)]
    return mutual / (sum(entropies) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_agreement_equals_the_slow_definitions(seed):
    g = torch.Generator().manual_seed(seed)
    first, second = torch.randint(4, (40,), generator=g), torch.randint(3, (40,), generator=g)
    second[:20] = first[:20] % 3
    found = agreement(first, second)
    assert found["ari"] == pytest.approx(slow_ari(first.tolist(), second.tolist()))
    assert found["nmi"] == pytest.approx(slow_nmi(first.tolist(), second.tolist()))


def test_agreement_of_the_examples_in_scikit_learns_manual():
    found = agreement(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]))
    assert found == {"nmi": pytest.approx(0.8), "ari": pytest.approx(0.5714285714)}
    renamed = agreement(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 1]))
    assert renamed == {"nmi": pytest.approx(1), "ari": pytest.approx(1)}
    one = agreement(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    assert one == {"nmi": 1.0, "ari": 1.0}


# ---- retrieval ----


def slow_average_precision(right):
    """Mean over the right places of the share that is right up to there."""
    places = [place for place, each in enumerate(right, start=1) if each]
    return sum(found / place for found, place in enumerate(places, start=1)) / max(1, len(places))


def test_search_equals_one_ranking_at_a_time(monkeypatch):
    g = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(50, 4, generator=g), torch.randn(13, 4, generator=g)
    labels, truth = torch.arange(50) % 6, torch.arange(13) % 7  # of the last there is none
    rankings = [
        [bool(labels[i] == label) for i in sorted(range(50), key=lambda i: -float(gallery[i] @ q))]
        for q, label in zip(queries, truth, strict=True)
    ]
    monkeypatch.setattr(retrieval, "_SIMILARITIES", 50 * 4)
    found = search(queries, truth, gallery, labels, (1, 3))
    mean = sum(map(slow_average_precision, rankings)) / 13
    assert found["map"] == pytest.approx(100 * mean, rel=1e-5)
    for k in (1, 3):
        share = sum(any(row[:k]) for row in rankings) / 13
        assert found[f"recall_{k}"] == pytest.approx(100 * share)


def test_features_that_do_not_differ_find_nothing():
    same, labels = torch.ones(40, 3), torch.arange(40) % 4
    found = search(same, labels, same, labels, (1, 30, 31))
    assert found["map"] == pytest.approx(25)  # as many as there are of the class
    assert (found["recall_1"], found["recall_30"], found["recall_31"]) == (0, 0, 100)


def test_twins_of_the_right_class_are_all_first():
    gallery, labels = torch.eye(2).repeat_interleave(3, 0), torch.arange(6) // 3
    found = search(torch.eye(2), torch.arange(2), gallery, labels, (1,))
    assert found == {"map": 100, "recall_1": 100}


# ---- label-free quality ----


def test_rankme_equals_the_papers_formula_on_the_singular_values():
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 12)
    singular = torch.linalg.svdvals(x.double())
    share = singular / singular.sum() + 1e-7
    wanted = math.exp(-float((share * share.log()).sum()))
    assert rankme(moments(x)[0]) == pytest.approx(wanted)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_rankme_counts_directions_of_equal_strength(rank):
    assert rankme(torch.diag(torch.arange(16) < rank).double()) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("width", [6, 200])
def test_alpha_is_the_exponent_of_a_spectrum_that_follows_a_power_law(power, width):
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -power
    assert alpha(torch.diag(spectrum)) == pytest.approx(power)


def test_moments_of_slices_are_those_of_all_rows(monkeypatch):
    monkeypatch.setattr("patchmine.evaluate.quality._ROWS", 7)
    x = torch.randn(45, 3, generator=torch.Generator().manual_seed(0)) + 5
    second, mean = moments(x)
    covariance = second - torch.outer(mean, mean)
    torch.testing.assert_close(covariance, torch.cov(x.double().T, correction=0))


# ---- few shots ----


def test_logistic_regression_is_at_its_optimum():
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(30, 5, generator=g), torch.arange(30) % 3
    weight, bias = train_logistic(x, labels, 3)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    misfit = F.cross_entropy(x @ weight + bias, labels, reduction="sum")
    (misfit + weight.square().sum() / 2).backward()
    torch.testing.assert_close(weight.grad, torch.zeros(5, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(bias.grad, torch.zeros(3), atol=1e-4, rtol=0)


def test_a_draw_has_so_many_of_each_class_and_another_draw_has_others():
    labels = torch.tensor([2, 0, 1] * 20)
    rows = drawn(labels, 4, seed=0)
    assert len(set(rows.tolist())) == 12
    assert labels[rows].bincount().tolist() == [4, 4, 4]
    assert set(rows.tolist()) != set(drawn(labels, 4, seed=1).tolist())


def test_fewshot_of_a_run_is_filed_with_spread_and_baselines(run_folder, two_colours):
    asked = given(FewshotSettings, run_folder, two_colours, shots=(1, 8), draws=3, baselines=True)
    result = evaluate_fewshot(asked)
    assert json.loads((run_folder / "eval" / "fewshot.json").read_text()) == result
    for name in ("knn_1_shot", "knn_8_shot", "logistic_1_shot", "logistic_8_shot"):
        draws = torch.tensor(result["draws"][name], dtype=torch.float64)
        assert len(draws) == 3
        assert result[name] == pytest.approx(float(draws.mean()))
        assert result[f"{name}_std"] == pytest.approx(float(draws.std()))
    assert result["baselines"]["raw_pixels"]["logistic_8_shot"] > 90
    one = evaluate_fewshot(given(FewshotSettings, run_folder, two_colours, shots=(1,), draws=1))
    assert "knn_1_shot_std" not in one


def test_fewer_images_than_shots_name_class_and_number_before_images_are_read(
    run_folder, two_colours
):
    said = []
    with pytest.raises(UserError, match=r"shots=30, but the class blue has only 12 training"):
        evaluate_fewshot(given(FewshotSettings, run_folder, two_colours, shots=(30,)), said.append)
    assert said == []


# ---- from settings to the file ----


def test_clusters_of_colours_are_the_classes(run_folder, two_colours):
    asked = given(ClusterSettings, run_folder, two_colours, baselines=True)
    result = evaluate_cluster(asked)
    assert json.loads((run_folder / "eval" / "cluster.json").read_text()) == result
    assert result["images"]["images"] == 32  # train and test
    assert result["settings"]["clusters"] == 2
    assert result["baselines"]["raw_pixels"]["nmi"] == pytest.approx(1)
    with pytest.raises(UserError, match="clusters=33, but there are only 32 images"):
        evaluate_cluster(asked.model_copy(update={"clusters": 33}))


def test_retrieval_of_a_run(run_folder, two_colours):
    asked = given(RetrievalSettings, run_folder, two_colours, baselines=True, recall=(1, 24))
    result = evaluate_retrieval(asked)
    assert json.loads((run_folder / "eval" / "retrieval.json").read_text()) == result
    assert result["baselines"]["raw_pixels"]["map"] > 95
    assert result["recall_24"] == 100  # all that there are
    assert result["settings"]["queries"] == 8
    said: list[str] = []
    asked = asked.model_copy(update={"queries": 4, "name": "few", "baselines": False})
    few = evaluate_retrieval(asked, said.append)
    assert [line for line in said if line.startswith("searches: 4 of 4")]
    assert few["settings"]["queries"] == 4
    assert "4 of 8 test images search" in few["notes"][-1]
    assert (run_folder / "eval" / "few.json").is_file()


def test_quality_needs_no_labels(run_folder, tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{number}.png")
    result = evaluate_quality(given(QualitySettings, run_folder, tmp_path / "flat", pooling="mean"))
    assert json.loads((run_folder / "eval" / "quality.json").read_text()) == result
    assert 1 <= result["rankme"] <= 5.001
    assert "fewer than the width of the features, 24" in result["notes"][0]
    for number in (2, 3, 4):
        (tmp_path / "flat" / f"{number}.png").unlink()
    with pytest.raises(UserError, match="2 images that can be read"):
        evaluate_quality(given(QualitySettings, run_folder, tmp_path / "flat"))


def test_the_table_has_a_line_for_each_measure(run_folder, two_colours):
    said = []
    how = given(ClusterSettings, run_folder, two_colours, baselines=True)
    result = evaluate_cluster(how, said.append)
    page = io.StringIO()
    show_result(result, Console(file=page, width=120))
    for words in ("nmi", "ari", "raw pixels", f"{result['nmi']:.3f}"):
        assert words in page.getvalue()
    assert "\n".join([*said, page.getvalue()]).count("without their labels") == 1


def test_a_wrong_pooling_is_told_before_images_are_read(run_folder, two_colours):
    said = []
    with pytest.raises(UserError, match="pooling='max'"):
        evaluate_cluster(
            given(ClusterSettings, run_folder, two_colours, pooling="max"), said.append
        )
    assert said == []

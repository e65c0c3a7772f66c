"""From the settings to the file of results, on tiny images."""

from __future__ import annotations

import copy
import errno
import io
import json
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tests.evaluate.votes import knn_accuracy

from patchmine.cli.commands import read_words
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError
from patchmine.evaluate.evaluated import open_evaluated
from patchmine.evaluate.features import Features, Reader, extract
from patchmine.evaluate.knn import evaluate_knn, knn_in_training, learn_knn
from patchmine.evaluate.labelled import open_labelled
from patchmine.evaluate.linear import batch_for, evaluate_linear, iterations_for
from patchmine.evaluate.measure import show_result
from patchmine.evaluate.settings import KnnSettings, LinearSettings, ReadingSettings, VoteSettings

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """Four classes that differ by colour: 12 training and 4 test images of each."""
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name, colour in {
            "blue": (0, 0, 1),
            "green": (0, 1, 0),
            "red": (1, 0, 0),
            "yellow": (1, 1, 0),
        }.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) * generator.uniform(120, 250) + generator.uniform(
                    0, 40, (20, 20, 3)
                )
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                    root / part / name / f"{i}.png"
                )
    return root


def settings(kind, target, data, **more):
    return kind(target=str(target), data=str(data), workers=0, **more)


def test_knn_of_a_run_is_filed_with_its_baselines(run_folder, colours):
    result = evaluate_knn(settings(KnnSettings, run_folder, colours, baselines=True))
    assert json.loads((run_folder / "eval" / "knn.json").read_text()) == result
    assert not [p for p in (run_folder / "eval").iterdir() if p.name != "knn.json"]
    assert set(result["by_k"]) == {"10", "20", "48"}  # no more neighbours than training images
    assert result["top1"] == result["by_k"]["20"]["top1"]
    assert result["baselines"]["raw_pixels"]["top1"] > 90
    assert result["baselines"]["random_init"]["top1"] > 25
    assert result["images"]["train"] == 48
    assert "by definition" in result["notes"][0]  # top-5 of four classes


def test_knn_equals_features_and_vote_put_together_by_hand(run_folder, colours):
    result = evaluate_knn(
        settings(KnnSettings, run_folder, colours, pooling="mean", k=5, neighbours=(5,))
    )
    target = open_evaluated(run_folder)
    train, test = (
        extract(target, open_source(colours / part), pooling="mean", workers=0)
        for part in ("train", "test")
    )
    wanted = knn_accuracy(train.x, train.labels, test.x, test.labels, 4, neighbours=(5,))[5]
    assert {key: result[key] for key in wanted} == pytest.approx(wanted)


def test_the_pooled_feature_of_a_resnet_is_measured(resnet_folder, colours):
    result = evaluate_knn(settings(KnnSettings, resnet_folder, colours, baselines=True))
    assert result["settings"]["pooling"] == "pooled"
    target = open_evaluated(resnet_folder)
    train, test = (
        extract(target, open_source(colours / part), workers=0) for part in ("train", "test")
    )
    assert train.x.shape == (48, 16)
    wanted = knn_accuracy(train.x, train.labels, test.x, test.labels, 4, neighbours=(20,))[20]
    assert {key: result[key] for key in wanted} == pytest.approx(wanted)
    assert {"random_init", "raw_pixels"} == result["baselines"].keys()
    probe = evaluate_linear(settings(LinearSettings, resnet_folder, colours, iterations=20))
    assert probe["chosen"]["pooling"] == "pooled"


def test_a_baseline_asked_for_alone_equals_the_baseline_of_the_run(run_folder, colours):
    with_baselines = evaluate_knn(settings(KnnSettings, run_folder, colours, baselines=True))[
        "baselines"
    ]
    for baseline, spec in (("random_init", "random-init"), ("raw_pixels", "raw-pixels")):
        alone = evaluate_knn(settings(KnnSettings, f"{spec}:{run_folder}", colours))
        assert alone["top1"] == with_baselines[baseline]["top1"]


def test_a_wrong_pooling_is_told_before_images_are_read(run_folder, colours):
    said = []
    with pytest.raises(UserError, match="pooling='max'"):
        evaluate_knn(settings(KnnSettings, run_folder, colours, pooling="max"), said.append)
    assert not any("images:" in line for line in said)


def test_what_is_no_run_is_not_filed(run_folder, colours):
    evaluate_knn(settings(KnnSettings, run_folder / "export", colours))
    assert not list(run_folder.rglob("knn.json"))


def test_linear_probe_learns_and_chooses_on_held_out_training_images(run_folder, colours):
    said = []
    kind = settings(
        LinearSettings, run_folder, colours, baselines=True, rates=(1e-6, 0.1, 0.5), iterations=200
    )
    result = evaluate_linear(kind, said.append)
    assert result["top1"] > 90
    assert result["baselines"]["raw_pixels"]["top1"] > 90
    assert result["settings"] == {
        "iterations": 200,
        "train_batch": 44,
        "trained_on": 44,
        "chosen_on": 4,
    }
    assert result["chosen"]["rate"] > 1e-6
    best = max(max(scores.values()) for scores in result["held_out_top1"].values())
    assert result["chosen"]["held_out_top1"] == best
    assert set(result["held_out_top1"]) == {
        *("cls", "mean", "cls+mean"),
        *("cls, last 4 blocks", "mean, last 4 blocks", "cls+mean, last 4 blocks"),
    }
    assert (run_folder / "eval" / "linear.json").is_file()


def test_the_test_images_do_not_take_part_in_the_choice(run_folder, colours, tmp_path):
    kind = settings(LinearSettings, run_folder, colours / "train", iterations=60)
    honest = evaluate_linear(kind.model_copy(update={"test": str(colours / "test")}))
    wrong = tmp_path / "wrong"  # the same test images under wrong names
    for name, other in (("blue", "green"), ("green", "red"), ("red", "yellow"), ("yellow", "blue")):
        (wrong / other).mkdir(parents=True)
        for path in (colours / "test" / name).iterdir():
            (wrong / other / path.name).write_bytes(path.read_bytes())
    fooled = evaluate_linear(kind.model_copy(update={"test": str(wrong)}))
    assert fooled["chosen"] == honest["chosen"]
    assert fooled["top1"] < honest["top1"]


def test_mae_protocol(run_folder, colours):
    kind = settings(
        LinearSettings, run_folder, colours, protocol="mae", train_batch=16, epochs=60, blr=300.0
    )  # few images
    result = evaluate_linear(kind)
    assert result["top1"] > 60
    assert (run_folder / "eval" / "linear-mae.json").is_file()
    with pytest.raises(UserError, match="warmup_epochs=10"):
        evaluate_linear(settings(LinearSettings, run_folder, colours, protocol="mae", epochs=5))


@pytest.mark.parametrize(
    ("images", "batch", "steps"),
    [
        (1_153_051, 1024, 12_500),
        (45_000, 256, 12_500),
        (6_000, 64, 9_300),
        (400, 64, 2_000),
        (20, 20, 2_000),
    ],
)
def test_length_of_training_by_the_number_of_images(images, batch, steps):
    assert batch_for(images, steps=128, least=64, most=1024) == batch
    assert iterations_for(images, batch) == steps


def test_knn_in_training_agrees_with_the_protocol_and_leaves_the_encoder_as_it_was(
    run_folder, colours
):
    target = open_evaluated(run_folder)
    encoder = target.encoder.train()
    encoder.blocks[1].eval()
    modes, state = [m.training for m in encoder.modules()], torch.get_rng_state()
    found = knn_in_training(target, open_labelled(colours), ReadingSettings(workers=0))
    assert torch.equal(state, torch.get_rng_state())
    assert found == {
        key: evaluate_knn(settings(KnnSettings, run_folder, colours))[key]
        for key in ("top1", "top5", "top1_interval")
    }
    assert [m.training for m in encoder.modules()] == modes
    assert all(p.grad is None for p in encoder.parameters())


class Processes:
    """Several processes of a run as threads, of which each has its own ``place``."""

    def __init__(self, count):
        self.world_size, self.barrier, self.given = count, threading.Barrier(count), [None] * count

    def place(self, rank):
        def gather(own):
            self.given[rank] = own
            self.barrier.wait(20)
            found = list(self.given)
            self.barrier.wait(20)
            return found

        return SimpleNamespace(rank=rank, world_size=self.world_size, gather=gather)


def in_processes(target, data, count):
    """What the evaluation during training gives in each of several processes, or raises."""
    processes, answers = Processes(count), [None] * count

    def evaluate(rank):
        own = replace(target, encoder=copy.deepcopy(target.encoder))
        try:
            answers[rank] = knn_in_training(
                own, data, ReadingSettings(workers=0), processes.place(rank)
            )
        except UserError as error:
            answers[rank] = error

    threads = [threading.Thread(target=evaluate, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_several_processes_share_an_evaluation_and_all_get_its_result(run_folder, colours):
    target, data = open_evaluated(run_folder), open_labelled(colours)
    alone = knn_in_training(target, data, ReadingSettings(workers=0))
    assert in_processes(target, data, 3) == [alone] * 3


def test_what_is_wrong_in_one_process_ends_the_evaluation_in_all(run_folder, colours, tmp_path):
    shutil.copytree(colours, tmp_path / "colours")
    for path in (tmp_path / "colours" / "train" / "blue").iterdir():
        path.write_bytes(b"")  # all that the first of four processes reads
    data = open_labelled(tmp_path / "colours")
    answers = in_processes(open_evaluated(run_folder), data, 4)
    assert all("12 of 48 images" in str(answer) for answer in answers)


def test_the_table_shows_target_baselines_and_intervals_and_the_division_is_said_once(
    run_folder, image_folder
):
    said = []
    how = settings(KnnSettings, run_folder, image_folder, baselines=True)
    result = evaluate_knn(how, said.append)
    page = io.StringIO()
    show_result(result, Console(file=page, width=200))
    for words in (
        "random init",
        "raw pixels",
        f"{result['top1']:.2f}",
        "95 % interval",
        "top-1 by k: 10:",
    ):
        assert words in page.getvalue()
    assert "\n".join([*said, page.getvalue()]).count("last fifth of each class") == 1
    low, high = result["top1_interval"]
    assert low < result["top1"] < high or result["top1"] in (low, high)
    assert f"{low:.1f} to {high:.1f}" in page.getvalue()


def test_features_know_their_length():
    assert len(Features(torch.zeros(3, 2), None, torch.arange(3))) == 3


def test_a_result_that_cannot_be_filed_is_still_told(run_folder, image_folder, monkeypatch):
    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, "No space left on device", str(run_folder / "eval"))

    monkeypatch.setattr("patchmine.evaluate.measure.write_result", full)
    with pytest.raises(
        UserError,
        match=r"eval cannot be written \(No space left on device\); make room.*top-1 \d+\.\d\d",
    ):
        evaluate_knn(KnnSettings(target=str(run_folder), data=str(image_folder), workers=0))


def test_a_table_prints_names_with_brackets_as_they_are():
    console = Console(file=io.StringIO(), width=100)
    result = {
        "protocol": "knn",
        "target": {"name": "runs/[red]x[/nothing]"},
        "top1": 1.0,
        "top5": 2.0,
        "images": {"train": 1, "test": 1, "classes": 2},
        "notes": ["learns from [/a]", "[b]"],
    }
    show_result(result, console)
    text = console.file.getvalue()
    assert all(part in text for part in ("runs/[red]x[/nothing]", "learns from [/a]", "[b]"))


def test_few_images_are_an_answer_or_a_sentence(run_folder, tmp_path):
    for name in "ab":
        (tmp_path / "few" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(
                tmp_path / "few" / name / f"{number}.png"
            )
    given = dict(target=str(run_folder), data=str(tmp_path / "few"), workers=0, iterations=2)
    assert evaluate_linear(LinearSettings(**given, held_out=0.999))["top1"] >= 0
    for name in "ab":
        (tmp_path / "few" / name / "2.png").unlink()
    with pytest.raises(UserError, match="one training image"):
        evaluate_linear(LinearSettings(**given))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["test=nowhere"], "test=nowhere: there is no such file or folder"),
        (["name=../x"], "name: given '../x'; must be letters, digits and the signs . - _ only"),
        ([f"name={'n' * 200}"], "must be at most 100 letters"),
        (["neighbours=[]"], "neighbours: given []; must be a list with at least 1 of them"),
        (
            ["neighbours=[0]"],
            "Error in `patchmine eval knn`: neighbours[0]: given 0; must be greater than 0",
        ),
    ],
)
def test_mistakes_name_the_setting_that_they_are_in(words, part, image_folder):
    def evaluate():
        given = ["raw-pixels", f"data={image_folder}", *words]
        return evaluate_knn(read_words(KnnSettings, given, command="eval knn", first=["target"]))

    with pytest.raises(UserError) as caught:
        evaluate()
    assert part in str(caught.value)


@pytest.mark.parametrize("target", ["vit_tiny_patch16_224", "run"])
def test_a_size_that_the_encoder_cannot_take_is_told_before_images_are_read(target, run_folder):
    target = str(run_folder) if target == "run" else target
    with pytest.raises(UserError, match="image_size=7x7"):
        open_evaluated(target, image_size=(7, 7))
    with pytest.raises(UserError, match="behind raw-pixels: stands"):
        open_evaluated("raw-pixels:" * 3000 + "x")


@pytest.mark.parametrize("pooling", ["cls", "cls+mean"])
def test_knn_leaves_the_features_to_the_next_protocol(run_folder, pooling):
    reader = Reader(open_evaluated(run_folder))
    x = 3 * torch.randn(6, 2, 24, generator=torch.Generator().manual_seed(0))
    train = Features(x.clone(), torch.arange(6), torch.arange(6))
    learned = learn_knn(VoteSettings(k=1), torch.device("cpu"), reader, train, 6, pooling=pooling)
    assert learned.score(x)["1"].argmax(1).tolist() == list(range(6))
    assert torch.equal(train.x, x)

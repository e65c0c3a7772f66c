import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from patchmine.errors import UserError
from patchmine.methods import METHODS
from patchmine.report.page import differing, write_report
from patchmine.report.reading import choose, embed
from patchmine.report.results import read_result

MakeRun = Callable[..., Path]
_VOID = {"meta", "link", "img", "input", "wbr", "br", "path"}


class Page(HTMLParser):
    """A strict reader: every element is closed in order; collects text, tags, ids and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")
        ]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words += " " + data.strip()


def report(tmp_path: Path, *runs: Path) -> Page:
    return Page(write_report(runs, tmp_path / "out" / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_asks_for_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    page = report(tmp_path, make_run("hpm", samples=2), make_run("mae", method="mae"))
    assert len(set(page.ids)) == len(page.ids)
    assert all(address.startswith("data:") for address in page.addresses)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", text)


def test_one_run_shows_its_figures(make_run: MakeRun, tmp_path: Path) -> None:
    page = report(tmp_path, make_run("hpm"))
    for text in (
        "step 2,000 of 2,000",
        "finished",
        "45.7 %",
        "+13.3 points",
        "+17.8 points",
        "vit_tiny_patch16_224",
    ):
        assert text in page.words
    assert "Runs" not in page.words


def test_a_run_in_progress_says_how_far_it_is(make_run: MakeRun, tmp_path: Path) -> None:
    page = report(tmp_path, make_run("mae", made=500, evals=False, knn=False))
    assert "step 500 of 2,000" in page.words
    assert "25 % done" in page.words
    assert "Evaluation" not in page.words
    assert "kNN" not in page.words
    assert "Pictures" not in page.words


def test_a_run_that_just_started_makes_a_page(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("new", evals=False)
    (folder / "metrics.jsonl").write_text("")
    page = report(tmp_path, folder)
    assert "step 0 of 2,000" in page.words
    assert "svg" not in page.tags
    (folder / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing" in report(tmp_path, folder).words


def test_names_cannot_break_the_page(make_run: MakeRun, tmp_path: Path) -> None:
    evil = make_run("<b><em>&\"'", data="</script><script>alert(1)</script>", samples=1, made=1900)
    (evil / "eval" / "<i>x.json").write_text(
        json.dumps({"top1": 10.0, "note": "<u>&", "floors": {"<s>": {"top1": 5}}})
    )
    with (evil / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2000, "</svg><img src=x>": 1.0}) + "\n")
    page = report(tmp_path, evil, make_run("other"))
    assert not {"em", "u", "s"} & set(page.tags)
    assert page.tags.count("script") == 2
    assert page.tags.count("img") == 1
    assert "<b><em>&\"'" in page.words


def test_runs_of_one_name_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    page = report(tmp_path, make_run("a/x"), make_run("b/x", method="mae"))
    assert "a/x" in page.words
    assert "b/x" in page.words


def test_settings_that_differ(make_run: MakeRun, tmp_path: Path) -> None:
    assert differing([{"a": "1", "b": "2", "out": "x"}, {"a": "1", "b": "3", "out": "y"}]) == {"b"}
    assert differing([{"a": "1"}, {}]) == {"a"}
    page = report(tmp_path, make_run("hpm"), make_run("mae", method="mae", seed=1))
    assert "2 of 15 settings differ." in page.words


@pytest.mark.parametrize("name", ["HPM", "SimMIM", "DropPos", "SemAIM", "EMAE"])
def test_methods_are_spelt_as_their_authors_spell_them(
    make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    page = report(tmp_path, make_run("run", method=name.lower()))
    assert f"{name} · vit_tiny_patch16_224" in page.words


def test_speed_is_samples_per_second_in_one_word(make_run: MakeRun, tmp_path: Path) -> None:
    page = report(tmp_path, make_run("run"))
    assert "Speed, samples/s" in page.words
    assert "per second" not in page.words


def test_evaluations_of_other_kinds_are_shown_too(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("hpm")
    (folder / "eval" / "segment.json").write_text(
        json.dumps({"name": "segment", "miou": 38.25, "data": "ade"})
    )
    (folder / "eval" / "odd.json").write_text(json.dumps({"top1": None, "floors": [1]}))
    page = report(tmp_path, folder)
    assert "mIoU" in page.words
    assert "38.2 %" in page.words
    assert "ade" in page.words


@pytest.mark.parametrize("key", ["baselines", "floors"])  # the older name
def test_results_keep_accuracies_apart_from_conditions(key: str) -> None:
    content = {
        "name": "knn",
        "top1": 40,
        "top5": 80.0,
        "k": 20,
        "notes": ["few classes"],
        key: {"random_init": {"top1": 30.0}, "x": None},
    }
    result = read_result(0, "run", content)
    assert (result.top1, result.top5, result.baselines) == (40.0, 80.0, {"random_init": 30.0})
    assert result.conditions == {"k": "20"}
    assert result.notes == ["few classes"]
    assert result.measures == {}


def test_pictures_are_few_with_the_first_and_the_last(make_run: MakeRun, tmp_path: Path) -> None:
    many = [(step, Path(f"{step}.png")) for step in range(100)]
    chosen = [step for step, _ in choose(many, most=5)]
    assert chosen == [0, 25, 50, 74, 99]
    folder = make_run("hpm", samples=3)
    (folder / "samples" / "step-00000500.png").write_text("no picture")
    (folder / "samples" / "notes.txt").write_text("")
    page = report(tmp_path, folder)
    assert page.tags.count("img") == 3


def of_method(folder: Path, **chosen: object) -> Path:
    """The run with other settings of its method."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["method"] |= chosen
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_pictures_of_every_method_are_explained(
    method: str, make_run: MakeRun, tmp_path: Path
) -> None:
    own = {
        "mae": "Plain reconstruction",
        "hpm": "light patches are masked first",
        "simmim": "Plain reconstruction",
        "amt": "thrown away",
        "emae": "Disagreement",
        "droppos": "Every place has a colour",
        "semaim": "predicted from the true ones before it",
        "scfs": "cosine",
        "mokd": "attention that each place pays",
    }
    words = report(tmp_path, make_run(method, method=method, samples=2)).words
    told = words[words.index("Always the same images") :]
    assert "Hatched" in told
    assert own[method] in told
    predicts_pixels = method not in ("droppos", "scfs", "mokd")
    assert ("borrows each patch's own from the input" in told) is predicts_pixels
    assert ("average of its weights" in told) is False


def test_what_is_said_of_pictures_follows_the_settings(make_run: MakeRun, tmp_path: Path) -> None:
    averaged = make_run("a", samples=1, ema_decay=0.9)
    words = report(tmp_path, of_method(averaged, norm_pix_loss=False, prediction="relative")).words
    assert "only the order within an image counts" in words
    assert "average of its weights (ema_decay)" in words
    assert "Plain reconstruction" in words
    assert "borrows" not in words
    other = of_method(make_run("b", samples=1), prediction="absolute", target="ema")
    words = report(tmp_path, other).words
    assert "only the order" not in words
    assert "Plain reconstruction" not in words
    assert "Always the same images" not in report(tmp_path, make_run("c")).words
    observed = of_method(make_run("d", samples=1), look="masked", score="observed")
    assert "the EMA teacher makes of each patch behind a mask" in report(tmp_path, observed).words
    words = report(tmp_path, of_method(make_run("e", samples=1), look="memory")).words
    assert "earlier visits of the same training image" in words
    assert "the EMA teacher" not in words
    words = report(tmp_path, of_method(make_run("f", samples=1), alpha_end=0.0)).words
    assert "Predicted difficulty is the error" in words
    assert "masked first" not in words


def test_skipped_steps_are_drawn_only_where_there_were_some(
    make_run: MakeRun, tmp_path: Path
) -> None:
    folder = make_run("hpm")
    lines = [
        json.loads(line) | {"skipped": 0}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "chart-skipped" not in report(tmp_path, folder).ids
    lines[-2]["skipped"] = 3
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "chart-skipped" in report(tmp_path, folder).ids


def test_a_folder_without_a_run_leaves_no_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_photographs_are_packed_and_drawings_are_not(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    Image.new("RGB", (300, 400)).save(tmp_path / "drawing.png")
    photo, drawing = (embed(1, tmp_path / f"{name}.png") for name in ("photo", "drawing"))
    assert photo is not None
    assert drawing is not None
    assert photo.uri.startswith("data:image/webp;base64,")
    assert drawing.uri.startswith("data:image/png;base64,")
    assert photo[2:] == drawing[2:] == (300, 400)

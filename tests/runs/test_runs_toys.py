"""What somebody else adds: a method in a file of their own, and a task that learns labels."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from drawn import draw_images
from torch import Tensor, nn

import patchmine
from patchmine import training
from patchmine.config.resolve import from_settings
from patchmine.data.sources.contract import Source
from patchmine.data.sources.source import open_source
from patchmine.errors import UserError
from patchmine.methods import METHODS
from patchmine.runs.preparing import item_of
from patchmine.task import Task
from patchmine.train.checkpoint import load, load_newest
from patchmine.train.engine import Engine
from patchmine.train.loop import Hooks
from patchmine.types import Batch, Losses, LrSchedule, ParamGroup, Progress

pytestmark = pytest.mark.bitwise

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "image_size": 16,
    "patch_size": 4,
    "batch_size": 8,
    "blr": 1e-2,
    "warmup_epochs": 0,
    "workers": 0,
    "tensorboard": False,
    "sample_every": 1000,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("labelled") / "images", 24, ("cat", "dog"))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_method_in_a_file_of_its_own_does_all_that_ours_do(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "toy", METHODS["mae"])  # taken out again when the test ends
    import toy_method

    METHODS["toy"] = toy_method.ToySettings

    def settings(out: str, **more: Any) -> dict[str, Any]:
        shared = dict(data=str(labelled), method={"name": "toy", "share": 0.4}, steps=6)
        return {**TINY, **shared, "out": str(tmp_path / out), "say": lambda _: None, **more}

    whole = patchmine.pretrain(**settings("whole", eval_every=1, eval_data=str(labelled)))
    parts = patchmine.pretrain(**settings("parts", checkpoint_every=4, keep_checkpoints=9))
    newest = parts.checkpoints[-1]
    newest.unlink()
    assert load(parts.checkpoints[-1]).step == 4
    patchmine.resume(parts.path, say=lambda _: None)
    assert same(load(whole.checkpoint_dir / "last").model, load(newest).model)

    encoder = timm.create_model(f"local-dir:{whole.export_dir}", pretrained=True)
    assert same(encoder.state_dict(), whole.encoder().state_dict())
    assert whole.show([labelled / "cat/000.png"], tmp_path / "panel.png").is_file()
    assert whole.report(tmp_path / "report.html").is_file()
    best = load(whole.checkpoint_dir / "best")
    evaluated = [line for line in whole.metrics() if line.get("eval", {}).get("name") == "knn"]
    scores = {line["step"]: line["eval"]["top1"] for line in evaluated}
    assert scores[best.step] == max(scores.values())
    assert load(whole.checkpoint_dir / "last").facts["best"]["step"] == best.step
    with pytest.raises(UserError, match=r"method\.share.*1\.5"):
        patchmine.pretrain(**settings("wrong", method={"name": "toy", "share": 1.5}))


@pytest.mark.slow
def test_a_method_in_a_file_of_its_own_keeps_the_contract(repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{FIXTURES}:{os.environ.get('PYTHONPATH', '')}"}
    command = ["-m", "pytest", "-q", "-p", "toy_method", "-k", "toy", "tests/test_methods.py"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


class Classifier(Task):
    """Says of an image which class it is of, by one linear layer on its pixels."""

    uses_targets: ClassVar[bool] = True

    def __init__(self, num_classes: int) -> None:
        super().__init__(None)
        torch.manual_seed(0)
        self.encoder, self.head = nn.Linear(3 * 16 * 16, 8), nn.Linear(8, num_classes)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        return {"loss": nn.functional.cross_entropy(self.predict(batch), batch.target)}

    def predict(self, batch: Batch) -> Tensor:
        return self.head(self.encoder(batch.views[0].flatten(1)).relu())

    def param_groups(self) -> list[ParamGroup]:
        body = [(f"encoder.{name}", p) for name, p in self.encoder.named_parameters()]
        head = [(f"head.{name}", p) for name, p in self.head.named_parameters()]
        return [ParamGroup(body, scale=0.5), ParamGroup(head, curve=LrSchedule("constant"))]

    def encoders(self) -> dict[str, nn.Module]:
        return {"student": self.encoder}

    def metric(self) -> str | None:
        return "top1"


class Watch:
    """Scores that rise and fall, and a stop after an epoch."""

    def __init__(self, stop_after: int = 99) -> None:
        self.stop_after = stop_after

    def hooks(self, log: object) -> Hooks:
        return Hooks(on_epoch=self.score, before_epoch=self.stop)

    def score(self, done: Progress) -> dict[str, float]:
        return {"top1": {3: 50.0, 6: 75.0}.get(done.step, 60.0)}

    def stop(self, now: Progress) -> None:
        if now.epoch == self.stop_after:
            raise ConnectionError("power failure")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


def classify(images: Source, out: Path, engine: Engine, resume: bool = False, **watch: int) -> Task:
    config = from_settings(
        data="labelled", epochs=5, keep_checkpoints=1, log_every=1, checkpoint_every=3, **TINY
    )
    config = config.model_copy(update={"mean": [0.5] * 3, "std": [0.25] * 3})
    labels = images.labels()
    assert labels is not None
    task = Classifier(len(labels.names))
    view = item_of(config).train_view(config, 1, False)
    start = load_newest(out / "checkpoints", print) if resume else None
    place = training.Place(out, engine)
    training.train_task(task, config, images, view, place, start=start, watch=Watch(**watch).hooks)
    return task


def test_a_task_with_labels_trains_resumes_bit_by_bit_and_keeps_its_best(
    labelled: Path, tmp_path: Path, engine: Engine
) -> None:
    images = open_source(str(labelled))
    whole = classify(images, tmp_path / "whole", engine)
    with pytest.raises(ConnectionError):
        classify(images, tmp_path / "parts", engine, stop_after=3)
    resumed = classify(images, tmp_path / "parts", engine, resume=True)
    assert same(whole.state_dict(), resumed.state_dict())
    for name in ("whole", "parts"):
        folder = tmp_path / name / "checkpoints"
        assert load(folder / "best").step == 6
        assert load(folder / "last").step == 15
        kept = {path.name for path in folder.glob("step-*")}
        assert kept == {"step-00000006.safetensors", "step-00000015.safetensors"}
    text = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    assert not same(whole.state_dict(), Classifier(2).state_dict())
    # The head's constant rate, above the body's half of a cosine.
    assert {json.loads(line)["lr"] for line in text} == {1e-2 * 8 / 256}


def test_a_run_of_labels_does_not_go_on_with_others(
    labelled: Path, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = open_source(str(labelled))
    classify(images, tmp_path / "run", engine)
    labels = images.labels()
    assert labels is not None
    other = open_source(str(labelled))
    turned = replace(labels, ids=1 - labels.ids)
    monkeypatch.setattr(type(other), "labels", lambda self: turned)
    with pytest.raises(UserError, match="other targets"):
        classify(other, tmp_path / "run", engine, resume=True)


def test_another_kind_of_run_is_refused_and_none_is_pre_training() -> None:
    assert from_settings(data="x").kind == "pretrain"
    assert "kind: pretrain" in from_settings(data="x").to_yaml()
    with pytest.raises(UserError, match=r"kind.*'paint'"):
        from_settings(data="x", kind="paint")


@pytest.fixture
def toy_of_contributing(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "toy.py" in b)
    (tmp_path / "toy.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)  # other tests have one of their own
    monkeypatch.setitem(METHODS, "toy", METHODS["mae"])  # taken out again when the test ends
    monkeypatch.setitem(sys.modules, "toy", importlib.import_module("toy"))


def test_a_method_from_elsewhere_trains_resumes_shows_reports_and_exports(
    toy_of_contributing: None,  # noqa: ARG001
    image_folder: Path,
    tmp_path: Path,
) -> None:
    images = sorted(image_folder.rglob("*.jpg"))
    run = patchmine.pretrain(
        data=image_folder,
        method={"name": "toy", "weight": 2.0},
        model="vit_tiny_patch16_224",
        model_args={"depth": 1, "embed_dim": 32, "num_heads": 2},
        image_size=32,
        patch_size=8,
        batch_size=4,
        steps=3,
        warmup_epochs=0,
        workers=0,
        device="cpu",
        tensorboard=False,
        out=tmp_path / "run",
        say=lambda _: None,
    )
    assert run.metrics()[-1]["step"] == 3
    assert run.method().config.weight == 2.0
    assert patchmine.resume(run.path, workers=0, say=lambda _: None).checkpoints
    assert run.show(images[0], tmp_path / "panel.png").is_file()
    assert run.report(tmp_path / "report.html").is_file()
    exported = patchmine.load_encoder(run.export(tmp_path / "export"))
    pixels = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(exported(pixels), run.encoder()(pixels))

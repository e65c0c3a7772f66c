"""What `import patchmine` gives: names, keywords, and a run that does what commands do."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import patchmine
from patchmine import api
from patchmine.config.schema import (
    DetectConfig,
    FinetuneConfig,
    PretrainConfig,
    SegmentConfig,
    names_of,
)


def test_the_names_are_those_that_are_promised_and_no_others() -> None:
    public = {name for name in dir(patchmine) if not name.startswith("__")}
    assert public == set(patchmine.__all__) - {"__version__"}
    assert 30 <= len(patchmine.__all__) <= 45
    for name in patchmine.__all__:
        assert getattr(patchmine, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = patchmine.nothing  # type: ignore[attr-defined]


def test_importing_brings_no_module_and_each_name_only_its_own() -> None:
    program = "import sys, patchmine; assert 'pydantic' not in sys.modules; "
    program += "patchmine.UserError, patchmine.KnnSettings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_keywords_of_pretrain_and_resume_are_the_settings() -> None:
    running = set(names_of(PretrainConfig, decide_weights=False))
    assert set(get_type_hints(api.RunningSettings)) == running
    own = {"data", "kind"}  # an argument of its own, and what pretrain itself says
    assert own | set(get_type_hints(api.RunSettings)) == set(PretrainConfig.model_fields)


def test_the_keywords_of_finetune_are_its_settings() -> None:
    own = {"data", "kind"}
    assert own | set(get_type_hints(api.FinetuneRunSettings)) == set(FinetuneConfig.model_fields)


def test_the_keywords_of_segment_are_its_settings() -> None:
    own = {"data", "kind"}
    assert own | set(get_type_hints(api.SegmentRunSettings)) == set(SegmentConfig.model_fields)


def test_the_keywords_of_detect_are_its_settings() -> None:
    own = {"data", "kind"}
    assert own | set(get_type_hints(api.DetectRunSettings)) == set(DetectConfig.model_fields)


@pytest.mark.parametrize("name", patchmine.__all__)
def test_every_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    thing: Any = getattr(patchmine, name)
    functions = [thing] if inspect.isfunction(thing) else []
    if inspect.isclass(thing) and thing.__module__ == "patchmine.api":
        functions = [each for key, each in vars(thing).items() if key[0] != "_"]
    for function in functions:
        doc = inspect.getdoc(function) or ""
        for heading in ("Args:", "Returns:", "Raises:"):
            assert f"\n{heading}\n" in doc, f"{function.__qualname__} has no {heading}"


def test_every_name_stands_on_its_page(repository: Path) -> None:
    page = (repository / "docs" / "api.md").read_text(encoding="utf-8")
    untold = {"__version__", "METHODS", "Losses"}
    missing = [
        n for n in patchmine.__all__ if n not in untold and f"::: patchmine.{n}\n" not in page
    ]
    assert not missing


def test_wrong_settings_of_an_evaluation_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: x\n", encoding="utf-8")
    run = patchmine.Run(tmp_path)
    with pytest.raises(
        patchmine.UserError, match=r"2 errors in the settings of KnnSettings:"
    ) as got:
        run.eval_knn("labelled", k=0, poling="cls")
    assert "k: given 0" in str(got.value)
    assert "did you mean pooling?" in str(got.value)
    with pytest.raises(patchmine.UserError, match=r"out: given 'x\.pdf'"):
        run.embed("photos", "x.pdf")

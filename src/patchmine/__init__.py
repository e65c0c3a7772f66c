"""patchmine: pre-train vision backbones on your own unlabelled images and videos.

``patchmine.pretrain(data="photos/", method="hpm", out="runs/hpm")`` makes a run,
``patchmine.Run(path)`` opens one, ``patchmine.load_encoder(path)`` gives its timm model.
Importing takes no time: each name brings its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchmine.api import Run as Run
    from patchmine.api import compare_shares as compare_shares
    from patchmine.api import detect as detect
    from patchmine.api import finetune as finetune
    from patchmine.api import import_weights as import_weights
    from patchmine.api import plan as plan
    from patchmine.api import pretrain as pretrain
    from patchmine.api import resume as resume
    from patchmine.api import segment as segment
    from patchmine.config.schema import DetectConfig as DetectConfig
    from patchmine.config.schema import FinetuneConfig as FinetuneConfig
    from patchmine.config.schema import PretrainConfig as PretrainConfig
    from patchmine.config.schema import SegmentConfig as SegmentConfig
    from patchmine.data.inspect import inspect as inspect
    from patchmine.data.settings import Clip as Clip
    from patchmine.data.settings import Crops as Crops
    from patchmine.data.sharding import write_shards as write_shards
    from patchmine.data.sources.source import open_source as open_source
    from patchmine.errors import UserError as UserError
    from patchmine.evaluate.embed import embed as embed
    from patchmine.evaluate.knn import evaluate_knn as evaluate_knn
    from patchmine.evaluate.linear import evaluate_linear as evaluate_linear
    from patchmine.evaluate.settings import EmbedSettings as EmbedSettings
    from patchmine.evaluate.settings import KnnSettings as KnnSettings
    from patchmine.evaluate.settings import LinearSettings as LinearSettings
    from patchmine.evaluate.settings import VideoSettings as VideoSettings
    from patchmine.evaluate.video import evaluate_video as evaluate_video
    from patchmine.methods import METHODS as METHODS
    from patchmine.models.settings import MethodSettings as MethodSettings
    from patchmine.report.page import write_report as write_report
    from patchmine.report.show import show as show
    from patchmine.runs.exporting import export_run as export_run
    from patchmine.runs.opening import load_encoder as load_encoder
    from patchmine.task import Method as Method
    from patchmine.task import Task as Task
    from patchmine.types import Batch as Batch
    from patchmine.types import Grid as Grid
    from patchmine.types import Losses as Losses
    from patchmine.types import Mask as Mask
    from patchmine.types import Panel as Panel
    from patchmine.types import ParamGroup as ParamGroup
    from patchmine.types import Progress as Progress
    from patchmine.types import Sample as Sample

__version__ = "0.1.0"

_HOMES = {
    "api": (
        "Run",
        "compare_shares",
        "detect",
        "finetune",
        "import_weights",
        "plan",
        "pretrain",
        "resume",
        "segment",
    ),
    "config.schema": ("DetectConfig", "FinetuneConfig", "PretrainConfig", "SegmentConfig"),
    "data.inspect": ("inspect",),
    "data.settings": ("Clip", "Crops"),
    "data.sharding": ("write_shards",),
    "data.sources.source": ("open_source",),
    "errors": ("UserError",),
    "evaluate.embed": ("embed",),
    "evaluate.knn": ("evaluate_knn",),
    "evaluate.linear": ("evaluate_linear",),
    "evaluate.settings": ("EmbedSettings", "KnnSettings", "LinearSettings", "VideoSettings"),
    "evaluate.video": ("evaluate_video",),
    "methods": ("METHODS",),
    "models.settings": ("MethodSettings",),
    "report.page": ("write_report",),
    "report.show": ("show",),
    "runs.exporting": ("export_run",),
    "runs.opening": ("load_encoder",),
    "task": ("Method", "Task"),
    "types": ("Batch", "Grid", "Losses", "Mask", "Panel", "ParamGroup", "Progress", "Sample"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'patchmine' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"patchmine.{_MODULES[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    dunders = {name for name in globals() if name.startswith("__")}
    return sorted({*__all__, *dunders})

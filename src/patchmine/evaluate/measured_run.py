"""What is measured of a run from Python: a method for each protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from patchmine.config.explain import validate
from patchmine.errors import Say
from patchmine.evaluate.attentive import evaluate_attentive
from patchmine.evaluate.clustering import evaluate_cluster
from patchmine.evaluate.fewshot import evaluate_fewshot
from patchmine.evaluate.knn import evaluate_knn
from patchmine.evaluate.linear import evaluate_linear
from patchmine.evaluate.quality import evaluate_quality
from patchmine.evaluate.retrieval import evaluate_retrieval
from patchmine.evaluate.settings import (
    AttentiveSettings,
    ClusterSettings,
    FewshotSettings,
    KnnSettings,
    LinearSettings,
    QualitySettings,
    RetrievalSettings,
    VideoSettings,
)
from patchmine.evaluate.video import evaluate_video
from patchmine.runs.folder import RunFolder

Model = TypeVar("Model", bound=BaseModel)


class MeasuredRun(RunFolder):
    """The folder of a run, whose frozen encoder can be measured."""

    def eval_knn(self, data: Any, *, say: Say = print, **settings: Any) -> dict[str, Any]:
        """Measure the frozen encoder by its nearest neighbours.

        Args:
            data: labelled images; folders train/ and test/ in it are used as such.
            say: hears about the progress.
            **settings: those of `KnnSettings`.

        Returns:
            The result that also stands in ``eval/knn.json``: ``top1``, ``top5`` in percent, ...

        Raises:
            UserError: settings or data cannot be used.
        """
        return evaluate_knn(self._of_target(KnnSettings, data, settings), say)

    def eval_linear(self, data: Any, *, say: Say = print, **settings: Any) -> dict[str, Any]:
        """Measure the frozen encoder by linear classifiers.

        Args:
            data: labelled images; folders train/ and test/ in it are used as such.
            say: hears about the progress.
            **settings: those of `LinearSettings`.

        Returns:
            The result that also stands in ``eval/linear.json``: ``top1``, ``top5`` in percent, ...

        Raises:
            UserError: settings or data cannot be used.
        """
        return evaluate_linear(self._of_target(LinearSettings, data, settings), say)

    def eval_attentive(self, data: Any, *, say: Say = print, **settings: Any) -> dict[str, Any]:
        """Measure the frozen encoder by classifiers that learn which patch tokens to look at.

        Args:
            data: labelled images; folders train/ and test/ in it are used as such.
            say: hears about the progress and the size of the tokens.
            **settings: those of `AttentiveSettings`.

        Returns:
            The result that also stands in ``eval/attentive.json``: ``top1``, ``top5``, ...

        Raises:
            UserError: settings or data cannot be used.
        """
        return evaluate_attentive(self._of_target(AttentiveSettings, data, settings), say)

    def eval_video(self, data: Any, *, say: Say = print, **settings: Any) -> list[dict[str, Any]]:
        """Measure an encoder of clips with several views of each video.

        Args:
            data: labelled videos; folders train/ and test/ in it are used as such.
            say: hears about the progress.
            **settings: those of `VideoSettings`.

        Returns:
            The results of the nearest neighbours and of the linear classifier.

        Raises:
            UserError: settings or data cannot be used.
        """
        return evaluate_video(self._of_target(VideoSettings, data, settings), say)

    def eval_fewshot(self, data: Any, *, say: Say = print, **settings: Any) -> dict[str, Any]:
        """Measure the frozen encoder with a few labelled images of each class.

        Args:
            data: labelled images; folders train/ and test/ in it are used as such.
            say: hears about the progress.
            **settings: those of `FewshotSettings`.

        Returns:
            The result that also stands in ``eval/fewshot.json``: ``knn_5_shot``, ...

        Raises:
            UserError: settings or data cannot be used.
        """
        return evaluate_fewshot(self._of_target(FewshotSettings, data, settings), say)

    def eval_cluster(self, data: Any, *, say: Say = print, **settings: Any) -> dict[str, Any]:
        """Compare clusters of the frozen features with the classes.

        Args:
            data: labelled images, of which all are clustered.
            say: hears about the progress.
            **settings: those of `ClusterSettings`.

        Returns:
            The result that also stands in ``eval/cluster.json``: ``nmi`` and ``ari``.

        Raises:
            UserError: settings or data cannot be used.
        """
        return evaluate_cluster(self._of_target(ClusterSettings, data, settings), say)

    def eval_retrieval(self, data: Any, *, say: Say = print, **settings: Any) -> dict[str, Any]:
        """Measure how well the frozen features find images of the same class.

        Args:
            data: labelled images; folders train/ and test/ in it are used as such.
            say: hears about the progress.
            **settings: those of `RetrievalSettings`.

        Returns:
            The result that also stands in ``eval/retrieval.json``: ``map``, ``recall_1``, ...

        Raises:
            UserError: settings or data cannot be used.
        """
        return evaluate_retrieval(self._of_target(RetrievalSettings, data, settings), say)

    def eval_quality(self, data: Any, *, say: Say = print, **settings: Any) -> dict[str, Any]:
        """Measure how many directions the frozen features use.

        Args:
            data: images; labels are not needed.
            say: hears about the progress.
            **settings: those of `QualitySettings`.

        Returns:
            The result that also stands in ``eval/quality.json``: ``rankme`` and ``alpha``.

        Raises:
            UserError: settings or data cannot be used.
        """
        return evaluate_quality(self._of_target(QualitySettings, data, settings), say)

    def _of_target(self, model: type[Model], data: Any, settings: Mapping[str, Any]) -> Model:
        """Settings of an evaluation of this run."""
        values = {"target": str(self.path), "data": data, **settings}
        return validate(model, values, where=f"the settings of {model.__name__}")

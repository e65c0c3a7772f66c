"""What is made of a run from Python: features, predictions, pictures, pages, exports."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

from patchmine.config.explain import validate
from patchmine.config.keywords import Name
from patchmine.errors import Say
from patchmine.evaluate.embed import embed
from patchmine.evaluate.measured_run import MeasuredRun
from patchmine.evaluate.predict import predicted
from patchmine.evaluate.settings import EmbedSettings, PredictSettings
from patchmine.report.explore import explore
from patchmine.report.page import write_report
from patchmine.report.predictions import predict
from patchmine.report.settings import ExploreSettings
from patchmine.report.show import show
from patchmine.runs.exporting import export_run


class UsedRun(MeasuredRun):
    """The folder of a run, from which files can be made."""

    def embed(self, data: Any, out: Name, *, say: Say = print, **settings: Any) -> Path:
        """Write one feature vector per image, or video, to a file.

        Args:
            data: images; labels are not needed.
            out: file that ends in .parquet, .csv or .npz.
            say: hears about the progress.
            **settings: those of `EmbedSettings`.

        Returns:
            The file.

        Raises:
            UserError: settings or data cannot be used, or the file cannot be written.
        """
        return embed(self._of_target(EmbedSettings, data, {"out": out, **settings}), say)

    @overload
    def predict(
        self, data: Any, out: None = None, *, say: Say = print, **settings: Any
    ) -> dict[str, list[Any]]: ...

    @overload
    def predict(self, data: Any, out: Name, *, say: Say = print, **settings: Any) -> Path: ...

    def predict(
        self, data: Any, out: Name | None = None, *, say: Say = print, **settings: Any
    ) -> dict[str, list[Any]] | Path:
        """What this fine-tuned run says of images, or of videos.

        Args:
            data: images; labels are not needed.
            out: a .csv or .parquet file, or a folder for a table and pictures, which a run that
                segments or detects always writes; None: no file.
            say: hears about the progress.
            **settings: those of `patchmine config schema predict`.

        Returns:
            Without ``out`` lists of equal length: ``file``, ``class``, ``probability``, as the
            table has them; of a run that segments ``file`` and ``classes``, arrays (H, W); of one
            that detects ``file``, ``boxes`` (N, 4) (left, top, right, bottom) in pixels,
            ``labels``, ``names``, ``scores`` and, where it finds them, ``masks`` as run lengths.
            Else the file or folder.

        Raises:
            UserError: the run was not fine-tuned, settings or data cannot be used, or the place
                cannot be written.
        """
        place = {} if out is None else {"out": out}
        values = {"run": str(self.path), "data": data, **place, **settings}
        given = validate(PredictSettings, values, where="the settings of predict")
        return predicted(given, say) if out is None else predict(given, say)

    def explore(
        self, data: Any, out: Name = "explore.html", *, say: Say = print, **settings: Any
    ) -> Path:
        """Write one HTML page about a data set as this run sees it, and a table to clean it by.

        Args:
            data: images, or videos; labels are not needed.
            out: the page to write; the table stands beside it as a CSV file.
            say: hears about the progress.
            **settings: those of `patchmine config schema explore`.

        Returns:
            The page's file.

        Raises:
            UserError: settings or data cannot be used, or a file cannot be written.
        """
        return explore(self._of_target(ExploreSettings, data, {"out": out, **settings}), say)

    def show(
        self, images: Name | Sequence[Name], out: Name = "panel.png", *, seed: int = 0
    ) -> Path:
        """Draw input, mask, prediction and error for some images, or videos.

        Args:
            images: their files.
            out: the picture to write; of videos also .gif or .mp4.
            seed: decides the random masks.

        Returns:
            The picture's file.

        Raises:
            UserError: an image cannot be read, or the run holds no whole method.
        """
        names = [images] if isinstance(images, str | PathLike) else images
        return show(self.path, [str(name) for name in names], str(out), seed=seed)

    def report(self, out: Name = "report.html", *, others: Sequence[Name] = ()) -> Path:
        """Write one HTML page about this run, beside others if there are any.

        Args:
            out: the page to write.
            others: folders of runs to compare it with.

        Returns:
            The page's file.

        Raises:
            UserError: one of them is no run, or the page cannot be written.
        """
        return write_report([str(self.path), *map(str, others)], str(out))

    def export(
        self,
        out: Name | None = None,
        *,
        what: Literal["auto", "encoder", "full"] = "auto",
        to: Literal["timm", "onnx", "torch", "transformers"] = "timm",
        weights: str = "student",
        say: Say = print,
    ) -> Path:
        """Write what the run learned as a folder that timm and transformers open, or as one file.

        Args:
            out: the folder or file; None: ``export/``, ``export.onnx`` or ``export.pt2`` in the
                run.
            what: "auto" is the encoder, with the classifier of a fine-tuned run, and in one file
                with the head of a run that segments; "encoder" is the encoder alone; "full" writes
                the whole method of a run that pre-trains, as one .safetensors file.
            to: "onnx" writes one file, and compares its outputs in onnxruntime with the run's;
                "torch" one that `torch.export.load` opens, and compares likewise, or of a run that
                detects a folder with a loader; "transformers" writes timm's folder, and compares
                it as transformers opens it.
            weights: which network; "teacher" is the EMA copy, where the method keeps one.
            say: hears what a comparison found.

        Returns:
            The folder or file.

        Raises:
            UserError: the run lacks that network, a library is missing that ``to`` needs, outputs
                differ there, or the place cannot be written.
        """
        place = None if out is None else str(out)
        return export_run(self.path, place, what=what, weights=weights, to=to, say=say)

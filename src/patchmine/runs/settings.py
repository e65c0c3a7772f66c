"""Settings of what goes out of a run folder and into one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from patchmine.strict import (
    Arguments,
    Count,
    FolderName,
    SettingError,
    Size,
    Strict,
    Text,
    ends_in,
    is_folder_name,
)


def _export_name(name: str | None, info: ValidationInfo) -> str | None:
    if name is None:
        return None
    if info.data.get("what") == "full":
        return ends_in(".safetensors")(name)
    if info.data.get("to") == "onnx":
        return ends_in(".onnx")(name)
    if name.lower().endswith(".onnx"):
        raise ValueError("the name of a folder; to=onnx writes a file that ends in .onnx")
    if info.data.get("to") != "torch" and name.lower().endswith(".pt2"):
        raise ValueError("the name of a folder; to=torch writes a file that ends in .pt2")
    return is_folder_name(name)


class ExportSettings(Strict):
    """Write what a run learned for timm, ONNX or torch alone.

    The encoder goes with the classifier of a fine-tuned run, and to=onnx and to=torch write all of
    a run that segments.  timm.create_model("local-dir:FOLDER", pretrained=True) opens the folder;
    to=transformers writes the same one and compares what transformers makes of it; to=onnx and
    to=torch write one file and compare what onnxruntime, or torch.export, makes of it.  Of a run
    that detects to=torch writes a folder, whose load.py finds objects by torchvision.

    Example:
        patchmine export runs/hpm out=hpm-vit-s
        patchmine export runs/classify to=onnx out=birds.onnx
        patchmine export runs/segment to=torch out=streets.pt2
    """

    run: Text = Field(description="name the folder of a run first, as in patchmine export runs/hpm")
    what: Literal["auto", "encoder", "full"] = Field(
        "auto",
        description="auto: all that the format takes; encoder: alone; full: the whole method of a "
        "run that pre-trains, under the reference's names",
    )
    to: Literal["timm", "onnx", "torch", "transformers"] = Field(
        "timm",
        description="a folder; one .onnx file; one .pt2 file, of a run that detects a folder; "
        "timm's folder again: the last three are compared with the run",
    )
    out: Annotated[Text | None, AfterValidator(_export_name)] = Field(
        None, description="folder or file to write; null: export, or export.onnx, in the run"
    )
    weights: Literal["student", "teacher", "partner", "partner-teacher"] = Field(
        "student",
        description="teacher: the EMA copy, where there is one; partner: the second of a pair",
    )

    def setting_errors(self) -> Iterator[SettingError]:
        if self.what == "full" and self.to != "timm":
            must = "must be left out with what=full, which is one .safetensors file"
            yield SettingError("to", f"given '{self.to}'; {must}")


class ImportSettings(Strict):
    """Turn a checkpoint of somebody else into a run.

    A report tells what became of every tensor; nothing missing or unexpected is passed over.

    Example:
        patchmine import mae_pretrain_vit_base.pth out=runs/mae-official
    """

    file: Text = Field(
        description="name the file first, as in patchmine import mae.pth out=runs/mae"
    )
    out: FolderName = Field(description="name the folder to write, as in out=runs/mae")
    model: Text | None = Field(None, description="timm's name of the network, where nothing tells")
    model_args: Arguments = Field({}, description="more arguments for timm: init_values, ...")
    weights: Literal["auto", "student", "raw", "teacher", "ema"] = Field(
        "auto",
        description="student, raw: the trained network; teacher, ema: its average; auto: as known",
    )
    prefix: str | None = Field(None, description="of the encoder's names, where there are several")
    what: Literal["auto", "encoder", "full"] = Field(
        "auto", description="auto: as much as the file has"
    )
    image_size: Size | None = Field(None, description="pixels; positions are resampled to it")
    source_size: Size | None = Field(None, description="pixels that the file was trained at")
    num_heads: Count | None = Field(None, description="attention heads, where nothing tells")
    decoder_num_heads: Count | None = Field(None, description="the same of the decoder")
    allow: list[str] = Field([], description="tensors that may be missing, or beside: [head.*]")

    def setting_errors(self) -> Iterator[SettingError]:
        if self.model_args and self.model is None:
            yield SettingError("model_args", "given without model, whose arguments they are")

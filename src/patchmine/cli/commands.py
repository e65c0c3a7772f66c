"""The words after a command as typed settings: what stands first (a run, images) and `key=value`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo

from patchmine.config.explain import validate
from patchmine.config.words import put, read_settings, repeated
from patchmine.errors import shown_name
from patchmine.strict import (
    Count,
    FolderName,
    Mistake,
    Positive,
    Side,
    Strict,
    ends_in,
    is_folder_name,
)

Model = TypeVar("Model", bound=BaseModel)


def read_words(
    model: type[Model],
    words: Sequence[str],
    *,
    command: str,
    first: Sequence[str] = (),
    rest: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Model:
    """The settings of a command.

    Words without ``=`` fill the fields named in ``first``, in order, and then the list ``rest``.
    ``say`` hears of settings that are given twice.  Raises UserError with every mistake.
    """
    pairs, complaints, plain = read_settings(words)
    settings: dict[str, Any] = {}
    mistakes = [Mistake(*complaint) for complaint in complaints]
    for name, value in pairs:
        # Here too method=hpm is short for method.name=hpm, so that method.KEY=VALUE may stand
        # beside it.
        path = "method.name" if name == "method" and not isinstance(value, dict) else name
        complaint = put(settings, path, value)
        mistakes += [Mistake(name, complaint)] if complaint else []
    for sentence in repeated(pairs):
        say(sentence)
    settings |= zip(first, plain, strict=False)
    more = plain[len(first) :]
    if rest is not None and more:
        settings[rest] = more
    else:
        mistakes += [
            Mistake(shown_name(word), "one word too many; settings are written key=value")
            for word in more
        ]
    known = ", ".join(name for name in model.model_fields if name not in (*first, rest))
    hint = f"; there are {known}" if known else ""
    return validate(model, settings, where=f"`patchmine {command}`", before=mistakes, hint=hint)


class Show(Strict):
    """`patchmine show`."""

    run: str = Field(
        description="name the folder of a run first, as in `patchmine show runs/hpm a.jpg out=panel.png`"
    )
    images: list[str] = Field(
        min_length=1, description="name image files after the run, or videos of a run on videos"
    )
    out: str = Field("panel.png", description="picture to write; of videos also .gif or .mp4")
    seed: int = Field(0, ge=0, description="decides the random masks")


class Report(Strict):
    """`patchmine report`."""

    runs: list[str] = Field(
        min_length=1,
        description="name one run folder or several, as in `patchmine report runs/hpm`",
    )
    out: Annotated[str, AfterValidator(ends_in(".html", ".htm"))] = Field(
        "report.html", description="page to write"
    )


def _export_name(name: str | None, info: ValidationInfo) -> str | None:
    if name is None:
        return None
    return (
        ends_in(".safetensors")(name) if info.data.get("what") == "full" else is_folder_name(name)
    )


class Export(Strict):
    """`patchmine export`."""

    run: str = Field(
        description="name the folder of a run first, as in `patchmine export runs/hpm`"
    )
    what: Literal["encoder", "full"] = Field(
        "encoder", description="the encoder alone, or the method with its decoder"
    )
    out: Annotated[str | None, AfterValidator(_export_name)] = Field(
        None,
        description="folder to write; null: export/ or export-partner/ in the run; of what=full a .safetensors file",
    )
    weights: Literal["student", "teacher", "partner", "partner-teacher"] = Field(
        "student",
        description="teacher: the slow copy that HPM keeps; partner: the second network of a pair",
    )


class Import(Strict):
    """`patchmine import`."""

    file: str = Field(
        description="name the file first, as in `patchmine import mae_pretrain_vit_base.pth out=runs/mae`"
    )
    out: FolderName = Field(description="name the folder to write, as in out=runs/mae")
    weights: Literal["auto", "student", "raw", "teacher", "ema"] = Field(
        "auto",
        description="student (or raw): the trained network; teacher (or ema): its average; auto: DINO's teacher",
    )
    prefix: str | None = Field(
        None, description="of the encoder's names, where the file holds several encoders"
    )
    what: Literal["auto", "encoder", "full"] = Field(
        "auto", description="auto: the decoder too, where the file has one"
    )
    image_size: Side | tuple[Side, Side] | None = Field(
        None, description="pixels, one number or [height, width]; positions are resampled to it"
    )
    source_size: Side | tuple[Side, Side] | None = Field(
        None, description="the image size that the file was trained at, where nothing tells it"
    )
    num_heads: Count | None = Field(
        None, description="attention heads, where the width does not tell"
    )
    decoder_num_heads: Count | None = Field(None, description="the same of the decoder")
    allow: list[str] = Field(
        [], description="tensors that may be missing or unexpected, as in allow=[head.*]"
    )


class Inspect(Strict):
    """`patchmine data inspect`."""

    data: str = Field(description="name the images first, as in `patchmine data inspect photos/`")
    sample: Positive = Field(1000, description="images that are decoded")
    full: bool = Field(False, description="decode all images")
    video: bool = Field(False, description="these are videos; one frame of each is looked at")
    max_pixels: Positive | None = Field(None, description="as in a run; null: its default")


class Shard(Strict):
    """`patchmine data shard`."""

    data: str = Field(
        description="name the images first, as in `patchmine data shard photos/ out=shards/`"
    )
    out: FolderName = Field(description="name the folder to write, as in out=shards/")
    max_side: Count | None = Field(
        None, description="shrink larger images to this longest side, in pixels"
    )
    shard_mb: Count = Field(256, description="size of a shard, in megabytes")


class BenchData(Strict):
    """`patchmine bench data`."""

    data: str = Field(description="name the images, as in data=photos/")
    image_size: Side = Field(224, description="side of the crops, in pixels")
    repeats: Count = Field(5, description="times that all images are read")
    video: bool = Field(False, description="these are videos: time the reading of clips")
    frames: Count = Field(16, description="of a clip, where these are videos")
    stride: Count = Field(4, description="a clip takes every such frame of a video")

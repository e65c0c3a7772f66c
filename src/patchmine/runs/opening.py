"""The encoder of anything that has one: a run, an export, a file of weights."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from patchmine.backbones import filling
from patchmine.backbones import weights as files
from patchmine.backbones.family import Encoder
from patchmine.backbones.naming import Weights
from patchmine.errors import UserError, shown_name
from patchmine.runs.folder import RunFolder
from patchmine.runs.known import is_run


def load_encoder(
    path: str | PathLike[str],
    model: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    *,
    source_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    weights: Weights = "auto",
    prefix: str | None = None,
) -> Encoder:
    """The encoder of a run, an export or a weights file, in eval mode.

    Args:
        path: the folder of a run or export, a folder of timm or transformers, or a .safetensors,
            .pth, .pt or .bin file with the names of timm, MAE, HPM, VideoMAE, DINO, transformers,
            mmpretrain or torchvision.
        model: timm's name, where neither the tensors nor a config.json tell it.
        image_size: the size that it is wanted at, in pixels, one number or (height, width);
            positions are resampled from the grid that they were trained at.  None: that one.
        source_size: the size that a file was trained at, where nothing tells it.
        num_heads: attention heads, where the width is an unusual one and nothing tells them.
        weights: the trained network (student, raw) or its average (teacher, ema), where there are
            both.
        prefix: of the encoder's names, where a file holds several encoders.

    Returns:
        A ``VisionTransformer``, ``Beit`` or ``ResNet`` of timm's, or a `VideoTransformer`, without
        classifier: images (B, C, H, W), or clips (B, C, T, H, W), to features.

    Raises:
        UserError: there is no encoder, or it does not fit.
    """
    size = files.as_size(image_size, "image_size")
    if not is_run(path):
        encoder = files.load_encoder(
            Path(path),
            model=model,
            image_size=size,
            source_size=files.as_size(source_size, "source_size"),
            num_heads=num_heads,
            weights=weights,
            prefix=prefix,
        )
        return encoder.eval()
    given = dict(model=model, source_size=source_size, num_heads=num_heads, prefix=prefix)
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"{name}={value!r} is for files; {shown_name(path)} is a run, which knows it: "
                "leave it out"
            )
    run = RunFolder(path)
    known = {"teacher": "teacher", "ema": "ema" if run.keeps_average else "teacher"}
    encoder = run.encoder(known.get(weights, "student"))
    if size is not None:
        filling.resize_encoder(encoder, size)
    return encoder

"""Small sound files of every format that is read, from which mutants are made."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

CANARY = "CANARY"  # a file of this name in the working folder: something was executed
_SIZE = (24, 20)


class Trap:
    """Makes the canary when it is unpickled by a reader that executes what it reads."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


TRAPS = (
    Trap(os.system, f"touch {CANARY}"),
    Trap(open, CANARY, "w"),
    Trap(eval, f"open('{CANARY}', 'w')"),
)


def images() -> dict[str, list[bytes]]:
    """Format -> files."""
    noise = np.random.default_rng(0).integers(0, 255, (*_SIZE, 4), dtype=np.uint8)
    colour, grey, deep = (
        Image.fromarray(noise[..., :3]),
        Image.fromarray(noise[..., 0]),
        noise.view(np.uint16),
    )
    smooth = colour.resize((96, 64), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {
        "jpeg": [
            *(
                _saved(smooth, "JPEG", quality=80, exif=exif),
                _saved(smooth, "JPEG", progressive=True),
            ),
            *(_saved(grey, "JPEG"), _saved(colour.convert("CMYK"), "JPEG"), _saved(smooth, "MPO")),
        ],
        "png": [
            *(
                _saved(colour, "PNG", exif=exif),
                _saved(Image.fromarray(noise), "PNG"),
                _saved(grey, "PNG"),
            ),
            *(_saved(colour.quantize(16), "PNG", transparency=3), _saved(grey.convert("1"), "PNG")),
        ],
        "png of 16 bits": [_saved(Image.fromarray(deep[..., 0].copy()), "PNG"), _deep_png(deep)],
        "gif": [
            _saved(colour, "GIF"),
            _saved(colour, "GIF", save_all=True, append_images=[grey, colour], duration=40),
        ],
        "webp": [_saved(smooth, "WEBP"), _saved(colour, "WEBP", lossless=True, exif=exif)],
        "bmp": [_saved(colour, "BMP"), _saved(colour.quantize(16), "BMP")],
        "ppm": [
            _saved(colour, "PPM"),
            _saved(grey, "PPM"),
            b"P3 2 2 255\n1 2 3 4 5 6 7 8 9 10 11 12\n",
            b"P1 3 2\n1 0 1 0 1 0\n",
        ],
        "tiff": [
            *(
                _saved(colour, "TIFF", compression=how)
                for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
            ),
            *(
                _saved(colour, "TIFF", exif=exif),
                _saved(grey, "TIFF", save_all=True, append_images=[grey, grey]),
            ),
        ],
        "tiff with many channels": _deep_tiffs(deep),
        "npy": [
            _array(noise),
            _array(deep),
            _array(np.float32(deep[..., 0])),
            _array(np.asfortranarray(noise)),
            _pickled_array(),
        ],
    }
    for name, suffix in (("avif", "AVIF"), ("jpeg 2000", "JPEG2000")):
        if suffix in Image.SAVE:
            found[name] = [_saved(smooth, suffix)]
    return found


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _deep_png(deep: np.ndarray) -> bytes:
    """16 bits in grey and alpha, which Pillow does not write: a relabelled RGBA of 8."""
    import struct
    import zlib

    data = _saved(Image.fromarray(deep.view(np.uint8).reshape(deep.shape[0], -1, 4)), "PNG")
    header = b"IHDR" + data[16:24] + b"\x10\x04" + data[26:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _deep_tiffs(deep: np.ndarray) -> list[bytes]:
    import tifffile

    def written(array: np.ndarray, **options: Any) -> bytes:
        out = io.BytesIO()
        tifffile.imwrite(out, array, **options)
        return out.getvalue()

    channels = np.stack([deep[..., 0]] * 5)
    return [
        written(channels, photometric="minisblack", planarconfig="separate"),
        written(
            channels.transpose(1, 2, 0).copy(), photometric="minisblack", planarconfig="contig"
        ),
        written(channels, photometric="minisblack"),
        written(deep[..., 0].astype(np.float32), compression="zlib", predictor=True),
        written(deep, photometric="minisblack", bigtiff=True),
        written(channels, photometric="minisblack", ome=True),
        written(np.kron(deep[..., 0], np.ones((2, 4), np.uint16)), tile=(16, 16)),
    ]


def _array(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _pickled_array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([TRAPS[0], TRAPS[1]], dtype=object), allow_pickle=True)
    return out.getvalue()


def shards(pictures: dict[str, list[bytes]]) -> list[bytes]:
    """Tar archives with notes, labels, and names beyond 100 characters."""
    found = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
            for number in range(3):
                folder = ("a" * 60 + "/") * 2 if number == 2 else ""
                for suffix, content in (
                    ("png", pictures["png"][number]),
                    (
                        "json",
                        json.dumps({"label": number % 2, "path": f"was/{number}.png"}).encode(),
                    ),
                ):
                    info = tarfile.TarInfo(f"{folder}{number:04d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        found.append(out.getvalue())
    return found


LISTS = {
    ".txt": b"# images\n0.png 3\n1.jpg\t4\nsub folder/2.png 3\n",
    ".csv": b'path,label\n0.png,a\n1.jpg,"b, c"\n"sub folder/2.png",a\n',
    ".tsv": b"label\tfilename\na\t0.png\nb\t1.jpg\na\tsub folder/2.png\n",
}


def official_weights() -> dict[str, Tensor]:
    """A tiny MAE under the names of its authors' code."""
    import yaml
    from scene import SETTINGS

    from patchmine.backbones.reference import to_reference_names
    from patchmine.config.resolve import from_settings
    from patchmine.runs.folder import build_method

    settings = {
        key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in SETTINGS)
    }
    method = build_method(from_settings(data="x", **settings))
    tensors = dict(to_reference_names(method.state_dict()))
    table = method.get_submodule("decoder_input").get_buffer("pos_embed")
    tensors["decoder_pos_embed"] = torch.cat([table.new_zeros(1, table.shape[1]), table])[None]
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def other_weights() -> dict[str, Tensor]:
    """A tiny ResNet under torchvision's names, as from a wrapper that puts a prefix before them."""
    import timm

    network = timm.create_model(
        "resnet18", layers=(1, 1, 1, 1), channels=(4, 4, 8, 8), num_classes=0
    )
    return {f"module.{name}": tensor for name, tensor in network.state_dict().items()}


def pickles(tensors: dict[str, Tensor], *, zipped: bool) -> list[bytes]:
    """Checkpoints by torch.save, and such that execute something."""
    contents: list[Any] = [
        {"model": tensors, "args": argparse.Namespace(mask_ratio=0.75), "epoch": 3},
        {"state_dict": tensors},
    ]
    contents += [{"model": {**tensors, "x": trap}} for trap in TRAPS]
    found = []
    for content in contents:
        out = io.BytesIO()
        torch.save(content, out, _use_new_zipfile_serialization=zipped)
        found.append(out.getvalue())
    return found if zipped else [*found, *(pickle.dumps(trap) for trap in TRAPS)]


def torchscript(tensors: dict[str, Tensor]) -> list[bytes]:
    """The same tensors as attributes of scripted modules."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *parents, last = name.split(".")
        module = root
        for part in parents:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, tensor)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch, and still the format of old files
        torch.jit.save(torch.jit.script(root), out)
    return [out.getvalue()]


def safetensors(tensors: dict[str, Tensor]) -> list[bytes]:
    """One file, and one in half precision."""
    return [
        save_safetensors(tensors, metadata={"format": "pt"}),
        save_safetensors({k: v.half() for k, v in tensors.items()}),
    ]


def videos(folder: Path) -> dict[str, list[bytes]]:
    """Ending -> files of a few frames; nothing where PyAV is missing."""
    try:
        import av
    except ImportError:
        return {}
    frames = np.random.default_rng(0).integers(0, 255, (10, 48, 64, 3), dtype=np.uint8)
    found: dict[str, list[bytes]] = {}
    for suffix, codec in (
        (".mp4", "mpeg4"),
        (".mp4", "libx264"),
        (".avi", "mpeg4"),
        (".avi", "mjpeg"),
        (".mkv", "mpeg4"),
        (".webm", "libvpx-vp9"),
    ):
        path = folder / f"{codec}{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = (
                64,
                48,
                "yuvj420p" if codec == "mjpeg" else "yuv420p",
            )
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        found.setdefault(suffix, []).append(path.read_bytes())
    return found


EVALUATION = json.dumps(
    {
        "name": "knn",
        "protocol": "knn",
        "top1": 71.5,
        "top5": 99.0,
        "by_k": {"10": {"top1": 70.0}, "20": {"top1": 71.5}},
        "floors": {
            "random_init": {"top1": 30.0, "top5": 80.0},
            "raw_pixels": {"top1": 33.0, "top5": 81.0},
        },
        "target": {"name": "runs/x", "weights": "student", "note": ""},
        "images": {
            "how": "train/ and test/",
            "train": 100,
            "test": 50,
            "classes": 10,
            "image_size": [32, 32],
        },
        "seconds_spent": {"features": 1.5, "all": 2.5},
        "notes": ["a note"],
    }
).encode()

"""From images or clips to features of a frozen encoder: read once, in order, for everything
measured on them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.backbones.tokens import embed_patches
from patchmine.data.badfiles import BadFiles
from patchmine.data.loader import plain_batches
from patchmine.data.sources.contract import Source
from patchmine.data.views.clips import PlainClips
from patchmine.data.views.images import PlainView, View
from patchmine.data.views.normalise import normalise
from patchmine.errors import UserError, shown_name
from patchmine.evaluate.labelled import Part, everything
from patchmine.evaluate.progress import Say, progress, silent
from patchmine.evaluate.targets import Target, at_rest
from patchmine.types import Batch

LONGEST_SIDE, LONGEST_CLIP_SIDE = (
    32,
    8,
)  # of images, and of a clip's frames, whose bare pixels are features


@dataclass(frozen=True)
class Reading:
    """How images are read; none of it changes a result beyond rounding.

    ``batch_size``: images at once, of which the frames of a clip are so many.  ``max_bad_share``:
    broken images above which to stop.
    """

    batch_size: int = 256
    workers: int | Literal["auto"] = "auto"
    device: str = "auto"
    max_bad_share: float = 0.05

    def place(self) -> torch.device:
        """The device that is meant."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device={self.device}, but torch sees no GPU: give device=cpu")
        return torch.device(self.device)

    def num_workers(self) -> int:
        """Processes that decode images: "auto" leaves one core to the model."""
        return min(8, (os.cpu_count() or 1) - 1) if self.workers == "auto" else self.workers


@dataclass(frozen=True)
class Features:
    """``x`` (N, D), or (N, S, D) with S columns, float32; ``labels`` (N,) int64 where there are
    any; ``index`` (N,), items of the source.
    """

    x: Tensor
    labels: Tensor | None
    index: Tensor

    def __len__(self) -> int:
        return len(self.x)


class Reader:
    """Turns normalised images (B, C, H, W), or clips (B, C, T, H, W), into columns (B, S, D)
    float32: class tokens of the last blocks, then means of their patches.

    ``poolings``: which columns, laid end to end, are meant by a name: ``cls``, ``mean``,
    ``cls+mean`` of the last block, and with more ``blocks`` also ``cls, last 4 blocks`` and so on.
    The final norm is applied to every block.  A network without tokens has one column, ``pooled``
    (its own pooling); no encoder at all gives ``pixels``, the image shrunk to at most 32 pixels,
    all frames of a clip to at most 8.
    """

    def __init__(self, target: Target, blocks: int = 1) -> None:
        self.target = target
        self.blocks = 0
        encoder: Any = target.encoder  # timm's models share names, not types
        if encoder is None:
            self.poolings: dict[str, list[int]] = {"pixels": [0]}
        elif not hasattr(encoder, "num_prefix_tokens") or not hasattr(encoder, "blocks"):
            self.poolings = {"pooled": [0]}
        else:
            self.blocks = min(blocks, len(encoder.blocks))
            self.has_class_token = getattr(encoder, "cls_token", None) is not None
            self.poolings = _token_poolings(self.blocks, self.has_class_token)

    def choose(self, pooling: str) -> str:
        """``pooling``, or what stands in for ``cls`` where there is no class token.  Raises
        UserError for an unknown one.
        """
        if pooling in self.poolings:
            return pooling
        if pooling == "cls" or not self.blocks:
            return next(iter(self.poolings))
        raise UserError(f"pooling={pooling!r}: {self.target.name} has {', '.join(self.poolings)}")

    def __call__(self, images: Tensor) -> Tensor:
        """(B, S, D) float32."""
        encoder: Any = self.target.encoder
        if encoder is None:
            return _shrunk(images).flatten(1)[:, None]
        if not self.blocks:
            pooled: Tensor = encoder.forward_head(encoder.forward_features(images), pre_logits=True)
            return pooled.float()[:, None]
        tokens = self._tokens(encoder, images)
        prefix: int = encoder.num_prefix_tokens
        columns = [x[:, 0].float() for x in tokens] if self.has_class_token else []
        columns += [x[:, prefix:].float().mean(1) for x in tokens]
        return torch.stack(columns, dim=1)

    def _tokens(self, encoder: Any, images: Tensor) -> list[Tensor]:
        """The tokens of the last blocks after the final norm, the last block last: (B, P + L, D)
        each.
        """
        if self.blocks == 1:
            return [encoder.forward_features(images)]
        if self.target.clip is not None:
            return _last_blocks(encoder, images, self.blocks)
        parts = encoder.forward_intermediates(
            images,
            indices=self.blocks,
            norm=True,
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return [
            part if isinstance(part, Tensor) else torch.cat([part[1], part[0]], dim=1)
            for part in parts
        ]


class FrameReader(Reader):
    """Lets an encoder of images read clips (B, C, T, H, W): columns (B, S, D) are means over the
    frames.

    What it gives knows nothing of the order of frames, so it is the floor that an encoder of videos
    has to rise above. ``clips``: the target as which the clips are prepared; frames are normalised
    and resized anew for this one.
    """

    def __init__(self, target: Target, clips: Target, blocks: int = 1) -> None:
        super().__init__(target, blocks)
        if target.clip is not None:
            raise UserError(
                f"image={target.name} is an encoder of videos: give one of images, or leave image= out"
            )
        if target.channels != clips.channels:
            raise UserError(
                f"image={target.name} takes {target.channels} channels, {clips.name} {clips.channels}"
            )
        mean, std = torch.tensor(target.mean), torch.tensor(target.std)
        self.scale = (torch.tensor(clips.std) / std)[:, None, None]
        self.shift = ((torch.tensor(clips.mean) - mean) / std)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, S, D) float32."""
        frames = images.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
        frames = frames * self.scale.to(frames.device) + self.shift.to(frames.device)
        if tuple(frames.shape[-2:]) != self.target.image_size:
            frames = F.interpolate(frames, self.target.image_size, mode="bicubic", antialias=True)
        columns = super().__call__(frames)  # (B * T, S, D)
        return columns.view(len(images), -1, *columns.shape[1:]).mean(1)


def _last_blocks(encoder: Any, clips: Tensor, blocks: int) -> list[Tensor]:
    """What timm's ``forward_intermediates`` gives of images: (B, L, D) of each of the last blocks,
    normed.
    """
    tokens = encoder.norm_pre(embed_patches(encoder, clips))
    kept = []
    for number, block in enumerate(encoder.blocks):
        tokens = block(tokens)
        if number >= len(encoder.blocks) - blocks:
            kept.append(encoder.norm(tokens))
    return kept


def _token_poolings(blocks: int, has_class_token: bool) -> dict[str, list[int]]:
    n = blocks
    means = range(n, 2 * n) if has_class_token else range(n)
    last, every = {"mean": [means[-1]]}, {"mean": list(means)}
    if has_class_token:
        last = {"cls": [n - 1], **last, "cls+mean": [n - 1, means[-1]]}
        every = {"cls": list(range(n)), **every, "cls+mean": list(range(2 * n))}
    return (
        last
        if n == 1
        else last | {f"{name}, last {n} blocks": columns for name, columns in every.items()}
    )


def _shrunk(images: Tensor) -> Tensor:
    """Images (frames) whose longer side is at most 32 (8) pixels; smaller ones as they are."""
    longest = LONGEST_SIDE
    if images.ndim == 5:  # time counts as channels, which are resized one by one
        images, longest = images.flatten(1, 2), LONGEST_CLIP_SIDE
    height, width = images.shape[-2:]
    share = longest / max(height, width)
    if share >= 1:
        return images.float()
    size = (max(1, round(height * share)), max(1, round(width * share)))
    return F.interpolate(
        images.float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )


def plain_view(target: Target) -> View:
    """How items are prepared: shorter side to size / crop_pct, centre crop; of a video one clip
    from its middle.
    """
    kind = PlainView if target.clip is None else PlainClips
    return kind(target.input, target.crop_pct)


def stream(
    readers: Mapping[str, Reader],
    part: Part,
    reading: Reading,
    bad: BadFiles,
    *,
    view: View | None = None,
    views: int = 1,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """(index (B,), columns (B, S, D) by reader) of one batch after the other, in order, without
    broken images; all on the CPU.

    All readers see the same images, prepared by ``view``, by default `plain_view` of the first
    one's target.  A view that gives ``views`` clips of each video, (V, C, T, H, W), makes columns
    (B * V, S, D), those of a video together. On a GPU the encoders run under bf16 autocast.
    """
    target = next(iter(readers.values())).target
    device = reading.place()
    for reader in readers.values():
        if reader.target.encoder is not None:
            reader.target.encoder.to(device)
    mean, std = torch.tensor(target.mean), torch.tensor(target.std)
    frames = 1 if target.clip is None else target.clip.frames
    batches = plain_batches(
        part.source,
        view or plain_view(target),
        batch_size=max(1, reading.batch_size // (frames * views)),
        indices=part.indices,
        workers=reading.num_workers(),
        bad=bad,
    )
    for batch in batches:
        images = normalise(_side_by_side(batch), mean, std, device).views[0]
        columns = {name: _read(reader, images, device) for name, reader in readers.items()}
        for name, x in columns.items():
            _refuse_infinite(readers[name].target, x, images, part.source, batch.index)
        yield batch.index, columns


def _refuse_infinite(
    target: Target, columns: Tensor, images: Tensor, source: Source, index: Tensor
) -> None:
    """UserError where features (B * V, S, D) of the items ``index`` (B,) hold NaN or infinity: no
    number made of them would mean anything.
    """
    wrong = ~columns.flatten(1).isfinite().all(1)
    if not wrong.any():
        return
    views = len(columns) // len(index)
    items = wrong.view(-1, views).any(1).nonzero()[:, 0]
    first, kind = shown_name(source.path(int(index[items[0]]))), target.kind
    if not images[int(wrong.nonzero()[0])].isfinite().all():
        raise UserError(
            f"{first}: its values are not finite (NaN or infinity): mend it, or leave it out of the data"
        )
    raise UserError(
        f"{target.name} gives features that are not finite for {len(items)} of {len(index)} {kind}s, the first of them "
        f"{first}: its weights, or what it computes from them, are broken; measure an earlier checkpoint, or train "
        "again with a lower blr"
    )


def _side_by_side(batch: Batch) -> Batch:
    """Several clips of each video, (B, V, C, T, H, W), as so many clips; ``index`` stays that of
    the videos.
    """
    clips = batch.views[0]
    if clips.ndim < 6:
        return batch
    return replace(
        batch, views=[clips.flatten(0, 1)], flip=batch.flip.repeat_interleave(clips.shape[1])
    )


@torch.inference_mode()
def _read(reader: Reader, images: Tensor, device: torch.device) -> Tensor:
    with (
        at_rest(reader.target.encoder),
        torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
    ):
        return reader(images).cpu()


def extract_all(
    readers: Mapping[str, Reader],
    part: Part,
    reading: Reading,
    *,
    title: str = "features",
    say: Say = silent,
) -> dict[str, Features]:
    """Features (N, S, D) of all readers from one pass over the images; ``say`` hears of broken
    ones.
    """
    bad = BadFiles(
        None, 1.0
    )  # the share is judged at the end: items come in order, so broken ones may come in a row
    tables: dict[str, Tensor] = {}
    index = torch.empty(len(part), dtype=torch.int64)
    done = 0
    with progress(title, len(part), say) as tick:
        for places, columns in stream(readers, part, reading, bad):
            rows = slice(done, done + len(places))
            index[rows] = places
            for name, x in columns.items():
                table = tables.setdefault(name, torch.empty(len(part), *x.shape[1:]))
                table[rows] = x
            done += len(places)
            tick(len(places))
    judge_broken(part, done, reading, title, kind_of(readers), say)
    labels = None if part.labels is None else torch.from_numpy(part.labels)[index[:done]]
    return {name: Features(table[:done], labels, index[:done]) for name, table in tables.items()}


def kind_of(readers: Mapping[str, Reader]) -> str:
    """What is read, "image" or "video": what the first reader's target takes."""
    return next(iter(readers.values())).target.kind


def judge_broken(part: Part, done: int, reading: Reading, title: str, kind: str, say: Say) -> None:
    """After a pass that read ``done`` items: UserError where too few were whole, a sentence where
    some were broken.
    """
    if done == 0:
        raise UserError(f"{shown_name(part.source.name)} has no {kind} that can be read")
    if broken := len(part) - done:
        found = f"{broken:,} of {len(part):,} {kind}s of {shown_name(part.source.name)} are broken"
        if broken > reading.max_bad_share * len(part):
            raise UserError(
                f"{found}, more than max_bad_share={reading.max_bad_share} allows: mend them, or raise it"
            )
        say(f"{title}: {found} and were skipped")


def extract(
    target: Target,
    source: Source,
    *,
    pooling: str = "cls",
    batch_size: int = 256,
    workers: int | Literal["auto"] = "auto",
    device: str = "auto",
    say: Say = silent,
) -> Features:
    """Features (N, D) of every readable image or video of ``source``, in its order, with labels
    where it has any.

    ``pooling``: ``cls`` (the mean of the patches where there is no class token), ``mean`` or
    ``cls+mean``.
    """
    reader = Reader(target)
    chosen = reader.poolings[reader.choose(pooling)]
    reading = Reading(batch_size, workers, device)
    found = extract_all({target.name: reader}, everything(source), reading, say=say)[target.name]
    return replace(found, x=found.x[:, chosen].flatten(1))

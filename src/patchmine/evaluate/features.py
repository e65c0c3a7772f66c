"""From items to features of frozen encoders: read once, in order, for everything made of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchmine.backbones.family import block_outputs
from patchmine.backbones.tokens import embed_patches
from patchmine.data.badfiles import BadFiles
from patchmine.data.items import CLIP
from patchmine.data.loader import plain_batches
from patchmine.data.settings import InputSettings
from patchmine.data.sources.contract import Source
from patchmine.data.views.clips import TestClips
from patchmine.data.views.images import View
from patchmine.data.views.normalise import normalise
from patchmine.errors import Say, UserError, foreign_parser, shown_name, silent
from patchmine.evaluate.asked import judge_broken
from patchmine.evaluate.evaluated import Evaluated, in_eval_mode
from patchmine.evaluate.labelled import Part, everything
from patchmine.evaluate.progress import progress
from patchmine.evaluate.settings import ReadingSettings
from patchmine.system.heap import keep_freed
from patchmine.train.engine import choose_device

if TYPE_CHECKING:
    from patchmine.train.engine import Engine

# Pixels of the longest side of images, and of a clip's frames, whose raw pixels are features.
LONGEST_SIDE, LONGEST_CLIP_SIDE = 32, 8

Found = TypeVar("Found")


@dataclass(frozen=True)
class Features:
    """Features of the readable items of a source, in its order."""

    x: Tensor  # (N, D), or (N, S, D) with S columns; float32 unless the loop's tables are others
    labels: Tensor | None  # (N,) int64, where there are any
    index: Tensor  # (N,), which items of the source they are

    def __len__(self) -> int:
        return len(self.x)


class Reader:
    """Turns normalised images (B, C, H, W), or clips (B, C, T, H, W), into columns (B, S, D)."""

    # Columns are class tokens of the last blocks, then means of their patches, after the final
    # norm; ``poolings`` says which of them, laid end to end, a name means.  A network without
    # tokens has one column, ``pooled``; no encoder gives ``pixels``, the shrunk image.

    def __init__(self, evaluated: Evaluated, blocks: int = 1) -> None:
        self.evaluated = evaluated
        self.blocks = 0
        encoder = evaluated.encoder
        if encoder is None:
            self.poolings: dict[str, list[int]] = {"pixels": [0]}
            return
        if not hasattr(encoder, "num_prefix_tokens") or not hasattr(encoder, "blocks"):
            self.poolings = {"pooled": [0]}
            return
        self.blocks = n = min(blocks, len(encoder.blocks))
        self.has_class_token = getattr(encoder, "cls_token", None) is not None
        columns = {"mean": list(range(n))}
        if self.has_class_token:
            both = list(range(2 * n))
            columns = {"cls": both[:n], "mean": both[n:], "cls+mean": both}
        last = {name: each[n - 1 :: n] for name, each in columns.items()}
        every = {f"{name}, last {n} blocks": each for name, each in columns.items()}
        self.poolings = last if n == 1 else last | every

    def choose(self, pooling: str) -> str:
        """``pooling``, or what stands in for ``cls`` without a class token; else UserError."""
        if pooling in self.poolings:
            return pooling
        if pooling == "cls" or not self.blocks:
            return next(iter(self.poolings))
        known = ", ".join(self.poolings)
        raise UserError(f"pooling={pooling!r}: {self.evaluated.name} has {known}")

    def pooled(self, columns: Tensor, pooling: str) -> Tensor:
        """(N, D) of columns (N, S, D): those that the pooling means, laid end to end."""
        return columns[:, self.poolings[pooling]].flatten(1)

    def unit_rows(self, columns: Tensor, pooling: str) -> Tensor:
        """The same as float32, every row of length one."""
        return F.normalize(self.pooled(columns, pooling).float(), dim=1)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, S, D) float32."""
        encoder: Any = self.evaluated.encoder
        if encoder is None:
            return _shrunk(images).flatten(1)[:, None]
        if not self.blocks:
            pooled: Tensor = encoder.forward_head(encoder.forward_features(images), pre_logits=True)
            return pooled.float()[:, None]
        tokens = self._tokens(encoder, images)
        prefix: int = encoder.num_prefix_tokens
        columns = [x[:, 0].float() for x in tokens] if self.has_class_token else []
        columns += [x[:, prefix:].float().mean(1) for x in tokens]
        return torch.stack(columns, dim=1)  # (B, S, D)

    def _tokens(self, encoder: Any, images: Tensor) -> list[Tensor]:
        """Of the last blocks, the last one last, after the final norm: (B, P + L, D) each."""
        if self.blocks == 1:
            return [encoder.forward_features(images)]
        if self.evaluated.item is CLIP:  # timm's forward_intermediates is for images only
            depth = len(encoder.blocks)
            counts = range(depth - self.blocks + 1, depth + 1)
            outputs = block_outputs(encoder, embed_patches(encoder, images), counts)
            return [encoder.norm(output) for _, output in outputs]
        parts = encoder.forward_intermediates(
            images,
            indices=self.blocks,
            norm=True,
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return [x if isinstance(x, Tensor) else torch.cat([x[1], x[0]], dim=1) for x in parts]


class UnitReader(Reader):
    """A reader of one pooling in rows of length one: a large table is neither wider nor copied."""

    def __init__(self, evaluated: Evaluated, pooling: str) -> None:
        super().__init__(evaluated)
        self.chosen = self.choose(pooling)
        self.every, self.poolings = self.poolings, {self.chosen: [0]}

    def pooled(self, columns: Tensor, pooling: str) -> Tensor:
        """(N, D) of (N, 1, D), which is the pooling already."""
        return columns[:, 0]

    def unit_rows(self, columns: Tensor, pooling: str) -> Tensor:
        """The same: they have length one already."""
        return columns[:, 0]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 1, D) float32."""
        columns = super().__call__(images)
        return F.normalize(columns[:, self.every[self.chosen]].flatten(1), dim=1)[:, None]


class FrameReader(Reader):
    """An encoder of images reads clips prepared for ``clips``: columns are means over frames."""

    def __init__(self, evaluated: Evaluated, clips: Evaluated, blocks: int = 1) -> None:
        super().__init__(evaluated, blocks)
        own, theirs = evaluated.input, clips.input
        if evaluated.item is CLIP:
            wrong = f"image={evaluated.name} is an encoder of videos"
            raise UserError(f"{wrong}: give one of images, or leave image= out")
        if own.channels != theirs.channels:
            given = f"image={evaluated.name} takes {own.channels} channels"
            raise UserError(f"{given}, {clips.name} {theirs.channels}")
        mean, std = torch.tensor(own.mean), torch.tensor(own.std)
        self.scale = (torch.tensor(theirs.std) / std)[:, None, None]
        self.shift = ((torch.tensor(theirs.mean) - mean) / std)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """(B, S, D) float32."""
        frames = images.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
        frames = frames * self.scale.to(frames.device) + self.shift.to(frames.device)
        size = self.evaluated.input.image_size
        if tuple(frames.shape[-2:]) != size:
            frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
        columns = super().__call__(frames)  # (B * T, S, D)
        return columns.view(len(images), -1, *columns.shape[1:]).mean(1)


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
    return F.interpolate(images.float(), size, mode="bilinear", antialias=True)


@dataclass(frozen=True)
class Views:
    """Several views of each test item, whose scores are averaged."""

    view: View
    count: int
    middle: int  # number of the view that is also scored alone
    told: Mapping[str, int]  # settings that say so


def clip_views(settings: InputSettings, segments: int, crops: int) -> Views:
    """``segments`` clips of a video times ``crops`` crops."""
    return Views(
        TestClips(settings, segments, crops),
        count=segments * crops,
        middle=segments // 2 * crops + crops // 2,
        told={"segments": segments, "crops": crops},
    )


@dataclass(frozen=True)
class FeatureLoop:
    """A pass over items in which all readers see the same images."""

    readers: Mapping[str, Reader]  # items are prepared as the first one's model is used to
    reading: ReadingSettings
    device: torch.device  # where encoders run; on a GPU under bf16 autocast
    say: Say = silent
    engine: Engine | None = None  # the processes that share the work; None: this one
    empty: Callable[..., Tensor] = torch.empty  # makes the tables, (N, ...)

    @property
    def evaluated(self) -> Evaluated:
        """The model of the first reader."""
        return next(iter(self.readers.values())).evaluated

    def table(self, part: Part, title: str, views: Views | None = None) -> dict[str, Features]:
        """Features (N, S, D) by reader, the same in every process.

        With ``views``, readers that make one row of all views of an item.
        """

        def own() -> tuple[Tensor, dict[str, Tensor]]:
            mine, done = self.share(part), 0
            index = torch.empty(len(mine), dtype=torch.int64)
            tables: dict[str, Tensor] = {}
            for places, columns in self.batches(mine, title, views):
                rows = slice(done, done + len(places))
                index[rows] = places
                for name, x in columns.items():
                    # Made once, at full size: lists of batches would need twice the memory.
                    if name not in tables:
                        tables[name] = self.empty(len(mine), *x.shape[1:])
                    tables[name][rows] = x
                done += len(places)
            return index[:done], {name: x[:done] for name, x in tables.items()}

        shares = [share for share in self.in_all_processes(own) if len(share[0])]
        self.judge_broken(part, sum(len(index) for index, _ in shares), title)
        index = torch.cat([index for index, _ in shares])
        labels = None if part.labels is None else torch.from_numpy(part.labels)[index]
        found = {}
        for name in self.readers:
            parts = [tables[name] for _, tables in shares]
            x = parts[0] if len(parts) == 1 else torch.cat(parts)  # no copy of a large table
            found[name] = Features(x, labels, index)
        return found

    def batches(
        self, part: Part, title: str, views: Views | None = None
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """(index (B,), columns (B * V, S, D) by reader), in order, on the CPU; V = 1 by default."""
        evaluated = self.evaluated
        settings = evaluated.input
        for reader in self.readers.values():
            if reader.evaluated.encoder is not None:
                reader.evaluated.encoder.to(self.device)
        view = evaluated.item.plain_view(settings, evaluated.crop_pct)
        at_once = settings.clip.frames if evaluated.item is CLIP else 1
        if views is not None:
            view, at_once = views.view, at_once * views.count
        wanted, spare = self.reading.workers, (os.cpu_count() or 1) - 1  # one core for the model
        loaded = plain_batches(
            part.source,
            view,
            batch_size=max(1, self.reading.batch_size // at_once),
            indices=part.indices,
            workers=min(8, spare) if wanted == "auto" else wanted,
            # Broken items are judged at the end: in order, they may come in a row.
            bad=BadFiles(None, 1.0),
        )
        mean, std = torch.tensor(settings.mean), torch.tensor(settings.std)
        with progress(title, len(part), self.say) as tick:
            for batch in loaded:
                if (clips := batch.views[0]).ndim == 6:  # (B, V, C, T, H, W)
                    flip = batch.flip.repeat_interleave(clips.shape[1])
                    batch = replace(batch, views=[clips.flatten(0, 1)], flip=flip)
                images = normalise(batch, mean, std, self.device).views[0]
                columns = {}
                for name, reader in self.readers.items():
                    columns[name] = x = self._read(reader, images)
                    refuse_infinite(reader, x, images, part.source, batch.index)
                yield batch.index, columns
                tick(len(batch.index))

    @torch.inference_mode()
    def _read(self, reader: Reader, images: Tensor) -> Tensor:
        with in_eval_mode(reader.evaluated.encoder), autocast(self.device):
            return reader(images).cpu()

    def share(self, part: Part) -> Part:
        """The items that this process reads."""
        return part if self.engine is None else part.share(self.engine.rank, self.engine.world_size)

    def in_all_processes(self, work: Callable[[], Found]) -> list[Found]:
        """What ``work`` gives in each process; what it raises in one of them, all of them raise."""
        if self.engine is None or self.engine.world_size == 1:
            return [work()]
        try:
            with foreign_parser(UserError, OSError):
                own: Found | Exception = work()
        except (UserError, OSError) as error:
            own = error
        every = self.engine.gather(own)
        for found in every:
            if isinstance(found, Exception):
                raise found
        return [each for each in every if not isinstance(each, Exception)]

    def judge_broken(self, part: Part, done: int, title: str) -> None:
        """After ``done`` whole items: UserError where too few, else a word on the rest."""
        noun, limit = self.evaluated.item.noun, self.reading.max_bad_share
        judge_broken(part.source, len(part), done, noun, limit, title, self.say)


def refuse_infinite(
    reader: Reader, columns: Tensor, images: Tensor, source: Source, index: Tensor
) -> None:
    """UserError where features (B * V, S, D) of the items ``index`` (B,) hold NaN or infinity."""
    wrong = ~columns.flatten(1).isfinite().all(1)
    if not wrong.any():
        return
    items = wrong.view(len(index), -1).any(1).nonzero()[:, 0]
    first = shown_name(source.path(int(index[items[0]])))
    rows = images.view(
        len(wrong), -1, *images.shape[1:]
    )  # a reader may make one row of several views
    if not rows[int(wrong.nonzero()[0])].isfinite().all():
        raise UserError(f"{first}: its values are not finite (NaN or infinity): mend or remove it")
    name, many = (
        reader.evaluated.name,
        f"{len(items)} of {len(index)} {reader.evaluated.item.noun}s",
    )
    found = f"{name}: features are not finite for {many}, the first of them {first}"
    raise UserError(f"{found}: take an earlier checkpoint, or train again with a lower blr")


def autocast(device: torch.device) -> torch.autocast:
    """The arithmetic of networks that are used: bf16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def device_of(reading: ReadingSettings) -> torch.device:
    """The device that is meant, ready to compute; UserError where there is none."""
    kind = choose_device(reading.device)
    if kind == "cpu":
        keep_freed()
    return torch.device(kind)


def extract(
    evaluated: Evaluated,
    source: Source,
    *,
    pooling: str = "cls",
    batch_size: int = 256,
    workers: int | Literal["auto"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    say: Say = silent,
) -> Features:
    """Features (N, D) of every readable item of ``source``, with labels where it has any.

    Args:
        evaluated: see `open_evaluated`.
        source: see `open_source`.
        pooling: ``cls`` (without a class token the mean), ``mean`` or ``cls+mean``.
        batch_size: images, or frames of clips, that are encoded at once.
        workers: processes that decode.
        device: where the encoder runs.
        say: hears about the progress and broken items.

    Raises:
        UserError: too much is broken, or features are not finite.
    """
    reader = Reader(evaluated)
    reading = ReadingSettings(batch_size=batch_size, workers=workers, device=device)
    chosen = reader.choose(pooling)
    loop = FeatureLoop({"": reader}, reading, device_of(reading), say)
    found = loop.table(everything(source), "features")[""]
    return replace(found, x=reader.pooled(found.x, chosen))

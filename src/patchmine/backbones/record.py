"""What an encoder is built from, and the record of what differs between families of encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from patchmine.data.items import Item

Encoder: TypeAlias = Any
"""A module of timm's, or our `VideoTransformer`, that a `Family` knows; timm has no types."""


@dataclass(frozen=True)
class Blueprint:
    """What an encoder is built from; every encoder of ours carries its own as ``built_from``.

    Args:
        model: a name of timm's, or of `names.VIDEO_MODELS`.
        image_size: (height, width) in pixels.
        patch_size: pixels; None is the model's own.
        channels: of an image.
        model_args: more arguments of the model.
        export_arguments: what `export_encoder` writes of an encoder beside its blueprint's.
        clip: (frames, frames in a tubelet), which only encoders of clips look at.
    """

    model: str
    image_size: tuple[int, int] = (224, 224)
    patch_size: int | None = None
    channels: int = 3
    model_args: Mapping[str, Any] = field(default_factory=dict)
    clip: tuple[int, int] | None = None

    @property
    def architecture(self) -> str:
        """The model's name without ``timm/`` and without the tag of stored weights."""
        return self.model.removeprefix("timm/").split(".")[0]

    def arguments(self) -> dict[str, Any]:
        """Keywords of the network, sizes included; those of ``model_args`` count more."""
        own: dict[str, Any] = {"img_size": self.image_size, "in_chans": self.channels}
        if self.patch_size is not None:
            own["patch_size"] = self.patch_size
        if self.clip is not None:
            own |= dict(zip(("num_frames", "tubelet_size"), self.clip, strict=True))
        return own | dict(self.model_args)


class StageFeatures(NamedTuple):
    """``pooled`` (N, C), and one map (N, C_i, h_i, w_i) for each stage, in the order asked for."""

    pooled: Tensor
    maps: list[Tensor]


@dataclass(frozen=True)
class Family:
    """What differs between families of encoders.  A new family is a file with one such record.

    Args:
        name: as methods list it among the families that they train.
        module: the class of its encoders.
        timm_modules: the modules of timm that define its architectures.
        item: what it reads: images (B, C, H, W) or clips of videos (B, C, T, H, W).
        hierarchical: in place of tokens it has maps, each half as large as the one before, and no
            part of an image can be left out.
        create: the network of a name and timm's arguments; raises what timm raises.
        build: the network of a blueprint, its weights not yet meaningful; raises UserError.
        initialise: fresh weights in place.
        stages: the parts whose output is a map, by name, with the channels of that map.
        features: pooled features and the maps of some stages, at any image size.
        image_size: (height, width) in pixels that an encoder is built for.
        map_size: (rows, columns) of the last stage's map at that size.
        smallest_side: pixels of the smallest image that is of use.
        enter_blocks: of an encoder, embedded tokens (B, P + V, D), the patches among them (B, V),
            None for all in raster order, and the grid (rows, columns), None for the encoder's own:
            what the first block takes, and the keywords that every block takes.
        convolutional: made of convolutions, and so what MOKD calls a CNN.
        batch_normed: its norms are batch norms: its authors train it by SGD, others by AdamW.
        why_whole: of a hierarchical one, why patches cannot be hidden: "patches, which ...".
        resize: build it for images of another size, in place; of a hierarchical one.
        classifier: where timm has the layer of the classifier.
        mask_keyword: of a block, what it takes to be added to attention's scores (B, 1, N, N).
        relative_positions: whether attention knows how far apart two patches are, so that no
            patch can be left out.
        class_bias: what that adds to the class token's row of scores in the last block.
        angles: by what attention turns queries and keys of a grid's patches: (L, 2 d), sines before
            cosines; None where it does not.
        export_arguments: what `export_encoder` writes of an encoder beside its blueprint's.
        clip: (frames, frames in a tubelet) that an encoder is built for, where it reads clips.
        stores_positions: whether position tables are among its tensors.
        recognises: whether the names in a state dict are those of such an encoder.
        infer: the blueprint that a state dict tells, as `infer_architecture` does; None where it
            does not, so that the settings must.
        file_arguments: of a state dict and a network's arguments: these, with the norms and the
            pooling that go with its tensors.
        fitted: of an encoder, a state dict and who to name in messages: these tensors in the shapes
            of the encoder, and what was moved, for a report; of a hierarchical one.
        timm_opens: whether timm by itself can build the network of an encoder.
    """

    name: str
    module: type[nn.Module]
    timm_modules: frozenset[str]
    item: Item
    hierarchical: bool
    create: Callable[[str, Mapping[str, Any]], Encoder]
    build: Callable[[Blueprint], Encoder]
    initialise: Callable[[Encoder], None]
    stages: Callable[[Encoder], dict[str, int]]
    features: Callable[[Encoder, Tensor, Sequence[str]], StageFeatures]
    image_size: Callable[[Encoder], tuple[int, int]]
    map_size: Callable[[Encoder], tuple[int, int]]
    smallest_side: Callable[[Encoder], int]
    enter_blocks: Callable[..., tuple[Tensor, dict[str, Any]]]
    export_arguments: Callable[[Encoder], dict[str, Any]]
    convolutional: bool = False
    batch_normed: bool = False
    why_whole: str = ""
    resize: Callable[[Encoder, tuple[int, int]], None] = lambda *_: None
    classifier: str = "head"
    mask_keyword: str = "attn_mask"
    relative_positions: Callable[[Encoder], bool] = lambda _: False
    class_bias: Callable[[Encoder], Tensor | float] = lambda _: 0.0
    angles: Callable[[Encoder, tuple[int, ...]], Tensor | None] = lambda *_: None
    clip: Callable[[Encoder], tuple[int, int] | None] = lambda _: None
    stores_positions: bool = False
    recognises: Callable[[Mapping[str, Tensor]], bool] = lambda _: False
    infer: Callable[..., Blueprint] | None = None
    file_arguments: Callable[[Mapping[str, Tensor], dict[str, Any]], dict[str, Any]] = (
        lambda _, arguments: arguments
    )
    fitted: Callable[[Encoder, Mapping[str, Tensor], str], tuple[dict[str, Tensor], list[str]]] = (
        lambda _, tensors, __: (dict(tensors), [])
    )
    timm_opens: Callable[[Encoder], bool] = lambda _: True

"""MOKD's networks: an encoder and two heads, and what one asks of another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patchmine.backbones.family import Encoder, build_encoder, family_of, stage_features
from patchmine.errors import UserError
from patchmine.methods.settings.mokd import MokdSettings
from patchmine.models.heads import DinoHead
from patchmine.models.transformer_head import TransformerHead

# Of the T-Heads where no plain ViT sets one: that of ViT-S, the published partner of ResNet-50.
WIDTH_WITHOUT_VIT = 384


class Network(NamedTuple):
    """A student or a teacher."""

    encoder: Encoder
    head: DinoHead
    thead: TransformerHead


class Outputs(NamedTuple):
    """A network's ``pooled`` (N, C), ``maps`` (N, C, h, w) and logits (N, K) of both heads."""

    pooled: Tensor
    maps: Tensor
    head: Tensor
    thead: Tensor


def outputs_of(network: Network, images: Tensor) -> Outputs:
    """What a network makes of images (N, C, H, W) of any size."""
    encoder = network.encoder
    last = list(family_of(encoder).stages(encoder))[-1:]
    pooled, (maps,) = stage_features(encoder, images, last)
    return Outputs(pooled, maps, network.head(pooled), network.thead(maps))


@torch.no_grad()
def search(thead: TransformerHead, maps: Tensor, queries: Tensor) -> Tensor:
    """A teacher's T-Head logits (J * B, K) of global crop 0, of ``maps`` of both, for queries."""
    logits: Tensor = thead(maps.chunk(2)[0], queries.detach())
    return logits


def is_cnn(encoder: Encoder) -> bool:
    """Whether the network is a "CNN" of a pair, with settings of its own: ResNet or ConvNeXt."""
    return family_of(encoder).convolutional


def has_tokens(encoder: Encoder) -> bool:
    """Whether it is a plain ViT, whose tokens enter T-Heads as they are."""
    return not family_of(encoder).hierarchical


def build_partner(config: MokdSettings, encoder: Encoder) -> Encoder:
    """The second network, for images of the first one's size and channels."""
    size = family_of(encoder).image_size(encoder)
    channels = next(p for p in encoder.parameters() if p.ndim == 4).shape[1]
    model, arguments = config.partner_model, config.partner_args
    try:
        return build_encoder(model, image_size=size, channels=channels, model_args=arguments)
    except UserError as error:
        given = f"method.partner_model={model} with method.partner_args"
        raise UserError(f"{given}: {error}") from error


def thead_width(config: MokdSettings, encoder: Encoder, partner: Encoder) -> int:
    """Width of both T-Heads: each gets the other's queries; a ViT's tokens enter as they are."""
    names = {"model": encoder, f"method.partner_model={config.partner_model}": partner}
    widths = {name: each.embed_dim for name, each in names.items() if has_tokens(each)}
    if len(set(widths.values())) > 1:
        stated = " and ".join(f"{name} is {width} wide" for name, width in widths.items())
        remedy = "set the same embed_dim in model_args and method.partner_args, or take a "
        "ResNet, ConvNeXt or Swin"
        raise UserError(f"{stated}, but tokens of each enter the other's head: {remedy}")
    own = next(iter(widths.values()), None)
    if own is not None and config.thead_width not in (None, own):
        wrong = f"but the tokens of the vision transformer are {own} wide"
        raise UserError(f"method.thead_width={config.thead_width}, {wrong}: leave the setting out")
    width = own or config.thead_width or WIDTH_WITHOUT_VIT
    heads = config.thead_heads
    if width % heads:
        fitting = max(n for n in range(1, heads) if width % n == 0)
        wrong = f"method.thead_heads={heads} does not divide the transformer heads' width {width}"
        raise UserError(f"{wrong}: set method.thead_heads={fitting}")
    return width


def dino_head(config: MokdSettings, encoder: Encoder) -> DinoHead:
    """The gain of the prototypes is fixed for a CNN, as main_mokd.py builds it."""
    sizes = (config.out_dim, config.head_hidden, config.head_bottleneck)
    return DinoHead(encoder.num_features, *sizes, trainable_gain=not is_cnn(encoder))


def thead(config: MokdSettings, encoder: Encoder, width: int) -> TransformerHead:
    """The T-Head over an encoder's last map."""
    sizes = (encoder.num_features, width, family_of(encoder).map_size(encoder), config.out_dim)
    depth, heads = config.thead_depth, config.thead_heads
    return TransformerHead(*sizes, depth=depth, num_heads=heads, project=not has_tokens(encoder))

"""SimMIM: predict the pixels of large masked squares from the encoder's output by one linear layer.

Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu, "SimMIM: A Simple Framework for Masked Image Modeling",
CVPR 2022, arXiv 2111.09886.  Constants that the paper does not give come from the reference code,
microsoft/SimMIM; each names its file.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from patchmine.backbones import tokens as vit_tokens
from patchmine.backbones.family import Encoder, transform
from patchmine.errors import UserError
from patchmine.methods.settings.simmim import SimMimSettings
from patchmine.models.droppath import draw_drop_paths, seed_drop_paths
from patchmine.models.units import patches_per_unit
from patchmine.ops import pictures
from patchmine.ops.known import counting, settled, shown, told
from patchmine.ops.losses import absolute_error, masked_absolute_error
from patchmine.ops.masks import expand_units
from patchmine.ops.patches import channels_last, gather_patches
from patchmine.task import Method
from patchmine.types import Batch, Losses, Mask, Panel, ParamGroup, Progress

TOKEN_STD = 0.02  # models/simmim.py cuts the normal distribution at one deviation


class SimMIM(Method):
    """The full sequence goes through the encoder, with one learned token in each masked place."""

    Config = SimMimSettings

    config: SimMimSettings
    encoder: Encoder

    def __init__(self, config: SimMimSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.grid = vit_tokens.encoder_grid(encoder)
        self.per_unit = patches_per_unit(self.grid, config.mask_unit)
        self.num_units = self.grid.num_patches // math.prod(self.per_unit)
        self.num_masked_units = math.ceil(self.num_units * config.mask_ratio)  # data_simmim.py
        if self.num_masked_units == self.num_units:
            raise UserError(
                f"method.mask_ratio={config.mask_ratio} hides all {self.num_units} mask units of "
                f"the image: lower it, or set a smaller method.mask_unit={self.grid.patch[0]}"
            )
        self.channels = encoder.patch_embed.proj.in_channels
        self.drop_paths = seed_drop_paths(encoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=TOKEN_STD, a=-TOKEN_STD, b=TOKEN_STD)
        # torch's own initialisation, as the reference leaves its 1 x 1 convolution.
        self.head = nn.Linear(encoder.embed_dim, self.grid.values_per_patch(self.channels))

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        images = batch.views[0]  # (B, C, H, W)
        mask = self.draw_mask(images)
        counts = counting(batch.known, mask.masked, self.grid.patch, channels_first=True)
        target = self.target(images, mask)
        predicted = settled(self.reconstruct(images, mask), target, counts)  # (B, M, P)
        return {"loss": masked_absolute_error(predicted, target, self.channels), **told(counts)}

    def draw_mask(self, images: Tensor) -> Mask:
        """A random set of whole units of each image is masked, the same number in all."""
        noise = self.noise.uniform(len(images), self.num_units, device=images.device)
        order = noise.argsort(dim=1, stable=True)
        # Lowest noise is masked here, where MAE leaves it visible.
        halves = order.tensor_split([self.num_masked_units], dim=1)
        masked, visible = (expand_units(units, self.grid, self.per_unit) for units in halves)
        return Mask(visible, masked, self.grid.num_patches)

    def reconstruct(self, images: Tensor, mask: Mask) -> Tensor:
        """Predicted pixels of the masked patches in PixelShuffle's order, (C, h, w): (B, M, P)."""
        latent = self.encode(images, mask)[:, self.encoder.num_prefix_tokens :]  # (B, L, D)
        masked = mask.masked[:, :, None].expand(-1, -1, latent.shape[-1])
        return self.head(latent.gather(1, masked))

    def encode(self, images: Tensor, mask: Mask) -> Tensor:
        """Final tokens where a masked patch entered as the mask token: (B, P + L, D)."""
        embedded = vit_tokens.project_patches(self.encoder, images)  # (B, L, D)
        embedded = torch.where(mask.as_bool()[:, :, None], self.mask_token, embedded)
        embedded = embedded + vit_tokens.patch_positions(self.encoder)
        draw_drop_paths(self.drop_paths, self.noise, embedded)
        prefix = vit_tokens.prefix_tokens(self.encoder, len(embedded))
        return transform(self.encoder, torch.cat([prefix, embedded], dim=1))

    def target(self, images: Tensor, mask: Mask) -> Tensor:
        """Pixels of the masked patches, in the order of `reconstruct`: float32 (B, M, P)."""
        return gather_patches(images.float(), mask.masked, self.grid.patch).flatten(2)

    def param_groups(self) -> list[ParamGroup]:
        """Class token and learned positions are not decayed; the mask token is."""
        undecayed = {"encoder.cls_token", "encoder.pos_embed"}
        return self.sparing(undecayed, clip_norm=self.config.clip_grad)

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, what was left visible, the reconstruction, the error of each masked patch."""
        images, grid = batch.views[0], self.grid
        mask = self.draw_mask(images)
        predicted = self.reconstruct(images, mask)
        counts = counting(batch.known, mask.masked, grid.patch, channels_first=True)
        target = self.target(images, mask)
        error = shown(absolute_error(settled(predicted, target, counts), target), counts)  # (B, M)
        pixels = channels_last(predicted, self.channels)
        drawn = pictures.reconstruction_panels(images, mask, grid, pixels, standardised=False)
        unit = pictures.pixel_unit(squared=False)
        masked = pictures.masked_panels(images, mask, grid, drawn, error, unit)
        return [pictures.input_panel(images, batch.known), *masked]

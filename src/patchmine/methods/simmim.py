"""SimMIM: predict the raw pixels of large hidden squares from the encoder's own output, with a
single linear layer.

Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu, "SimMIM: A Simple Framework for Masked Image Modeling",
CVPR 2022, arXiv 2111.09886.  Constants that the paper does not give come from the reference code,
microsoft/SimMIM; each names its file.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from patchmine.backbones.family import Encoder, transform
from patchmine.backbones.tokens import encoder_grid, patch_positions, prefix_tokens, project_patches
from patchmine.errors import UserError
from patchmine.methods.settings.simmim import SimMimSettings
from patchmine.models.droppath import draw_drop_paths, seed_drop_paths
from patchmine.models.units import patches_per_unit
from patchmine.ops.losses import masked_absolute_error
from patchmine.ops.masks import expand_units
from patchmine.ops.patches import channels_last, gather_patches
from patchmine.ops.pictures import hide_masked, patch_map, reconstruction_panel
from patchmine.task import Method
from patchmine.types import Batch, Losses, Mask, Panel, ParamGroup, Progress

TOKEN_STD = 0.02  # models/simmim.py cuts the normal distribution at one deviation


class SimMIM(Method):
    """The full sequence goes through the encoder, with one learned token wherever a patch is
    hidden; no decoder.
    """

    Config = SimMimSettings

    config: SimMimSettings
    encoder: Encoder

    def __init__(self, config: SimMimSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.grid = encoder_grid(encoder)
        self.per_unit = patches_per_unit(self.grid, config.mask_unit)
        self.num_units = self.grid.num_patches // math.prod(self.per_unit)
        self.num_masked_units = math.ceil(
            self.num_units * config.mask_ratio
        )  # rounded up: data_simmim.py
        if self.num_masked_units == self.num_units:
            raise UserError(
                f"method.mask_ratio={config.mask_ratio} hides all {self.num_units} mask units of the image: lower it, "
                f"or set a smaller method.mask_unit={self.grid.patch[0]}"
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
        painted = self.reconstruct(images, mask)  # (B, M, P)
        return {"loss": masked_absolute_error(painted, self.target(images, mask), self.channels)}

    def draw_mask(self, images: Tensor) -> Mask:
        """Hidden and visible patches, where whole units are hidden: a random set of the same size
        for each image.
        """
        noise = self.noise.uniform(len(images), self.num_units, device=images.device)
        masked, visible = noise.argsort(dim=1, stable=True).tensor_split(
            [self.num_masked_units], dim=1
        )
        visible, masked = (
            expand_units(units, self.grid, self.per_unit) for units in (visible, masked)
        )
        return Mask(visible, masked, self.grid.num_patches)

    def reconstruct(self, images: Tensor, mask: Mask) -> Tensor:
        """Predicted pixels of the masked patches in PixelShuffle's order, (channel, row, column):
        (B, M, P).
        """
        latent = self.encode(images, mask)[:, self.encoder.num_prefix_tokens :]  # (B, L, D)
        wanted = mask.masked[:, :, None].expand(-1, -1, latent.shape[-1])
        return self.head(latent.gather(1, wanted))

    def encode(self, images: Tensor, mask: Mask) -> Tensor:
        """All tokens after the final norm, where a masked patch entered as the mask token: (B, P +
        L, D).
        """
        tokens = torch.where(
            mask.as_bool()[:, :, None], self.mask_token, project_patches(self.encoder, images)
        )
        tokens = tokens + patch_positions(self.encoder)  # (B, L, D)
        draw_drop_paths(self.drop_paths, self.noise, tokens)
        return transform(
            self.encoder, torch.cat([prefix_tokens(self.encoder, len(tokens)), tokens], dim=1)
        )

    def target(self, images: Tensor, mask: Mask) -> Tensor:
        """Pixels of the masked patches as they were fed to the network, in the order of
        `reconstruct`: (B, M, P).
        """
        return gather_patches(images.float(), mask.masked, self.grid.patch).flatten(2)

    def param_groups(self) -> list[ParamGroup]:
        """Everything that learns; class token and learned positions are not decayed, the mask token
        is.
        """
        return self.sparing(
            {"encoder.cls_token", "encoder.pos_embed"}, clip_norm=self.config.clip_grad
        )

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, what was left visible, the reconstruction, the error of each masked patch."""
        images = batch.views[0]
        mask = self.draw_mask(images)
        painted = self.reconstruct(images, mask)
        error = (painted.float() - self.target(images, mask)).abs().mean(dim=-1)  # (B, M)
        return [
            Panel("input", images),
            Panel("visible", hide_masked(images, mask, self.grid)),
            reconstruction_panel(
                images, mask, self.grid, channels_last(painted, self.channels), borrow=False
            ),
            Panel("error", patch_map(error, self.grid, mask.masked), kind="heat"),
        ]

"""MAE: predict the pixels of randomly removed patches from the few that are left.

He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022,
arXiv 2111.06377.  On clips it is VideoMAE: patches are cubes of space and time, and a place is
removed at all times or at none.  Tong, Song, Wang, Wang, "VideoMAE: Masked Autoencoders are
Data-Efficient Learners for Self-Supervised Video Pre-Training", NeurIPS 2022, arXiv 2203.12602.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchmine.backbones.family import Encoder, encode
from patchmine.backbones.tokens import encoder_grid
from patchmine.methods.settings.mae import MaeSettings
from patchmine.models.decoder import check_decoder, count_predicted, masked_decoder, predicted_part
from patchmine.models.noise_filter import NoiseFilter
from patchmine.models.units import block_grid, count_visible_blocks
from patchmine.ops import losses, masks, patches, pictures
from patchmine.ops.known import Counts, counting, settled, shown, told
from patchmine.task import Method
from patchmine.types import Batch, Losses, Mask, Panel, ParamGroup, Progress


class MAE(Method):
    """Masked autoencoder (models_mae.py; on clips modeling_pretrain.py of VideoMAE)."""

    Config = MaeSettings

    config: MaeSettings
    encoder: Encoder

    def __init__(self, config: MaeSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.grid = encoder_grid(encoder)
        # Masks are drawn over blocks of places, which stay visible at all times of a clip.
        self.blocks = block_grid(self.grid, config.mask_block)
        self.visible_blocks = count_visible_blocks(
            self.blocks, config.mask_block, config.mask_ratio
        )
        check_decoder(config, self.visible_blocks, config.mask_ratio, self.blocks.num_positions)
        white = config.mask_noise == "white"
        self.noise_filter = None if white else NoiseFilter(self.blocks, config.mask_noise)
        num_masked = self.grid.num_patches - self.visible_blocks * (
            config.mask_block**2 * self.grid.num_slots
        )
        self.num_predicted = count_predicted(config, num_masked)
        values = self.grid.values_per_patch(encoder.patch_embed.proj.in_channels)
        self.decoder_input, self.decoder = masked_decoder(encoder, self.grid, config, values)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        images = batch.views[0]  # (B, C, H, W) or (B, C, T, H, W)
        mask = predicted_part(self.draw_mask(images), self.noise, self.num_predicted)
        predicted = self.reconstruct(images, mask)  # (B, M, P)
        counts = counting(batch.known, mask.masked, self.grid.patch)
        return {"loss": self.error(predicted, images, mask, counts).mean(), **told(counts)}

    def draw_mask(self, images: Tensor) -> Mask:
        """A random mask of the configured ratio for each image, of whole tubes for each clip."""
        noise = self.noise.uniform(len(images), self.blocks.num_positions, device=images.device)
        if self.noise_filter is not None:
            noise = self.noise_filter(noise)
        blocks = masks.lowest_visible(noise, self.visible_blocks)
        places = masks.fill_blocks(blocks, self.grid, self.config.mask_block)
        return masks.tubes(places, self.grid)

    def reconstruct(self, images: Tensor, mask: Mask) -> Tensor:
        """Predicted values of the masked patches, (B, M, P)."""
        latent = encode(self.encoder, images, mask.visible)  # (B, P + V, D)
        tokens = self.decoder_input(latent, mask)  # (B, P + V + M, W)
        return self.decoder.head(self.decoder(tokens, mask.masked.shape[1]))

    def error(self, predicted: Tensor, images: Tensor, mask: Mask, counts: Counts = None) -> Tensor:
        """Mean squared error of each masked patch, 0 where it does not count: float32 (B, M)."""
        norm, of = self.config.norm_pix_loss, (images, mask.masked, self.grid.patch)
        target = patches.pixel_targets(*of, norm_pix_loss=norm, counts=counts)
        return losses.squared_error(settled(predicted, target, counts), target)

    def param_groups(self) -> list[ParamGroup]:
        """Everything that learns, clipped if the settings say so."""
        undecayed = self.decoder_input.undecayed("decoder_input.")
        return self.sparing(undecayed, clip_norm=self.config.clip_grad)

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, what the encoder saw, the reconstruction, the error of each masked patch."""
        images = batch.views[0]
        mask = self.draw_mask(images)
        predicted = self.reconstruct(images, mask)
        norm, of = self.config.norm_pix_loss, (images, mask, self.grid)
        drawn = pictures.reconstruction_panels(*of, predicted, standardised=norm)
        counts = counting(batch.known, mask.masked, self.grid.patch)
        error = shown(self.error(predicted, images, mask, counts), counts)
        masked = pictures.masked_panels(*of, drawn, error, pictures.pixel_unit(standardised=norm))
        return [pictures.input_panel(images, batch.known), *masked]

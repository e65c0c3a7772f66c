"""MAE: predict the pixels of randomly removed patches from the few that are left.

He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022,
arXiv 2111.06377.

On clips it is VideoMAE: patches are cubes of space and time, and a place is removed at all times or
at none. Tong, Song, Wang, Wang, "VideoMAE: Masked Autoencoders are Data-Efficient Learners for
Self-Supervised Video Pre-Training", NeurIPS 2022, arXiv 2203.12602.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchmine.backbones.family import Encoder, encode
from patchmine.backbones.tokens import encoder_grid
from patchmine.backbones.vit import initialise
from patchmine.methods.settings.mae import MaeSettings
from patchmine.models.decoder import Decoder, DecoderInput, check_decoder
from patchmine.ops.losses import squared_error
from patchmine.ops.masks import count_positions, lowest_visible, tubes
from patchmine.ops.patches import pixel_targets
from patchmine.ops.pictures import hide_masked, patch_map, reconstruction_panel
from patchmine.task import Method
from patchmine.types import Batch, Losses, Mask, Panel, ParamGroup, Progress


class MAE(Method):
    """Masked autoencoder.  ``encoder`` is a timm ViT or one of clips.

    References: models_mae.py of facebookresearch/mae, modeling_pretrain.py of MCG-NJU/VideoMAE.
    """

    Config = MaeSettings

    config: MaeSettings
    encoder: Encoder

    def __init__(self, config: MaeSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.grid = encoder_grid(encoder)
        self.num_visible = count_positions(
            self.grid, config.mask_ratio
        )  # places, at all times of a clip
        width, heads = config.decoder_embed_dim, config.decoder_num_heads
        check_decoder(width, heads, self.num_visible, config.mask_ratio, self.grid.num_positions)
        channels = encoder.patch_embed.proj.in_channels
        self.decoder_input = DecoderInput(
            encoder.embed_dim, width, self.grid, encoder.num_prefix_tokens
        )
        self.decoder = Decoder(
            width,
            config.decoder_depth,
            heads,
            self.grid.values_per_patch(channels),
            mlp_ratio=config.decoder_mlp_ratio,
            norm_eps=config.decoder_norm_eps,
            qkv_bias=config.decoder_qkv_bias,
        )
        self.decoder_input.draw_weights()
        initialise(self.decoder)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        images = batch.views[0]  # (B, C, H, W) or (B, C, T, H, W)
        mask = self.draw_mask(images)
        predicted = self.reconstruct(images, mask)  # (B, M, P)
        target = pixel_targets(
            images, mask.masked, self.grid.patch, norm_pix_loss=self.config.norm_pix_loss
        )
        return {"loss": squared_error(predicted, target).mean()}

    def draw_mask(self, images: Tensor) -> Mask:
        """A random mask of the configured ratio for each image, of whole tubes for each clip."""
        noise = self.noise.uniform(len(images), self.grid.num_positions, device=images.device)
        return tubes(lowest_visible(noise, self.num_visible), self.grid)

    def reconstruct(self, images: Tensor, mask: Mask) -> Tensor:
        """Predicted values of the masked patches, (B, M, P)."""
        latent = encode(self.encoder, images, mask.visible)  # (B, P + V, D)
        tokens = self.decoder_input(latent, mask)  # (B, P + V + M, W)
        return self.decoder.head(self.decoder(tokens, mask.masked.shape[1]))

    def param_groups(self) -> list[ParamGroup]:
        """Everything that learns, clipped if the settings say so."""
        return self.sparing(
            self.decoder_input.undecayed("decoder_input."), clip_norm=self.config.clip_grad
        )

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, what the encoder saw, the reconstruction, the error of each masked patch."""
        images = batch.views[0]
        mask = self.draw_mask(images)
        predicted = self.reconstruct(images, mask)
        norm_pix_loss = self.config.norm_pix_loss
        target = pixel_targets(images, mask.masked, self.grid.patch, norm_pix_loss=norm_pix_loss)
        return [
            Panel("input", images),
            Panel("visible", hide_masked(images, mask, self.grid)),
            reconstruction_panel(images, mask, self.grid, predicted, borrow=norm_pix_loss),
            Panel(
                "error",
                patch_map(squared_error(predicted, target), self.grid, mask.masked),
                kind="heat",
            ),
        ]

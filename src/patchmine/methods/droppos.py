"""DropPos: say where visible patches belong whose position was withheld.

Wang, Fan, Wang, Song, Wang, Zhang, "DropPos: Pre-Training Vision Transformers by Reconstructing
Dropped Positions", NeurIPS 2023, arXiv 2309.03576.  Constants that the paper's abstract does not
give come from the reference code, Haochen-Wang409/DropPos; each names its file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.backbones import tokens as vit_tokens
from patchmine.backbones.family import Encoder, encode, family_of, transform
from patchmine.backbones.vit import initialise
from patchmine.errors import UserError
from patchmine.methods.settings.droppos import DropPosSettings
from patchmine.models.decoder import Decoder, DecoderInput, check_decoder
from patchmine.models.puzzles import Puzzle, places_as_colours, put_at_places
from patchmine.ops import position_targets as places_of
from patchmine.ops.losses import squared_error
from patchmine.ops.masks import count_visible, lowest_visible
from patchmine.ops.patches import pixel_targets
from patchmine.ops.pictures import patch_map, reconstruction_panels, visible_panel
from patchmine.ops.schedules import falling
from patchmine.task import Method
from patchmine.types import Batch, Grid, Losses, Panel, ParamGroup, Progress


class DropPos(Method):
    """A classifier over all places for visible patches without position."""

    Config = DropPosSettings

    config: DropPosSettings
    encoder: Encoder
    position_token: nn.Parameter | None
    pixel_input: DecoderInput | None
    pixel_decoder: Decoder | None

    def __init__(self, config: DropPosSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        _refuse_leaks(encoder)
        self.grid = vit_tokens.encoder_grid(encoder)
        self.num_visible = count_visible(self.grid.num_patches, config.mask_ratio)
        self.num_kept = count_visible(self.num_visible, config.pos_mask_ratio)
        self.num_dropped = self.num_visible - self.num_kept
        self.smoothing_size = _smoothing_size(config, self.grid)
        width = config.decoder_embed_dim
        check_decoder(config, self.num_visible, config.mask_ratio)
        _check(config, encoder, self.num_dropped, self.grid.num_patches - self.num_visible)
        # With one weight for all, every image has as many terms as any other.
        self.averages_rows = not (config.attentive or config.conf_ignore)

        self.position_token = None
        if config.mask_token_type == "param":
            self.position_token = nn.Parameter(torch.empty(1, 1, encoder.embed_dim))
            nn.init.normal_(self.position_token, std=0.02)
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.decoder = Decoder(config, self.grid.num_patches)
        parts: list[nn.Module] = [self.decoder_embed, self.decoder]
        self.pixel_input = self.pixel_decoder = None
        if config.multi_task:
            prefix = encoder.num_prefix_tokens
            self.pixel_input = DecoderInput(encoder.embed_dim, width, self.grid, prefix)
            values = self.grid.values_per_patch(encoder.patch_embed.proj.in_channels)
            self.pixel_decoder = Decoder(config, values)
            parts += [self.pixel_input, self.pixel_decoder]
        for part in parts:
            initialise(part)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        images = batch.views[0]  # (B, C, H, W)
        puzzle = self.draw_puzzle(images)
        latent = self.encode(images, puzzle)  # (B, P + V, D)
        logits = self.locate(latent, self.num_dropped)  # (B, Q, L)
        weights = self.weigh(images, puzzle)  # (B, Q) or None
        losses = self.position_losses(logits, puzzle.dropped, weights, progress)
        predicted = self.reconstruct(latent, puzzle)
        if predicted is None:
            return losses
        norm, patch = self.config.norm_pix_loss, self.grid.patch
        target = pixel_targets(images, puzzle.removed, patch, norm_pix_loss=norm)
        position, pixels = losses["loss"], squared_error(predicted, target).mean()
        loss = self.config.pos_weight * position + pixels
        return {**losses, "loss": loss, "position": position, "pixels": pixels}

    def draw_puzzle(self, images: Tensor) -> Puzzle:
        """Which patches stay, and which of those keep their position: two independent draws."""
        count, device = len(images), images.device
        noise = self.noise.uniform(count, self.grid.num_patches, device=device)
        there = lowest_visible(noise, self.num_visible)
        noise = self.noise.uniform(count, self.num_visible, device=device)
        slots = lowest_visible(noise, self.num_kept)  # numbers among the visible ones
        kept, dropped = (there.visible.gather(1, index) for index in (slots.visible, slots.masked))
        return Puzzle(kept, dropped, there.masked)

    def encode(self, images: Tensor, puzzle: Puzzle) -> Tensor:
        """Final tokens: prefix, visible patches with position, those without: (B, P + V, D)."""
        kept = vit_tokens.embed_patches(self.encoder, images, puzzle.kept)  # (B, K, D)
        dropped = vit_tokens.project_patches(self.encoder, images, puzzle.dropped)  # (B, Q, D)
        dropped = dropped + self._in_place_of_positions(puzzle)
        prefix = vit_tokens.prefix_tokens(self.encoder, len(images))
        return transform(self.encoder, torch.cat([prefix, kept, dropped], dim=1))

    def _in_place_of_positions(self, puzzle: Puzzle) -> Tensor | float:
        """What dropped patches get instead, (B, Q, D) or less."""
        if self.position_token is not None:
            return self.position_token
        if self.config.mask_token_type == "zeros":
            return 0.0
        # Some patch may get its own position back and is asked for it all the same (reference).
        noise = self.noise.uniform(*puzzle.dropped.shape, device=puzzle.dropped.device)
        other = puzzle.dropped.gather(1, noise.argsort(dim=1, stable=True))
        return vit_tokens.patch_positions(self.encoder)[other]

    def locate(self, latent: Tensor, num_last: int) -> Tensor:
        """Logits over all places for the last tokens: (B, P + V, D) -> (B, num_last, L)."""
        # The decoder gets no positions either: they would be the answer.
        return self.decoder.head(self.decoder(self.decoder_embed(latent), num_last))

    @torch.no_grad()
    def weigh(self, images: Tensor, puzzle: Puzzle) -> Tensor | None:
        """How much each dropped patch counts, from a pass over the whole image: (B, Q) or None."""
        if not self.config.attentive:
            return None
        features = encode(self.encoder, images)  # (B, P + L, D)
        wanted = puzzle.visible[:, :, None].expand(-1, -1, features.shape[-1])
        patches = features[:, self.encoder.num_prefix_tokens :].gather(1, wanted)
        weights = attentive_weights(features[:, 0], patches, self.config.temperature)
        return weights[:, self.num_kept :]

    def reconstruct(self, latent: Tensor, puzzle: Puzzle) -> Tensor | None:
        """Predicted pixels of the removed patches, (B, L - V, P), where ``multi_task`` asks."""
        if self.pixel_input is None or self.pixel_decoder is None:
            return None
        tokens = self.pixel_input(latent, puzzle.mask)
        return self.pixel_decoder.head(self.pixel_decoder(tokens, puzzle.removed.shape[1]))

    def position_losses(
        self, logits: Tensor, places: Tensor, weights: Tensor | None, progress: Progress
    ) -> Losses:
        """Cross-entropy with the smoothed places (B, Q), one ratio over the batch.

        ``above_floor`` is the loss less its smallest possible value, which falls with the width of
        the targets; ``accuracy`` counts all dropped patches alike (docs/methods/droppos.md).
        """
        smoothed = self.smoothed_places(progress, logits.device)  # (L, L)
        scores = logits.float().log_softmax(dim=-1)
        entropies = -(smoothed[places] * scores).sum(dim=-1)  # (B, Q)
        right = (scores.argmax(dim=-1) == places).float()
        counted = torch.ones_like(entropies) if weights is None else weights
        if self.config.conf_ignore:
            sureness = scores.detach().gather(2, places[:, :, None]).squeeze(2).exp()
            counted = counted * (sureness < smoothed.diagonal()[places])
        # All may be ignored; then there is nothing to learn, and 0 / 0 would say NaN.
        total = counted.sum().clamp(min=torch.finfo(torch.float32).tiny)
        loss = (counted * entropies).sum() / total
        lowest = (counted * places_of.least_cross_entropy(smoothed)[places]).sum() / total
        losses = {"loss": loss, "above_floor": loss.detach() - lowest, "accuracy": right.mean()}
        if not self.averages_rows:
            losses["weighted_accuracy"] = (counted * right).sum() / total
        return losses

    def smoothed_places(self, progress: Progress, device: torch.device) -> Tensor:
        """(target L, place L): how each place's target is spread over the grid in this epoch."""
        config = self.config
        width = falling(progress, config.smoothing) if config.smoothing_decay else config.smoothing
        count = self.grid.num_patches
        size, norm = self.smoothing_size, config.smoothing_norm
        full = places_of.smoothing_map(size, width, norm=norm, device=device)
        return full[:count, :count]

    def param_groups(self) -> list[ParamGroup]:
        """Everything that learns; each parameter's gradient is clipped by itself."""
        return [ParamGroup(self.learning(), clip_norm=self.config.clip_grad, clip_each=True)]

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, visible patches, weights, true and predicted places, the patches put there.

        Of ``multi_task`` the reconstruction too.
        """
        images = batch.views[0]
        puzzle = self.draw_puzzle(images)
        weights = self.weigh(images, puzzle)
        latent = self.encode(images, puzzle)
        logits = self.locate(latent, self.num_dropped)
        sureness, places = logits.float().softmax(-1).max(dim=-1)
        panels = [Panel("input", images), visible_panel(images, puzzle.mask, self.grid)]
        if weights is not None:
            heat = patch_map(weights, self.grid, puzzle.dropped)
            note = "likeness to the class token, as a share of all visible patches"
            missing = "hatched: removed, or its position is known"
            panels.append(Panel("weight in the loss", heat, kind="heat", note=f"{note}; {missing}"))
        both = (puzzle.dropped, places)
        true, predicted = (places_as_colours(puzzle, where, self.grid) for where in both)
        put = put_at_places(images, puzzle, places, sureness, self.grid)
        gone, empty = "hatched: removed", "pixels are the input's; hatched: no patch is put there"
        predicted_pixels = self.reconstruct(latent, puzzle)
        if predicted_pixels is not None:
            norm = self.config.norm_pix_loss
            of = (images, puzzle.mask, self.grid, predicted_pixels)
            panels += reconstruction_panels(*of, standardised=norm)
        return [
            *panels,
            Panel("true places as colours (white: position kept)", true, "colour", gone),
            Panel("predicted places in the same colours", predicted, "colour", gone),
            Panel("patches put where predicted, the surest on top", put, note=empty),
        ]


def attentive_weights(whole: Tensor, patches: Tensor, temperature: float) -> Tensor:
    """Softmax of patches' cosines with the image's token: (B, D), (B, V, D) -> float32 (B, V)."""
    cosines = F.cosine_similarity(patches.float(), whole.float()[:, None], dim=-1, eps=1e-8)
    return (cosines / temperature).softmax(dim=-1)


def _smoothing_size(config: DropPosSettings, grid: Grid) -> tuple[int, ...]:
    """Rows and columns of the grid on which distances are measured."""
    if config.smoothing_grid == "patches":
        return grid.size
    # The published scripts give patches per side where engine_pretrain.py expects pixels per patch,
    # so that it counts image side / patches per side: 16 in place of 14 for 224 pixels.
    if grid.size[0] != grid.size[1] or grid.patch[0] < grid.size[0]:
        raise UserError(
            "method.smoothing_grid=as_run needs a square grid of no more patches a side than one "
            f"has pixels, not {grid.size[0]}x{grid.size[1]} of {grid.patch[0]} pixels: "
            "set method.smoothing_grid=patches"
        )
    return grid.patch


def _refuse_leaks(encoder: Encoder) -> None:
    """UserError for an encoder that knows places otherwise than by the table that is withheld."""
    if family_of(encoder).relative_positions(encoder):
        raise UserError(
            "method=droppos asks for places, and relative positions tell the encoder the answer: "
            "set model_args.use_rel_pos_bias=false model_args.use_shared_rel_pos_bias=false "
            "model_args.use_abs_pos_emb=true, or choose vit_base_patch16_224"
        )
    if encoder.pos_embed is None:
        raise UserError(
            "method=droppos withholds positions, and this encoder has none to withhold: "
            "set model_args.use_abs_pos_emb=true, or choose vit_base_patch16_224"
        )


def _check(config: DropPosSettings, encoder: Encoder, num_dropped: int, num_removed: int) -> None:
    if num_dropped == 0:
        raise UserError(
            f"method.pos_mask_ratio={config.pos_mask_ratio} withholds no patch's position: raise "
            f"it, or lower method.mask_ratio={config.mask_ratio}, or use smaller patches"
        )
    if config.attentive and encoder.cls_token is None:
        raise UserError(
            "method.attentive=true compares patches with the class token, and the model has none: "
            "set model_args.class_token=true or method.attentive=false"
        )
    if config.multi_task and num_removed == 0:
        raise UserError(
            "method.multi_task=true predicts removed patches, and method.mask_ratio="
            f"{config.mask_ratio} removes none: raise it, or set method.multi_task=false"
        )

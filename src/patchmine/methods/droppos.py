"""DropPos: say where visible patches belong whose position was withheld.

Wang, Fan, Wang, Song, Wang, Zhang, "DropPos: Pre-Training Vision Transformers by Reconstructing
Dropped Positions", NeurIPS 2023, arXiv 2309.03576.  Constants that the paper's abstract does not
give come from the reference code, Haochen-Wang409/DropPos; each names its file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.backbones.family import Encoder, encode, family_of, transform
from patchmine.backbones.tokens import (
    embed_patches,
    encoder_grid,
    patch_positions,
    prefix_tokens,
    project_patches,
)
from patchmine.backbones.vit import initialise
from patchmine.errors import UserError
from patchmine.methods.settings.droppos import DropPosSettings
from patchmine.models.decoder import Decoder, DecoderInput, check_decoder
from patchmine.ops.losses import squared_error
from patchmine.ops.masks import count_visible, lowest_visible
from patchmine.ops.patches import all_patches, images_from_values, patch_values, pixel_targets
from patchmine.ops.pictures import hide_masked, patch_map
from patchmine.ops.position_targets import (
    least_cross_entropy,
    paint_patches,
    place_colours,
    smoothing_map,
)
from patchmine.ops.schedules import falling
from patchmine.task import Method
from patchmine.types import Batch, Grid, Losses, Mask, Panel, ParamGroup, Progress


@dataclass(frozen=True)
class Puzzle:
    """Who is who among the patches of each image, by number, in raster order: the encoder sees
    ``kept``, ``dropped``.

    ``kept`` (B, K) keep their position embedding, ``dropped`` (B, Q) lose it, ``removed`` (B, L -
    V) are not there.
    """

    kept: Tensor
    dropped: Tensor
    removed: Tensor

    @property
    def visible(self) -> Tensor:
        """(B, V), in the order in which the encoder sees them: those whose place is asked for come
        last.
        """
        return torch.cat([self.kept, self.dropped], dim=1)

    @property
    def mask(self) -> Mask:
        """The same as MAE sees it; ``visible`` is in the encoder's order."""
        return Mask(
            self.visible,
            self.removed,
            self.kept.shape[1] + self.dropped.shape[1] + self.removed.shape[1],
        )


class DropPos(Method):
    """A classifier over all places for visible patches without position; few patches seen, no
    pixels predicted.
    """

    Config = DropPosSettings

    config: DropPosSettings
    encoder: Encoder
    position_token: nn.Parameter | None
    pixel_input: DecoderInput | None
    pixel_decoder: Decoder | None

    def __init__(self, config: DropPosSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        _refuse_leaks(encoder)
        self.grid = encoder_grid(encoder)
        self.num_visible = count_visible(self.grid.num_patches, config.mask_ratio)
        self.num_kept = count_visible(self.num_visible, config.pos_mask_ratio)
        self.num_dropped = self.num_visible - self.num_kept
        self.smoothing_size = _smoothing_size(config, self.grid)
        width, depth, heads = (
            config.decoder_embed_dim,
            config.decoder_depth,
            config.decoder_num_heads,
        )
        blocks: dict[str, Any] = dict(
            mlp_ratio=config.decoder_mlp_ratio,
            norm_eps=config.decoder_norm_eps,
            qkv_bias=config.decoder_qkv_bias,
        )
        check_decoder(width, heads, self.num_visible, config.mask_ratio)
        _check(
            config,
            encoder,
            num_dropped=self.num_dropped,
            num_removed=self.grid.num_patches - self.num_visible,
        )
        # With one weight for all, every image has as many terms as any other.
        self.averages_rows = not (config.attentive or config.conf_ignore)

        self.position_token = None
        if config.mask_token_type == "param":
            self.position_token = nn.Parameter(torch.empty(1, 1, encoder.embed_dim))
            nn.init.normal_(self.position_token, std=0.02)
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.decoder = Decoder(width, depth, heads, self.grid.num_patches, **blocks)
        parts: list[nn.Module] = [self.decoder_embed, self.decoder]
        self.pixel_input = self.pixel_decoder = None
        if config.multi_task:
            self.pixel_input = DecoderInput(
                encoder.embed_dim, width, self.grid, encoder.num_prefix_tokens
            )
            values = self.grid.values_per_patch(encoder.patch_embed.proj.in_channels)
            self.pixel_decoder = Decoder(width, depth, heads, values, **blocks)
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
        if self.pixel_input is None or self.pixel_decoder is None:
            return losses
        tokens = self.pixel_input(latent, puzzle.mask)
        painted = self.pixel_decoder.head(
            self.pixel_decoder(tokens, puzzle.removed.shape[1])
        )  # (B, L - V, P)
        target = pixel_targets(
            images, puzzle.removed, self.grid.patch, norm_pix_loss=self.config.norm_pix_loss
        )
        position, pixels = losses["loss"], squared_error(painted, target).mean()
        return {
            **losses,
            "loss": self.config.pos_weight * position + pixels,
            "position": position,
            "pixels": pixels,
        }

    def draw_puzzle(self, images: Tensor) -> Puzzle:
        """Two independent draws for each image: which patches stay, and which of those keep their
        position.
        """
        noise = self.noise.uniform(len(images), self.grid.num_patches, device=images.device)
        there = lowest_visible(noise, self.num_visible)
        slots = lowest_visible(
            self.noise.uniform(len(images), self.num_visible, device=images.device), self.num_kept
        )  # numbers among the visible ones
        kept, dropped = (there.visible.gather(1, index) for index in (slots.visible, slots.masked))
        return Puzzle(kept, dropped, there.masked)

    def encode(self, images: Tensor, puzzle: Puzzle) -> Tensor:
        """Tokens of the visible patches after the final norm, prefix first, then those with
        position: (B, P + V, D).
        """
        kept = embed_patches(self.encoder, images, puzzle.kept)  # (B, K, D)
        dropped = project_patches(
            self.encoder, images, puzzle.dropped
        ) + self._in_place_of_positions(puzzle)
        return transform(
            self.encoder,
            torch.cat([prefix_tokens(self.encoder, len(images)), kept, dropped], dim=1),
        )

    def _in_place_of_positions(self, puzzle: Puzzle) -> Tensor | float:
        """What dropped patches get instead, (B, Q, D) or less."""
        if self.position_token is not None:
            return self.position_token
        if self.config.mask_token_type == "zeros":
            return 0.0
        # Some patch may get its own position back; it is asked for it all the same, as in the
        # reference.
        order = self.noise.uniform(*puzzle.dropped.shape, device=puzzle.dropped.device).argsort(
            dim=1, stable=True
        )
        return patch_positions(self.encoder)[puzzle.dropped.gather(1, order)]

    def locate(self, latent: Tensor, num_last: int) -> Tensor:
        """Logits over all places for the last ``num_last`` tokens: (B, P + V, D) -> (B, num_last,
        L).

        The decoder gets no positions either: they would be the answer.
        """
        return self.decoder.head(self.decoder(self.decoder_embed(latent), num_last))

    @torch.no_grad()
    def weigh(self, images: Tensor, puzzle: Puzzle) -> Tensor | None:
        """How much each dropped patch counts: by what the encoder itself makes of the whole image,
        (B, Q) or None.
        """
        if not self.config.attentive:
            return None
        features = encode(self.encoder, images)  # (B, P + L, D)
        wanted = puzzle.visible[:, :, None].expand(-1, -1, features.shape[-1])
        patches = features[:, self.encoder.num_prefix_tokens :].gather(1, wanted)
        return attentive_weights(features[:, 0], patches, self.config.temperature)[
            :, self.num_kept :
        ]

    def position_losses(
        self, logits: Tensor, places: Tensor, weights: Tensor | None, progress: Progress
    ) -> Losses:
        """Cross-entropy with the smoothed places (B, Q), one ratio over the batch (spec droppos.md,
        section 3.6).

        ``above_floor`` is what is left of it when the smallest possible value is taken off, which
        falls with the width of the targets.  ``accuracy`` counts all dropped patches alike.
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
        floor = (counted * least_cross_entropy(smoothed)[places]).sum() / total
        losses = {"loss": loss, "above_floor": loss.detach() - floor, "accuracy": right.mean()}
        if not self.averages_rows:
            losses["weighted_accuracy"] = (counted * right).sum() / total
        return losses

    def smoothed_places(self, progress: Progress, device: torch.device) -> Tensor:
        """(target L, place L): how the target of each place is spread over the grid in this epoch."""
        config = self.config
        width = falling(progress, config.smoothing) if config.smoothing_decay else config.smoothing
        count = self.grid.num_patches
        return smoothing_map(self.smoothing_size, width, norm=config.smoothing_norm, device=device)[
            :count, :count
        ]

    def param_groups(self) -> list[ParamGroup]:
        """Everything that learns; each parameter's gradient is clipped by itself."""
        return [ParamGroup(self.learning(), clip_norm=self.config.clip_grad, clip_each=True)]

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, what the encoder saw, the weights, true and predicted places as colours, the
        patches put there.
        """
        images = batch.views[0]
        puzzle = self.draw_puzzle(images)
        weights = self.weigh(images, puzzle)
        sureness, places = (
            self.locate(self.encode(images, puzzle), self.num_dropped)
            .float()
            .softmax(-1)
            .max(dim=-1)
        )
        panels = [
            Panel("input", images),
            Panel("visible", hide_masked(images, puzzle.mask, self.grid)),
        ]
        if weights is not None:
            panels.append(
                Panel(
                    "weight in the loss", patch_map(weights, self.grid, puzzle.dropped), kind="heat"
                )
            )
        true, predicted = (
            _as_colours(puzzle, where, self.grid) for where in (puzzle.dropped, places)
        )
        return [
            *panels,
            Panel("true places as colours (white: position kept)", true, kind="colour"),
            Panel("predicted places in the same colours", predicted, kind="colour"),
            Panel(
                "patches put where predicted, the surest on top",
                _put(images, puzzle, places, sureness, self.grid),
            ),
        ]


def attentive_weights(whole: Tensor, patches: Tensor, temperature: float) -> Tensor:
    """Softmax of each patch's cosine with the token of the whole image: (B, D), (B, V, D) -> (B,
    V), float32.
    """
    cosines = F.cosine_similarity(patches.float(), whole.float()[:, None], dim=-1, eps=1e-8)
    return (cosines / temperature).softmax(dim=-1)


def _as_colours(puzzle: Puzzle, places: Tensor, grid: Grid) -> Tensor:
    """Each dropped patch in the colour of its place in ``places`` (B, Q), kept ones white: (B, 3,
    H, W), NaN: removed.

    A removed patch has no grey, which is about the colour of the middle.
    """
    colours = torch.full((len(places), grid.num_patches, 3), float("nan"), device=places.device)
    for index, paint in (
        (puzzle.kept, 1.0),
        (puzzle.dropped, place_colours(grid, places.device)[places]),
    ):
        filled = torch.zeros(*index.shape, 3, device=places.device) + paint
        colours = colours.scatter(1, index[:, :, None].expand_as(filled), filled)
    return paint_patches(colours, grid)


def _put(images: Tensor, puzzle: Puzzle, places: Tensor, sureness: Tensor, grid: Grid) -> Tensor:
    """Dropped patches at ``places`` (B, Q), the surest of several on top; the others where they
    belong; NaN: nobody.
    """
    values = patch_values(all_patches(images.float(), grid.patch))  # (B, L, P)

    def wide(index: Tensor) -> Tensor:
        return index[:, :, None].expand(-1, -1, values.shape[-1])

    claims = sureness[:, :, None] * F.one_hot(places, grid.num_patches)  # (B, Q, L)
    strongest, winner = claims.max(dim=1)  # (B, L)
    moved = values.gather(1, wide(puzzle.dropped)).gather(1, wide(winner))
    put = moved.masked_fill((strongest == 0)[:, :, None], float("nan"))
    put = put.scatter(1, wide(puzzle.kept), values.gather(1, wide(puzzle.kept)))
    return images_from_values(put, grid, images.shape[1])


def _smoothing_size(config: DropPosSettings, grid: Grid) -> tuple[int, ...]:
    """Rows and columns of the grid on which distances are measured.

    The published scripts give patches per side where engine_pretrain.py expects pixels per patch,
    so that it counts image side / patches per side: 16 in place of 14 for 224 pixels.
    """
    if config.smoothing_grid == "patches":
        return grid.size
    if grid.size[0] != grid.size[1] or grid.patch[0] < grid.size[0]:
        raise UserError(
            "method.smoothing_grid=as_run repeats published runs, whose grid had as many places a side as a patch has "
            f"pixels, which needs a square image of no more patches a side; here it is {grid.size[0]}x{grid.size[1]} "
            f"patches of {grid.patch[0]} pixels: set method.smoothing_grid=patches"
        )
    return grid.patch


def _refuse_leaks(encoder: Encoder) -> None:
    """UserError for an encoder that knows places otherwise than by the table that is withheld, or
    does not know any.
    """
    if family_of(encoder).relative_positions(encoder):
        raise UserError(
            "method=droppos asks where patches belong, and relative positions tell the encoder the answer: set "
            "model_args.use_rel_pos_bias=false model_args.use_shared_rel_pos_bias=false "
            "model_args.use_abs_pos_emb=true, or choose vit_base_patch16_224"
        )
    if encoder.pos_embed is None:
        raise UserError(
            "method=droppos withholds positions, and this encoder has none to withhold: set "
            "model_args.use_abs_pos_emb=true, or choose vit_base_patch16_224"
        )


def _check(
    config: DropPosSettings, encoder: Encoder, *, num_dropped: int, num_removed: int
) -> None:
    if num_dropped == 0:
        raise UserError(
            f"method.pos_mask_ratio={config.pos_mask_ratio} withholds no patch's position: raise it, or lower "
            f"method.mask_ratio={config.mask_ratio}, or use smaller patches"
        )
    if config.attentive and encoder.cls_token is None:
        raise UserError(
            "method.attentive=true compares patches with the class token, and the model has none: set "
            "model_args.class_token=true or method.attentive=false"
        )
    if config.multi_task and num_removed == 0:
        raise UserError(
            f"method.multi_task=true predicts removed patches, and method.mask_ratio={config.mask_ratio} removes none: "
            "raise it, or set method.multi_task=false"
        )

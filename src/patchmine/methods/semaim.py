"""SemAIM: predict every patch from those before it, in an order that starts at the main object.

Song, Zhang, Wang, "Semantic-Aware Autoregressive Image Modeling for Visual Representation
Learning", AAAI 2024, arXiv 2312.10457.  With ``order=stochastic`` it is SAIM: Qi et al., "Exploring
Stochastic Autoregressive Image Modeling for Visual Representation", AAAI 2023, arXiv 2212.01610.
Constants come from the reference code, skyoux/SemAIM.
"""

from __future__ import annotations

from typing import cast

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from patchmine.backbones.attention import class_attention
from patchmine.backbones.family import Encoder, encode, family_of, transform
from patchmine.backbones.foreign import ForeignTeacher
from patchmine.backbones.positions import sincos_table
from patchmine.backbones.tokens import (
    angles_at,
    embed_patches,
    encoder_grid,
    patch_positions,
    prefix_tokens,
)
from patchmine.backbones.vit import initialise
from patchmine.errors import UserError
from patchmine.methods.settings.semaim import SemAimSettings
from patchmine.models.streams import check_causal, query_stream, two_streams, without_learning
from patchmine.models.teacher import Teacher, foreign_teacher, ramped_decay
from patchmine.ops import losses, orders
from patchmine.ops import patches as cut
from patchmine.ops.blur import blur_matrix, blurred
from patchmine.ops.known import Counts, counting, levelled, settled, shown, told
from patchmine.ops.pictures import DIRECTION_UNIT, error_panel, input_panel, patch_map, pixel_unit
from patchmine.task import Method
from patchmine.types import Batch, Losses, Panel, Progress


class SemAIM(Method):
    """The encoder under a causal mask, and a query stream that reads what came earlier."""

    Config = SemAimSettings

    config: SemAimSettings
    encoder: Encoder
    teacher: Teacher | None
    foreign: ForeignTeacher | None
    query_table: Tensor | None
    blur_rows: Tensor
    blur_columns: Tensor

    def __init__(self, config: SemAimSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        check_causal(encoder, "semaim")
        self.grid = encoder_grid(encoder)
        self.by_content = config.order in orders.BY_CONTENT
        channels = encoder.patch_embed.proj.in_channels
        depth = config.query_depth or len(encoder.blocks)
        _check(config, depth=len(encoder.blocks), channels=channels)

        self.foreign = foreign_teacher(config, self.grid)
        width = encoder.embed_dim
        out_width = self.grid.values_per_patch(channels) if config.target == "pixel" else width
        if self.foreign is not None:
            out_width = self.foreign.width
            compared = self.by_content and config.similarity == "cls"
            if compared and self.foreign.tower.cls_token is None:
                raise UserError(
                    f"method.target_file={config.target_file} has no class token, which method."
                    "similarity=cls compares its patches with: set method.similarity=gap"
                )

        self.query_blocks = query_stream(encoder, depth)
        # Where attention alone is told places, queries start at MAE's table: all alike at zero,
        # their norm would leave them zero, and nothing to turn.
        table = sincos_table(width, self.grid.size) if encoder.pos_embed is None else None
        self.register_buffer("query_table", table, persistent=False)  # (L, D)
        mlp = config.head == "mlp"
        self.head = Mlp(width, 4 * width, out_width) if mlp else nn.Linear(width, out_width)
        initialise(self.head)

        asked = self.by_content and config.target == "pixel" and config.semantic_source == "ema"
        self.teacher = Teacher(encoder=encoder) if asked or config.target == "ema" else None
        for name, count, side in zip(
            ("rows", "columns"), self.grid.size, self.grid.patch, strict=True
        ):
            matrix = blur_matrix(count * side, config.blur_kernel, config.blur_sigma or 1.0)
            self.register_buffer(f"blur_{name}", matrix, persistent=False)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        images = batch.views[0]  # (B, C, H, W)
        patches = embed_patches(self.encoder, images)  # (B, L, D)
        features, similarity = self.judge(images, patches)
        if similarity is not None:
            similarity = levelled(similarity, batch.known, self.grid.patch)
        order, score = self.draw_order(images, similarity)  # (B, L); None, or (1 or B, L)
        predicted = self.predict_patches(patches, order, score)  # (B, L, T), by rank from here on
        error = self.error(predicted, images, features, order, batch.known)  # (B, L)
        by_rank = error.detach().mean(dim=0)
        counts = self.counting(batch.known, features, order)
        if counts is not None:
            by_rank = by_rank / counts.float().mean(dim=(0, 2)).clamp(min=1e-6)
        count = self.grid.num_patches
        return {
            "loss": error.mean(),
            # Known from its position only: below 1 here means a leak or a bias of the data.
            "first_patch": by_rank[0],
            "first_tenth": by_rank[: -(-count // 10)].mean(),
            "last_half": by_rank[count // 2 :].mean(),
            **told(counts),
        }

    @torch.no_grad()
    def judge(self, images: Tensor, patches: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Target features (B, L, T) and similarities (B, L) of whole images, where needed.

        One pass makes both; ``patches`` (B, L, D) are the encoder's own, which it shares.
        """
        config = self.config
        wants_features, by_attention = config.target != "pixel", config.similarity == "self"
        if not (wants_features or self.by_content):
            return None, None
        tokens, num_prefix = None, 1
        judging = self.encoder if self.teacher is None else cast(Encoder, self.teacher.encoder)
        similarity = None
        with without_learning(judging, images.device):
            if self.foreign is not None:
                tokens = self.foreign.tokens(images)
                num_prefix = self.foreign.tower.num_prefix_tokens
            elif wants_features or not by_attention:
                tokens = self._encode(images, patches)
            if self.by_content and by_attention:
                similarity = class_attention(judging, images)[:, :, 1:].mean(dim=1)
        if tokens is None:
            return None, similarity
        features = tokens[:, num_prefix:]
        if self.by_content and not by_attention:
            anchor = tokens[:, 0] if config.similarity == "cls" else features.float().mean(dim=1)
            similarity = orders.token_similarity(anchor, features)
        return (features if wants_features else None), similarity

    def _encode(self, images: Tensor, patches: Tensor) -> Tensor:
        """Final tokens (B, 1 + L, D) of the EMA teacher or else the encoder, nothing masked."""
        if self.teacher is not None:
            return encode(cast(Encoder, self.teacher.encoder), images)
        prefix = prefix_tokens(self.encoder, len(patches))
        return transform(self.encoder, torch.cat([prefix, patches], dim=1))

    def draw_order(self, images: Tensor, similarity: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The patch of each rank (B, L); scores (1 or B, L) where some are predicted at once."""
        config, count = self.config, self.grid.num_patches
        noise = self.noise.uniform(len(images), count, device=images.device)
        levels = orders.patch_levels(config.order, self.grid.size, similarity, images.device)
        order = orders.visiting_order(config.order, levels, noise)
        if config.ties == "keep":
            return order, levels.expand(len(images), -1).gather(1, order)
        if config.group_size > 1:
            return order, (torch.arange(count, device=images.device) // config.group_size)[None]
        return order, None

    def predict_patches(self, patches: Tensor, order: Tensor, score: Tensor | None) -> Tensor:
        """Predictions by rank, (B, L, T), of embedded patches (B, L, D) in raster order."""
        # Sorted by rank, attention is exactly the lower triangle, in both streams: content is the
        # class token and all patches but the last, which nobody reads, and the query of rank r
        # reads the first r + 1 of them.  Only patches that are predicted at once take masks.
        prefix = prefix_tokens(self.encoder, len(patches))
        content = torch.cat([prefix, orders.take(patches, order[:, :-1])], dim=1)  # (B, L, D)
        table = patch_positions(self.encoder) if self.query_table is None else self.query_table
        queries = table[order].to(content.dtype)  # (B, L, D)
        content_mask = query_mask = None
        if score is not None:
            length = order.shape[1]
            both = orders.visibility(score)
            content_mask, query_mask = (mask[:, None, :length, :length] for mask in both)
        angles = family_of(self.encoder).angles(self.encoder, self.grid.size)
        angles = None if angles is None else angles_at(angles, order)  # (B, 1, L, A)
        streams = (content, queries, content_mask, query_mask, angles)
        _, answers = two_streams(self.encoder, self.query_blocks, *streams)
        return self.head(self.encoder.norm(answers[-1]))

    def counting(self, known: Tensor | None, features: Tensor | None, order: Tensor) -> Counts:
        """Which values of the patches by rank count, of features which patches."""
        return counting(known, order, self.grid.patch, whole=features is not None)

    def error(
        self,
        predicted: Tensor,
        images: Tensor,
        features: Tensor | None,
        order: Tensor,
        known: Tensor | None = None,
    ) -> Tensor:
        """Loss of each patch by rank, 0 where it does not count: float32 (B, L)."""
        counts = self.counting(known, features, order)
        if features is not None:
            target = orders.take(features, order)
            return losses.direction_error(settled(predicted, target, counts), target)
        norm, of = self.config.norm_pix_loss, (self.soften(images, known), order, self.grid.patch)
        target = cut.pixel_targets(*of, norm_pix_loss=norm, counts=counts)
        squared = self.config.pixel_loss == "l2"
        apart = losses.squared_error if squared else losses.absolute_error
        return apart(settled(predicted, target, counts), target)

    def soften(self, images: Tensor, known: Tensor | None = None) -> Tensor:
        """What pixel targets are cut from, float32 (B, C, H, W), made of known pixels alone."""
        if self.config.blur_sigma is None:
            return images.float()
        blurs = (self.blur_rows, self.blur_columns)
        if known is None:
            return blurred(images, *blurs)
        share = blurred(known.float(), *blurs) / blurred(torch.ones_like(images), *blurs)
        return blurred(images.where(known, 0.0), *blurs) / share.clamp(min=1e-6)

    def after_step(self, progress: Progress) -> None:
        if self.teacher is not None:
            self.teacher.update(ramped_decay(self.config, progress), encoder=self.encoder)

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, similarity, rank of each patch, each as predicted from those before it, error."""
        images = batch.views[0]
        patches = embed_patches(self.encoder, images)
        features, similarity = self.judge(images, patches)
        if similarity is not None:
            similarity = levelled(similarity, batch.known, self.grid.patch)
        order, score = self.draw_order(images, similarity)
        predicted = self.predict_patches(patches, order, score)
        panels = [input_panel(images, batch.known)]
        if similarity is not None:
            titles = {"cls": "similarity to the class token", "gap": "similarity to the mean patch"}
            title = titles.get(self.config.similarity, "attention of the class token")
            attends = "share of the attention, mean of heads"
            note = "cosine, 1: alike" if self.config.similarity in titles else attends
            heat = patch_map(similarity, self.grid)
            panels.append(Panel(title, heat, kind="heat", note=note))
        together = "" if score is None else ", some at once"
        ranks = torch.arange(self.grid.num_patches, device=images.device)
        ranks = ranks if score is None else score
        rank_map = patch_map(ranks.expand_as(order), self.grid, order)
        title = f"order: dark is predicted first{together}"
        panels.append(Panel(title, rank_map, kind="heat", note="place in the order, 0 is first"))
        unit = DIRECTION_UNIT
        if features is None:
            panels += self._drawn(images, predicted, order)
            squared, norm = self.config.pixel_loss == "l2", self.config.norm_pix_loss
            unit = pixel_unit(squared=squared, standardised=norm)
        counts = self.counting(batch.known, features, order)
        error = shown(self.error(predicted, images, features, order, batch.known), counts)
        return [*panels, error_panel(error, self.grid, order, unit)]

    def _drawn(self, images: Tensor, predicted: Tensor, order: Tensor) -> list[Panel]:
        """All patches as predicted, each from the true ones before it."""
        title, places = "each patch as predicted from the true ones before it", order.argsort(dim=1)

        def panel(title: str, values: Tensor, note: str) -> Panel:
            raster = orders.take(values, places)
            pixels = cut.images_from_values(raster, self.grid, images.shape[1])
            return Panel(title, pixels, note=note)

        values = predicted.float()
        if not self.config.norm_pix_loss:
            return [panel(title, values, "the model's own pixels")]
        true = cut.gather_patches(self.soften(images), order, self.grid.patch)
        own = cut.patch_statistics(cut.patch_values(true))
        usual = (each.mean(dim=1, keepdim=True) for each in own)
        plain = "all patches with one mean and contrast, the image's average"
        borrowed = "mean and contrast of each patch borrowed from the input, unknown to the model"
        return [
            panel(f"plain: {title}", cut.with_statistics(values, *usual), plain),
            panel(f"{title}, statistics borrowed", cut.with_statistics(values, *own), borrowed),
        ]


def _check(config: SemAimSettings, *, depth: int, channels: int) -> None:
    """UserError for settings that contradict each other or the encoder."""
    foreign = config.target in ("dino", "clip")
    if config.query_depth is not None and depth % config.query_depth:
        divisors = ", ".join(str(n) for n in range(1, depth + 1) if depth % n == 0)
        raise UserError(
            f"method.query_depth={config.query_depth} does not divide the {depth} blocks of the "
            f"encoder: choose one of {divisors}"
        )
    if config.blur_sigma is not None and config.blur_kernel % 2 == 0:
        raise UserError(
            f"method.blur_kernel={config.blur_kernel} has no middle pixel: "
            f"try method.blur_kernel={config.blur_kernel + 1}"
        )
    if config.ties == "keep" and config.order not in orders.IN_GROUPS:
        raise UserError(
            f"method.ties=keep: method.order={config.order} has no ties; "
            f"choose method.order={', '.join(orders.IN_GROUPS)}, or method.group_size=N"
        )
    if config.ties == "keep" and config.group_size > 1:
        raise UserError(
            f"method.ties=keep and method.group_size={config.group_size} are two ways to group "
            "patches: give one of them"
        )
    if config.semantic_source == "ema" and config.target not in ("pixel", "ema"):
        raise UserError(
            f"method.semantic_source=ema is not used with method.target={config.target}, "
            "which judges similarity itself: leave it out"
        )
    if foreign and config.similarity == "self":
        raise UserError(
            "method.similarity=self needs the encoder's attention, and method.target="
            f"{config.target} judges by its own features: set method.similarity=cls or gap"
        )
    if foreign and channels != 3:
        raise UserError(
            f"method.target={config.target} is a network for three channels, not for "
            f"channels={channels}"
        )

"""EMAE: all parts of an image predict the rest in one step, and must agree where they overlap.

Li, Zhu, Chen, Li, Zhao, Zhao, Tang, Wang, "Efficient Masked Autoencoders with Self-Consistency",
arXiv 2302.14431, without published code.  What the abstract leaves open follows an independent
re-implementation or MAE; docs/methods/emae.md says for each choice which.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from patchmine.backbones.family import Encoder, transform
from patchmine.backbones.tokens import embed_patches, encoder_grid, prefix_tokens
from patchmine.errors import UserError
from patchmine.methods.settings.emae import EmaeSettings
from patchmine.models.decoder import check_decoder, masked_decoder
from patchmine.ops import parts as image_parts
from patchmine.ops import pictures
from patchmine.ops.known import Counts, counting, shown, told
from patchmine.ops.patches import pixel_targets
from patchmine.task import Method
from patchmine.types import Batch, Grid, Losses, Mask, Panel, Progress

MOST_SHOWN = 4  # parts in a picture; more would make it too wide to read


class EMAE(Method):
    """MAE over K disjoint visible parts of each image at once, with a self-consistency loss."""

    Config = EmaeSettings

    config: EmaeSettings
    encoder: Encoder
    by_patch: Tensor

    def __init__(self, config: EmaeSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.grid = encoder_grid(encoder)
        self.num_parts, self.num_used = _count_parts(config, self.grid)
        num_visible = self.grid.num_patches // self.num_parts
        check_decoder(config, num_visible, 1 - 1 / self.num_parts)
        values = self.grid.values_per_patch(encoder.patch_embed.proj.in_channels)
        self.decoder_input, self.decoder = masked_decoder(encoder, self.grid, config, values)
        if config.mask_token == "zeros":
            self.decoder_input.mask_token.requires_grad_(False).zero_()
        by_patch = image_parts.order_by_patch(self.num_parts, self.num_used)
        self.register_buffer("by_patch", by_patch, persistent=False)

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        images = batch.views[0]  # (B, C, H, W)
        parts = self.draw_parts(images)  # (B, K, V)
        predicted = self.reconstruct(images, parts)  # (B, U * (K - 1), V, P)
        counts = self.counting(batch, parts)  # (B, K, V, P)
        target = self.targets(images, parts, counts)  # (B, K, V, P)
        reconstruction, distance, disagreement = image_parts.parts_losses(
            predicted, target, self.num_used, self.config.sc_dist, counts
        )
        if self.num_parts == 2 or self.num_used == 1:  # no patch has two predictions
            return {"loss": reconstruction, **told(counts)}
        consistency = self.pull * distance
        if self.config.sc_grad == "both":
            # Two terms, each with the other side fixed: one plain term's gradient, twice its value.
            consistency = consistency + consistency.detach()
        return {
            "loss": reconstruction + self.config.sc_weight * consistency,
            "reconstruction": reconstruction,
            "consistency": consistency,
            "disagreement": disagreement,
            **told(counts),
        }

    @property
    def pull(self) -> float:
        """Factor of the mean distance over pairs of parts and the patches that both predict."""
        # Both of a pair predict 1 - 2/K of an image.
        share = 1 - 2 / self.num_parts if self.config.sc_norm == "all" else 1.0
        pairs = self.num_used * (self.num_used - 1) // 2
        return share * (pairs if self.config.sc_pairs == "sum" else 1)

    def draw_parts(self, images: Tensor) -> Tensor:
        """Numbers of the patches in each part, (B, K, V)."""
        noise = self.noise.uniform(len(images), self.grid.num_patches, device=images.device)
        return image_parts.split_parts(noise, self.num_parts)

    def encode_parts(self, images: Tensor, parts: Tensor) -> Tensor:
        """The parts in use as sequences, each with a class token of its own: (B * U, P + V, D)."""
        # Every patch is embedded once, in the order of the parts: splitting then costs nothing.
        used = parts[:, : self.num_used]
        tokens = embed_patches(self.encoder, images, used.flatten(1))  # (B, U * V, D)
        tokens = tokens.reshape(-1, used.shape[2], tokens.shape[-1])  # (B * U, V, D)
        prefix = prefix_tokens(self.encoder, len(tokens))
        return transform(self.encoder, torch.cat([prefix, tokens], dim=1), used.flatten(0, 1))

    def reconstruct(self, images: Tensor, parts: Tensor) -> Tensor:
        """What each part predicts of what it does not see, by patch: (B, U * (K - 1), V, P)."""
        features = self.decoder(*self.decoder_tokens(images, parts))  # (B * U, (K - 1) * V, W)
        features = features.reshape(len(images), len(self.by_patch), -1, features.shape[-1])
        return self.decoder.head(features.index_select(1, self.by_patch))

    def decoder_tokens(self, images: Tensor, parts: Tensor) -> tuple[Tensor, int]:
        """What enters the decoder, (B * U, P + K * V, W), and how many at its end are masked."""
        visible = parts[:, : self.num_used].flatten(0, 1)  # (B * U, V)
        unseen = image_parts.unseen_patches(parts, self.num_used).flatten(0, 1)
        # Part after part, not in raster order: attention does not mind, and predictions line up.
        mask = Mask(visible, unseen, self.grid.num_patches)
        return self.decoder_input(self.encode_parts(images, parts), mask), unseen.shape[1]

    def counting(self, batch: Batch, parts: Tensor) -> Counts:
        """Which values of the patches of each part count, (B, K, V, P); None: all."""
        counts = counting(batch.known, parts.flatten(1), self.grid.patch)
        return None if counts is None else counts.reshape(*parts.shape, -1)

    def targets(self, images: Tensor, parts: Tensor, counts: Counts = None) -> Tensor:
        """What is to be predicted, once for each patch of each part: float32 (B, K, V, P)."""
        norm, of = self.config.norm_pix_loss, (images, parts.flatten(1), self.grid.patch)
        counts = None if counts is None else counts.flatten(1, 2)
        values = pixel_targets(*of, norm_pix_loss=norm, counts=counts)
        return values.reshape(*parts.shape, -1)

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input; each part and its reconstruction of the rest; mean error and disagreement."""
        images = batch.views[0]
        parts = self.draw_parts(images)
        predicted = self.reconstruct(images, parts)  # (B, U * (K - 1), V, P)
        panels, norm = [pictures.input_panel(images, batch.known)], self.config.norm_pix_loss
        unseen = image_parts.unseen_patches(parts, self.num_used)  # (B, U, (K - 1) * V)
        by_part = predicted.index_select(1, self.by_patch.argsort()).reshape(*unseen.shape, -1)
        for part in range(min(self.num_used, MOST_SHOWN)):
            mask = Mask(parts[:, part], unseen[:, part], self.grid.num_patches)
            title, own = f"part {part + 1} of {self.num_parts}", by_part[:, part]
            drawn = pictures.reconstruction_panels(images, mask, self.grid, own, standardised=norm)
            seen = pictures.visible_panel(images, mask, self.grid, title)
            drawn = [replace(each, title=f"{title}: {each.title}") for each in drawn]
            if part > 0:
                # One plain reconstruction, and notes once: all would be too wide to read.
                seen, drawn = replace(seen, note="hatched: hidden"), [replace(drawn[1], note="")]
            panels += [seen, *drawn]
        counts = self.counting(batch, parts)
        of = (self.targets(images, parts, counts), self.num_used, counts)
        errors = [each.square().mean(dim=(2, 4)) for each in image_parts.errors(predicted, *of)]
        error, index = torch.cat(errors, dim=1).flatten(1), parts.flatten(1)
        error = shown(error, None if counts is None else counts.flatten(1, 2))
        unit = f"{pictures.pixel_unit(standardised=norm)}; mean over the parts that predict it"
        panels.append(pictures.error_panel(error, self.grid, index, unit))
        if self.num_parts > 2 and self.num_used > 1:
            apart = image_parts.patch_disagreement(predicted, self.num_parts, self.num_used)
            heat = pictures.patch_map(apart.flatten(1), self.grid, index)
            note = "mean distance between two parts' predictions of a patch, in units of the target"
            if self.num_used < self.num_parts:
                note += "; hatched: predicted once"
            panels.append(Panel("disagreement", heat, kind="heat", note=note))
        return panels


def _count_parts(config: EmaeSettings, grid: Grid) -> tuple[int, int]:
    """K and U, or a UserError for numbers that do not fit."""
    parts, patches = config.parts, grid.num_patches
    if patches % parts:
        divisors = [n for n in range(2, patches + 1) if patches % n == 0]
        fitting = sorted(divisors, key=lambda n: abs(n - parts))[:3]
        remedy = " or ".join(f"method.parts={n}" for n in sorted(fitting)) or "a smaller patch_size"
        size = "x".join(map(str, grid.size))
        raise UserError(
            f"method.parts={parts} does not divide the {patches} patches of a {size} grid: set "
            f"{remedy}"
        )
    used = parts if config.parts_used is None else config.parts_used
    if used > parts:
        raise UserError(
            f"method.parts_used={used} is more than method.parts={parts}: set it to {parts} or less"
        )
    return parts, used

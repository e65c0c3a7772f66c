"""AMT: the model's own attention decides which patches are masked, and which are thrown away.

Liu, Gui, Luo, "Good helper is around you: Attention-driven Masked Image Modeling", AAAI 2023, arXiv
2211.15362 (versions 1 and 2; version 3 is another method).  Constants come from the reference code,
guijiejie/AMT; each names its file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from patchmine.backbones import tokens as vit_tokens
from patchmine.backbones.attention import class_attention
from patchmine.backbones.family import Encoder, encode, transform
from patchmine.errors import UserError
from patchmine.methods.settings.amt import AmtSettings
from patchmine.models.decoder import Decoder, check_decoder, masked_decoder
from patchmine.models.droppath import draw_drop_paths, seed_drop_paths
from patchmine.models.maps import ItemMaps
from patchmine.models.onednn import fast_linear
from patchmine.models.teacher import Teacher
from patchmine.models.units import patches_per_unit
from patchmine.ops import losses, masks, patches, pictures
from patchmine.ops.alignment import align, attention_map
from patchmine.ops.known import Counts, counting, levelled, settled, shown, told
from patchmine.task import Method, PlainItems
from patchmine.types import Batch, Losses, Mask, Panel, ParamGroup, Progress

LONG_RUN = 200  # epochs from which the published schedule, in absolute epochs, makes sense
TOKEN_STD = 0.02  # SimMIM-AMT/models/simmim.py cuts the normal distribution at one deviation


class Published(NamedTuple):
    """What the published settings of one host are where the user leaves them open."""

    mask_ratio: float
    throw_ratio: float
    warmup_mask_ratio: float | None  # None: as mask_ratio
    clip_grad: float | None


PUBLISHED = {
    "mae": Published(0.45, 0.40, 0.75, None),  # mae-AMT/models_mae.py
    "simmim": Published(0.44, 0.26, None, 5.0),  # SimMIM-AMT: yaml of the 200 epochs, config.py
}


class AMT(Method):
    """Attention-driven masking and throwing, on MAE (a decoder) or on SimMIM (mask tokens)."""

    Config = AmtSettings

    config: AmtSettings
    encoder: Encoder
    decoder: Decoder | None
    teacher: Teacher | None
    maps: ItemMaps | None

    def __init__(self, config: AmtSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        if encoder.cls_token is None:
            raise UserError(
                "method=amt follows the class token's attention, and the model has none: set "
                "model_args.class_token=true, or choose vit_base_patch16_224"
            )
        self.published = PUBLISHED[config.host]
        self.on_mae = config.host == "mae"
        self.grid = vit_tokens.encoder_grid(encoder)
        self.per_unit = (1, 1) if self.on_mae else patches_per_unit(self.grid, config.mask_unit)
        self.num_units = self.grid.num_patches // math.prod(self.per_unit)
        self.num_masked, self.num_thrown, self.num_warmup = self._counts()
        self.channels = encoder.patch_embed.proj.in_channels
        values = self.grid.values_per_patch(self.channels)

        self.drop_paths = seed_drop_paths(encoder)
        self.decoder = None
        if self.on_mae:
            left = self.num_units - self.num_warmup
            check_decoder(config, left, config.warmup_mask_ratio or 0.75)
            self.decoder_input, self.decoder = masked_decoder(encoder, self.grid, config, values)
        else:
            self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.embed_dim))
            nn.init.trunc_normal_(self.mask_token, std=TOKEN_STD, a=-TOKEN_STD, b=TOKEN_STD)
            self.head = nn.Linear(encoder.embed_dim, values)  # torch's initialisation: SimMIM
        online = config.maps == "online"
        self.teacher = Teacher(encoder=encoder) if online else None
        self.maps = None if online else ItemMaps(self.grid.num_patches)
        self.inductive = online  # other images have no maps in the table

    def _counts(self) -> tuple[int, int, int]:
        """Units masked, thrown, and masked at random before; rounded as in each host's code."""
        config, published, units = self.config, self.published, self.num_units
        masked = published.mask_ratio if config.mask_ratio is None else config.mask_ratio
        thrown = published.throw_ratio if config.throw_ratio is None else config.throw_ratio
        warmup = config.warmup_mask_ratio or published.warmup_mask_ratio or masked
        if self.on_mae:
            num_masked = int(units * masked)
            num_thrown = int(units * (masked + thrown)) - num_masked
            num_warmup = units - masks.count_visible(units, warmup)
        else:
            shares = (masked, thrown, warmup)
            num_masked, num_thrown, num_warmup = (math.ceil(units * share) for share in shares)
        given = f"method.mask_ratio={masked:g} and method.throw_ratio={thrown:g}"
        if masked + thrown >= 1 or num_masked + num_thrown >= units:
            raise UserError(
                f"{given} leave none of {units} patches or mask units visible: lower one of them"
            )
        if num_masked == 0 or num_warmup in (0, units):
            raise UserError(
                f"{given} and method.warmup_mask_ratio={warmup:g} mask none or all of {units} "
                "patches or mask units: choose ratios nearer to one half, or smaller patches"
            )
        return num_masked, num_thrown, num_warmup

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        images = batch.views[0]  # (B, C, H, W)
        attention = self.attend(batch) if self.guided(progress) else None  # (B, L)
        mask = self.draw_mask(images, attention)
        counts = self.counting(batch, mask)
        target = self.target(images, mask, counts)  # (B, M, P)
        predicted = settled(self.reconstruct(images, mask), target, counts)  # (B, M, P)
        if self.on_mae:
            return {"loss": losses.squared_error(predicted, target).mean(), **told(counts)}
        loss = losses.masked_absolute_error(predicted, target, self.channels)
        return {"loss": loss, **told(counts)}

    def guided(self, progress: Progress) -> bool:
        """Whether attention decides in this epoch."""
        return progress.epoch >= _epochs(self.config.start_epoch, 41, math.ceil, progress)

    @torch.no_grad()
    def attend(self, batch: Batch) -> Tensor:
        """How much attention goes to each patch of the views, (B, L) in [0, 1].

        A patch without data is taken to have the mean of its image.
        """
        if self.teacher is not None:
            attention = probe(cast(Encoder, self.teacher.encoder), batch.views[0])
        else:
            maps = cast(ItemMaps, self.maps)(batch.index)  # (B, L), of the whole images
            how = (batch.box, batch.flip, self.config.alignment)
            attention = align(maps, self.grid, *how)
        return levelled(attention, batch.known, self.grid.patch)

    def draw_mask(self, images: Tensor, attention: Tensor | None) -> Mask:
        """Masked, visible and thrown patches drawn by attention (B, L); at random without it."""
        noise = self.noise.uniform(len(images), self.num_units, device=images.device)
        if attention is not None:
            weights = masks.sum_in_units(attention, self.grid, self.per_unit)
            order = masks.weighted_order(weights, noise)
            masked = order[:, : self.num_masked]
            visible = order[:, self.num_masked + self.num_thrown :]
        else:
            # The lowest noise stays visible on MAE, and is masked on SimMIM.
            order = noise.argsort(dim=1, stable=True)
            first = self.num_units - self.num_warmup if self.on_mae else self.num_warmup
            low, high = order.tensor_split([first], dim=1)
            visible, masked = (low, high) if self.on_mae else (high, low)
        both = (visible, masked)
        visible, masked = (masks.expand_units(units, self.grid, self.per_unit) for units in both)
        return Mask(visible, masked, self.grid.num_patches)

    def reconstruct(self, images: Tensor, mask: Mask) -> Tensor:
        """Predicted pixels of the masked patches, (B, M, P), in the order of `target`."""
        draw_drop_paths(self.drop_paths, self.noise, images)
        if self.decoder is not None:
            latent = encode(self.encoder, images, mask.visible)  # (B, P + V, D)
            tokens = self.decoder_input(latent, mask)  # (B, P + V + M, W)
            return self.decoder.head(self.decoder(tokens, mask.masked.shape[1]))
        visible = vit_tokens.embed_patches(self.encoder, images, mask.visible)  # (B, V, D)
        positions = vit_tokens.patch_positions(self.encoder)
        hidden = self.mask_token + positions[mask.masked]  # (B, M, D)
        prefix = vit_tokens.prefix_tokens(self.encoder, len(images))
        # Their order means nothing, as positions go with them; masked ones last are one slice.
        order = torch.cat([mask.visible, mask.masked], dim=1)  # (B, V + M)
        tokens = transform(self.encoder, torch.cat([prefix, visible, hidden], dim=1), order)
        return self.head(tokens[:, -mask.masked.shape[1] :])

    def counting(self, batch: Batch, mask: Mask) -> Counts:
        """Which values count, in the order of `target`."""
        of = (batch.known, mask.masked, self.grid.patch)
        return counting(*of, channels_first=not self.on_mae)

    def target(self, images: Tensor, mask: Mask, counts: Counts = None) -> Tensor:
        """Pixels of masked patches, float32 (B, M, P): (h, w, C) on MAE, (C, h, w) on SimMIM."""
        norm, patch = self.config.norm_pix_loss, self.grid.patch
        if self.on_mae:
            of = (images, mask.masked, patch)
            return patches.pixel_targets(*of, norm_pix_loss=norm, counts=counts)
        return patches.gather_patches(images.float(), mask.masked, patch).flatten(2)

    def begin_epoch(self, progress: Progress, plain_data: PlainItems) -> None:
        """Every few epochs, renew the maps of all whole images with the encoder as it is now."""
        if self.maps is None or progress.epoch not in self.whole_epochs(progress):
            return
        training = self.encoder.training
        self.encoder.eval()
        # As the loop computes a step on a processor; compiled blocks do not run inside of it.
        compiled = any(part._compiled_call_impl is not None for part in self.encoder.modules())
        with nullcontext() if compiled else fast_linear():
            self.maps.replace(
                (batch.index, probe(self.encoder, batch.views[0])) for batch in plain_data
            )
        self.encoder.train(training)

    def whole_epochs(self, progress: Progress) -> Collection[int]:
        if self.maps is None:
            return ()
        start = _epochs(self.config.start_epoch, 41, math.ceil, progress)
        every = _epochs(self.config.refresh_every, 40, round, progress)
        return range(start, progress.total_epochs, every)

    def after_step(self, progress: Progress) -> None:
        if self.teacher is not None:
            self.teacher.update(self.config.ema, encoder=self.encoder)

    def param_groups(self) -> list[ParamGroup]:
        """On SimMIM the class token and learned positions are not decayed, as there."""
        clip = self.config.clip_grad or self.published.clip_grad
        undecayed = () if self.on_mae else {"encoder.cls_token", "encoder.pos_embed"}
        return self.sparing(undecayed, clip_norm=clip)

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, attention, the roles drawn from it, visible patches, reconstruction, error.

        The attention is that of the encoder as it is now to the pictures themselves.
        """
        images, grid = batch.views[0], self.grid
        attending = self.encoder if self.teacher is None else cast(Encoder, self.teacher.encoder)
        attention = levelled(probe(attending, images), batch.known, grid.patch)
        guided = self.guided(progress)
        mask = self.draw_mask(images, attention if guided else None)
        counts, predicted = self.counting(batch, mask), self.reconstruct(images, mask)
        target = self.target(images, mask, counts)
        apart = losses.squared_error if self.on_mae else losses.absolute_error
        error = shown(apart(settled(predicted, target, counts), target), counts)
        if not self.on_mae:
            predicted = patches.channels_last(predicted, self.channels)
        norm = self.on_mae and self.config.norm_pix_loss
        drawn = pictures.reconstruction_panels(images, mask, grid, predicted, standardised=norm)
        unit = pictures.pixel_unit(squared=self.on_mae, standardised=norm)
        attended = "of the class token; each head from 0 (least) to 1 (most), then their mean"
        how = "drawn by attention" if guided else "drawn at random"
        return [
            pictures.input_panel(images, batch.known),
            Panel("attention", pictures.patch_map(attention, grid), kind="heat", note=attended),
            pictures.roles_panel(mask, grid, how),
            *pictures.masked_panels(images, mask, grid, drawn, error, unit),
        ]


@torch.no_grad()
def probe(encoder: Encoder, images: Tensor) -> Tensor:
    """The class token's attention in the last block to all patches of images: (B, L) in [0, 1]."""
    return attention_map(class_attention(encoder, images)[:, :, encoder.num_prefix_tokens :])


def _epochs(
    given: int | None, published: int, rounded: Callable[[float], int], progress: Progress
) -> int:
    """A setting in epochs: as given, as published, or a tenth of a run too short for that."""
    if given is not None:
        return given
    short = max(1, rounded(progress.total_epochs / 10))
    return published if progress.total_epochs >= LONG_RUN else short

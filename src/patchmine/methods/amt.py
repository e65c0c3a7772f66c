"""AMT: where the model itself looks decides which patches are hidden, and which are thrown away
altogether.

Liu, Gui, Luo, "Good helper is around you: Attention-driven Masked Image Modeling", AAAI 2023, arXiv
2211.15362 (versions 1 and 2; version 3 is another method).  Constants come from the reference code,
guijiejie/AMT; each names its file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from patchmine.backbones.attention import class_attention
from patchmine.backbones.family import Encoder, encode, transform
from patchmine.backbones.tokens import embed_patches, encoder_grid, patch_positions, prefix_tokens
from patchmine.backbones.vit import initialise
from patchmine.errors import UserError
from patchmine.methods.settings.amt import AmtSettings
from patchmine.models.decoder import Decoder, DecoderInput, check_decoder
from patchmine.models.droppath import draw_drop_paths, seed_drop_paths
from patchmine.models.maps import ItemMaps
from patchmine.models.onednn import fast_linear
from patchmine.models.teacher import Teacher
from patchmine.models.units import patches_per_unit
from patchmine.ops.alignment import align, attention_map
from patchmine.ops.losses import masked_absolute_error, squared_error
from patchmine.ops.masks import count_visible, expand_units, sum_in_units, weighted_order
from patchmine.ops.patches import channels_last, gather_patches, pixel_targets
from patchmine.ops.pictures import hide_masked, patch_map, reconstruction_panel, roles_panel
from patchmine.task import Method
from patchmine.types import Batch, Losses, Mask, Panel, ParamGroup, Progress

LONG_RUN = (
    200  # epochs from which the published schedule, which counts in absolute epochs, makes sense
)
TOKEN_STD = 0.02  # SimMIM-AMT/models/simmim.py cuts the normal distribution at one deviation


class Published(NamedTuple):
    """What the published settings of one host are where the user leaves them open."""

    mask_ratio: float
    throw_ratio: float
    warmup_mask_ratio: float | None  # None: as mask_ratio
    clip_grad: float | None


PUBLISHED = {
    "mae": Published(0.45, 0.40, 0.75, None),  # mae-AMT/models_mae.py
    "simmim": Published(
        0.44, 0.26, None, 5.0
    ),  # SimMIM-AMT, the yaml of the 200 epochs and config.py
}


class AMT(Method):
    """Attention-driven masking and throwing, on MAE (with a decoder) or on SimMIM (with mask tokens
    in the encoder).
    """

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
                "method=amt follows the class token's attention, and the model has none: choose another"
            )
        self.published = PUBLISHED[config.host]
        self.grid = encoder_grid(encoder)
        self.per_unit = (
            (1, 1) if config.host == "mae" else patches_per_unit(self.grid, config.mask_unit)
        )
        self.num_units = self.grid.num_patches // math.prod(self.per_unit)
        self.num_masked, self.num_thrown, self.num_warmup = self._counts()
        self.channels = encoder.patch_embed.proj.in_channels
        values = self.grid.values_per_patch(self.channels)

        self.drop_paths = seed_drop_paths(encoder)
        self.decoder = None
        if config.host == "mae":
            width, heads = config.decoder_embed_dim, config.decoder_num_heads
            check_decoder(
                width, heads, self.num_units - self.num_warmup, config.warmup_mask_ratio or 0.75
            )
            self.decoder_input = DecoderInput(
                encoder.embed_dim, width, self.grid, encoder.num_prefix_tokens
            )
            self.decoder = Decoder(
                width,
                config.decoder_depth,
                heads,
                values,
                mlp_ratio=config.decoder_mlp_ratio,
                norm_eps=config.decoder_norm_eps,
                qkv_bias=config.decoder_qkv_bias,
            )
            initialise(self.decoder_input)
            initialise(self.decoder)
        else:
            self.mask_token = nn.Parameter(torch.empty(1, 1, encoder.embed_dim))
            nn.init.trunc_normal_(self.mask_token, std=TOKEN_STD, a=-TOKEN_STD, b=TOKEN_STD)
            self.head = nn.Linear(
                encoder.embed_dim, values
            )  # torch's own initialisation, as in SimMIM
        online = config.maps == "online"
        self.teacher = Teacher(encoder=encoder) if online else None
        self.maps = None if online else ItemMaps(self.grid.num_patches)

    def _counts(self) -> tuple[int, int, int]:
        """Units that are masked and thrown, and those masked at random before; rounded as in the
        code of each host.
        """
        config, published, units = self.config, self.published, self.num_units
        masked = published.mask_ratio if config.mask_ratio is None else config.mask_ratio
        thrown = published.throw_ratio if config.throw_ratio is None else config.throw_ratio
        warmup = config.warmup_mask_ratio or published.warmup_mask_ratio or masked
        if config.host == "mae":
            num_masked = int(units * masked)
            num_thrown = int(units * (masked + thrown)) - num_masked
            num_warmup = units - count_visible(units, warmup)
        else:
            num_masked, num_thrown, num_warmup = (
                math.ceil(units * share) for share in (masked, thrown, warmup)
            )
        given = f"method.mask_ratio={masked:g} and method.throw_ratio={thrown:g}"
        if masked + thrown >= 1 or num_masked + num_thrown >= units:
            raise UserError(
                f"{given} leave none of {units} patches or mask units visible: lower one of them"
            )
        if num_masked == 0 or num_warmup in (0, units):
            raise UserError(
                f"{given} and method.warmup_mask_ratio={warmup:g} mask none or all of {units} patches or mask units: "
                "choose ratios nearer to one half, or smaller patches"
            )
        return num_masked, num_thrown, num_warmup

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        images = batch.views[0]  # (B, C, H, W)
        attention = self.look(batch) if self.guided(progress) else None  # (B, L)
        mask = self.draw_mask(images, attention)
        painted = self.reconstruct(images, mask)  # (B, M, P)
        if self.config.host == "mae":
            return {"loss": squared_error(painted, self.target(images, mask)).mean()}
        return {"loss": masked_absolute_error(painted, self.target(images, mask), self.channels)}

    def guided(self, progress: Progress) -> bool:
        """Whether attention decides in this epoch."""
        return progress.epoch >= _epochs(self.config.start_epoch, 41, math.ceil, progress)

    @torch.no_grad()
    def look(self, batch: Batch) -> Tensor:
        """How much attention goes to each patch of the views, (B, L) in [0, 1]."""
        if self.teacher is not None:
            return probe(cast(Encoder, self.teacher.encoder), batch.views[0])
        maps = cast(ItemMaps, self.maps)(batch.index)  # (B, L), of the whole images
        return align(maps, self.grid, batch.box, batch.flip, self.config.alignment)

    def draw_mask(self, images: Tensor, attention: Tensor | None) -> Mask:
        """What is masked, visible and thrown, drawn by attention (B, L); without it, masked and
        visible at random.
        """
        noise = self.noise.uniform(len(images), self.num_units, device=images.device)
        if attention is not None:
            order = weighted_order(sum_in_units(attention, self.grid, self.per_unit), noise)
            masked, visible = (
                order[:, : self.num_masked],
                order[:, self.num_masked + self.num_thrown :],
            )
        elif (
            self.config.host == "mae"
        ):  # the lowest noise stays visible there, and is hidden in SimMIM
            visible, masked = noise.argsort(dim=1, stable=True).tensor_split(
                [self.num_units - self.num_warmup], dim=1
            )
        else:
            masked, visible = noise.argsort(dim=1, stable=True).tensor_split(
                [self.num_warmup], dim=1
            )
        visible, masked = (
            expand_units(units, self.grid, self.per_unit) for units in (visible, masked)
        )
        return Mask(visible, masked, self.grid.num_patches)

    def reconstruct(self, images: Tensor, mask: Mask) -> Tensor:
        """Predicted pixels of the masked patches, (B, M, P), in the order of `target`."""
        draw_drop_paths(self.drop_paths, self.noise, images)
        if self.decoder is not None:
            latent = encode(self.encoder, images, mask.visible)  # (B, P + V, D)
            tokens = self.decoder_input(latent, mask)  # (B, P + V + M, W)
            return self.decoder.head(self.decoder(tokens, mask.masked.shape[1]))
        seen = embed_patches(self.encoder, images, mask.visible)  # (B, V, D)
        hidden = self.mask_token + patch_positions(self.encoder)[mask.masked]  # (B, M, D)
        prefix = prefix_tokens(self.encoder, len(images))
        # Positions are in the tokens, so their order means nothing; masked ones last are one slice.
        tokens = transform(self.encoder, torch.cat([prefix, seen, hidden], dim=1))
        return self.head(tokens[:, -mask.masked.shape[1] :])

    def target(self, images: Tensor, mask: Mask) -> Tensor:
        """Pixels of the masked patches, float32 (B, M, P): (row, column, channel) on MAE, channel
        first on SimMIM.
        """
        if self.config.host == "mae":
            return pixel_targets(
                images, mask.masked, self.grid.patch, norm_pix_loss=self.config.norm_pix_loss
            )
        return gather_patches(images.float(), mask.masked, self.grid.patch).flatten(2)

    def begin_epoch(self, progress: Progress, plain_data: Iterable[Batch]) -> None:
        """Every few epochs, look at all whole images with the encoder as it is now."""
        start = _epochs(self.config.start_epoch, 41, math.ceil, progress)
        every = _epochs(self.config.refresh_every, 40, round, progress)
        if self.maps is None or progress.epoch < start or (progress.epoch - start) % every:
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

    def after_step(self, progress: Progress) -> None:
        if self.teacher is not None:
            self.teacher.update(self.config.ema, encoder=self.encoder)

    def encoders(self) -> dict[str, nn.Module]:
        """The student, and its EMA teacher where it has one."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher.get_submodule("encoder")}
        return {"student": self.encoder, **teacher}

    def param_groups(self) -> list[ParamGroup]:
        """Everything that learns; on SimMIM the class token and learned positions are not decayed,
        as there.
        """
        clip = self.config.clip_grad or self.published.clip_grad
        undecayed = (
            {"encoder.cls_token", "encoder.pos_embed"} if self.config.host == "simmim" else ()
        )
        return self.sparing(undecayed, clip_norm=clip)

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, attention, the three roles drawn from it, what is seen, the reconstruction, the
        error.

        The attention is that of the encoder as it is now to the pictures themselves: they need not
        be of the data set.
        """
        images = batch.views[0]
        attention = probe(
            self.encoder if self.teacher is None else cast(Encoder, self.teacher.encoder), images
        )
        guided = self.guided(progress)
        mask = self.draw_mask(images, attention if guided else None)
        painted, target = self.reconstruct(images, mask), self.target(images, mask)
        if self.config.host == "mae":
            error = squared_error(painted, target)
        else:
            error = (painted.float() - target).abs().mean(dim=-1)
            painted = channels_last(painted, self.channels)
        borrow = self.config.host == "mae" and self.config.norm_pix_loss
        repainted = reconstruction_panel(images, mask, self.grid, painted, borrow=borrow)
        kept = Mask(torch.cat([mask.visible, mask.masked], dim=1), mask.masked, mask.num_patches)
        return [
            Panel("input", images),
            Panel("attention", patch_map(attention, self.grid), kind="heat"),
            roles_panel(mask, self.grid, "drawn by attention" if guided else "drawn at random"),
            Panel("visible", hide_masked(images, mask, self.grid)),
            Panel(repainted.title, hide_masked(repainted.data, kept, self.grid)),
            Panel("error", patch_map(error, self.grid, mask.masked), kind="heat"),
        ]


@torch.no_grad()
def probe(encoder: Encoder, images: Tensor) -> Tensor:
    """Where the class token looks in the last block, over all patches of ``images``: (B, L) in [0,
    1].
    """
    return attention_map(class_attention(encoder, images)[:, :, encoder.num_prefix_tokens :])


def _epochs(
    given: int | None, published: int, rounded: Callable[[float], int], progress: Progress
) -> int:
    """A setting in epochs: as given, else as published, else a tenth of a run that is too short for
    that.
    """
    if given is not None:
        return given
    return (
        published
        if progress.total_epochs >= LONG_RUN
        else max(1, rounded(progress.total_epochs / 10))
    )

"""HPM: a teacher predicts where reconstruction will be hard, and the student is masked there.

Wang, Song, Fan, Wang, Xie, Zhang, "Hard Patches Mining for Masked Image Modeling", CVPR 2023, arXiv
2304.05919.  Constants that the abstract does not give come from the reference code,
Haochen-Wang409/HPM; each names its file.  On clips the patches are VideoMAE's cubes; that extension
(arXiv 2312.13714) has no public code: how a tube is scored, the constants and the second decoder
are inferred (docs/methods/hpm.md).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.backbones.family import Encoder, encode
from patchmine.backbones.foreign import ForeignTeacher
from patchmine.backbones.tokens import encoder_grid
from patchmine.backbones.vit import initialise
from patchmine.methods.settings.hpm import HpmSettings
from patchmine.models.decoder import Decoder, DecoderInput, check_decoder, masked_decoder
from patchmine.models.teacher import Teacher, foreign_teacher, ramped_decay
from patchmine.ops import losses, masks, patches, pictures
from patchmine.ops.schedules import hard_count
from patchmine.task import Method
from patchmine.types import Batch, Losses, Mask, Panel, ParamGroup, Progress

_ABSOLUTE_UNIT = "0 is an image's mean, 1 a deviation among its patches"


class HPM(Method):
    """MAE with a second decoder that predicts each patch's loss; its EMA copy chooses the masks."""

    Config = HpmSettings

    config: HpmSettings
    encoder: Encoder
    teacher: Teacher | None
    foreign: ForeignTeacher | None
    predictor: Decoder | None

    def __init__(self, config: HpmSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.grid = encoder_grid(encoder)
        # Masks are drawn over units: tubes through all time slots, or cubes; an image's patches.
        places = masks.count_positions(self.grid, config.mask_ratio)
        tube = config.mask_unit == "tube"
        self.num_units = self.grid.num_positions if tube else self.grid.num_patches
        self.visible_units = places if tube else places * self.grid.num_slots
        self.num_masked = self.grid.num_patches - places * self.grid.num_slots
        check_decoder(config, places, config.mask_ratio, self.grid.num_positions)
        values = self.grid.values_per_patch(encoder.patch_embed.proj.in_channels)

        self.foreign = foreign_teacher(config, self.grid)
        width = values if config.target == "pixel" else encoder.embed_dim
        width = width if self.foreign is None else self.foreign.width
        self.decoder_input, self.decoder = masked_decoder(encoder, self.grid, config, width)
        self.predictor = None
        if config.prediction != "none":
            self.predictor = Decoder(config, values)
            initialise(self.predictor)
            if config.losspred_head == "scalar":
                _shrink_head(self.predictor)
        # No pixel decoder: the teacher predicts difficulty and reconstructs nothing.
        needed = self.predictor is not None or config.target == "ema"
        self.teacher = Teacher(own_statistics=False, **self._copied()) if needed else None

    def _copied(self) -> dict[str, nn.Module]:
        """The student's modules of which the EMA teacher holds copies."""
        if self.predictor is None:
            return {"encoder": self.encoder}
        beside = {"decoder_input": self.decoder_input, "predictor": self.predictor}
        return {"encoder": self.encoder, **beside}

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        images = batch.views[0]  # (B, C, H, W) or (B, C, T, H, W)
        features, difficulty = self.ask_teachers(images, self._hard_count(progress) > 0)
        mask = self.draw_mask(images, difficulty, progress)

        latent = encode(self.encoder, images, mask.visible)  # (B, P + V, D)
        tokens = self.decoder_input(latent, mask)  # (B, P + V + M, W), the start of both decoders
        output = self.decoder.head(self.decoder(tokens, self.num_masked))  # (B, M, T)
        error = self.error(output, images, features, mask)  # (B, M)
        reconstruction = error.mean()
        if self.predictor is None:
            return {"loss": reconstruction}
        predicted = predict_difficulty(self.predictor, tokens, self.num_masked)  # (B, M)
        relative = self.config.prediction == "relative"
        objective = losses.relative_difficulty_loss if relative else losses.absolute_difficulty_loss
        prediction = objective(predicted, error.detach())
        parts = {"reconstruction": reconstruction, "prediction": prediction}
        return {"loss": reconstruction + prediction, **parts}

    @torch.no_grad()
    def ask_teachers(
        self, images: Tensor, want_difficulty: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Target features (B, L, T) and difficulty (B, L) of the whole images, where needed."""
        features, difficulty = None, None
        if self.foreign is not None:
            features = self.foreign(images)
        if self.teacher is not None and (want_difficulty or self.config.target == "ema"):
            latent = encode(self.teacher.encoder, images)  # (B, P + L, D)
            if self.config.target == "ema":
                features = latent[:, self.encoder.num_prefix_tokens :]
            if want_difficulty:
                tokens = cast(DecoderInput, self.teacher.decoder_input).all_visible(latent)
                predictor = cast(Decoder, self.teacher.predictor)
                difficulty = predict_difficulty(predictor, tokens, self.grid.num_patches)
        return features, difficulty

    def draw_mask(self, images: Tensor, difficulty: Tensor | None, progress: Progress) -> Mask:
        """The hardest units are masked, as many as the schedule asks for; the rest is drawn."""
        noise = self.noise.uniform(len(images), self.num_units, device=images.device)
        if difficulty is None:
            return self._mask_hardest(noise, noise, 0)
        return self._mask_hardest(noise, self._unit_scores(difficulty), self._hard_count(progress))

    def _unit_scores(self, difficulty: Tensor) -> Tensor:
        """Difficulty of each unit (B, units), of that of patches (B, L)."""
        slots = difficulty.reshape(len(difficulty), -1, self.num_units)  # (B, slots, units)
        return slots.mean(dim=1) if self.config.tube_score == "mean" else slots.amax(dim=1)

    def _mask_hardest(self, noise: Tensor, scores: Tensor, count: int) -> Mask:
        """``count`` units with the largest scores (B, units) are masked, others by noise."""
        return masks.tubes(masks.hard_masked(noise, scores, count, self.visible_units), self.grid)

    def _hard_count(self, progress: Progress) -> int:
        config, masked = self.config, self.num_units - self.visible_units
        if self.predictor is None:
            return 0
        start, end, offset = config.alpha_start, config.alpha_end, config.alpha_offset
        return hard_count(progress, masked, start=start, end=end, offset=offset)

    def error(self, output: Tensor, images: Tensor, features: Tensor | None, mask: Mask) -> Tensor:
        """Reconstruction loss of each masked patch, float32 (B, M)."""
        if features is None:
            norm, patch = self.config.norm_pix_loss, self.grid.patch
            target = patches.pixel_targets(images, mask.masked, patch, norm_pix_loss=norm)
            return losses.squared_error(output, target)
        masked = mask.masked[:, :, None].expand(-1, -1, features.shape[-1])
        return losses.direction_error(output, features.gather(1, masked))

    def after_step(self, progress: Progress) -> None:
        if self.teacher is not None:
            self.teacher.update(ramped_decay(self.config, progress), **self._copied())

    def param_groups(self) -> list[ParamGroup]:
        """Everything that learns, clipped at the published norm."""
        undecayed = self.decoder_input.undecayed("decoder_input.")
        return self.sparing(undecayed, clip_norm=self.config.clip_grad)

    @torch.no_grad()
    def difficulty(self, images: Tensor) -> Tensor | None:
        """The student's mean error (B,) where the teacher expects it to be hardest.

        The predictions themselves only rank the patches of one image: nothing in the relative loss
        makes their level the same in two images.  The error under the mask that they choose can be
        compared.
        """
        if self.predictor is None:
            return None
        features, expected = self.ask_teachers(images, True)
        scores = self._unit_scores(cast(Tensor, expected))
        num_hard = self.num_units - self.visible_units
        mask = self._mask_hardest(torch.zeros_like(scores), scores, num_hard)
        return self.error(self._reconstruct(images, mask), images, features, mask).mean(dim=1)

    def _reconstruct(self, images: Tensor, mask: Mask) -> Tensor:
        """What the decoder says of each masked patch, (B, M, T)."""
        latent = encode(self.encoder, images, mask.visible)
        return self.decoder.head(self.decoder(self.decoder_input(latent, mask), self.num_masked))

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, predicted difficulty, what the student saw, the reconstruction, the true error."""
        images, grid = batch.views[0], self.grid
        features, difficulty = self.ask_teachers(images, self.predictor is not None)
        mask = self.draw_mask(images, difficulty, progress)
        output = self._reconstruct(images, mask)
        panels = [Panel("input", images)]
        if difficulty is not None:
            heat = pictures.patch_map(difficulty, grid)
            relative = self.config.prediction == "relative"
            unit = "no unit, only the order in an image counts" if relative else _ABSOLUTE_UNIT
            note = f"error that the teacher expects, light is masked first; {unit}"
            panels.append(Panel("predicted difficulty", heat, kind="heat", note=note))
        drawn, unit = list[Panel](), pictures.DIRECTION_UNIT
        if features is None:
            norm = self.config.norm_pix_loss
            unit = pictures.pixel_unit(standardised=norm)
            drawn = pictures.reconstruction_panels(images, mask, grid, output, standardised=norm)
        error = self.error(output, images, features, mask)
        return [*panels, *pictures.masked_panels(images, mask, grid, drawn, error, unit)]


def predict_difficulty(predictor: Decoder, tokens: Tensor, num_last: int) -> Tensor:
    """Predicted loss of the last ``num_last`` patches, float32 (B, num_last)."""
    features = predictor(tokens, num_last)
    # The published head has one output per value of a patch and averages them: the average of a
    # linear map's outputs is a dot product with its mean row (docs/methods/hpm.md).  In float32 the
    # order of close predictions survives.
    with torch.autocast(features.device.type, enabled=False):
        row = predictor.head.weight.float().mean(dim=0, keepdim=True)
        bias = predictor.head.bias.float().mean(dim=0, keepdim=True)
        return F.linear(features.float(), row, bias).squeeze(-1)


def _shrink_head(predictor: Decoder) -> None:
    """Replace the head by a single output that starts from the mean row of the full one."""
    full = predictor.head
    predictor.head = nn.Linear(full.in_features, 1)
    with torch.no_grad():
        predictor.head.weight.copy_(full.weight.mean(dim=0, keepdim=True))
        predictor.head.bias.copy_(full.bias.mean(dim=0, keepdim=True))

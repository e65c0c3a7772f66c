"""HPM: a teacher predicts where reconstruction will be hard, and that is where the student's input
is masked.

Wang, Song, Fan, Wang, Xie, Zhang, "Hard Patches Mining for Masked Image Modeling", CVPR 2023, arXiv
2304.05919. Constants that the paper's abstract does not give come from the reference code,
Haochen-Wang409/HPM; each names its file.

On clips the patches are VideoMAE's cubes.  The extension to video (Wang, Fan, Wang, Song, Wang,
Zhang, Zhang, "Bootstrap Masked Visual Modeling via Hard Patches Mining", TPAMI, arXiv 2312.13714)
has no public code: what is established is that it adapts the image method with almost no
modification; how a tube is scored, the constants and the second decoder are inferred (spec
hpm-video.md, section 4).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.backbones.family import Encoder, encode
from patchmine.backbones.foreign import ForeignTeacher
from patchmine.backbones.tokens import encoder_grid
from patchmine.backbones.vit import initialise
from patchmine.errors import UserError
from patchmine.methods.settings.hpm import HpmSettings
from patchmine.models.decoder import Decoder, DecoderInput, check_decoder
from patchmine.models.teacher import Teacher
from patchmine.ops.losses import (
    absolute_difficulty_loss,
    direction_error,
    relative_difficulty_loss,
    squared_error,
)
from patchmine.ops.masks import count_positions, hard_masked, tubes
from patchmine.ops.patches import pixel_targets
from patchmine.ops.pictures import hide_masked, patch_map, reconstruction_panel
from patchmine.ops.schedules import ema_decay, hard_count
from patchmine.task import Method
from patchmine.types import Batch, Losses, Mask, Panel, ParamGroup, Progress


class HPM(Method):
    """Masked autoencoder with a second decoder that predicts each patch's loss; an EMA copy of it
    chooses the masks.
    """

    Config = HpmSettings

    config: HpmSettings
    encoder: Encoder
    teacher: Teacher | None
    foreign: ForeignTeacher | None
    predictor: Decoder | None

    def __init__(self, config: HpmSettings, encoder: Encoder) -> None:
        super().__init__(config, encoder)
        self.grid = encoder_grid(encoder)
        # Masks are drawn over units: tubes through all time slots, or cubes.  Of an image both are
        # its patches.
        places = count_positions(self.grid, config.mask_ratio)
        tube = config.mask_unit == "tube"
        self.num_units = self.grid.num_positions if tube else self.grid.num_patches
        self.visible_units = places if tube else places * self.grid.num_slots
        self.num_masked = self.grid.num_patches - places * self.grid.num_slots
        width, depth, heads = (
            config.decoder_embed_dim,
            config.decoder_depth,
            config.decoder_num_heads,
        )
        check_decoder(width, heads, places, config.mask_ratio, self.grid.num_positions)
        blocks: dict[str, Any] = dict(
            mlp_ratio=config.decoder_mlp_ratio,
            norm_eps=config.decoder_norm_eps,
            qkv_bias=config.decoder_qkv_bias,
        )
        values = self.grid.values_per_patch(encoder.patch_embed.proj.in_channels)

        self.foreign = None
        target_width = values if config.target == "pixel" else encoder.embed_dim
        if config.target in ("dino", "clip"):
            if len(self.grid.size) == 3:
                raise UserError(
                    f"method.target={config.target} is a network for images, which does not describe cubes of clips: "
                    "choose method.target=pixel or method.target=ema"
                )
            self.foreign = ForeignTeacher(
                config.target,
                config.target_file,
                grid=self.grid,
                renormalise=config.target_renormalise,
            )
            target_width = self.foreign.width

        self.decoder_input = DecoderInput(
            encoder.embed_dim, width, self.grid, encoder.num_prefix_tokens
        )
        self.decoder = Decoder(width, depth, heads, target_width, **blocks)
        self.decoder_input.draw_weights()
        initialise(self.decoder)
        self.predictor = None
        if config.prediction != "none":
            self.predictor = Decoder(width, depth, heads, values, **blocks)
            initialise(self.predictor)
            if config.losspred_head == "scalar":
                _shrink_head(self.predictor)
        # No pixel decoder: the teacher looks and predicts difficulty, it never paints.
        taught = self.predictor is not None or config.target == "ema"
        self.teacher = Teacher(own_statistics=False, **self._taught()) if taught else None

    def _taught(self) -> dict[str, nn.Module]:
        """The student's modules of which the teacher keeps a slow copy."""
        if self.predictor is None:
            return {"encoder": self.encoder}
        return {
            "encoder": self.encoder,
            "decoder_input": self.decoder_input,
            "predictor": self.predictor,
        }

    def forward(self, batch: Batch, progress: Progress) -> Losses:
        images = batch.views[0]  # (B, C, H, W) or (B, C, T, H, W)
        features, difficulty = self.look(images, self._hard_count(progress) > 0)
        mask = self.draw_mask(images, difficulty, progress)

        latent = encode(self.encoder, images, mask.visible)  # (B, P + V, D)
        tokens = self.decoder_input(latent, mask)  # (B, P + V + M, W), the start of both decoders
        painted = self.decoder.head(self.decoder(tokens, self.num_masked))  # (B, M, T)
        error = self.error(painted, images, features, mask)  # (B, M)
        reconstruction = error.mean()
        if self.predictor is None:
            return {"loss": reconstruction}
        predicted = predict_difficulty(self.predictor, tokens, self.num_masked)  # (B, M)
        relative = self.config.prediction == "relative"
        prediction = (relative_difficulty_loss if relative else absolute_difficulty_loss)(
            predicted, error.detach()
        )
        return {
            "loss": reconstruction + prediction,
            "reconstruction": reconstruction,
            "prediction": prediction,
        }

    @torch.no_grad()
    def look(self, images: Tensor, want_difficulty: bool) -> tuple[Tensor | None, Tensor | None]:
        """What the teachers see in the whole image: target features (B, L, T) or None, difficulty
        (B, L) or None.

        Nothing is computed that nobody asks for: pixels need no features, and a step without hard
        patches no difficulty.
        """
        features, difficulty = None, None
        if self.foreign is not None:
            features = self.foreign(images)
        if self.teacher is not None and (want_difficulty or self.config.target == "ema"):
            latent = encode(self.teacher.encoder, images)  # (B, P + L, D)
            if self.config.target == "ema":
                features = latent[:, self.encoder.num_prefix_tokens :]
            if want_difficulty:
                tokens = cast(DecoderInput, self.teacher.decoder_input).all_visible(latent)
                difficulty = predict_difficulty(
                    cast(Decoder, self.teacher.predictor), tokens, self.grid.num_patches
                )
        return features, difficulty

    def draw_mask(self, images: Tensor, difficulty: Tensor | None, progress: Progress) -> Mask:
        """The hardest patches are masked, as many as the schedule asks for; the rest is drawn
        (spec, section 3.2).

        Of clips the hardest tubes, at all times, or the hardest cubes, as ``mask_unit`` says.
        """
        noise = self.noise.uniform(len(images), self.num_units, device=images.device)
        if difficulty is None:
            return tubes(hard_masked(noise, noise, 0, self.visible_units), self.grid)
        scores = difficulty.reshape(
            len(difficulty), -1, self.num_units
        )  # (B, slots of a unit, units)
        scores = scores.mean(dim=1) if self.config.tube_score == "mean" else scores.amax(dim=1)
        return tubes(
            hard_masked(noise, scores, self._hard_count(progress), self.visible_units), self.grid
        )

    def _hard_count(self, progress: Progress) -> int:
        if self.predictor is None:
            return 0
        config = self.config
        return hard_count(
            progress,
            self.num_units - self.visible_units,
            start=config.alpha_start,
            end=config.alpha_end,
            offset=config.alpha_offset,
        )

    def error(self, painted: Tensor, images: Tensor, features: Tensor | None, mask: Mask) -> Tensor:
        """Reconstruction loss of each masked patch, float32 (B, M)."""
        if features is None:
            target = pixel_targets(
                images, mask.masked, self.grid.patch, norm_pix_loss=self.config.norm_pix_loss
            )
            return squared_error(painted, target)
        wanted = mask.masked[:, :, None].expand(-1, -1, features.shape[-1])
        return direction_error(painted, features.gather(1, wanted))

    def after_step(self, progress: Progress) -> None:
        if self.teacher is not None:
            config = self.config
            decay = ema_decay(
                progress,
                start=config.ema_start,
                end=config.ema_end,
                ramp_epochs=config.ema_ramp_epochs,
            )
            self.teacher.update(decay, **self._taught())

    def encoders(self) -> dict[str, nn.Module]:
        """The student, and its EMA teacher where it has one."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher.get_submodule("encoder")}
        return {"student": self.encoder, **teacher}

    def param_groups(self) -> list[ParamGroup]:
        """Everything that learns, clipped at the published norm."""
        return self.sparing(
            self.decoder_input.undecayed("decoder_input."), clip_norm=self.config.clip_grad
        )

    @torch.no_grad()
    def panels(self, batch: Batch, progress: Progress) -> list[Panel]:
        """Input, the teacher's predicted difficulty, what the student saw, the reconstruction, the
        true error.
        """
        images = batch.views[0]
        features, difficulty = self.look(images, self.predictor is not None)
        mask = self.draw_mask(images, difficulty, progress)
        latent = encode(self.encoder, images, mask.visible)
        painted = self.decoder.head(self.decoder(self.decoder_input(latent, mask), self.num_masked))
        panels = [Panel("input", images)]
        if difficulty is not None:
            panels.append(
                Panel("predicted difficulty", patch_map(difficulty, self.grid), kind="heat")
            )
        panels.append(Panel("visible", hide_masked(images, mask, self.grid)))
        if features is None:
            borrow = self.config.norm_pix_loss
            panels.append(reconstruction_panel(images, mask, self.grid, painted, borrow=borrow))
        error = self.error(painted, images, features, mask)
        panels.append(Panel("error", patch_map(error, self.grid, mask.masked), kind="heat"))
        return panels


def predict_difficulty(predictor: Decoder, tokens: Tensor, num_last: int) -> Tensor:
    """Predicted loss of the last ``num_last`` patches, float32 (B, num_last).

    The published head has one output per value of a patch and averages them; the average of a
    linear map's outputs is a dot product with its mean row (spec hpm.md, section 3.1), and in
    float32 the order of close predictions survives.
    """
    features = predictor(tokens, num_last)
    with torch.autocast(features.device.type, enabled=False):
        row = predictor.head.weight.float().mean(dim=0, keepdim=True)
        return F.linear(
            features.float(), row, predictor.head.bias.float().mean(dim=0, keepdim=True)
        ).squeeze(-1)


def _shrink_head(predictor: Decoder) -> None:
    """Replace the head by a single output that starts from the mean row of the full one."""
    full = predictor.head
    predictor.head = nn.Linear(full.in_features, 1)
    with torch.no_grad():
        predictor.head.weight.copy_(full.weight.mean(dim=0, keepdim=True))
        predictor.head.bias.copy_(full.bias.mean(dim=0, keepdim=True))

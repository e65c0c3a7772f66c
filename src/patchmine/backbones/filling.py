"""An encoder's weights at another image size, and in another encoder, with positions moved."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

from patchmine.backbones.family import family_of
from patchmine.backbones.loading import COUNTER, LoadReport, load_tensors
from patchmine.backbones.parts import refuse_other_parts, refuse_other_settings, unseen
from patchmine.backbones.positions import give_each_its_own, move_all_positions
from patchmine.backbones.record import Encoder
from patchmine.backbones.tokens import embedded_prefix, refuse_unfilled
from patchmine.backbones.weights import clip_notes
from patchmine.errors import UserError

_log = logging.getLogger("patchmine")


def resize_encoder(encoder: Encoder, image_size: tuple[int, int]) -> None:
    """Make an encoder expect another image size (height, width), in place; positions are moved."""
    family = family_of(encoder)
    trained_at = family.image_size(encoder)
    if trained_at == tuple(image_size):
        return
    if family.hierarchical:
        family.resize(encoder, image_size)
        _note_size(encoder, image_size)
        return
    source, patch = encoder.patch_embed.grid_size, encoder.patch_embed.patch_size
    refuse_unfilled(image_size, patch, "the weights")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about how timm indexes relative tables
        encoder.set_input_size(image_size)
    for note in clip_notes(encoder, trained_at):
        _log.warning(note)
    if family.stores_positions:
        # Written anew, because not every timm knows that a table may be of a rectangle.
        grid, rows = encoder.patch_embed.grid_size, embedded_prefix(encoder)
        encoder.load_state_dict(move_all_positions(before, source, grid, rows)[0])
    _note_size(encoder, image_size)


def _note_size(encoder: Encoder, image_size: tuple[int, int]) -> None:
    """Note what it is built for now."""
    built = getattr(encoder, "built_from", None)
    if built is not None:
        own = {name: value for name, value in built.model_args.items() if name != "img_size"}
        encoder.built_from = replace(built, image_size=tuple(image_size), model_args=own)


def fill(encoder: Encoder, other: Encoder, source: str) -> LoadReport:
    """Load the weights of ``other``, positions moved from its grid; what became of every tensor."""
    report, tensors = LoadReport(source), other.state_dict()
    own = encoder.state_dict()
    pooled = [name for name in tensors if name.startswith("fc_norm.")]
    if pooled and pooled[0] not in own:
        tensors |= {name.removeprefix("fc_"): tensors.pop(name) for name in pooled}
        report.notes.append("the norm after pooling (fc_norm) is taken as the last norm of tokens")
    refuse_other_parts(own, tensors, source)
    refuse_other_settings(unseen(other), encoder, source, "its network")
    families = family_of(other), family_of(encoder)
    if all(family.stores_positions for family in families):
        grids = [tuple(each.patch_embed.grid_size) for each in (other, encoder)]
        rows = embedded_prefix(other)
        if rows != embedded_prefix(encoder):
            raise UserError(
                f"{source}: its position table has {rows} rows of class and register tokens, the "
                f"model's {embedded_prefix(encoder)}: set model_args.no_embed_class="
                f"{str(rows == 0).lower()}"
            )
        tensors, report.resized = move_all_positions(tensors, grids[0], grids[1], rows)
        tensors, shared_out = give_each_its_own(tensors, own)
        report.notes += shared_out
    elif families[0] is families[1]:
        report.assumed += clip_notes(encoder, families[0].image_size(other))
        tensors, report.resized = families[1].fitted(encoder, tensors, source)
    load_tensors(encoder, tensors, report, allow=[f"*.{COUNTER}"])
    return report

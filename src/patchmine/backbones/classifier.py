"""A classifier on a backbone: one linear layer on pooled features, and the same as timm has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from patchmine.backbones.description import CONFIG, WEIGHTS, read_json
from patchmine.backbones.family import family_of, pooled
from patchmine.backbones.loading import refuse_non_finite
from patchmine.backbones.record import Encoder
from patchmine.errors import UserError, foreign_parser, shown_name

PROBLEMS = {
    "ce": "single_label_classification",
    "bce": "multi_label_classification",
    "mse": "regression",
}
"""What transformers calls the losses (``problem_type`` in config.json)."""

_FINAL_NORM = "norm."  # of a ViT; timm has it behind the pooling as fc_norm, under another name


class Classifier(nn.Module):
    """Scores of images (B, C, H, W), or of clips (B, C, T, H, W).

    Args:
        encoder: a network without classifier.
        head: from its features (B, D) to the scores (B, K).
        pool: see `family.pooled`.
    """

    def __init__(self, encoder: Encoder, head: nn.Linear, pool: str) -> None:
        super().__init__()
        if pool == "cls" and getattr(encoder, "cls_token", None) is None:
            raise UserError("pool=cls, but this encoder has no class token: give pool=mean")
        if head.in_features != encoder.num_features:
            raise UserError(
                f"a classifier of {head.in_features} features does not fit an encoder that gives "
                f"{encoder.num_features}: export both from one run"
            )
        self.encoder, self.head, self.pool = encoder, head, pool

    def forward(self, images: Tensor) -> Tensor:
        """(B, K) scores before softmax or sigmoid."""
        scores: Tensor = self.head(pooled(self.encoder, images, self.pool))
        return scores


@dataclass(frozen=True)
class Head:
    """What an export says of a classifier.

    Args:
        layer: from pooled features to scores.
        pool: see `family.pooled`.
        names: of the scores.
        loss: by which they were learned: ``ce``, ``bce`` or ``mse``.
    """

    layer: nn.Linear
    pool: str
    names: Sequence[str]
    loss: str = "ce"

    def arguments(self, encoder: Encoder) -> dict[str, Any]:
        """The arguments of a network that pools so, but ``num_classes``."""
        family = family_of(encoder)
        if family.hierarchical:
            return {}
        mean, known = self.pool == "mean", family.export_arguments(encoder)
        own = {"global_pool": "avg" if mean else "token", "fc_norm": mean}
        own |= {"use_fc_norm": mean, "use_post_transformer_norm": not mean}  # timm's `Eva`
        return {name: value for name, value in own.items() if name in known}

    def tensors(self, encoder: Encoder) -> dict[str, Tensor]:
        """The whole classifier under timm's names."""
        renamed = self.pool == "mean" and not family_of(encoder).hierarchical
        body = {
            f"fc_{name}" if renamed and name.startswith(_FINAL_NORM) else name: tensor
            for name, tensor in encoder.state_dict().items()
        }
        place = family_of(encoder).classifier
        return body | {f"{place}.{name}": each for name, each in self.layer.state_dict().items()}


def read_head(folder: Path) -> Head:
    """The classifier in an export.

    Raises UserError where it has none, does not tell of it, or is damaged.
    """
    config, name = read_json(folder / CONFIG), shown_name(folder)
    losses = {told: loss for loss, told in PROBLEMS.items()}
    # Exports from before it was written are of one class an image.
    problem = config.get("problem_type") or PROBLEMS["ce"]
    names, loss = config.get("label_names"), losses.get(str(problem))
    pooling = config.get("global_pool") or "avg"
    if pooling not in ("avg", "token"):
        raise UserError(f"{name}: its classifier pools by global_pool={pooling}, which is not read")
    with foreign_parser(lambda reason: UserError(f"{name}: its weights cannot be read ({reason})")):
        tensors = load_file(folder / WEIGHTS)
        places = [place for place in ("head", "fc", "head.fc") if f"{place}.weight" in tensors]
        if not names or loss is None or not places:
            raise UserError(
                f"{name} is an export without classifier (label_names, and a known problem_type, in"
                f" {CONFIG}): give a fine-tuned run, or what `patchmine export` wrote of one; a "
                "run that segments or detects is given itself"
            )
        weight, bias = (tensors[f"{places[0]}.{part}"] for part in ("weight", "bias"))
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
    refuse_non_finite(layer.state_dict(), f"the classifier of {name}")
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise UserError(f"{name}: label_names in {CONFIG} is no list of texts: export again")
    if len(names) != layer.out_features:
        raise UserError(
            f"{name}: label_names in {CONFIG} has {len(names)} names, but its classifier has "
            f"{layer.out_features} outputs: export again"
        )
    return Head(layer, "cls" if pooling == "token" else "mean", names, loss)


def new_layer(width: int, outputs: int, std: float) -> nn.Linear:
    """A classifier before its first step: weights normal, biases 0 (MAE, ``main_finetune.py``)."""
    layer = nn.Linear(width, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer

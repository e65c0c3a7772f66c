"""Times our training steps in turns with those of others, of the same sizes.

    python benchmarks/step_against.py transformers method=mae device=cpu out=step.json
    python benchmarks/step_against.py dino method=scfs,mokd model=resnet50 batch_size=4

``transformers`` is its ViTMAEForPreTraining with the sizes of the first method (MAE or another with
MAE's decoder); ``dino`` is what is left of SCFS without its stages.  Everything behind the name is
a setting of `patchmine bench step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from patchmine.bench.settings import BenchStepSettings
from patchmine.bench.step import (
    Contestant,
    bench_step,
    build_method,
    contestants,
    random_images,
    size_of,
)
from patchmine.cli.commands import read_words
from patchmine.cli.program import ended_in_words
from patchmine.methods import METHODS
from patchmine.task import Method
from patchmine.train.engine import Engine
from patchmine.train.optim import build_optimizers
from patchmine.types import ParamGroup


def dino(
    methods: Mapping[str, Method], config: BenchStepSettings, engine: Engine
) -> list[Contestant]:
    """SCFS with stage weights of 0, and the settings that any of the methods got."""
    given = [method.config.model_dump(exclude_unset=True) for method in methods.values()]
    fields = METHODS["scfs"].model_fields.keys() - {"name"}
    known = {key: value for own in given for key, value in own.items() if key in fields}
    method = build_method("scfs", {**known, "stage_weights": 0.0}, config)
    return contestants("dino", method, config, engine)


def transformers(
    methods: Mapping[str, Method], config: BenchStepSettings, engine: Engine
) -> list[Contestant]:
    """ViTMAEForPreTraining with the sizes of the first method and the settings of its decoder."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    ours: Any = next(iter(methods.values()))
    settings, encoder = ours.config, ours.encoder
    (images,) = random_images(config, 1, size_of(config), engine)
    block = encoder.blocks[0]
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=encoder.embed_dim,
            num_hidden_layers=len(encoder.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            layer_norm_eps=1e-6,
            image_size=size_of(config),
            patch_size=encoder.patch_embed.patch_size[0],
            num_channels=config.channels,
            decoder_hidden_size=settings.decoder_embed_dim,
            decoder_num_hidden_layers=settings.decoder_depth,
            decoder_num_attention_heads=settings.decoder_num_heads,
            decoder_intermediate_size=ours.decoder.blocks[0].mlp.fc1.out_features,
            mask_ratio=settings.mask_ratio,
            norm_pix_loss=settings.norm_pix_loss,
            attn_implementation="sdpa",
        )
    )
    theirs = theirs.to(engine.device).train()
    trained = [(name, p) for name, p in theirs.named_parameters() if p.requires_grad]
    optimizers = build_optimizers(
        [ParamGroup(trained)], weight_decay=0.05, blr=1.5e-4, betas=(0.9, 0.95)
    )

    def step() -> None:
        optimizers.zero_grad()
        with engine.autocast():
            loss = theirs(images).loss
        loss.backward()
        for optimizer in optimizers.by_name.values():
            optimizer.step()

    state = [*theirs.parameters(), *theirs.buffers()]
    return [Contestant("transformers", step, optimizers, state)]


RIVALS = {"transformers": transformers, "dino": dino}


@click.command(help=__doc__)
@click.argument("rival", type=click.Choice(list(RIVALS)))
@click.argument("words", nargs=-1)
def main(rival: str, words: tuple[str, ...]) -> None:
    """One race."""
    with ended_in_words():
        given = read_words(BenchStepSettings, list(words), command="bench step")
        bench_step(say=print, rivals=RIVALS[rival], **given.model_dump(exclude_unset=True))


if __name__ == "__main__":
    main()

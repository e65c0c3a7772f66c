"""What the maps that a method masks or orders by follow: the picture, or the place in it.

    python benchmarks/maps.py runs/hpm cifar10/test

Of a run with HPM, AMT or SemAIM, on images or clips that it may not have seen: the share of the
variance within maps that the position alone explains, and the rank correlation with the true error
within an image (the mean over random masks, or orders).  Of HPM, the map as the run looks for it is
compared with other looks of the same teacher; of AMT it is the attention of the class token, of
SemAIM the similarity that orders patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import torch
from mining_rows import half_size_look
from torch import Tensor

from patchmine.backbones.tokens import embed_patches
from patchmine.cli.program import ended_in_words
from patchmine.config.schema import PretrainConfig
from patchmine.data.loader import plain_batches
from patchmine.data.sampling import spread_indices
from patchmine.data.views.normalise import normalise
from patchmine.errors import UserError
from patchmine.methods.amt import AMT, probe
from patchmine.methods.hpm import HPM
from patchmine.methods.semaim import SemAIM
from patchmine.ops.losses import absolute_error, squared_error
from patchmine.ops.mining import position_share, rank_correlation
from patchmine.runs.folder import RunFolder
from patchmine.runs.preparing import item_of


def some_images(run: RunFolder, data: str, count: int) -> Tensor:
    """Images (N, C, H, W) or clips (N, C, T, H, W) spread over ``data``, as the run sees them
    without augmentation.
    """
    config = run.whole_config
    assert isinstance(config, PretrainConfig)
    item = item_of(config)
    source, view = item.open(data), item.plain_view(config, None)
    chosen = spread_indices(len(source), min(count, len(source)))
    batches = plain_batches(source, view, batch_size=64, indices=chosen)
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    return torch.cat([normalise(batch, mean, std, "cpu").views[0] for batch in batches])


def uniform(images: Tensor, method: HPM, seed: int) -> Tensor:
    """Noise that masks are drawn from, (B, units)."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.rand(len(images), method.num_units, generator=drawn)


@torch.no_grad()
def errors(
    method: HPM | AMT | SemAIM, images: Tensor, masks: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each random mask the patches (B, M) that it hides, or that a random order visits, and
    their errors.
    """
    if isinstance(method, HPM):
        features, _ = method.ask_teachers(images, False)
    elif isinstance(method, SemAIM):
        patches = embed_patches(method.encoder, images)
        features, _ = method.judge(images, patches)
    for number in range(masks):
        method.noise.begin(number)
        if isinstance(method, HPM):
            noise = uniform(images, method, number)
            mask = method._mask_hardest(noise, noise, 0)
            found = method.error(method._reconstruct(images, mask), images, features, mask)
            yield mask.masked, found
        elif isinstance(method, AMT):
            mask = method.draw_mask(images, None)
            apart = squared_error if method.on_mae else absolute_error
            yield mask.masked, apart(method.reconstruct(images, mask), method.target(images, mask))
        else:
            order = method.noise.uniform(len(images), method.grid.num_patches).argsort(dim=1)
            predicted = method.predict_patches(patches, order, None)
            yield order, method.error(predicted, images, features, order)


def true_error(method: HPM | AMT | SemAIM, images: Tensor, masks: int) -> Tensor:
    """Mean error of each patch over random masks that hide it, (B, L)."""
    total = torch.zeros(len(images), method.grid.num_patches)
    times = torch.zeros_like(total)
    for index, error in errors(method, images, masks):
        total.scatter_add_(1, index, error)
        times.scatter_add_(1, index, torch.ones_like(error))
    return total / times


@torch.no_grad()
def maps_of(method: HPM | AMT | SemAIM, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the method masks or orders by, (B, L), by name."""
    if isinstance(method, HPM):
        yield from looks(method, images)
    elif isinstance(method, AMT):
        yield "attention of the class token", probe(method.encoder, images)
    else:
        similarity = method.judge(images, embed_patches(method.encoder, images))[1]
        if similarity is not None:
            yield "similarity that orders", similarity


def halves(method: HPM) -> bool:
    """Whether a teacher trained so can look at images of half the size."""
    sides, settings = method.grid.size, method.config
    even = len(sides) == 2 and not any(side % 2 for side in sides)
    return even and method.encoder.pos_embed is not None and settings.decoder_attention == "self"


@torch.no_grad()
def looks(method: HPM, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Maps of the same teacher by other ways to look, by name."""
    settings = method.config
    if method.teacher is None or not method.mines:
        return
    ways = [("masked", count) for count in (1, 4, 16)]
    if settings.score == "predicted":
        ways.insert(0, ("full", 0))
    for look, count in ways:
        method.config = settings.model_copy(update={"look": look})
        noise = [uniform(images, method, 1000 + number) for number in range(count)]
        _, difficulty = method.ask_teachers(images, True, noise)
        assert difficulty is not None
        yield ("whole image" if look == "full" else f"{count} masked"), difficulty
    method.config = settings
    if settings.score == "predicted" and halves(method):
        yield "half the size", half_size_look(method, images)


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.argument("data")
@click.option("--images", "count", default=256)
@click.option("--masks", default=40, help="over which the true error is the mean")
def main(run: Path, data: str, count: int, masks: int) -> None:
    """A table."""
    with ended_in_words():
        folder = RunFolder(run)
        method = folder.method().eval()
        if not isinstance(method, HPM | AMT | SemAIM):
            raise UserError(f"{run}: its method has no such maps; give a run of HPM, AMT or SemAIM")
        images = some_images(folder, data, count)
    print("| map | explained by position | rank correlation with the true error |\n|---|---|---|")
    error = true_error(method, images, masks)
    print(f"| the true error | {position_share(error):.1%} | 1 |")
    for name, found in maps_of(method, images):
        shared, follows = position_share(found), rank_correlation(found, error)
        print(f"| {name} | {shared:.1%} | {follows:.3f} |")


if __name__ == "__main__":
    main()

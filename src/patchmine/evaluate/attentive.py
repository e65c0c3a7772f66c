"""Attentive classifiers on frozen patch tokens: Efficient Probing, or timm's latent pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchmine.errors import Say, UserError, silent
from patchmine.evaluate.features import Features, Reader, device_of
from patchmine.evaluate.heads import shuffled_batches
from patchmine.evaluate.linear import grid_plan, say_edge
from patchmine.evaluate.measure import Learned, Result, measure, models_of, opened
from patchmine.evaluate.progress import progress
from patchmine.evaluate.settings import AttentiveSettings
from patchmine.evaluate.tokens import TokenReader, token_tables

_QUERIES = 32  # the paper's EP_32
_HEAD_WIDTH = 64  # of timm's pooling, as in its ViTs
_WARMUP = 10 / 90  # share of the steps, that of MAE's probe
_ROWS = 256  # images that are scored at once


def evaluate_attentive(settings: AttentiveSettings, say: Say = silent) -> Result:
    """A classifier that learns which patch tokens to look at, on top of the frozen encoder.

    From Efficient Probing (arXiv 2506.10178) are the pooling, see `EfficientPool`, and what follows
    it as in MAE's probe: batch norm without affine parameters, then one linear layer.  Ours are the
    optimizer (AdamW without weight decay, several rates at once, where the authors use LARS with
    one), the choice on held-out training images, and that there is no augmentation: tokens are
    read once.

    Args:
        settings: model, data, probe and rates.
        say: hears about the progress and the size of the tokens.

    Returns:
        ``top1`` and ``top5`` in percent of the chosen rate, ``held_out_top1`` of all.

    Raises:
        UserError: the model or the data cannot be used, or the tokens fit neither memory nor disk.
    """
    evaluated = opened(settings)
    models = models_of(settings, evaluated, say)
    models.pop("raw_pixels", None)  # which are no tokens
    readers: dict[str, Reader] = {name: TokenReader(model) for name, model in models.items()}
    learn = {"attentive": partial(learn_attentive, settings, say)}
    return measure(settings, learn, say, readers, empty=token_tables(settings.token_memory, say))[0]


class EfficientPool(nn.Module):
    """Pooling of Efficient Probing: M queries look at the tokens, each for its part of the values.

    Keys are the tokens themselves and nothing is projected behind the values; both as in the
    authors' code, one head, scale 1/sqrt(D), queries from N(0, 0.02).

    Args:
        width: D of the tokens.
        queries: M, which divides D.
    """

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, D) of tokens (B, L, D)."""
        num_queries, width = self.queries.shape
        attention = (tokens @ self.queries.T / math.sqrt(width)).softmax(dim=1)  # (B, L, M)
        # Values are a linear map, so that it may follow the sum over tokens: the same numbers for
        # 1/L of the work.
        pooled = attention.transpose(1, 2) @ tokens  # (B, M, D)
        parts = self.value.weight.view(num_queries, -1, width)  # (M, D / M, D)
        return torch.einsum("bmd,mpd->bmp", pooled, parts).flatten(1)


def new_probe(settings: AttentiveSettings, width: int, num_classes: int) -> nn.Sequential:
    """Pooling, batch norm and classifier; which weights it starts from the seed decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        pool: nn.Module
        if settings.probe == "latent":
            from timm.layers import AttentionPoolLatent

            heads = width // _HEAD_WIDTH if width % _HEAD_WIDTH == 0 else 1
            pool = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
        else:
            pool = EfficientPool(width, num_queries(settings.queries, width))
        linear = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(pool, nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


def num_queries(wanted: int | None, width: int) -> int:
    """Queries for tokens of this width, which they divide; UserError where the wanted do not."""
    if wanted is None:
        return max(count for count in range(1, _QUERIES + 1) if width % count == 0)
    if width % wanted:
        raise UserError(f"queries={wanted} does not divide the width of the tokens, {width}")
    return wanted


def learn_attentive(
    settings: AttentiveSettings, say: Say, reader: Reader, train: Features, num_classes: int
) -> Learned:
    """The probe whose rate is best on held-out training items."""
    device, name, rates = device_of(settings), reader.evaluated.name, settings.rates
    assert train.labels is not None, "labelled data has labels"
    labels, plan, width = train.labels, grid_plan(settings, train.labels), train.x.shape[2]
    probes = [new_probe(settings, width, num_classes).to(device) for _ in rates]
    with progress(f"{name}: {len(rates)} attentive probes", plan.iterations, say) as tick:
        train_probes(
            probes,
            train.x,
            labels,
            [rate * plan.batch / 256 for rate in rates],
            rows=plan.fit,
            iterations=plan.iterations,
            batch_size=plan.batch,
            seed=settings.seed,
            tick=tick,
        )
    held_out = probe_accuracy(probes, train.x, labels, plan.choice)
    best = held_out.index(max(held_out))
    say_edge(name, rates, best, say)
    what: str = settings.probe
    if what == "efficient":
        what = f"efficient probe, {num_queries(settings.queries, width)} queries"
    told = {
        "chosen": {"pooling": what, "rate": rates[best], "held_out_top1": held_out[best]},
        "held_out_top1": {what: dict(zip(map(str, rates), held_out, strict=True))},
        "settings": {"probe": settings.probe, **plan.told},
    }
    return Learned(lambda rows: {"best": probes[best](rows.to(device))}, "best", told)


def train_probes(
    probes: Sequence[nn.Module],
    table: Tensor,
    labels: Tensor,
    rates: Sequence[float],
    *,
    rows: Tensor,
    iterations: int,
    batch_size: int,
    seed: int = 0,
    tick: Callable[[int], None] = lambda _: None,
) -> None:
    """Train each probe at its rate on the same batches of a table (N, L, D); then in eval mode."""
    groups = [{"params": list(probe.parameters())} for probe in probes]
    device = groups[0]["params"][0].device
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(1, round(_WARMUP * iterations))
    for step, index in enumerate(shuffled_batches(len(rows), batch_size, iterations, seed)):
        decay = 0.5 * (1 + math.cos(math.pi * step / iterations))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / warmup) * decay
        chosen = rows[index]
        tokens, truth = table[chosen].to(device).float(), labels[chosen].to(device)
        optimizer.zero_grad()
        for probe in probes:  # one after the other: the graph of one is gone before the next
            F.cross_entropy(probe(tokens), truth).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        tick(1)
    for probe in probes:
        probe.eval()


@torch.no_grad()
def probe_accuracy(
    probes: Sequence[nn.Module], table: Tensor, labels: Tensor, rows: Tensor
) -> list[float]:
    """Percent right of each probe on these rows of a table (N, L, D)."""
    device = next(probes[0].parameters()).device
    hits = torch.zeros(len(probes), dtype=torch.float64)
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        tokens, truth = table[some].to(device).float(), labels[some].to(device)
        right = [(probe(tokens).argmax(1) == truth).sum() for probe in probes]
        hits += torch.stack(right).cpu()
    return (100 * hits / len(rows)).tolist()

"""Plain, slow parts of the methods, written from the specifications alone: loops, float64, nothing
of `patchmine`.

Networks are functions of a dictionary of weights under the reference's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def layer_norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / (variance + eps) ** 0.5 * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    y = x @ state[f"{name}.weight"].flatten(1).T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-head attention, head after head: what is mixed (B, N, D), and the shares (B, H, N, M)."""
    width = query.shape[-1] // heads
    mixed, shares = [], []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        if bias is not None:
            scores = scores + bias[head]
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        share = scores.softmax(dim=-1)
        shares.append(share)
        mixed.append(share @ value[..., part])
    return torch.cat(mixed, dim=-1), torch.stack(shares, dim=1)


def block(
    x: Tensor,
    state: State,
    name: str,
    heads: int,
    eps: float,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A pre-norm block, BEiT's with layer scale where there are gammas: tokens (B, N, D), shares
    (B, H, N, N).
    """
    normed = layer_norm(x, state, f"{name}.norm1", eps)
    products = normed @ state[f"{name}.attn.qkv.weight"].T
    if f"{name}.attn.qkv.bias" in state:
        products = products + state[f"{name}.attn.qkv.bias"]
    query, key, value = products.chunk(3, dim=-1)
    if f"{name}.attn.q_bias" in state:  # BEiT and VideoMAE: keys have none
        query, value = query + state[f"{name}.attn.q_bias"], value + state[f"{name}.attn.v_bias"]
    mixed, shares = attend(query, key, value, heads, seen, bias)
    x = x + state.get(f"{name}.gamma_1", 1.0) * linear(mixed, state, f"{name}.attn.proj")
    return x + state.get(f"{name}.gamma_2", 1.0) * perceptron(x, state, name, eps), shares


def perceptron(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    hidden = gelu(linear(layer_norm(x, state, f"{name}.norm2", eps), state, f"{name}.mlp.fc1"))
    return linear(hidden, state, f"{name}.mlp.fc2")


def blocks(x: Tensor, state: State, prefix: str, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """All blocks of a network that are called ``{prefix}.{i}``, and the shares of the last one."""
    shares = x
    for number in range(count(state, prefix)):
        x, shares = block(x, state, f"{prefix}.{number}", heads, eps)
    return x, shares


def count(state: State, prefix: str) -> int:
    return len(
        {
            name.removeprefix(f"{prefix}.").split(".")[0]
            for name in state
            if name.startswith(f"{prefix}.")
        }
    )


def patch_list(images: Tensor, patch: int) -> list[Tensor]:
    """Every patch (B, C, p, p), row after row."""
    _, _, height, width = images.shape
    corners = [(top, left) for top in range(0, height, patch) for left in range(0, width, patch)]
    return [images[:, :, top : top + patch, left : left + patch] for top, left in corners]


def channels_last(images: Tensor, patch: int) -> Tensor:
    """Pixels of every patch in the order (row, column, channel): (B, L, p * p * C)."""
    return torch.stack(
        [each.permute(0, 2, 3, 1).flatten(1) for each in patch_list(images, patch)], dim=1
    )


def channels_first(images: Tensor, patch: int) -> Tensor:
    """Pixels of every patch in the order (channel, row, column): (B, L, C * p * p)."""
    return torch.stack([each.flatten(1) for each in patch_list(images, patch)], dim=1)


def embed(images: Tensor, state: State, patch: int, name: str = "patch_embed.proj") -> Tensor:
    """Patch tokens without positions (B, L, D)."""
    return linear(channels_first(images, patch), state, name)


def standardised(values: Tensor) -> Tensor:
    """Each patch with mean 0 and deviation 1: unbiased variance, 1e-6 inside the root."""
    mean = values.mean(dim=-1, keepdim=True)
    variance = ((values - mean) ** 2).sum(dim=-1, keepdim=True) / (values.shape[-1] - 1)
    return (values - mean) / (variance + 1e-6) ** 0.5


def sincos(width: int, rows: int, columns: int) -> Tensor:
    """MAE's table (rows * columns, width): the column in the first half of the channels, the row in
    the second.
    """
    quarter = width // 4
    table = []
    for row in range(rows):
        for column in range(columns):
            entry = []
            for place in (column, row):
                angles = [place / 10000 ** (k / quarter) for k in range(quarter)]
                entry += [math.sin(angle) for angle in angles] + [
                    math.cos(angle) for angle in angles
                ]
            table.append(entry)
    return torch.tensor(table, dtype=torch.float64)


def interleaved(width: int, length: int) -> Tensor:
    """VideoMAE's one-dimensional table (length, width): sine and cosine side by side."""
    table = [
        [
            (math.cos if j % 2 else math.sin)(n / 10000 ** (2 * (j // 2) / width))
            for j in range(width)
        ]
        for n in range(length)
    ]
    return torch.tensor(table, dtype=torch.float64)


def rows_of(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[b, n]]: (B, L, ...), (B, N) -> (B, N, ...)."""
    return torch.stack([row[numbers] for row, numbers in zip(values, index, strict=True)])


# ---- losses ----


def ranking(predicted: Tensor, error: Tensor) -> Tensor:
    """HPM: the mean of -log(sigmoid(p_a - p_b) + 1e-6) over pairs of one image with error_a >
    error_b.
    """
    terms = [
        -torch.log(torch.sigmoid(scores[a] - scores[b]) + 1e-6)
        for scores, errors in zip(predicted, error, strict=True)
        for a in range(len(scores))
        for b in range(len(scores))
        if errors[a] > errors[b]
    ]
    return torch.stack(terms).mean()


def absolute_ranking(predicted: Tensor, error: Tensor) -> Tensor:
    """HPM: mean squared distance to the errors, standardised within each image."""
    return ((predicted - standardised(error)) ** 2).mean()


def directions_apart(predicted: Tensor, target: Tensor) -> Tensor:
    """|a / |a| - b / |b||^2 of each patch."""
    predicted = predicted / predicted.norm(dim=-1, keepdim=True)
    target = target / target.norm(dim=-1, keepdim=True)
    return ((predicted - target) ** 2).sum(dim=-1)


def dino(student: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """The mean cross-entropy of every target (one a global crop) with the logits of every other
    crop.
    """
    terms = [
        -(target * (crop / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()
        for t, target in enumerate(targets)
        for s, crop in enumerate(student)
        if s != t
    ]
    return (sum(terms) / len(terms)).item()


# ---- places ----


def smoothing(rows: int, columns: int, sigma: float) -> Tensor:
    """DropPos: exp(-d^2 / sigma^2) between all places (L, L), each column divided by its sum."""
    places = [(row, column) for row in range(rows) for column in range(columns)]
    if sigma == 0:
        return torch.eye(len(places), dtype=torch.float64)
    raw = [
        [math.exp(-((r - s) ** 2 + (c - d) ** 2) / sigma**2) for s, d in places] for r, c in places
    ]
    full = torch.tensor(raw, dtype=torch.float64)
    return full / full.sum(dim=0, keepdim=True)


def stretched(attention: Tensor) -> Tensor:
    """AMT: the class token's attention (B, H, L), stretched to [0, 1] by head, mean over heads: (B,
    L).
    """
    low, high = attention.amin(dim=-1, keepdim=True), attention.amax(dim=-1, keepdim=True)
    return ((attention - low) / (high - low)).mean(dim=1)


def area_weights(cells: Tensor, box: Sequence[int]) -> Tensor:
    """AMT: the mean of a map (rows, columns), constant within each cell, over what each patch of a
    crop shows.

    ``box``: height and width of the image, top, left, height and width of the crop in pixels,
    whether it is mirrored.
    """
    rows, columns = cells.shape
    height, width, top, left, tall, broad, mirrored = box

    def shares(start: float, extent: float, number: int) -> Tensor:
        """How much of patch i lies in cell j, along one axis measured in cells."""
        shared = torch.zeros(number, number, dtype=torch.float64)
        for i in range(number):
            low, high = start + extent * i / number, start + extent * (i + 1) / number
            for j in range(number):
                shared[i, j] = max(0.0, min(high, j + 1) - max(low, j)) / (high - low)
        return shared

    down = shares(top / height * rows, tall / height * rows, rows)
    across = shares(left / width * columns, broad / width * columns, columns)
    weights = down @ cells @ across.T
    return weights.flip(1) if mirrored else weights


def relative_index(rows: int, columns: int) -> Tensor:
    """BEiT: the row of the relative table for every pair of tokens, class token first: (1 + L, 1 +
    L).
    """
    places = [(row, column) for row in range(rows) for column in range(columns)]
    size = (2 * rows - 1) * (2 * columns - 1) + 3
    index = torch.zeros(1 + len(places), 1 + len(places), dtype=torch.int64)
    for i, (row, column) in enumerate(places, start=1):
        for j, (r, c) in enumerate(places, start=1):
            index[i, j] = (row - r + rows - 1) * (2 * columns - 1) + column - c + columns - 1
    index[0, :], index[:, 0], index[0, 0] = size - 3, size - 2, size - 1
    return index


def gaussian(kernel: int, sigma: float) -> Tensor:
    """SemAIM: a window (k, k) that adds up to 1."""
    middle = kernel // 2
    window = [
        [math.exp(-((a - middle) ** 2 + (b - middle) ** 2) / (2 * sigma**2)) for b in range(kernel)]
        for a in range(kernel)
    ]
    full = torch.tensor(window, dtype=torch.float64)
    return full / full.sum()


def look_earlier(score: Tensor) -> tuple[Tensor, Tensor]:
    """SemAIM: who may look at whom by score (B, L): content and queries, (B, 1 + L, 1 + L), class
    token first.
    """
    batch, length = score.shape
    content = torch.zeros(batch, 1 + length, 1 + length, dtype=torch.bool)
    content[:, :, 0] = True
    query = content.clone()
    for b in range(batch):
        for i in range(length):
            for j in range(length):
                content[b, 1 + i, 1 + j] = bool(score[b, j] <= score[b, i])
                query[b, 1 + i, 1 + j] = bool(score[b, j] < score[b, i])
    return content, query

"""SCFS's search: cosine similarity of a small crop at each position of a map."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-12  # F.normalize's, in the reference (models/scfs.py)


def cosine_attention(
    queries: Float[Tensor, "J B C"], maps: Float[Tensor, "B C h w"]
) -> Float[Tensor, "J B h w"]:
    """Cosine of each query with each position of its image's map.

    In [0, 1]: what points away counts as 0, which maps that went through a ReLU never do; 0 where a
    map has no feature at all.  No softmax, no temperature.
    """
    with torch.autocast(maps.device.type, enabled=False):
        keys = maps.float().flatten(2)  # (B, C, h * w)
        queries = queries.float().transpose(0, 1)  # (B, J, C)
        # Dividing the products by the lengths spares a normalised copy of the map.
        queries = queries / torch.linalg.vector_norm(queries, dim=2, keepdim=True).clamp(min=EPS)
        lengths = torch.linalg.vector_norm(keys, dim=1, keepdim=True).clamp(
            min=EPS
        )  # (B, 1, h * w)
        cosine = ((queries @ keys) / lengths).clamp(min=0)  # (B, J, h * w)
        return cosine.transpose(0, 1).unflatten(2, maps.shape[2:])

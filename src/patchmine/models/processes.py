"""How many processes compute together, for what is computed over all of them."""

from __future__ import annotations

import torch.distributed


def num_processes() -> int:
    """Processes of this run; 1 where it has a single one."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1

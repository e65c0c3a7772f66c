"""Makes a second folder of golden vectors: the same format, with other sizes, options and names of
cases.

``python tests/golden/make_vectors.py FOLDER``, then ``PATCHMINE_GOLDEN=FOLDER pytest
tests/golden``.  Networks, masks, targets and losses come from `second_folder.reference`, plain
loops in float64 that know nothing of `patchmine`; of MOKD and SCFS the activations and gradients
are our own, which their JSON says.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from second_folder import amt, droppos, emae, hpm, mae, pairs, semaim, videomae

MAKERS = (
    *(mae.mae, hpm.hpm, emae.emae, amt.amt, amt.amt_simmim, amt.simmim),
    *(droppos.droppos, semaim.semaim, videomae.videomae, pairs.mokd, pairs.scfs),
)


def main(folder: Path) -> None:
    """Write all files."""
    torch.set_num_threads(1)
    for make in MAKERS:
        make(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Whether the run of `make demo` has learned: `python tests/demo_floors.py runs/demo`, after it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ABOVE = {"random_init": 4.0, "raw_pixels": 20.0}
"""Points of top-1 by which the encoder has to be better than each baseline."""


def failures(result: dict[str, Any]) -> list[str]:
    """A sentence for each floor that the result of ``eval knn`` is below."""
    own, found = result["top1"], result["baselines"]
    return [
        f"kNN top-1 {own:.1f} is not {points:g} points above {name} ({found[name]['top1']:.1f})"
        for name, points in ABOVE.items()
        if own < found[name]["top1"] + points
    ]


if __name__ == "__main__":
    run = Path(sys.argv[1])
    result = json.loads((run / "eval" / "knn.json").read_text())
    assert list(run.glob("samples/step-*.png")), f"{run} has no picture"
    sys.exit("\n".join(failures(result)) or 0)

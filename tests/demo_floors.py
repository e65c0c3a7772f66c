"""Whether the run of `make demo` has learned: `python tests/demo_floors.py runs/demo`, after it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

ABOVE = {"random_init": 4.0, "raw_pixels": 20.0}
"""Points of top-1 by which the encoder has to be better than each baseline."""

FEWEST_STEPS = 450
"""Of a machine that manages fewer in the time of the demonstration nothing is asked."""


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
    steps = yaml.safe_load((run / "config.yaml").read_text())["steps"]
    found = failures(result)
    if steps < FEWEST_STEPS:
        text = f"{steps} steps are too few for the floors, which are for {FEWEST_STEPS}: {found}"
        sys.stdout.write(f"{text}\n")
        found = []
    sys.exit("\n".join(found) or 0)

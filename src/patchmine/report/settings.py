"""Settings of what is drawn of runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from patchmine.strict import Strict, Text, ends_in


class ShowSettings(Strict):
    """Draw what a run makes of some images or videos.

    Input, mask, reconstruction and error, and what else the method can show of each patch.

    Example:
        patchmine show runs/hpm a.jpg b.jpg out=panel.png
        patchmine show runs/clips a.mp4 out=clip.gif
    """

    run: Text = Field(
        description="name the folder of a run first, as in patchmine show runs/hpm a.jpg"
    )
    images: list[str] = Field(
        min_length=1, description="name images after the run, or videos of a run on them"
    )
    out: Text = Field("panel.png", description="picture to write; of videos also .gif or .mp4")
    seed: int = Field(0, ge=0, description="decides the random masks")


class ReportSettings(Strict):
    """Write one HTML page about a run, or comparing several.

    The page holds curves, pictures, evaluations and settings; it needs no network.

    Example:
        patchmine report runs/hpm runs/mae out=report.html
    """

    runs: list[str] = Field(min_length=1, description="name one run folder or several")
    out: Annotated[Text, AfterValidator(ends_in(".html", ".htm"))] = Field(
        "report.html", description="page to write"
    )

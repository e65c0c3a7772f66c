"""Settings of what is drawn of runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from patchmine.evaluate.settings import EvaluatedSettings, ReadingSettings
from patchmine.strict import Strict, Text, ends_in


class ShowSettings(Strict):
    """Draw what a run makes of some images or videos.

    Input, mask, reconstruction and error, and what else the method can show of each patch.

    Example:
        patchmine show runs/hpm a.jpg b.jpg out=panel.png
        patchmine show runs/hpm photos/
        patchmine show runs/clips a.mp4 out=clip.gif
    """

    run: Text = Field(
        description="name the folder of a run first, as in patchmine show runs/hpm a.jpg"
    )
    images: list[str] = Field(
        min_length=1,
        description="name images or a folder after the run, or videos of a run on them",
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


class ExploreSettings(ReadingSettings, EvaluatedSettings):
    """Write a page about a data set, and a table to clean it by.

    As a model sees it: near-duplicates, outliers, clusters, the hardest and the easiest images of
    an HPM run, and the nearest neighbours of any image that is clicked.  The table has a row for
    every image.  Of a model of clips the items are videos.

    Example:
        patchmine explore runs/hpm data=photos/ out=explore.html
    """

    out: Annotated[Text, AfterValidator(ends_in(".html", ".htm"))] = Field(
        "explore.html", description="page to write"
    )
    csv: Annotated[Text, AfterValidator(ends_in(".csv"))] | None = Field(
        None, description="table to write; null: beside the page, under its name"
    )
    pooling: str = Field("cls", description="cls, mean or cls+mean; cls is mean without a token")
    neighbours: Annotated[int, Field(ge=1, le=100)] = Field(
        10, description="of each image that are found and shown"
    )
    clusters: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="how many; null: the root of half the images, at most 50"
    )
    similarity: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="cosine of near-duplicates; null: by the data"
    )
    shown: Annotated[int, Field(ge=1, le=20_000)] = Field(
        2000, description="images on the page at most; the table has all"
    )

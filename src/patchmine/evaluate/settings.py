"""Settings of the evaluations: of a run on its way, and of each protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from patchmine.data.settings import REMOTE_GB, RemoteGb
from patchmine.strict import (
    LARGEST_RUN,
    OF_A_MACHINE,
    BatchSize,
    Count,
    Device,
    Fraction,
    Positive,
    SettingError,
    Size,
    Strict,
    Text,
    Texts,
    Workers,
    ends_in,
)

TEMPERATURE = 0.07  # DINO's knn_classifier
NEIGHBOURS = (10, 20, 100, 200)  # reported by DINO, DINOv2 and HPM
SHOTS = RECALL = (1, 5, 10)
HEADLINE = 20  # the k that papers quote
# DINOv2, eval/linear.py, for 256 images; the last three are added because features of masked
# pre-training ask for more.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
ATTENTIVE_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
TABLE_ENDINGS = (".parquet", ".csv", ".npz")
PREDICTION_ENDINGS = (".csv", ".parquet")

_POOLING = Field("cls", description="cls, mean or cls+mean; cls is mean where there is none")
_Rate = Annotated[float, Field(gt=0, le=1e6)]


class EvalSettings(Strict):
    """What a training run measures on its way."""

    DECIDES_WEIGHTS: ClassVar[bool] = False

    eval_every: int = Field(
        0, ge=0, le=LARGEST_RUN, description="epochs between evaluations; 0: none"
    )
    eval_data: Annotated[Text | None, OF_A_MACHINE] = Field(
        None, description="labelled images for it"
    )
    eval_test: Annotated[Text | None, OF_A_MACHINE] = Field(
        None, description="labelled images to test on; null: a part of eval_data"
    )
    crop_pct: float = Field(0.875, gt=0, le=1, description="centre crop, share of the shorter side")
    monitor_images: int = Field(
        512, ge=0, le=LARGEST_RUN, description="images watched without labels; 0: none"
    )
    monitor_data: Annotated[Text | None, OF_A_MACHINE] = Field(
        None, description="held-out images to watch; null: some of data, without a held-out loss"
    )
    monitor_every: Positive | None = Field(
        None, description="epochs between looks at them; null: as eval_every, or a twentieth"
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """Evaluations without data, and monitors without images."""
        for name in ("monitor_data", "monitor_every"):
            if self.monitor_images == 0 and (given := getattr(self, name)) is not None:
                text = f"given {given}, but monitor_images=0 switches monitors off; leave one out"
                yield SettingError(name, text)
        if self.eval_every and self.eval_data is None:
            text = "but eval_data is not set; name a folder of labelled images"
            yield SettingError("eval_every", f"given {self.eval_every}, {text}")


class ReadingSettings(Strict):
    """How items are read; none of it changes a result beyond rounding."""

    batch_size: BatchSize = Field(
        default=256, description="images encoded at once; changes no result"
    )
    workers: Workers = Field(default="auto", description="processes that decode images")
    device: Device = Field(default="auto", description="auto: cuda where there is one")
    max_bad_share: Fraction = Field(
        default=0.05, description="share of broken images above which to stop"
    )
    remote_gb: RemoteGb = REMOTE_GB


class EvaluatedSettings(Strict):
    """The model under evaluation, and its items."""

    target: Text = Field(
        description="a run, an export, a file, a timm model, random-init:RUN or raw-pixels"
    )
    data: Texts = Field(
        description="folder, list file, tar shards, Parquet, embedded:photos; images or videos"
    )
    weights: str = Field(
        "student", description="student, teacher, partner or partner-teacher; or a file"
    )
    image_size: Size | None = Field(None, description="pixels; null: the model's own")
    channels: Count | None = Field(None, description="null: the model's own")
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="centre crop, share of the shorter side; null: the model's own"
    )
    stride: Count | None = Field(None, description="clips take every such frame; null: the model's")
    seed: int = Field(0, ge=0, description="decides random weights and the order of training")


class EmbedSettings(ReadingSettings, EvaluatedSettings):
    """Write one feature vector per image to a file.

    Of a run on videos the rows are videos, one clip from the middle of each.

    Example:
        patchmine embed runs/hpm data=photos/ out=embeddings.parquet
    """

    out: Annotated[Text, AfterValidator(ends_in(*TABLE_ENDINGS))] = Field(
        description="parquet file to write, as in out=embeddings.parquet; or .csv or .npz"
    )
    pooling: str = _POOLING


def _is_table_or_folder(name: str | None) -> str | None:
    """A check of ``out`` of predictions: a table by its ending, or a folder without one."""
    if name is None:
        return name
    ending = PurePath(name).suffix.lower()
    if ending and ending not in PREDICTION_ENDINGS and not name.endswith("/"):
        endings = " or ".join(PREDICTION_ENDINGS)
        raise ValueError(f"the name of a file that ends in {endings}, or of a folder (out=name/)")
    return name


class PredictSettings(ReadingSettings):
    """Write what a trained run says of images.

    One row for each readable image: file, class and probability, by a fine-tuned run.  Of a run
    with several labels (loss=bce) the class is all labels above 0.5, joined by |, and each label
    has a column; of one with numbers (loss=mse) each number has.  Of a run on videos the rows are
    videos.

    Of a run that segments a new folder: a PNG of class numbers for each image, the classes over the
    images in overlays/, and how many pixels each has in classes.csv.

    Of a run that detects a new folder: annotations.json in COCO's format, the objects drawn over
    the images in overlays/, and a row for each in objects.csv.

    Example:
        patchmine predict runs/classify images/ out=predictions.csv
        patchmine predict runs/classify images/ out=predictions/ top=3
        patchmine predict runs/segment images/ out=predictions/
        patchmine predict runs/detect images/ out=predictions/ tile=auto
    """

    run: Text = Field(
        description="folder of a fine-tuned run, of its export, or of timm's classifier"
    )
    data: Texts = Field(
        description="folder of images or videos, list file, tar shards; or single files"
    )
    out: Annotated[Text | None, AfterValidator(_is_table_or_folder)] = Field(
        None,
        description=".csv or .parquet; or a folder, for pictures too; null: predictions.csv, or of "
        "class maps and objects predictions/",
    )
    top: Count = Field(1, description="classes in a row, the most probable first")
    all: bool = Field(False, description="also a column for each class, with its probability")
    segments: Count | None = Field(
        None, description="clips of each video, averaged; null: as the run was tested"
    )
    crops: Count | None = Field(
        None, description="crops of each of these, along the longer side; null: as it was tested"
    )
    score_threshold: Fraction = Field(
        0.5, description="of objects: the score, from 0 to 1, below which they are left out"
    )
    tile: Size | Literal["auto"] | None = Field(
        None,
        description="of objects: pixels of the pieces in which larger images are looked through; "
        "auto: so that objects look as large as in training; null: images are shrunk whole",
    )
    overlap: float = Field(
        0.25, ge=0, lt=1, description="share of a piece that the next one sees too (tile)"
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """Pieces that there are not."""
        if self.tile is None and "overlap" in self.model_fields_set:
            text = f"given {self.overlap:g}, which is of use with tile=auto or a number of pixels"
            yield SettingError("overlap", text)


class FiledSettings(ReadingSettings, EvaluatedSettings):
    """What the protocols share."""

    baselines: bool = Field(
        False, description="also measure random weights, the raw pixels and a run's start"
    )
    name: str | None = Field(
        None,
        pattern=r"^[\w.-]+$",
        max_length=100,
        description="of the result's file; null: the protocol's",
    )


class ProtocolSettings(FiledSettings):
    """What the protocols share that learn from some images and are tested on others."""

    test: Texts | None = Field(None, description="images to test on; null: a part of data")


class VoteSettings(Strict):
    """How neighbours vote."""

    k: BatchSize = Field(default=HEADLINE, description="neighbours that vote for top1 and top5")
    temperature: float = Field(
        default=TEMPERATURE, ge=1e-6, description="of the vote exp(cosine / temperature)"
    )


class KnnSettings(VoteSettings, ProtocolSettings):
    """Nearest neighbours on frozen features (DINO's protocol).

    Nothing is trained, so it is quick.  Folders train/ and test/ in data are used as such.

    Example:
        patchmine eval knn runs/hpm data=cifar10/train test=cifar10/test baselines=true
    """

    pooling: str = _POOLING
    neighbours: tuple[BatchSize, ...] = Field(
        NEIGHBOURS, min_length=1, description="k that are reported"
    )


class GridSettings(ProtocolSettings):
    """How many classifiers are trained at once, DINOv2's way."""

    rates: tuple[_Rate, ...] = Field(
        RATES, min_length=1, description="rates for 256 images (dinov2)"
    )
    iterations: Positive | None = Field(
        None, description="training steps (dinov2); null: by the data"
    )
    held_out: float = Field(
        0.1, gt=0, lt=1, description="share of the data that the choice is made on"
    )
    train_batch: BatchSize | None = Field(None, description="features in a step; null: by the data")


class LinearSettings(GridSettings):
    """Linear classifiers on frozen features.

    Many learning rates and poolings are trained at once, DINOv2's way; the best is chosen on
    held-out images.

    Example:
        patchmine eval linear runs/hpm data=cifar10/train test=cifar10/test baselines=true
    """

    protocol: Literal["dinov2", "mae"] = Field(
        "dinov2", description="many classifiers at once, or one with LARS"
    )
    epochs: Positive = Field(90, description="passes over the training images (mae)")
    warmup_epochs: int = Field(10, ge=0, le=LARGEST_RUN, description="with a rising rate (mae)")
    blr: _Rate = Field(0.1, description="learning rate for 256 images (mae)")


class AttentiveSettings(GridSettings):
    """Attentive classifiers on frozen patch tokens.

    Queries are learnt that pick the tokens to look at, which suits masked pre-training better than
    one fixed mean.  All rates are trained at once; the best is chosen on held-out images.

    Example:
        patchmine eval attentive runs/hpm data=cifar10/train test=cifar10/test
    """

    rates: tuple[_Rate, ...] = Field(
        ATTENTIVE_RATES, min_length=1, description="of AdamW, for 256 images"
    )
    probe: Literal["efficient", "latent"] = Field(
        "efficient", description="Efficient Probing, or timm's AttentionPoolLatent"
    )
    queries: Count | None = Field(
        None, description="of the efficient probe; null: 32, or the next that divides the width"
    )
    token_memory: float = Field(
        4.0, ge=0, le=1e6, description="GB of tokens held in memory; more lie in a temporary file"
    )


class VideoSettings(VoteSettings, GridSettings):
    """Videos, as papers test them: several clips of each.

    kNN and a linear classifier learn from one clip of each training video; of a test video the
    scores of several clips and crops are averaged.  `eval knn` and `eval linear` take one clip.

    Example:
        patchmine eval video runs/video data=clips/train test=clips/test baselines=true
    """

    segments: Count = Field(5, description="clips of each test video, at even distances")
    crops: Count = Field(3, description="crops of each of these, along the longer side")
    image: Text | None = Field(
        None, description="also measure this encoder of images over the frames"
    )


class FewshotSettings(VoteSettings, ProtocolSettings):
    """A few labelled images of each class, on frozen features.

    Nearest neighbours and logistic regression learn from 1, 5 and 10 random images of each class,
    several times; mean and standard deviation of top-1 are reported.

    Example:
        patchmine eval fewshot runs/hpm data=labelled/ shots=[1,5,10] draws=10
    """

    pooling: str = _POOLING
    shots: tuple[BatchSize, ...] = Field(
        SHOTS, min_length=1, description="images of each class to learn from"
    )
    draws: Count = Field(10, description="random choices of these images")


class ClusterSettings(FiledSettings):
    """Clusters of frozen features, compared with the classes.

    k-means without labels; then normalised mutual information (NMI) and the adjusted Rand index
    (ARI) between clusters and classes, both 1 where they are the same.

    Example:
        patchmine eval cluster runs/hpm data=labelled/ baselines=true
    """

    pooling: str = _POOLING
    clusters: BatchSize | None = Field(None, description="null: as many as classes")
    iterations: Positive = Field(100, description="of k-means, at most")


class RetrievalSettings(ProtocolSettings):
    """Search for images of the same class among frozen features.

    Each test image searches the images of data: mean average precision over the whole ranking, and
    the share of searches that find its class among the first 1, 5 and 10.

    Example:
        patchmine eval retrieval runs/hpm data=labelled/ baselines=true
    """

    pooling: str = _POOLING
    recall: tuple[BatchSize, ...] = Field(
        RECALL, min_length=1, description="numbers of first images that are looked at"
    )
    queries: BatchSize | None = Field(
        default=10_000, description="most test images that search, drawn by class; null: all"
    )


class QualitySettings(FiledSettings):
    """Directions that frozen features use; needs no labels.

    RankMe, the effective rank of the features, and alpha, the exponent with which the spectrum of
    their covariance falls.  They compare runs on the same images, not models of different widths.

    Example:
        patchmine eval quality runs/hpm data=photos/ baselines=true
    """

    pooling: str = _POOLING

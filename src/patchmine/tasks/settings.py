"""Settings of the supervised tasks: what is learned, from which labels, and how carefully."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from patchmine.models.settings import AverageSettings, TrainableSettings
from patchmine.strict import (
    LARGEST_COUNT,
    LARGEST_RUN,
    OF_A_MACHINE,
    Count,
    Fraction,
    Positive,
    SettingError,
    Share,
    Side,
    Size,
    Strict,
    Text,
    Texts,
)

Loss = Literal["ce", "bce", "mse"]
Byte = Annotated[int, Field(ge=0, le=255)]
VOID = "ignore"
"""The name in ``palette`` of pixels that belong to no class."""


class HeldOutSettings(Strict):
    """Which labelled images a network learns, and by which it is chosen."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    share: Share = Field(
        1.0, description="share of the training images that is used, as 0.1 or 10%"
    )
    val: Annotated[Texts | None, OF_A_MACHINE] = Field(
        None, description="labelled images that choose the best checkpoint; null: see val_share"
    )
    val_share: float = Field(
        0.0, ge=0, lt=1, description="share kept from training to choose the best checkpoint by"
    )
    patience: Positive | None = Field(
        None, description="epochs without a better validation after which training stops"
    )
    classes: list[str] = Field([], description="names of what is told apart; []: the data's")

    def setting_errors(self) -> Iterator[SettingError]:
        """Two places to validate on."""
        if self.val is not None and self.val_share:
            text = f"given {self.val_share:g}, but val names images: give one of the two"
            yield SettingError("val_share", text)


class LabelSettings(HeldOutSettings):
    """The labels of whole images."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    labels: Annotated[Text | None, OF_A_MACHINE] = Field(
        None, description="CSV file of labels, a row an image; null: the folders are the classes"
    )
    column: str | None = Field(
        None, description="of labels: the column to learn; null: the only one beside the file's"
    )
    loss: Loss = Field(
        "ce", description="ce: one class an image; bce: any number of labels; mse: a number"
    )

    def setting_errors(self) -> Iterator[SettingError]:
        """Validation without data, and a column without a table."""
        if self.patience is not None and self.val is None and not self.val_share:
            text = "but nothing to validate on: set val_share=0.1, or val to labelled images"
            yield SettingError("patience", f"given {self.patience}, {text}")
        if self.labels is None and self.column is not None:
            text = f"given '{self.column}', but there is no table: set labels to a CSV file"
            yield SettingError("column", text)
        if self.labels is None and self.loss == "mse":
            text = "given mse, but folders name classes: set labels to a CSV file of numbers"
            yield SettingError("loss", text)


class BackboneSettings(TrainableSettings):
    """How far the backbone moves."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    positions: Literal["learned", "frozen"] = Field(
        "learned", description="whether the table of positions is trained too (trainable=all)"
    )
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth of the last block")
    clip_grad: float | None = Field(None, gt=0, description="largest norm of the gradient")


class NetworkSettings(BackboneSettings):
    """What stands on the backbone, and how far the backbone moves."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    pool: Literal["mean", "cls"] = Field(
        "mean", description="mean of the patches, then the norm; or the class token"
    )
    head_std: float = Field(
        2e-5, ge=0, le=1, description="deviation of the classifier's first weights"
    )


class RegularSettings(AverageSettings):
    """What keeps a network from learning few labels by heart."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="share of a label that goes to all classes"
    )
    balance: bool = Field(False, description="weigh images so that all classes count the same")


class JudgeSettings(Strict):
    """What the finished network is tested on."""

    DECIDES_WEIGHTS: ClassVar[bool] = False

    test: Annotated[Texts | None, OF_A_MACHINE] = Field(
        None, description="labelled images to test on; null: a part of data"
    )
    eval_every: int = Field(
        1, ge=0, le=LARGEST_RUN, description="epochs between validations; 0: at the end only"
    )


class TestSettings(JudgeSettings):
    """How a finished classifier is tested."""

    DECIDES_WEIGHTS: ClassVar[bool] = False
    __test__: ClassVar[bool] = False  # no test, whatever pytest thinks of the name

    eval_batch: int = Field(
        256, gt=0, le=LARGEST_COUNT, description="images tested at once; changes no result"
    )
    crop_pct: Fraction = Field(
        0.875, gt=0, description="centre crop in tests, share of the shorter side"
    )
    test_segments: Count = Field(
        1, description="clips of each test video, at even distances, whose scores are averaged"
    )
    test_crops: Count = Field(
        1, description="crops of each of these along the longer side; 1 and 1: the middle"
    )


class FinetuneSettings(TestSettings, RegularSettings, NetworkSettings, LabelSettings):
    """All that a fine-tuned run has beside a pre-training run's data, views and schedule."""


class SegmentLossSettings(Strict):
    """What is learned of label maps, and by which network on the backbone."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    labels: Annotated[Text | None, OF_A_MACHINE] = Field(
        None, description="folder of label maps, or a COCO file; null: beside the images"
    )
    skip_bad_objects: bool = Field(
        False, description="leave out annotations of COCO files that are wrong"
    )
    ignore_index: int = Field(
        255, ge=0, lt=2**31, description="class number of pixels that belong to no class"
    )
    palette: dict[str, int | tuple[Byte, Byte, Byte]] = Field(
        {}, description="colour or value of each class, as {cell: 255}; {}: values are the classes"
    )
    head: Literal["linear", "upernet", "dpt", "eomt"] = Field(
        "linear",
        description="what stands on the backbone; upernet is the papers'; eomt: queries inside of "
        "it, for strong starts",
    )
    head_width: Count | None = Field(
        None, description="channels of the head's hidden layers; null: its own"
    )
    queries: Count | None = Field(
        None, description="of head=eomt: how many propose a class and a mask; null: 100"
    )
    query_blocks: Count | None = Field(
        None, description="of head=eomt: last blocks with queries; null: a quarter, up to 4"
    )
    aux_weight: float = Field(
        0.4, ge=0, le=10, description="share of the auxiliary head in the loss, where there is one"
    )
    balance: bool = Field(False, description="weigh pixels so that all classes count the same")
    dice: float = Field(0.0, ge=0, le=100, description="weight of the Dice loss beside the other")
    focal: float = Field(
        0.0, ge=0, le=10, description="gamma of the focal loss; 0: plain cross entropy"
    )


class SlidingSettings(JudgeSettings):
    """How whole images are tested: in windows of ``image_size``."""

    DECIDES_WEIGHTS: ClassVar[bool] = False

    eval_batch: Count = Field(8, description="windows tested at once; changes no result")
    test_stride: Side | None = Field(
        None, description="pixels from window to window; null: two thirds of image_size"
    )


class SegmentSettings(SlidingSettings, SegmentLossSettings, BackboneSettings, HeldOutSettings):
    """All that a run that segments has beside its data, views and schedule."""

    def setting_errors(self) -> Iterator[SettingError]:
        """Class names that stand in two places, or mean two things; settings of other heads."""
        of_maps, of_queries = (
            ("head_width", "balance", "dice", "focal"),
            ("queries", "query_blocks"),
        )
        for name in of_maps if self.head == "eomt" else of_queries:
            if getattr(self, name):
                text = f"given {getattr(self, name)}, which is not for head={self.head}"
                yield SettingError(name, f"{text}: leave it out")
        names = [name for name in self.palette if name != VOID]
        if self.palette and not names:
            yield SettingError("palette", f"names no class but {VOID}: give each class its colour")
        if names and self.classes and self.classes != names:
            text = f"given {self.classes}, but palette names {names}: leave classes out"
            yield SettingError("classes", text)
        kinds = {isinstance(value, tuple) for value in self.palette.values()}
        if len(kinds) > 1:
            text = "mixes numbers and colours: give all classes a number, or all a colour"
            yield SettingError("palette", text)
        values = list(self.palette.values())
        if doubled := [name for name in names if values.count(self.palette[name]) > 1]:
            text = f"gives {doubled[0]} and another class the same value: give each its own"
            yield SettingError("palette", text)


class DetectLossSettings(Strict):
    """Which objects are learned, and by which network on the backbone."""

    DECIDES_WEIGHTS: ClassVar[bool] = True

    annotations: Annotated[Text | None, OF_A_MACHINE] = Field(
        None,
        description="COCO file, or folder of train.json and so on; null: beside the images, or "
        "data/annotations",
    )
    masks: bool = Field(False, description="find the masks of objects, too: Mask R-CNN")
    skip_bad_objects: bool = Field(
        False, description="leave wrong annotations out, instead of refusing their file"
    )
    head: Literal["fpn", "vitdet"] = Field(
        "fpn", description="heads on the maps: torchvision's, or ViTDet's larger ones"
    )
    width: Count = Field(256, description="channels of maps and heads")
    window: int | None = Field(
        None,
        ge=0,
        le=LARGEST_COUNT,
        description="patches along a side of attention's windows; 0: every block sees all patches; "
        "null: 0 up to 32x32 patches, else 14",
    )
    global_blocks: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="blocks, from 0, that have no windows; null: the last of each quarter"
    )
    anchor_scale: float = Field(
        8.0, gt=0, le=256, description="size of anchors, as a factor of their map's stride"
    )
    proposals: Count = Field(1000, description="places of an image where objects are looked for")
    samples: Count = Field(512, description="of these places, how many a training step learns from")


class FindSettings(JudgeSettings):
    """What counts as found when a network is tested."""

    DECIDES_WEIGHTS: ClassVar[bool] = False

    eval_batch: Count = Field(8, description="images tested at once; changes no result")
    score_threshold: Fraction = Field(0.05, description="score below which nothing is found")
    nms: Fraction = Field(
        0.5, gt=0, description="overlap (IoU) above which the less sure of two boxes is dropped"
    )
    category_ids: list[int] = Field(
        [], description="of the classes in what is predicted; []: those of the COCO files"
    )
    usual_size: Size | None = Field(
        None,
        description="[height, width] that tile=auto goes by; null: the training images' median",
    )


class DetectSettings(FindSettings, DetectLossSettings, BackboneSettings, HeldOutSettings):
    """All that a run that detects has beside its data, views and schedule."""

    def setting_errors(self) -> Iterator[SettingError]:
        """Blocks that are spared from windows which there are not."""
        if self.global_blocks is not None and not self.window:
            text = f"given {self.global_blocks}, which is of use with window=14 or another number"
            yield SettingError("global_blocks", text)
        if self.samples > self.proposals:
            must = f"must not be above proposals={self.proposals}"
            yield SettingError("samples", f"given {self.samples}; {must}")


def _listed(value: Any) -> Any:
    """1%,10%,100% as a list; one share alone is a list too."""
    if isinstance(value, str):
        return value.split(",")
    return value if isinstance(value, list | tuple) else [value]


class ShareSettings(Strict):
    """Runs with parts of the labels, and of other starts, to be compared with each other."""

    shares: Annotated[list[Share], BeforeValidator(_listed)] = Field(
        [], description="a run for each of these shares of the labels, as 1%,10%,100%"
    )
    baselines: bool = Field(False, description="the same from random weights, to compare with")
    compare: Texts = Field([], description="other starts to compare with, at equal settings")
    seeds: Annotated[int, Field(ge=1, le=100)] = Field(
        1, description="runs of each share and start, with other labels and other random numbers"
    )

    @property
    def asked(self) -> bool:
        """Whether there is anything to compare."""
        return bool(self.shares or self.baselines or self.compare or self.seeds > 1)


class CommandOptions(Strict):
    """What commands that teach labels take beside the settings of a run."""

    recipe: Text | None = Field(None, description="a recipe's name or YAML file; yours overrule it")
    check: bool = Field(False, description="only look whether settings, labels and images fit")


class FinetuneOptions(CommandOptions, ShareSettings):
    """What `patchmine finetune` takes beside the settings of a run."""

"""What was found as sentences, each with what can be done about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from patchmine.data.inspecting.findings import Findings, Tally
from patchmine.data.inspecting.masks import Masks
from patchmine.data.inspecting.proposal import Proposal, quoted
from patchmine.data.inspecting.report import InspectReport, counted, num_repeats
from patchmine.data.settings import DataSettings
from patchmine.data.sources.contract import Source
from patchmine.errors import shown_name

_MAX_BAD_SHARE = float(DataSettings.model_fields["max_bad_share"].default)
_LONG = 4  # times as long as wide, from which on an image is told
_SHRUNK = 6  # times that the whole image is larger than the crop's picture, likewise
_SMALLEST_CROP = 0.2  # share of an image, of crop_scale in the recipe my-images
_STOPS = f"and a run stops above max_bad_share={_MAX_BAD_SHARE:g}"

_PLAIN_IMAGES = "save each image as TIFF, PNG or .npy"
_FOREIGN = {
    "camera raw files": (
        ".cr2 .cr3 .nef .arw .dng .raf .rw2 .orf .pef .srw",
        "develop them to TIFF or JPEG",
    ),
    "medical images": (".mha .mhd .nrrd", _PLAIN_IMAGES),
    "slides": (".svs .ndpi .mrxs .scn .vms .bif", "cut them into tiles"),
    "microscopes' files": (".czi .lif .nd2 .oib .oif .vsi .ims .lsm", "export them as TIFF"),
    "arrays": (".npz .mat .nc .pt .pkl .parquet", _PLAIN_IMAGES),
    "satellites' files": (".img .ers .ntf .nitf .vrt .bsq .bil .safe", "convert them to TIFF"),
    "pictures of other formats": (
        ".exr .hdr .jxl .psd .svg .pdf .eps .pcx .sgi .qoi",
        _PLAIN_IMAGES,
    ),
    "archives": (".zip .gz .tgz .bz2 .xz .7z .rar", "unpack them"),
    "videos": (
        ".mp4 .avi .mkv .mov .webm .mpg .mpeg .m4v .wmv",
        "a model of videos reads them, as with model=video_vit_small_patch16",
    ),
}
"""What files that are left out hold, by their endings, and how they could count."""


def advise(
    source: Source,
    report: InspectReport,
    findings: Findings,
    masks: Masks | None,
    proposal: Proposal | None,
    listed: bool,
) -> tuple[str, ...]:
    """Sentences in the order in which one would act on them; ``listed``: a list is written."""
    sentences = [*_foreign(source.passed_over), *_broken(report)]
    sentences += [masks.advice] if masks else []
    sentences += [*_blank(source, findings)]
    sentences += [] if listed else _duplicates(report)
    if proposal is not None:
        sentences += _pages(source, findings)
        sentences += _channels(findings.main, proposal)
        sentences += _colours(findings.main, proposal)
        sentences += _statistics(findings.main, proposal)
        sentences += _sizes(source, findings, proposal)
    return tuple(sentences)


def _foreign(passed_over: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """About left out files that hold images; that, and why, others are left out a note tells."""
    for what, (endings, remedy) in _FOREIGN.items():
        counts = {
            ending: passed_over[reason][0]
            for ending in endings.split()
            if (reason := f"ending {ending}") in passed_over
        }
        if counts:
            many = _files(sum(counts.values()))
            yield f"{many} left out that may hold images, {what} ({counted(counts)}): {remedy}"


def _broken(report: InspectReport) -> Iterator[str]:
    broken = len(report.broken)
    empty = sum(reason.startswith("is empty") for _, reason in report.broken)
    if empty:
        yield f"{_files(empty)} empty (0 bytes): copy them again, or delete them"
    if broken > _MAX_BAD_SHARE * report.read:
        yield f"{broken / report.read:.0%} are broken, {_STOPS}: mend them or leave them out"


def _blank(source: Source, findings: Findings) -> Iterator[str]:
    if findings.blank:
        many, one = _images(len(findings.blank)), shown_name(source.path(findings.blank[0]))
        yield f"{many} of a single colour, as {one}: nothing can be learnt of them; leave them out"


def _duplicates(report: InspectReport) -> Iterator[str]:
    equal, alike = num_repeats(report.duplicates), num_repeats(report.near_duplicates)
    if equal + alike:
        yield (
            f"{_images(equal + alike)} repeats ({equal:,} equal to another, {alike:,} nearly so), "
            "which weigh more and may stand on both sides of a split: dedup=kept.txt writes a list "
            "with one of each, for data=kept.txt"
        )


def _pages(source: Source, findings: Findings) -> Iterator[str]:
    for pages in findings.pages.values():
        many = f"{pages.count:,} TIFF{'s' * (pages.count > 1)} of {pages.full} pages"
        one = f"as {shown_name(source.path(pages.first))}"
        if pages.used > 1:
            yield (
                f"{many} ({one}): {pages.used} pages are the channels of one image "
                f"(channels={pages.channels}); where they are images by themselves, save each as a "
                "file"
            )
        else:
            yield f"{many} ({one}): only one is read; save each page as a file to use all"


def _channels(tally: Tally, proposal: Proposal) -> Iterator[str]:
    channels, total = proposal.channels, len(tally)
    refused = total - tally.channels[channels]
    does = f"channels={channels} reads no others"
    if channels in (1, 3):
        refused = tally.misfits.total()
        does = "channels=1 turns colour grey"
        if channels == 3:
            does = "channels=3 repeats grey three times and drops alpha"
    if len(tally.channels) > 1:
        end = f"; {refused:,} of them count as broken" if refused else ""
        if refused > _MAX_BAD_SHARE * total:
            end += f", {_STOPS}: train on one kind"
        yield f"numbers of channels differ ({counted(tally.channels)}): {does}{end}"
    elif tally.channels[4] and channels == 3:
        yield "all have 4 channels: channels=3 drops the last as alpha, channels=4 keeps it"


def _colours(tally: Tally, proposal: Proposal) -> Iterator[str]:
    channels, total = proposal.channels, len(tally)
    if channels == 1 and tally.neutral:
        what = f"{tally.neutral:,} of {total:,} are stored in colour but grey in every pixel"
        yield f"{what}: channels=1 loses nothing"
    if channels == 1 and (lost := tally.in_colour):
        yield f"{lost:,} of {total:,} are in colour, which channels=1 drops; channels=3 keeps it"
    if len(tally.dtypes) > 1:
        yield (
            f"types of values differ ({counted(tally.dtypes)}): bytes and 16-bit values fill "
            "[0, 1], others stay as they are; train on one kind where brightness should agree"
        )


def _statistics(tally: Tally, proposal: Proposal) -> Iterator[str]:
    for dtype, (low, high) in tally.range.items():
        whole = round(high * 65535)
        if dtype == "uint16" and 0 < whole < 1 << 15:
            what = f"16-bit values reach only {whole:,} ({whole.bit_length()} bits)"
            yield f"{what} of 65,535, which is scaled to 1: {_normalised(proposal)}"
        elif dtype not in ("uint8", "uint16") and (low < 0 or high > 1):
            what = f"values of type {dtype} run from {low:.4g} to {high:.4g}"
            yield f"{what} and are taken as they are: {_normalised(proposal)}"
    if proposal.statistics is not None:
        mean, std = (float(np.mean(values)) for values in proposal.statistics)
        kind = "dark" if mean < 0.25 else "bright" if mean > 0.65 else "unlike usual photographs"
        kind += " and of little contrast" * (std < 0.12)
        yield f"the images are {kind}: {_normalised(proposal)}"


def _normalised(proposal: Proposal) -> str:
    """What becomes of brightness: what pretrain does by itself, or the settings to give."""
    if proposal.channels != 3:
        return f"with channels={proposal.channels} pretrain takes mean and std from the data"
    if proposal.statistics is None:
        return "pretrain takes ImageNet's mean and std, which are near the data's"
    words = " ".join(map(quoted, proposal.statistics_words()))
    return f"pretrain takes ImageNet's mean and std unless you give {words}"


def _sizes(source: Source, findings: Findings, proposal: Proposal) -> Iterator[str]:
    sizes = findings.main.sizes
    size, patch = proposal.image_size, proposal.smallest_side

    def told(test: Callable[[int, int], bool], what: str, remedy: str) -> Iterator[str]:
        found = [each for each in sizes if test(*each)]
        if found:
            many = _images(sum(sizes[each] for each in found))
            first = min(findings.first_of_size[each] for each in found)
            yield f"{many} {what}, as {shown_name(source.path(first))}: {remedy}"

    yield from told(
        lambda height, width: min(height, width) < patch,
        f"smaller than a patch of {patch} pixels",
        "training counts such as broken; leave them out",
    )
    yield from told(
        lambda height, width: patch <= min(height, width) < size / 2,
        f"less than half of image_size={size}",
        "enlarged they are blurred; leave such out where there are enough others",
    )
    yield from told(
        lambda height, width: max(height, width) > _LONG * min(height, width),
        f"over {_LONG} times as long as wide",
        "no crop shows all of one; cut them into pieces",
    )
    area = float(np.median([height * width for height, width in sizes.elements()]))
    times = area**0.5 / size
    if times > _SHRUNK:
        least, most = (f"{min(1.0, share * size**2 / area):.2g}" for share in (1, 8))
        crop = f"{times * _SMALLEST_CROP**0.5:.0f} to {times:.0f} times"
        yield (
            f"images are so large that crops are shrunk {crop}: where small things matter "
            f"(cells, cracks, ships), set 'crop_scale=[{least},{most}]'; where they do not, "
            f"`patchmine data shard` with max_side={2 * size} saves most of the decoding"
        )


def _images(count: int) -> str:
    return f"{count:,} images are" if count > 1 else "1 image is"


def _files(count: int) -> str:
    return f"{count:,} files are" if count > 1 else "1 file is"

"""Videos: features of clips, scores of several clips of each, and frames that an encoder of images
reads.
"""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save_file
from tests.evaluate.votes import knn_accuracy, vote_shares

from patchmine.backbones.family import build_encoder
from patchmine.backbones.reference import to_videomae_names
from patchmine.data.items import CLIP
from patchmine.data.sources.source import open_source
from patchmine.data.views.clips import PlainClips, TestClips
from patchmine.errors import UserError
from patchmine.evaluate.embed import embed
from patchmine.evaluate.evaluated import open_evaluated
from patchmine.evaluate.features import FrameReader, Reader, extract
from patchmine.evaluate.knn import evaluate_knn, knn_in_training
from patchmine.evaluate.labelled import open_labelled
from patchmine.evaluate.linear import evaluate_linear
from patchmine.evaluate.measure import opened, show_result
from patchmine.evaluate.settings import (
    EmbedSettings,
    KnnSettings,
    LinearSettings,
    ReadingSettings,
    VideoSettings,
)
from patchmine.evaluate.video import evaluate_video
from patchmine.report.results import read_result


def settings(kind, target, data, **more):
    return kind(target=str(target), data=str(data), workers=0, **more)


def features_of(target, view, source):
    """(N, V, D): one video after the other, in the obvious way; V clips of each."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(len(source)):
        pixels = view(source.read(number), 3, generator).views[0].float() / 255
        channels = (
            torch.tensor(target.input.mean)[:, None, None, None],
            torch.tensor(target.input.std)[:, None, None, None],
        )
        clips = (pixels - channels[0]) / channels[1]
        with torch.no_grad():
            rows.append(target.encoder.eval()(clips if clips.ndim == 5 else clips[None]))
    return torch.stack(rows)


def test_features_of_videos_are_those_of_the_clip_in_the_middle(video_folder, clips):
    target, source = open_evaluated(video_folder), open_source(clips / "train", "video")
    assert (target.item.noun, target.input.clip.frames, target.input.clip.stride) == ("video", 4, 2)
    found = extract(target, source, batch_size=20, workers=0)
    wanted = features_of(target, PlainClips(target.input, target.crop_pct), source)[:, 0]
    torch.testing.assert_close(found.x, wanted, rtol=1e-4, atol=1e-5)
    assert found.labels.tolist() == [0] * 6 + [1] * 6


def test_columns_of_the_last_blocks_equal_hooks(video_folder):
    target = open_evaluated(video_folder)
    outputs = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: outputs.append(out))
        for block in target.encoder.blocks
    ]
    images = torch.randn(2, 3, 4, 16, 16)
    reader = Reader(target, blocks=4)
    with torch.no_grad():
        columns = reader(images)
        for hook in hooks:
            hook.remove()
        wanted = torch.stack([target.encoder.norm(out).mean(1) for out in outputs[-4:]], dim=1)
        torch.testing.assert_close(columns, wanted)
        torch.testing.assert_close(columns[:, 3], target.encoder(images))
    assert reader.poolings == {"mean": [3], "mean, last 4 blocks": [0, 1, 2, 3]}


def test_an_encoder_of_images_reads_the_frames_one_by_one_in_any_order(
    video_folder, tmp_path, make_image_run
):
    run = make_image_run(
        tmp_path / "image", image_size=24, mean=[0.2, 0.3, 0.4], std=[0.5, 0.6, 0.7]
    )
    target, image = open_evaluated(video_folder), open_evaluated(run)
    pixels = torch.rand(2, 3, 4, 16, 16)
    channels = (1, 3, 1, 1, 1)
    clips = (pixels - torch.tensor(target.input.mean).view(channels)) / torch.tensor(
        target.input.std
    ).view(channels)
    reader = FrameReader(image, target)
    with torch.no_grad():
        found = reader(clips)
        torch.testing.assert_close(reader(clips.flip(2)), found)
        wanted = torch.zeros(2, 2, 24)
        for row, clip in enumerate(pixels):
            for frame in clip.unbind(1):
                x = F.interpolate(frame[None], (24, 24), mode="bicubic", antialias=True)
                x = (x - torch.tensor(image.input.mean).view(1, 3, 1, 1)) / torch.tensor(
                    image.input.std
                ).view(1, 3, 1, 1)
                wanted[row] += Reader(image)(x)[0] / 4
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_bare_pixels_of_clips_are_small_and_keep_their_frames(video_folder):
    reader = Reader(open_evaluated(video_folder).raw_pixels())
    images = torch.randn(2, 3, 4, 16, 32)
    found = reader(images)
    assert found.shape == (2, 1, 3 * 4 * 4 * 8)
    frame = F.interpolate(images[:, :, 1], size=(4, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(found.view(2, 3, 4, 4, 8)[:, :, 1], frame)


def test_a_twin_of_a_video_encoder_is_drawn_anew(video_folder):
    target = open_evaluated(video_folder)
    twin = target.random_init()
    weight = twin.encoder.patch_embed.proj.weight
    assert not torch.equal(weight, target.encoder.patch_embed.proj.weight)
    assert twin.input.clip == target.input.clip
    assert torch.equal(twin.encoder.pos_embed, target.encoder.pos_embed)


def test_exports_and_names_are_targets_too(video_folder):
    target, export = open_evaluated(video_folder), open_evaluated(video_folder / "export")
    assert (export.input.clip.frames, export.input.clip.stride, export.input.clip.tubelet) == (
        4,
        2,
        2,
    )
    assert (export.input.image_size, export.input.channels, export.input.mean) == (
        target.input.image_size,
        3,
        target.input.mean,
    )
    clips = torch.randn(1, 3, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(export.encoder.eval()(clips), target.encoder.eval()(clips))
    named = open_evaluated("video_vit_tiny_patch16", image_size=(32, 32))
    assert "no weights were loaded" in named.note
    assert (named.input.clip.frames, named.input.image_size) == (16, (32, 32))


def test_a_file_of_videomae_is_a_target_and_takes_the_stride_that_is_given(tmp_path):
    args = dict(image_size=(32, 32), model_args={"embed_dim": 192, "depth": 1}, clip=(4, 2))
    encoder = build_encoder("video_vit_tiny_patch16", **args).eval()
    save_file(to_videomae_names(encoder.state_dict()), tmp_path / "w.safetensors")
    how = KnnSettings(
        target=str(tmp_path / "w.safetensors"), data="unread", image_size=(32, 32), stride=3
    )
    target = opened(how)
    assert (
        target.input.clip.stride,
        target.input.clip.tubelet,
        target.input.image_size,
        target.input.channels,
    ) == (3, 2, (32, 32), 3)
    clips = torch.randn(1, 3, target.input.clip.frames, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(target.encoder.eval()(clips), encoder(clips))


def test_shares_of_the_vote_sum_to_one_and_rank_as_the_vote_does():
    bank, query = F.normalize(torch.randn(60, 6), dim=1), 3 * torch.randn(40, 6)
    labels, truth = torch.randint(5, (60,)), torch.randint(5, (40,))
    shares = vote_shares(bank, labels, query, 5, k=7)
    torch.testing.assert_close(shares.sum(1), torch.ones(40))
    right = 100 * (shares.argmax(1) == truth).float().mean().item()
    assert right == pytest.approx(
        knn_accuracy(bank, labels, query, truth, 5, neighbours=(7,))[7]["top1"]
    )
    cosine = F.normalize(query, dim=1)[0] @ bank.T
    weight, place = (cosine / 0.07).exp().topk(7)
    wanted = torch.zeros(5).index_add_(0, labels[place], weight)
    torch.testing.assert_close(shares[0], wanted / wanted.sum(), rtol=1e-4, atol=1e-6)


def test_several_clips_of_a_video_equal_the_protocol_done_by_hand(video_folder, clips):
    results = evaluate_video(
        settings(VideoSettings, video_folder, clips, segments=2, crops=3, iterations=30, k=5)
    )
    knn, linear = results
    assert [
        json.loads((video_folder / "eval" / f"video-{name}.json").read_text())
        for name in ("knn", "linear")
    ] == [knn, linear]
    target = open_evaluated(video_folder)
    train, test = open_source(clips / "train", "video"), open_source(clips / "test", "video")
    bank = F.normalize(features_of(target, PlainClips(target.input), train)[:, 0], dim=1)
    labels, truth = torch.from_numpy(train.labels().ids), torch.from_numpy(test.labels().ids)
    views = features_of(target, TestClips(target.input, segments=2, crops=3), test)  # (6, 6, D)
    shares = torch.stack([vote_shares(bank, labels, own, 2, k=5) for own in views])
    assert knn["top1"] == pytest.approx(
        100 * (shares.mean(1).argmax(1) == truth).float().mean().item()
    )
    middle = shares[:, 1 * 3 + 1]  # the second window, the crop in its middle
    assert knn["one_view"]["top1"] == pytest.approx(
        100 * (middle.argmax(1) == truth).float().mean().item()
    )
    assert knn["settings"] == {
        "segments": 2,
        "crops": 3,
        "k": 5,
        "pooling": "mean",
        "temperature": 0.07,
    }
    assert linear["chosen"]["pooling"] in ("mean", "mean, last 4 blocks")
    assert linear["images"]["clip"] == {"frames": 4, "stride": 2, "short": "hold"}
    assert (linear["images"]["train"], linear["images"]["test_read"]) == (12, 6)


def test_baselines_are_measured_on_the_same_clips_and_shown(video_folder, run_folder, clips):
    said = []
    how = dict(
        segments=1, crops=1, iterations=20, baselines=True, image=str(run_folder), name="moves"
    )
    knn, linear = evaluate_video(settings(VideoSettings, video_folder, clips, **how), said.append)
    for result in (knn, linear):
        assert result["baselines"].keys() == {"random_init", "raw_pixels", "per_frame"}
        assert any(str(run_folder) in note for note in result["notes"])
    assert knn["baselines"]["per_frame"]["settings"]["pooling"] == "cls"
    assert (video_folder / "eval" / "moves-linear.json").is_file()
    assert any(line.startswith("baseline per_frame, video-linear") for line in said)
    page = io.StringIO()
    show_result(knn, Console(file=page, width=200))
    for words in ("per frame", "12 training and 6 test videos", "1 x 1 clips of each video"):
        assert words in page.getvalue()
    shown = read_result(0, "run", knn)
    assert shown.top1 == knn["top1"]
    assert shown.baselines.keys() == {"random_init", "raw_pixels", "per_frame"}


def test_the_protocols_of_images_take_one_clip_of_each_video(video_folder, clips, tmp_path):
    result = evaluate_knn(settings(KnnSettings, video_folder, clips, neighbours=(3,), k=3))
    target, data = open_evaluated(video_folder), open_labelled(clips, item=CLIP)
    train, test = (extract(target, part.source, workers=0) for part in (data.train, data.test))
    wanted = knn_accuracy(train.x, train.labels, test.x, test.labels, 2, neighbours=(3,))[3]
    assert {key: result[key] for key in wanted} == pytest.approx(wanted)
    assert (
        evaluate_linear(settings(LinearSettings, video_folder, clips, iterations=20))["images"][
            "clip"
        ]["stride"]
        == 2
    )
    online = knn_in_training(target, data, ReadingSettings(workers=0))
    twenty = evaluate_knn(settings(KnnSettings, video_folder, clips))
    assert online == {key: twenty[key] for key in ("top1", "top5", "top1_interval")}
    out = tmp_path / "e.parquet"
    said = []
    embed(settings(EmbedSettings, video_folder, clips / "test", out=str(out)), said.append)
    table = pq.read_table(out)
    np.testing.assert_allclose(
        np.array(table["embedding"].to_pylist()), test.x.numpy(), rtol=1e-4, atol=1e-5
    )
    assert table["label"].to_pylist() == ["left"] * 3 + ["right"] * 3
    assert "6 embeddings of 6 videos" in said[-1]


def test_a_broken_video_is_left_out_and_said(video_folder, clips, tmp_path):
    shutil.copytree(clips, tmp_path / "clips")
    for frame in (tmp_path / "clips" / "test" / "left" / "1").iterdir():
        frame.write_bytes(b"")
    said = []
    how = settings(
        VideoSettings, video_folder, tmp_path / "clips", segments=1, crops=1, iterations=5
    )
    with pytest.raises(UserError, match="1 of 6 videos"):
        evaluate_video(how)
    knn, _ = evaluate_video(how.model_copy(update={"max_bad_share": 0.5}), said.append)
    assert any("1 of 6 videos" in line and "skipped" in line for line in said)
    assert knn["images"]["test_read"] == 5
    assert knn["top1"] in [pytest.approx(20 * right) for right in range(6)]


def test_moving_photographs_bring_both_halves():
    pytest.importorskip("skimage")
    data = open_labelled("embedded:moving-photos", item=CLIP)
    assert (data.train.source.name, data.test.source.name) == tuple(
        f"embedded:moving-photos/{part}" for part in ("train", "test")
    )
    assert len(data.classes) == 8


@pytest.mark.parametrize(
    ("kind", "target", "more", "words"),
    [
        (VideoSettings, "IMAGE", {}, "image="),
        (VideoSettings, "VIDEO", {"crop_pct": 0.9}, "crop_pct=0.9"),
        (VideoSettings, "VIDEO", {"image": "VIDEO"}, "encoder of videos"),
        (KnnSettings, "IMAGE", {"stride": 2}, "stride=2"),
        (KnnSettings, "VIDEO", {"data": "IMAGES"}, "IMAGES"),
    ],
)
def test_mistakes_are_explained(video_folder, run_folder, clips, kind, target, more, words):
    folders = {"IMAGE": str(run_folder), "VIDEO": str(video_folder)}
    given = {"data": str(clips), **{key: folders.get(value, value) for key, value in more.items()}}
    run = {VideoSettings: evaluate_video, KnnSettings: evaluate_knn}[kind]
    with pytest.raises(UserError, match=words):
        run(kind(target=folders[target], workers=0, **given))


def test_another_stride_spreads_the_frames(video_folder, clips):
    wide = opened(settings(KnnSettings, video_folder, clips, stride=3))
    assert (wide.input.clip.stride, wide.input.clip.frames) == (3, 4)

"""Finds objects in images, by the files beside this one: `python load.py photo.jpg`.

It needs torch, torchvision, safetensors and Pillow.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.nn.functional import interpolate
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import FasterRCNN, faster_rcnn, mask_rcnn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.v2.functional import pil_to_tensor


class Backbone(nn.Module):
    """Images (B, C, H, W) to the maps of a pyramid: a graph of torch.export, and its weights."""

    def __init__(self, file: Path, device: str, weights: dict[str, Tensor], width: int) -> None:
        super().__init__()
        graph = move_to_device_pass(torch.export.load(file), device).module()
        self.graph = (graph, dict(sorted(weights.items())))  # it takes them by their places
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, out_channels, h, w) each."""
        graph, weights = self.graph
        return graph(weights, images)


class Detector:
    """The objects in an image: `Detector()(read("photo.jpg"))`.

    ``told`` is config.json, ``network`` a model of torchvision's for views of ``image_size``.
    """

    def __init__(self, folder: Path = Path(__file__).parent, device: str = "cpu") -> None:
        self.told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.device = device
        weights = load_file(folder / "model.safetensors", device=device)
        heads = [name for name in weights if name.startswith(("rpn.", "roi_heads."))]
        state = {name: weights.pop(name) for name in heads}
        backbone = Backbone(folder / "maps.pt2", device, weights, self.told["width"])
        self.network = network_of(self.told, backbone)
        self.network.load_state_dict(state)
        self.network.to(device).eval()

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> dict[str, Any]:
        """What is in an image (C, H, W) of bytes, the surest first.

        ``boxes`` (N, 4): left, top, right, bottom in pixels; ``names``, N of them; ``scores`` (N,);
        ``masks`` (N, H, W) of booleans where they were learned.
        """
        told, network = self.told, self.network
        (high, wide), (height, width) = image.shape[1:], told["image_size"]
        scale = min(height / high, width / wide)
        size = max(1, round(high * scale)), max(1, round(wide * scale))
        mean, std = (torch.tensor(told[name])[:, None, None] for name in ("mean", "std"))
        view = (255 * mean).round().byte().repeat(1, height, width)
        seen = interpolate(image[None], size, mode=told["interpolation"], antialias=True)[0]
        view[:, : size[0], : size[1]] = seen
        views = view.float().div(255).sub(mean).div(std)[None].to(self.device)
        maps = network.backbone(views)
        proposals, _ = network.rpn(ImageList(views, [(height, width)]), maps)
        (found,), _ = network.roi_heads(maps, proposals, [(height, width)])
        found = {name: value.cpu() for name, value in found.items()}
        boxes = found["boxes"] * torch.tensor([wide / size[1], high / size[0]] * 2)
        boxes = boxes.clamp(min=0).minimum(torch.tensor([wide, high] * 2))
        names = [told["class_names"][number - 1] for number in found["labels"]]
        objects = {"boxes": boxes, "names": names, "scores": found["scores"]}
        if "masks" in found:
            whole = paste_masks_in_image(found["masks"], boxes, (high, wide))
            objects["masks"] = whole[:, 0] >= 0.5
        return objects


def network_of(told: dict[str, Any], backbone: Backbone) -> FasterRCNN:
    """Faster or Mask R-CNN of these settings."""
    width, classes = told["width"], 1 + len(told["class_names"])
    convolutions, levels = [width] * 4, ["0", "1", "2", "3"]
    if vitdet := told["head"] == "vitdet":
        size = (width, 7, 7)
        head = faster_rcnn.FastRCNNConvFCHead(size, convolutions, [4 * width], LayerNorm2d)
    else:
        head = faster_rcnn.TwoMLPHead(49 * width, 4 * width)
    sizes = tuple((stride * told["anchor_scale"],) for stride in told["strides"])
    network = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        rpn_head=RPNHead(width, 3, conv_depth=2 if vitdet else 1),
        rpn_pre_nms_top_n_test=told["proposals"],
        rpn_post_nms_top_n_test=told["proposals"],
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2),
        box_head=head,
        box_predictor=faster_rcnn.FastRCNNPredictor(4 * width, classes),
        box_score_thresh=told["score_threshold"],
        box_nms_thresh=told["nms"],
    )
    if told["masks"]:
        norm, heads = LayerNorm2d if vitdet else None, network.roi_heads
        heads.mask_roi_pool = MultiScaleRoIAlign(levels, 14, 2)
        heads.mask_head = mask_rcnn.MaskRCNNHeads(width, convolutions, 1, norm)
        heads.mask_predictor = mask_rcnn.MaskRCNNPredictor(width, width, classes)
    return network


def read(file: str, mode: str = "RGB") -> Tensor:
    """An image as it is seen, (C, H, W) of bytes; ``mode`` is Pillow's: L is grey."""
    return pil_to_tensor(ImageOps.exif_transpose(Image.open(file)).convert(mode))


if __name__ == "__main__":
    detector = Detector()
    for file in sys.argv[1:]:
        found = detector(read(file))
        for name, score, box in zip(found["names"], found["scores"], found["boxes"], strict=True):
            print(file, name, f"{score:.4f}", *(f"{side:.2f}" for side in box))

"""The detector: torchvision's RetinaNet, with a small body from chance or ResNet-50 from COCO."""

# B pictures, C channels, H, W pixels

import functools
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet, RetinaNet_ResNet50_FPN_V2_Weights, retinanet_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetHead

from trainbook.errors import UserError
from trainbook.workflows.license_plates.config import Config

SCORE_FLOOR = 0.05  # boxes below it are not even candidates: precision at so low a score is nil
NUM_CLASSES = 1  # a sigmoid has no need of a class for the background
STAGE_CHANNELS = (32, 64, 128)  # of the small body, at 1/4, 1/8, 1/16 of the picture
# Square roots of the anchors' areas per level, and their heights over widths: plates of 12 to 90 pixels' width.
ANCHOR_SIZES = ((11, 15), (21, 29), (40, 56))
ANCHOR_RATIOS = (0.22, 0.35, 0.6)


def build_detector(config: Config, data_folder: Path) -> RetinaNet:
    """RetinaNet of one class, as the config wants it.

    Its pictures have all one size, so it scales none. Scores and offsets leave the heads in float32, and so are the losses:
    in 16 bits the focal loss overflows.

    Args:
        config: body, width, thresholds, size of the pictures.
        data_folder: where COCO's weights are kept.

    Raises:
        UserError: when COCO's weights cannot be had.
    """
    sides = sorted((config.image_width, config.image_height))
    common = {
        "min_size": sides[0], "max_size": sides[1], "score_thresh": SCORE_FLOOR, "nms_thresh": config.nms_threshold,
    }  # fmt: skip
    if config.body == "resnet50":
        model = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, **common)
        if config.coco_weights:
            model.load_state_dict(coco_weights(data_folder))
        features, anchors = model.backbone.out_channels, model.anchor_generator.num_anchors_per_location()[0]
        fresh = RetinaNetClassificationHead(features, anchors, NUM_CLASSES)
        model.head.classification_head.cls_logits = fresh.cls_logits  # the convolutions before it stay
        model.head.classification_head.num_classes = NUM_CLASSES
    else:
        levels = {f"stage{index}": str(index) for index in range(len(STAGE_CHANNELS))}
        body = BackboneWithFPN(_small_body(), levels, list(STAGE_CHANNELS), config.pyramid_width)
        body.fpn.extra_blocks = None  # three levels are enough for plates
        anchors = AnchorGenerator(ANCHOR_SIZES, (ANCHOR_RATIOS,) * len(ANCHOR_SIZES))
        # Without norms, the heads' small initial weights all but stop a signal of so few channels.
        norm = functools.partial(nn.GroupNorm, 8)
        head = RetinaNetHead(config.pyramid_width, anchors.num_anchors_per_location()[0], NUM_CLASSES, norm)
        head.regression_head._loss_type = "giou"  # as torchvision's second version, which resnet50 is
        model = RetinaNet(body, NUM_CLASSES, anchor_generator=anchors, head=head, **common)
    model.head.register_forward_hook(_in_float32)
    return model


def _in_float32(head: nn.Module, inputs: tuple[Tensor, ...], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in outputs.items()}


def _small_body() -> nn.Sequential:
    """Stem and three stages of two convolutions; group norms, so that the loss stays a mean over pictures."""
    stages = [("stem", _convolution(3, 16, stride=2))]
    before = 16
    for index, channels in enumerate(STAGE_CHANNELS):
        stages.append((f"stage{index}", nn.Sequential(_convolution(before, channels, 2), _convolution(channels, channels, 1))))
        before = channels
    return nn.Sequential(OrderedDict(stages))


def _convolution(before: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, channels, 3, stride, padding=1, bias=False), nn.GroupNorm(8, channels), nn.ReLU(inplace=True)
    )


def coco_weights(data_folder: Path) -> dict[str, Tensor]:
    """Torchvision's weights of RetinaNet on COCO, checked against the SHA-256 in their file's name; kept once fetched.

    Raises:
        UserError: when they cannot be had, or are not what was asked for.
    """
    weights = RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1
    try:
        return weights.get_state_dict(
            progress=False, check_hash=True, model_dir=str(data_folder), map_location="cpu", weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"cannot get COCO's weights of RetinaNet into {data_folder}: {error}",
            f"turn the internet on, or put {weights.url} in that folder, or set coco_weights = false or body = small",
        ) from None


@torch.no_grad()
def detect(model: nn.Module, images: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """Boxes (n, 4) and scores (n,) of every picture, best first, after non-maximum suppression; on the CPU.

    Args:
        model: a detector; left in the mode it was in.
        images: (B, 3, H, W) uint8.
        batch_size: pictures at a time.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = [one for part in images.split(batch_size) for one in model(list(part.to(device).float().div(255)))]
    model.train(was_training)
    return [{name: one[name].cpu() for name in ("boxes", "scores")} for one in found]

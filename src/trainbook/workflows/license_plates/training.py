"""Builds and trains the detector: focal loss of the anchors' scores and GIoU loss of their boxes, by the kit's stage."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainbook.data import Batches, Data
from trainbook.fitting import Stage
from trainbook.records import Record
from trainbook.runtime import Runtime
from trainbook.state import TrainState
from trainbook.workflows.license_plates.config import Config
from trainbook.workflows.license_plates.detectors import build_detector, detect
from trainbook.workflows.license_plates.scoring import score

BRIGHTNESS, CONTRAST = 0.15, 0.3  # largest change: as a share of white, and of the distance from grey


def build(config: Config, data: Data, runtime: Runtime) -> TrainState:
    """The detector on the runtime's device, and its stage."""
    model = build_detector(config, runtime.data_folder).to(runtime.device).train()
    steps = config.num_epochs * (len(data.train["images"]) // config.batch_size)
    return TrainState({"detector": model}, stateful={"fit": Stage("fit", model, config, steps)}, total_steps=steps, stage="fit")


def train(config: Config, data: Data, state: TrainState) -> Iterator[Record]:
    """Train to the end; yields once per step. The detector then has the weights that were best on the validation split."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, boxes = prepared(batch, next(model.parameters()).device)
        return detection_loss(model, *(augment(images, boxes) if config.augment else (images, boxes)), batch["num_boxes"])

    def validate(model: nn.Module) -> dict[str, float]:
        scored = score(data.valid, detect(model, data.valid["images"], config.batch_size), config.confidence_threshold)
        return {f"valid_{name}": scored.metrics[name] for name in ("ap", "ap50")}

    batches = Batches(data.train, config.seed, config.batch_size, config.batch_scaling)
    yield from state.stateful["fit"].train(state, batches, loss, validate)


def prepared(batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pictures in [0, 1], (B, 3, H, W), and boxes, (B, M, 4), on a device."""
    return batch["images"].to(device, non_blocking=True).float().div(255), batch["boxes"].to(device, non_blocking=True)


def augment(images: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror half of the pictures with their boxes, and vary brightness and contrast of each.

    Args:
        images: (B, 3, H, W), in [0, 1].
        boxes: (B, M, 4), x0, y0, x1, y1 in pixels.
    """
    mirrored, gain, offset = torch.rand(3, len(images), 1, 1, 1, device=images.device)
    mirrored = mirrored < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    x0, y0, x1, y1 = boxes.unbind(-1)
    flipped = torch.stack((images.shape[-1] - x1, y0, images.shape[-1] - x0, y1), -1)
    boxes = torch.where(mirrored[..., 0, 0].unsqueeze(-1), flipped, boxes)
    images = (images - 0.5) * (1 + CONTRAST * (2 * gain - 1)) + 0.5 + BRIGHTNESS * (2 * offset - 1)
    return images.clamp(0, 1), boxes


def detection_loss(model: nn.Module, images: Tensor, boxes: Tensor, num_boxes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over pictures of focal loss plus GIoU loss, each by the number of anchors on a plate; and the two on their own.

    Args:
        model: a detector in training mode.
        images: (B, 3, H, W), in [0, 1].
        boxes: (B, M, 4), those from num_boxes on are left out.
        num_boxes: (B,), on the CPU; 0 for a picture without plates, which only has a focal loss.

    Source: Lin et al. (2017), Focal Loss for Dense Object Detection, arXiv 1708.02002, section 3; Rezatofighi
    et al. (2019), Generalized Intersection over Union, arXiv 1902.09630.
    """
    targets = [
        {"boxes": found[:number], "labels": torch.zeros(number, dtype=torch.int64, device=found.device)}
        for found, number in zip(boxes, num_boxes.tolist(), strict=True)
    ]
    losses = model(list(images), targets)
    return sum(losses.values()), {f"{name.removeprefix('bbox_')}_loss": value for name, value in losses.items()}

"""Held-out metrics: the detector beside a finder of edges and beside finding nothing."""

import torch
from torch import Tensor

from trainbook.comparison import STANDARD_ERROR
from trainbook.data import Data
from trainbook.state import TrainState
from trainbook.workflows.license_plates.baseline import edge_blobs
from trainbook.workflows.license_plates.config import Config
from trainbook.workflows.license_plates.detectors import detect
from trainbook.workflows.license_plates.scoring import Score, score


def detections(config: Config, data: Data, state: TrainState) -> dict[str, list[dict[str, Tensor]]]:
    """What each finds in the test pictures: who to boxes and scores of every picture."""
    images = data.test["images"]
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
    return {
        "detector": detect(state.modules["detector"], images, config.batch_size),
        "edges": [edge_blobs(image) for image in images],
        "nothing": [nothing] * len(images),
    }


def scores(config: Config, data: Data, found: dict[str, list[dict[str, Tensor]]]) -> dict[str, Score]:
    """Of each on the test pictures; those without a scale of confidence report all their boxes."""
    lowest = {"detector": config.confidence_threshold}
    return {who: score(data.test, boxes, lowest.get(who, 0.0)) for who, boxes in found.items()}


def evaluate(config: Config, data: Data, state: TrainState) -> dict[str, float]:
    """Metrics of the detector, of edges and of nothing; shares of pictures with their standard errors."""
    num_pictures = int((data.test["num_boxes"] > 0).sum())
    metrics = {}
    for who, scored in scores(config, data, detections(config, data, state)).items():
        for name, value in scored.metrics.items():
            metrics[f"{who}/{name}"] = value
        share = scored.metrics["top1_at_iou70"]
        metrics[f"{who}/top1_at_iou70{STANDARD_ERROR}"] = (share * (1 - share) / num_pictures) ** 0.5
    return metrics

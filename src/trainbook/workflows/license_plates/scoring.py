"""How good boxes are, as COCO counts it: average precision by pycocotools, and what a user of the detector meets."""

# T thresholds of IoU (0.5, 0.55, ..., 0.95), R points of recall (0, 0.01, ..., 1), N pictures

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_iou

MAX_BOXES = 100  # per picture, the best ones, as COCO
TOP1_IOU = 0.7  # of CCPD's protocol


@dataclass(frozen=True)
class Match:
    """What became of a picture's boxes at IoU 0.5 and above the confidence threshold.

    Attributes:
        found: (n,) bool, of the true boxes.
        correct: (m,) bool, of the reported boxes, in the order of their scores.
    """

    found: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True)
class Score:
    """Metrics over a split.

    Attributes:
        metrics: ap, ap50, ap75, top1_at_iou70, precision, recall; all in [0, 1].
        precision: (T, R), highest precision at that recall or a higher one; 0 where it is never reached.
        matches: of every picture.
    """

    metrics: dict[str, float]
    precision: np.ndarray
    matches: list[Match]


def score(split: dict[str, Tensor], detections: Sequence[dict[str, Tensor]], confidence: float) -> Score:
    """Compare detected boxes with the true ones.

    AP is the mean over T of the mean over R of the precision; ap50 and ap75 are those of one threshold. `precision` and
    `recall` count boxes scored at least `confidence`, at IoU 0.5. `top1_at_iou70` is the share of pictures with plates whose
    best box overlaps a plate by IoU > 0.7.

    Args:
        split: with boxes (N, M, 4) and num_boxes (N,).
        detections: N times boxes (n, 4) and scores (n,), x0, y0, x1, y1 in pixels.
        confidence: in [0, 1].

    Raises:
        ValueError: when the split has no box, for then nothing can be measured.

    Source: Lin et al. (2014), Microsoft COCO, and pycocotools, its authors' code; Xu et al. (2018) for the top box.
    """
    true = [boxes[:number] for boxes, number in zip(split["boxes"], split["num_boxes"].tolist(), strict=True)]
    if not any(map(len, true)):
        raise ValueError("a split without boxes cannot be scored")
    ones = [torch.ones(len(boxes)) for boxes in true]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth, found = _coco(true, ones), _coco([d["boxes"] for d in detections], [d["scores"] for d in detections])
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MAX_BOXES]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, 0, 0, 0]
    matches = [_match(one, confidence, len(boxes)) for one, boxes in zip(evaluation.evalImgs, true, strict=True)]
    num_reported = sum(len(match.correct) for match in matches)
    num_correct = sum(int(match.correct.sum()) for match in matches)
    metrics = {
        "ap": precision.mean(),
        "ap50": precision[0].mean(),
        "ap75": precision[5].mean(),
        "top1_at_iou70": _top1(true, detections),
        "precision": num_correct / max(1, num_reported),
        "recall": num_correct / sum(map(len, true)),
    }
    return Score({name: float(value) for name, value in metrics.items()}, precision, matches)


def _coco(boxes: Sequence[Tensor], scores: Sequence[Tensor]) -> COCO:
    """Boxes as pycocotools holds them: x, y, width and height, with an area."""
    annotations = []
    for image, (found, values) in enumerate(zip(boxes, scores, strict=True)):
        for (x0, y0, x1, y1), value in zip(found.tolist(), values.tolist(), strict=True):
            box, area = [x0, y0, x1 - x0, y1 - y0], (x1 - x0) * (y1 - y0)
            number = len(annotations) + 1  # 0 would mean: not matched
            annotations.append(
                {"id": number, "image_id": image, "category_id": 1, "bbox": box, "area": area, "iscrowd": 0, "score": value}
            )
    data = COCO()
    data.dataset = {"images": [{"id": i} for i in range(len(boxes))], "categories": [{"id": 1}], "annotations": annotations}
    data.createIndex()
    return data


def _match(evaluated: dict | None, confidence: float, num_true: int) -> Match:
    if evaluated is None:  # neither a true nor a detected box
        return Match(np.zeros(num_true, bool), np.zeros(0, bool))
    kept = np.array(evaluated["dtScores"]) >= confidence
    correct = evaluated["dtMatches"][0][kept] > 0
    # A true box may have been taken by a detection that is not reported.
    by_reported = set(np.array(evaluated["dtIds"])[kept].tolist())
    found = np.zeros(num_true, bool)
    for place, match in zip(np.argsort(np.argsort(evaluated["gtIds"])), evaluated["gtMatches"][0], strict=True):
        found[place] = int(match) in by_reported
    return Match(found, correct)


def _top1(true: Sequence[Tensor], detections: Sequence[dict[str, Tensor]]) -> float:
    hits = [
        len(found["boxes"]) > 0 and float(box_iou(found["boxes"][found["scores"].argmax()][None], boxes).max()) > TOP1_IOU
        for boxes, found in zip(true, detections, strict=True)
        if len(boxes)
    ]
    return sum(hits) / len(hits)

"""The pictures that show whether the detector worked: boxes on held-out pictures, precision over recall, what is missed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from trainbook.data import Data
from trainbook.plots import new_figure
from trainbook.state import TrainState
from trainbook.workflows.license_plates.config import Config
from trainbook.workflows.license_plates.evaluation import detections, scores
from trainbook.workflows.license_plates.scoring import Match, Score

NUM_EXAMPLES, NUM_COLUMNS = 12, 4
FOUND, MISSED, FALSE, TRUE = "#20c020", "#ff3030", "#ffb000", "#20a0ff"
WIDTH_BINS = 5


def draw_data(config: Config, data: Data) -> dict[str, Figure]:
    """The first training pictures with their boxes."""
    number = min(NUM_EXAMPLES, len(data.train["images"]))
    figure, panels = _panels(data.train["images"][0], number, "training pictures and their boxes")
    for index, panel in enumerate(panels):
        _show(panel, data.train["images"][index])
        for box in data.train["boxes"][index][: data.train["num_boxes"][index]]:
            _outline(panel, box, TRUE)
    return {"data": figure}


def draw(config: Config, data: Data, state: TrainState, history: list[dict[str, Any]]) -> dict[str, Figure]:
    """Detections on held-out pictures, the worst of them, precision over recall, recall by width."""
    found = detections(config, data, state)
    scored = scores(config, data, found)
    matches = scored["detector"].matches
    wrong = [int((~match.found).sum() + (~match.correct).sum()) for match in matches]
    worst = sorted((i for i, count in enumerate(wrong) if count), key=lambda index: -wrong[index])[:NUM_EXAMPLES]
    figures = {
        "detections": draw_detections(config, data.test, found["detector"], matches, range(min(NUM_EXAMPLES, len(matches)))),
        "precision_recall": draw_precision_recall(config, scored),
        "recall_by_width": draw_recall_by_width(data.test, scored),
    }
    if worst:
        title = f"the worst: {sum(map(bool, wrong))} of {len(wrong)} held-out pictures have a missed plate or a false box"
        figures["worst"] = draw_detections(config, data.test, found["detector"], matches, worst, title)
    return figures


def draw_detections(
    config: Config,
    split: dict[str, Tensor],
    found: Sequence[dict[str, Tensor]],
    matches: Sequence[Match],
    shown: Sequence[int],
    title: str = "the first held-out pictures, none picked",
) -> Figure:
    """Reported boxes with their scores, correct ones and false ones, and the plates that were missed."""
    figure, panels = _panels(split["images"][0], len(shown), f"{title}; boxes scored at least {config.confidence_threshold:g}")
    for panel, index in zip(panels, shown, strict=True):
        _show(panel, split["images"][index])
        true = split["boxes"][index][: split["num_boxes"][index]]
        for box, is_found in zip(true, matches[index].found, strict=True):
            if not is_found:
                _outline(panel, box, MISSED, "--")
        for rank, is_correct in enumerate(matches[index].correct):
            _outline(panel, found[index]["boxes"][rank], FOUND if is_correct else FALSE)
            x, y = found[index]["boxes"][rank][:2].tolist()
            panel.annotate(
                f"{found[index]['scores'][rank]:.2f}", (max(x, 0), max(y, 0)), xytext=(0, 2), textcoords="offset points",
                fontsize=6, color="white", bbox={"facecolor": "black", "alpha": 0.6, "pad": 0.6, "linewidth": 0},
                annotation_clip=False,
            )  # fmt: skip
    kinds = ((FOUND, "-", "found"), (MISSED, "--", "missed plate"), (FALSE, "-", "false box"))
    lines = [panels[0].plot([], [], style, color=colour, label=name)[0] for colour, style, name in kinds]
    figure.legend(handles=lines, loc="outside right upper", fontsize=8)
    return figure


def draw_precision_recall(config: Config, scored: dict[str, Score]) -> Figure:
    """Precision over recall at three thresholds of IoU, and at one for the edges; the point that a user gets."""
    figure, axes = new_figure(width=8.0, height=3.6)
    panel, recall = axes[0, 0], np.linspace(0, 1, scored["detector"].precision.shape[1])
    for threshold, iou in ((0, 0.5), (5, 0.75), (8, 0.9)):
        values = scored["detector"].precision[threshold]
        panel.plot(recall, values, color=f"C{threshold // 4}", label=f"detector, IoU {iou}: area {values.mean():.3f}")
    values = scored["edges"].precision[0]
    panel.plot(recall, values, "--", color="0.5", label=f"edges, IoU 0.5: area {values.mean():.3f}")
    at = scored["detector"].metrics
    panel.plot(
        [at["recall"]], [at["precision"]], "k*", markersize=9,
        label=f"at score {config.confidence_threshold:g}: precision {at['precision']:.2f}, recall {at['recall']:.2f}",
    )  # fmt: skip
    panel.set(xlabel="recall (share of plates found)", ylabel="precision (share of boxes that are plates)", ylim=(-0.02, 1.04))
    panel.set_title("held-out pictures", fontsize=10)
    panel.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def draw_recall_by_width(split: dict[str, Tensor], scored: dict[str, Score]) -> Figure:
    """Share of plates found by their width, in bins of equally many plates."""
    boxes = np.concatenate([found[:number].numpy() for found, number in zip(split["boxes"], split["num_boxes"], strict=True)])
    widths = boxes[:, 2] - boxes[:, 0]
    bins = np.array_split(np.argsort(widths, kind="stable"), min(WIDTH_BINS, len(widths)))
    figure, axes = new_figure(width=5.6, height=3.2)
    for offset, who, colour in ((-0.2, "detector", "#7fb3e6"), (0.2, "edges", "0.8")):
        is_found = np.concatenate([match.found for match in scored[who].matches])
        values = [is_found[part].mean() for part in bins]
        axes[0, 0].bar(np.arange(len(bins)) + offset, values, 0.4, color=colour, label=who)
        for position, value in enumerate(values):
            axes[0, 0].annotate(f"{value:.2f}", (position + offset, value), ha="center", va="bottom", fontsize=7)
    names = [f"{widths[part].min():.0f} to {widths[part].max():.0f}\nn = {len(part)}" for part in bins]
    axes[0, 0].set_xticks(range(len(bins)), names, fontsize=8)
    axes[0, 0].set(xlabel="width of the plate in pixels", ylabel="share found, IoU 0.5", ylim=(0, 1.15))
    axes[0, 0].legend(fontsize=8)
    return figure


def _panels(image: Tensor, number: int, title: str) -> tuple[Figure, list[Any]]:
    num_columns = min(NUM_COLUMNS, number)
    width = 2.9
    height = width * image.shape[1] / image.shape[2]
    figure, axes = new_figure(num_columns, math.ceil(number / num_columns), width, height + 0.1)
    for panel in axes.flat:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=10)
    return figure, list(axes.flat)[:number]


def _show(panel: Any, image: Tensor) -> None:
    """With the picture's edges at 0 and its width and height, as the boxes count."""
    _, height, width = image.shape
    panel.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0), interpolation="nearest")


def _outline(panel: Any, box: Tensor, colour: str, style: str = "-") -> None:
    x0, y0, x1, y1 = box.tolist()
    panel.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], style, color=colour, linewidth=1.3)

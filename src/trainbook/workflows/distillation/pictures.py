"""The pictures that show what distillation is worth here: accuracy, retention, errors, curves, components, calibration."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from trainbook.data import Data
from trainbook.intervals import t_interval
from trainbook.plots import image_grid, new_figure
from trainbook.state import TrainState
from trainbook.workflows.distillation.arms import DIRECT, HPM_KD, KD, KD_LONG, WITHOUT, arms
from trainbook.workflows.distillation.config import Config
from trainbook.workflows.distillation.evaluation import (
    ablation_pairs,
    all_scores,
    contrasts,
    missing_logits,
    test_logits,
)
from trainbook.workflows.distillation.graph import TEACHER
from trainbook.workflows.distillation.job_table import JOBS, JobTable
from trainbook.workflows.distillation.jobs import plain_logits
from trainbook.workflows.distillation.scores import confusion, recall, reliability

MAIN = (DIRECT, KD, HPM_KD)
COLOURS = {DIRECT: "C7", KD: "C0", KD_LONG: "C9", HPM_KD: "C3", TEACHER: "black"}
FEWEST_IN_BIN = 10  # images, for a bin of calibration that is drawn
NARROWEST = 7.5  # inches: the line of provenance below a picture must fit
MOST_NUMBERED = 12  # classes of a confusion matrix that carries its counts


def draw_data(config: Config, data: Data) -> dict[str, Figure]:
    """A grid of training images, in the order of their classes."""
    labels = data.train["labels"]
    shown = labels.argsort(stable=True)[:: max(1, len(labels) // 60)][:60]
    images = data.train["images"][shown].cpu().numpy()
    figure, axes = new_figure(width=6.5, height=2.2)
    pictures = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    image_grid(axes[0, 0], pictures, 20, f"training images ({data.source.split(':')[0]})")
    return {"data": figure}


@torch.no_grad()
def draw(config: Config, data: Data, state: TrainState, history: list[dict[str, Any]]) -> dict[str, Figure]:
    """Accuracy, retention, confusion and calibration; curves; and where the run has them components, weights, a missing class."""
    table: JobTable = state.stateful[JOBS]
    figures = {"confusion": draw_confusion(data, table), "calibration": draw_calibration(data, table)}
    if config.stage != TEACHER:
        figures |= {"accuracy": draw_accuracy(data, table), "valid_accuracy": draw_curves(config, history)}
    if "teacher_1" in table.networks and config.stage != TEACHER:
        figures["retention"] = draw_retention(data, table)
    if any(ablation_pairs(config, regime) for regime in config.regimes):
        figures["components"] = draw_components(data, table)
    if any(record.get("temperature") is not None for record in history):
        figures["temperature"] = draw_temperature(config, history)
    if "gate" in table.facts:
        figures["gate"] = draw_gate(data, table)
    if config.missing_class >= 0 and config.stage == "all":
        figures["missing_class"] = draw_missing(data, table)
    return figures


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _regimes(config: Config) -> list[str]:
    return [regime for regime in config.regimes if arms(config, regime)]


def _intervals(panel: Any, rows: Sequence[tuple[str, Sequence[float]]], title: str, label: str, line: float | None) -> None:
    """One row per name: each seed's value as a dot, their mean with its 95 % t interval."""
    positions = np.arange(len(rows))[::-1]
    for position, (name, values) in zip(positions, rows, strict=True):
        mean, half = t_interval(list(values))
        colour = COLOURS.get(name, "C2" if name.startswith(WITHOUT) else "C4")
        panel.plot(values, np.full(len(values), position + 0.22), ".", color="0.65", markersize=4)
        whisker = half if np.isfinite(half) else None
        panel.errorbar(mean, position, xerr=whisker, fmt="o", color=colour, markersize=5, capsize=3)
        panel.annotate(f"{mean:.2f}", (1.01, position), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    if line is not None:
        panel.axvline(line, color="black", linestyle=":", linewidth=1)
    panel.set_yticks(positions, [_spoken(name) for name, _ in rows], fontsize=8)
    panel.set_ylim(-0.7, len(rows) - 0.2)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(label, fontsize=8)
    panel.grid(alpha=0.3, axis="x")


def _rows_figure(data: Data, table: JobTable, relative: bool) -> Figure:
    """A panel per regime: accuracy of every arm in %, or what it keeps of the teacher's."""
    config, scores = table.config, all_scores(data, table)
    regimes = [regime for regime in _regimes(config) if not regime.startswith("without_")]
    teacher = scores.get("teacher_1")
    most = max(len(arms(config, regime)) for regime in regimes)
    figure, axes = new_figure(len(regimes), width=max(5.6, NARROWEST / len(regimes)), height=1.3 + 0.3 * most)
    for panel, regime in zip(axes[0], regimes, strict=True):
        rows = []
        for arm in arms(config, regime):
            found = [100 * scores[name].accuracy for name in table.graph.students(regime, arm.name)]
            rows.append((arm.name, [value / teacher.accuracy for value in found] if relative else found))
        what = "accuracy / teacher's, %" if relative else "test accuracy, %"
        line = None if teacher is None else 100.0 if relative else 100 * teacher.accuracy
        label = f"{what} (axis does not start at 0)\ndots: seeds" + ("" if teacher is None else "; dotted line: first teacher")
        _intervals(panel, rows, f"students see {_spoken(regime)}", label, line)
    return figure


def draw_accuracy(data: Data, table: JobTable) -> Figure:
    """Accuracy of every arm, with intervals over seeds."""
    return _rows_figure(data, table, relative=False)


def draw_retention(data: Data, table: JobTable) -> Figure:
    """What every arm keeps of the first teacher's accuracy."""
    return _rows_figure(data, table, relative=True)


def draw_components(data: Data, table: JobTable) -> Figure:
    """HPM-KD less itself without each component, seed by seed."""
    config = table.config
    regimes = [regime for regime in config.regimes if ablation_pairs(config, regime)]
    figure, axes = new_figure(len(regimes), width=max(5.2, NARROWEST / len(regimes)), height=2.8)
    for panel, regime in zip(axes[0], regimes, strict=True):
        found = contrasts(data, table, regime, ablation_pairs(config, regime))
        positions = np.arange(len(found))[::-1]
        for position, contrast in zip(positions, found, strict=True):
            mean, low, high = contrast.found.mean, contrast.found.low, contrast.found.high
            ends = [[mean - low], [high - mean]] if np.isfinite(low) else None
            sure = np.isfinite(low) and (low > 0 or high < 0)
            panel.errorbar(mean, position, xerr=ends, fmt="o", color="C3" if sure else "0.4", capsize=3, markersize=5)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(positions, [_spoken(c.other.removeprefix(WITHOUT)) for c in found], fontsize=8)
        panel.set_ylim(-0.6, len(found) - 0.4)
        panel.set_title(f"what a component is worth, {_spoken(regime)}", fontsize=10)
        panel.set_xlabel("points of accuracy, with - without it (95 % interval; red: not 0)", fontsize=8)
        panel.grid(alpha=0.3, axis="x")
    return figure


def _main_names(table: JobTable, regime: str) -> dict[str, list[str]]:
    """The first teacher, and each main arm's students."""
    own = {arm.name for arm in arms(table.config, regime)}
    found = {TEACHER: ["teacher_1"]} if "teacher_1" in table.networks else {}
    return found | {name: table.graph.students(regime, name) for name in MAIN if name in own}


def draw_confusion(data: Data, table: JobTable) -> Figure:
    """Counts per true and chosen class over all seeds, coloured by their share of the true class; errors only."""
    regime = table.config.regimes[len(table.config.labels) - 1]  # the one with the fewest labels tells most
    labels, logits = data.test["labels"].cpu(), test_logits(data, table)
    groups = _main_names(table, regime)
    figure, axes = new_figure(len(groups), width=max(3.5, NARROWEST / len(groups)), height=4.1)
    matrices = {name: sum(confusion(logits[one], labels) for one in names).numpy() for name, names in groups.items()}
    shares = {name: matrix / np.maximum(matrix.sum(1, keepdims=True), 1) for name, matrix in matrices.items()}
    errors = {name: share * (1 - np.eye(len(share))) for name, share in shares.items()}
    top = max(error.max() for error in errors.values()) or 1.0
    for panel, (name, matrix) in zip(axes[0], matrices.items(), strict=True):
        picture = panel.imshow(errors[name], cmap="Reds", vmin=0, vmax=top)
        seeds = f", {len(groups[name])} seeds" if len(groups[name]) > 1 else ""
        panel.set_title(f"{_spoken(name)}: {np.trace(matrix) / matrix.sum():.2%} right{seeds}", fontsize=9)
        panel.set_xlabel("chosen class", fontsize=8)
        if len(matrix) <= MOST_NUMBERED:
            panel.set_xticks(range(len(matrix)))
            panel.set_yticks(range(len(matrix)))
            panel.tick_params(labelsize=7)
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    colour = "white" if errors[name][row, column] > 0.6 * top else "black"
                    panel.text(column, row, str(count), ha="center", va="center", fontsize=5.5, color=colour)
    axes[0, 0].set_ylabel("true class", fontsize=8)
    bar = figure.colorbar(picture, ax=axes, shrink=0.75)
    bar.set_label(f"errors, share of the true class ({_spoken(regime)})", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_calibration(data: Data, table: JobTable) -> Figure:
    """Accuracy over confidence in 15 bins, all seeds together, and how many images are in each."""
    regimes = [regime for regime in table.config.regimes if not regime.startswith("without_")]
    labels, logits = data.test["labels"].cpu(), test_logits(data, table)
    figure, axes = new_figure(len(regimes), width=max(4.2, NARROWEST / len(regimes)), height=3.2)
    for panel, regime in zip(axes[0], regimes, strict=True):
        panel.plot([0, 1], [0, 1], color="0.7", linestyle=":")
        for name, names in _main_names(table, regime).items():
            count, confidence, accuracy = reliability(torch.cat([logits[one] for one in names]), labels.repeat(len(names)))
            some = count >= FEWEST_IN_BIN
            error = float((count / count.sum() * (accuracy - confidence).abs()).nansum())
            label = f"{_spoken(name)}, ECE {error:.3f}"
            panel.plot(confidence[some], accuracy[some], "-", color=COLOURS[name], linewidth=1, label=label)
            sizes = 120 * (count[some] / count.sum()).sqrt()
            panel.scatter(confidence[some], accuracy[some], s=sizes, color=COLOURS[name], alpha=0.5)
        panel.set(title=f"calibration, {_spoken(regime)}", xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.05))
        panel.grid(alpha=0.3)
        title = f"bins of {FEWEST_IN_BIN} or more; area: share of images"
        panel.legend(fontsize=7, loc="upper left", title=title, title_fontsize=6)
    return figure


def _courses(history: list[dict[str, Any]], regime: str, arm: str, metric: str) -> np.ndarray:
    """A metric over the chunks of an arm's students, (seeds, chunks)."""
    courses: dict[str, list[float]] = {}
    for record in history:
        if record.get("job", "").rpartition("/")[0] == f"{regime}/{arm}" and metric in record:
            courses.setdefault(record["job"], []).append(record[metric])
    return np.array(list(courses.values()))


def draw_curves(config: Config, history: list[dict[str, Any]]) -> Figure:
    """Valid accuracy over the share of training that is done: mean over seeds, and from the worst seed to the best."""
    regimes = _regimes(config)
    figure, axes = new_figure(len(regimes), width=max(4.2, NARROWEST / len(regimes)), height=3.2)
    for panel, regime in zip(axes[0], regimes, strict=True):
        for arm in (arm.name for arm in arms(config, regime) if arm.name in COLOURS):
            courses = 100 * _courses(history, regime, arm, "valid_accuracy")
            share = np.arange(1, courses.shape[1] + 1) / courses.shape[1]
            panel.plot(share, courses.mean(0), ".-", color=COLOURS[arm], linewidth=1.2, markersize=4, label=_spoken(arm))
            panel.fill_between(share, courses.min(0), courses.max(0), color=COLOURS[arm], alpha=0.12, linewidth=0)
        panel.set_title(f"valid, {_spoken(regime)}", fontsize=10)
        panel.set_xlabel("share of its own training", fontsize=8)
        panel.set_ylabel("accuracy, % (axis does not start at 0)", fontsize=8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="lower right")
    return figure


def draw_temperature(config: Config, history: list[dict[str, Any]]) -> Figure:
    """Temperature of KD and HPM-KD over training, of every seed."""
    regimes = [regime for regime in _regimes(config) if not regime.startswith("without_")]
    figure, axes = new_figure(len(regimes), width=max(4.2, NARROWEST / len(regimes)), height=2.6)
    for panel, regime in zip(axes[0], regimes, strict=True):
        for arm in (arm.name for arm in arms(config, regime) if arm.name in (KD, HPM_KD)):
            for index, course in enumerate(_courses(history, regime, arm, "temperature")):
                share = np.arange(1, len(course) + 1) / len(course)
                panel.plot(share, course, ".-", color=COLOURS[arm], linewidth=1, label=None if index else _spoken(arm))
        panel.set_title(f"temperature, {_spoken(regime)}", fontsize=10)
        panel.set_xlabel("share of training", fontsize=8)
        panel.set_ylabel("T")
        panel.set_ylim(0, None)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return figure


def draw_gate(data: Data, table: JobTable) -> Figure:
    """Mean weight of each teacher by true class, on the training images as they are."""
    config, weights = table.config, plain_logits(table.facts["gate"]["weights"], table.config.augmentation).cpu()
    labels = data.train["labels"].cpu()
    classes = range(int(labels.max()) + 1)
    means = torch.stack([weights[labels == number].mean(0) for number in classes]).numpy()  # (C, M)
    figure, axes = new_figure(width=NARROWEST, height=2.8)
    base = np.zeros(len(means))
    for index in range(means.shape[1]):
        accuracy = table.results[f"teacher_{index + 1}"]["valid_accuracy"]
        label = f"teacher {index + 1}: {means[:, index].mean():.2f} (valid {accuracy:.1%})"
        axes[0, 0].bar(list(classes), means[:, index], bottom=base, label=label, width=0.8)
        base += means[:, index]
    axes[0, 0].set(title=f"weights of the teachers: {table.facts['gate']['rule']}", xlabel="class", ylabel="mean weight")
    axes[0, 0].set_xticks(list(classes) if len(means) <= MOST_NUMBERED else [])
    axes[0, 0].legend(fontsize=7, loc="lower left", bbox_to_anchor=(1.0, 0.0), title=f"gate = {config.gate}", title_fontsize=7)
    return figure


def draw_missing(data: Data, table: JobTable) -> Figure:
    """Recall of the class that no student ever saw, before and after its bias is set on valid, of every seed."""
    config, labels = table.config, data.test["labels"].cpu()
    figure, axes = new_figure(2, width=4.4, height=2.8)
    names, recalls, accuracies = [], [], []
    for arm in (DIRECT, KD):
        both = [missing_logits(data, table, arm, seed) for seed in config.student_seeds]
        for place, suffix in enumerate(("", ", bias set on valid")):
            names.append(_spoken(arm) + suffix)
            recalls.append([100 * recall(pair[place], labels, config.missing_class) for pair in both])
            accuracies.append([100 * float((pair[place].argmax(1) == labels).double().mean()) for pair in both])
    panels = ((recalls, f"recall of the {config.missing_class}, never seen, %"), (accuracies, "accuracy on all classes, %"))
    positions = np.arange(len(names))[::-1]
    for panel, (values, title) in zip(axes[0], panels, strict=True):
        panel.barh(positions, [np.mean(each) for each in values], color=["0.8", "0.8", "#7fb3e6", "#7fb3e6"])
        for position, each in zip(positions, values, strict=True):
            panel.plot(each, np.full(len(each), position), ".", color="black", markersize=4)
            panel.annotate(f"{np.mean(each):.1f}", (1.01, position), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        panel.set_yticks(positions, names if panel is axes[0, 0] else [], fontsize=8)
        panel.set_xlim(0, 100)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("dots: seeds", fontsize=8)
    return figure

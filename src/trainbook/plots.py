"""Pictures: curves, image grids, heatmaps, bars. The only user of matplotlib; figures never touch pyplot's global state."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from torch import Tensor

from trainbook.comparison import STANDARD_ERROR, STANDARD_ERRORS

DOTS_PER_INCH = 100
MAX_CURVES = 12
BARS_PER_ROW = 3  # panels
VALID = "valid_"  # begins the name of what was measured on the validation split
POINTS_BESIDE = 4  # between two lines with intervals at the same place
MAX_LAYERS, MAX_HEADS, MAX_TOKENS = 6, 8, 20  # in a picture of attention; tokens along an axis that carry their text


def new_figure(num_columns: int = 1, num_rows: int = 1, width: float = 4.2, height: float = 3.0) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of axes.

    Args:
        num_columns, num_rows: size of the grid.
        width, height: of one panel, in inches.

    Returns:
        The figure and its axes, (num_rows, num_columns).
    """
    figure = Figure(figsize=(width * num_columns, height * num_rows), layout="constrained", dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def to_png(figure: Figure, footnote: str = "", description: str = "") -> bytes:
    """The figure as PNG, with a small line of provenance below it, and all of it in the file's own text."""
    if footnote:
        figure.supxlabel(footnote, fontsize=7, color="0.45", wrap=True)
    buffer = io.BytesIO()
    # Without matplotlib's own metadata the same figure gives the same bytes, so a checksum can be verified.
    metadata = {"Software": None} | ({"Description": description} if description else {})
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata=metadata)
    return buffer.getvalue()


def image_grid(axes: Axes, images: np.ndarray, num_columns: int, title: str = "", row_labels: Sequence[str] = ()) -> None:
    """Draw images side by side with one pixel of white between them.

    Args:
        axes: where.
        images: (N, H, W) or (N, H, W, C), values in [0, 1]; row by row.
        num_columns: images per row.
        title: above the grid.
        row_labels: one per row, at the left.
    """
    images = np.asarray(images, dtype=float).clip(0, 1)
    if images.ndim == 3:
        images = images[..., None].repeat(3, axis=-1)
    num_rows = math.ceil(len(images) / num_columns)
    height, width = images.shape[1:3]
    canvas = np.ones((num_rows * (height + 1) - 1, num_columns * (width + 1) - 1, 3))
    for index, image in enumerate(images):
        row, column = divmod(index, num_columns)
        canvas[row * (height + 1) :, column * (width + 1) :][:height, :width] = image
    axes.imshow(canvas, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([row * (height + 1) + (height - 1) / 2 for row in range(len(row_labels))], row_labels, fontsize=8)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def heatmap(
    axes: Axes,
    values: np.ndarray,
    title: str,
    x_label: str,
    y_label: str,
    unit: str,
    extent: Sequence[float] | None = None,
) -> None:
    """Draw a matrix with a colour bar; row 0 at the bottom.

    Args:
        axes: where.
        values: (rows, columns).
        title, x_label, y_label: texts.
        unit: of the values, beside the colour bar.
        extent: left, right, bottom, top in data units.
    """
    picture = axes.imshow(np.asarray(values), aspect="auto", origin="lower", interpolation="nearest", extent=extent)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.figure.colorbar(picture, ax=axes, label=unit)


def baseline_bars(metrics: dict[str, float], names: Sequence[str]) -> Figure:
    """One panel per metric: a bar for everybody who has it, with its 95 % interval where that was measured.

    Args:
        metrics: "<who>/<metric>" to number; "<who>/<metric>_standard_error" gives the interval.
        names: the metrics to show.
    """
    num_columns = min(BARS_PER_ROW, len(names))
    figure, axes = new_figure(num_columns, math.ceil(len(names) / num_columns), width=4.6, height=2.6)
    for panel in list(axes.flat)[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(axes.flat, names, strict=False):
        who = [key.rpartition("/")[0] for key in metrics if key.rpartition("/")[2] == name]
        values = [metrics[f"{one}/{name}"] for one in who]
        errors = [STANDARD_ERRORS * metrics.get(f"{one}/{name}{STANDARD_ERROR}", 0.0) for one in who]
        positions = np.arange(len(who))[::-1]
        panel.barh(
            positions, values, xerr=errors if any(errors) else None, color=["#7fb3e6"] + ["0.8"] * (len(who) - 1), capsize=3
        )
        for position, value in zip(positions, values, strict=True):
            panel.annotate(f"{value:.3g}", (0, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        panel.set_yticks(positions, [one.replace("_", " ") for one in who])
        panel.set_title(name.replace("_", " "), fontsize=10)
    return figure


def interval_lines(
    axes: Axes,
    lines: Mapping[str, Sequence[tuple[float | str, float, float | None, float | None]]],
    colours: Mapping[str, str],
) -> None:
    """Draw one line per name through values with their intervals, side by side where they would cover each other.

    The x axis is logarithmic where numbers spread evenly on that, and has categories, as they come, where not all are numbers.

    Args:
        axes: where.
        lines: name to points: place on the x axis, value, low and high end of its interval (None: no interval).
        colours: by the same names.
    """
    places = list(dict.fromkeys(point[0] for line in lines.values() for point in line))
    numbers = not any(isinstance(place, str) for place in places)
    places = sorted(places) if numbers else places
    positions = {place: place if numbers else index for index, place in enumerate(places)}
    for index, (name, line) in enumerate(lines.items()):
        points = sorted((positions[place], value, low, high) for place, value, low, high in line)
        x, values, lows, highs = zip(*points, strict=True)
        ends = [
            [math.nan if end is None else abs(end - v) for end, v in zip(side, values, strict=True)] for side in (lows, highs)
        ]
        label = name.replace("_", " ") or "run"
        bars = axes.errorbar(x, values, ends, fmt=".-", color=colours[name], markersize=5, capsize=2, linewidth=1, label=label)
        aside = ScaledTranslation(POINTS_BESIDE * (index - (len(lines) - 1) / 2) / 72, 0, axes.figure.dpi_scale_trans)
        for part in bars.get_children():  # moved when the axes have their limits already, which do not count such moves
            part.set_transform(axes.transData + aside)
    if numbers and _even_on_a_logarithmic_axis(places):
        axes.set_xscale("log")
    axes.set_xticks(list(positions.values()), [str(place) for place in places], fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, framealpha=0.6)


def _even_on_a_logarithmic_axis(values: Sequence[float]) -> bool:
    """Whether gaps between sorted values are more alike by ratio than by difference."""
    if values[0] <= 0 or len(values) < 2:
        return False
    gaps, ratios = np.diff(values), np.diff(np.log(values))
    return values[-1] / values[0] >= 10 or np.std(ratios) / np.mean(ratios) < np.std(gaps) / np.mean(gaps)


def schedules(rates: dict[str, tuple[Sequence[int], Sequence[float]]]) -> Figure:
    """The learning rate of each stage before it is trained: name to steps and rates."""
    figure, axes = new_figure(len(rates), width=4.2, height=2.2)
    for panel, (name, (steps, values)) in zip(axes[0], rates.items(), strict=True):
        panel.plot(steps, values, linewidth=1.2)
        panel.set(title=f"{name.replace('_', ' ')}: learning rate", xlabel="step of the stage", ylim=(0, None))
        panel.grid(alpha=0.3)
    return figure


def phase_times(seconds: Mapping[str, float]) -> Figure:
    """How long each phase of a run took: name to seconds."""
    figure, axes = new_figure(width=6.0, height=0.9 + 0.32 * len(seconds))
    positions = np.arange(len(seconds))[::-1]
    axes[0, 0].barh(positions, list(seconds.values()), color="#7fb3e6")
    for position, value in zip(positions, seconds.values(), strict=True):
        text = f"{value:.1f} s, {value / max(sum(seconds.values()), 1e-9):.0%}"
        axes[0, 0].annotate(text, (0, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes[0, 0].set_yticks(positions, [name.replace("_", " ") for name in seconds])
    axes[0, 0].set(title="time per phase", xlabel="seconds")
    return figure


def record_curves(history: list[dict[str, Any]]) -> Figure:
    """One panel for each real number that the records hold, over steps, with stages told apart by colour.

    Stages that take turns are not joined by lines. What was measured on the validation split (`valid_loss`) is drawn over
    the same of the training batches (`loss`). What was recorded once makes no curve: it is written in a panel of its own.
    """
    panels = _curve_panels(history)
    points = {
        title: [p for by_stage in curves.values() for one in by_stage.values() for p in one] for title, curves in panels.items()
    }
    once = {title: found[0] for title, found in points.items() if len(found) == 1} if len(history) > 1 else {}
    shown = [(title, curves) for title, curves in panels.items() if title not in once][: MAX_CURVES - bool(once)]
    num_panels = max(1, len(shown) + bool(once))
    num_columns = min(3, num_panels)
    figure, axes = new_figure(num_columns, math.ceil(num_panels / num_columns))
    stages = list(dict.fromkeys(record["stage"] for record in history))
    for panel, (title, curves) in zip(axes.flat, shown, strict=False):
        _draw_curves(panel, title, curves, stages)
    for panel in list(axes.flat)[len(shown) :]:
        panel.set_axis_off()
    if once:
        panel = axes.flat[len(shown)]
        panel.set_title("recorded once", fontsize=10)
        lines = [
            f"{title.replace('_', ' ')}  {value:.4g}  at step {step}" for title, (step, value) in list(once.items())[:MAX_CURVES]
        ]
        panel.text(0.0, 0.95, "\n".join(lines), fontsize=8, va="top", linespacing=1.6, transform=panel.transAxes)
    return figure


def curves_side_by_side(histories: Mapping[str, list[dict[str, Any]]]) -> Figure | None:
    """One column per run and one row per real number that all their records together hold; a row has one scale.

    Args:
        histories: name of the run to its records.

    Returns:
        None where no record has one.
    """
    panels = {name: _curve_panels(history) for name, history in histories.items()}
    titles = list(dict.fromkeys(title for one in panels.values() for title in one))[:MAX_CURVES]
    if not titles:
        return None
    figure, axes = new_figure(len(histories), len(titles), height=2.4)
    stages = list(dict.fromkeys(record["stage"] for history in histories.values() for record in history))
    for index, title in enumerate(titles):
        for panel, (name, one) in zip(axes[index], panels.items(), strict=True):
            if title in one:
                _draw_curves(panel, title, one[title], stages)
                if panel is not axes[index, 0]:
                    panel.sharey(axes[index, 0])
            else:
                panel.set_axis_off()
            if index == 0:
                panel.set_title(textwrap.fill(name, 36) + f"\n{title.replace('_', ' ')}", fontsize=9)
    return figure


def _curve_panels(history: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[tuple[int, float]]]]]:
    """Title to name of a number to stage to points."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    turn, last_turn = 0, {}  # a stage that others interrupted goes on in a line of its own
    for before, record in zip([None, *history], history, strict=False):
        turn += before is not None and before["stage"] != record["stage"]
        for name, value in record.items():
            if name not in ("step", "stage") and isinstance(value, float):
                points = series.setdefault(name, {}).setdefault(record["stage"], [])
                if last_turn.setdefault((name, record["stage"]), turn) != turn:
                    points.append((record["step"], math.nan))
                    last_turn[name, record["stage"]] = turn
                points.append((record["step"], value))
    panels: dict[str, dict[str, dict[str, list[tuple[int, float]]]]] = {}
    for name, by_stage in series.items():
        of_training = name.removeprefix(VALID)
        panels.setdefault(of_training if of_training in series else name, {})[name] = by_stage
    return panels


def _draw_curves(panel: Axes, title: str, curves: dict[str, dict[str, list[tuple[int, float]]]], stages: Sequence[str]) -> None:
    for name, by_stage in curves.items():
        for stage, points in by_stage.items():
            is_validation = name != title
            panel.plot(
                *np.array(points).T,
                ".-" if len(points) < 40 else "-",
                color="black" if is_validation else f"C{stages.index(stage)}",
                label=f"{stage}, validation" if is_validation else stage,
                linewidth=1,
                markersize=3,
            )
    panel.set(title=title.replace("_", " "), xlabel="step")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)


def draw_attention(weights: Mapping[str, Tensor], tokens: Sequence[str] | None = None, example: int = 0) -> Figure:
    """Attention weights of one example: a row of panels per operation, a panel per head, one colour scale for all.

    At most `MAX_LAYERS` operations and `MAX_HEADS` heads are drawn, the first ones; the title says so when there are more.

    Args:
        weights: name to (B, H, Q, K), as from `attention.attention_weights`.
        tokens: texts along each axis of their number, Q or K; every nth where they would not fit.
        example: which of the batch.

    Raises:
        ValueError: when there is nothing to draw, or no axis is as long as `tokens`.
    """
    if not weights:
        raise ValueError("no attention weights to draw")
    values = {name: operation[example].float().cpu().numpy() for name, operation in weights.items()}
    lengths = {length for value in values.values() for length in value.shape[1:]}
    if tokens is not None and len(tokens) not in lengths:
        raise ValueError(f"{len(tokens)} tokens, but the axes have the lengths {sorted(lengths)}")
    shown = [(name, value[:MAX_HEADS]) for name, value in list(values.items())[:MAX_LAYERS]]
    top = max(np.nanmax(value, initial=0) for _, value in shown)
    num_columns, num_heads = max(len(value) for _, value in shown), max(len(value) for value in values.values())
    figure, axes = new_figure(num_columns, len(shown), width=2.5, height=2.5)
    for index, (name, value) in enumerate(shown):
        is_last = index + 1 == len(shown) or shown[index + 1][1].shape != value.shape
        for head, (panel, matrix) in enumerate(zip(axes[index], value, strict=False)):
            picture = panel.imshow(matrix, aspect="auto", vmin=0, vmax=top)
            panel.set_title(f"head {head}" if head else f"{name}\nhead 0", fontsize=8, loc="left")
            panel.set(xticks=[], yticks=[])
            if head == 0:
                _name_axis(panel.yaxis, "query", matrix.shape[0], tokens)
            if is_last:
                _name_axis(panel.xaxis, "key", matrix.shape[1], tokens)
                panel.tick_params(axis="x", rotation=90)
        for panel in axes[index, len(value) :]:
            panel.set_axis_off()
    figure.colorbar(picture, ax=axes, label="attention weight", aspect=20 * len(shown), fraction=0.15 / num_columns)
    if len(values) > MAX_LAYERS or num_heads > MAX_HEADS:
        figure.suptitle(f"the first {len(shown)} of {len(values)} operations, {num_columns} of {num_heads} heads", fontsize=10)
    return figure


def _name_axis(axis: Axis, name: str, length: int, tokens: Sequence[str] | None) -> None:
    texts = tokens if tokens is not None and len(tokens) == length else [str(position) for position in range(length)]
    step = math.ceil(length / MAX_TOKENS)
    axis.set_ticks(range(0, length, step), texts[::step], fontsize=6, parse_math=False)  # a token may be a "$"
    axis.set_label_text(name, fontsize=8)

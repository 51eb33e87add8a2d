"""The cube's pictures, each from arrays: what runs through it, what it looks at, and what comes out."""

# T steps, L side, N sentences, D numbers of a vector, S experts

import itertools
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainbook.plots import heatmap, new_figure
from trainbook.workflows.cellular_cube.similarity import cosine_matrix

EXPERTS = ("local", "functional", "distant")
COLOURS = ("#7fb3e6", "#f2b661", "#8cc98c")
MAX_SHOWN = 9  # steps and planes of the picture of planes
MAX_MATRIX = 150  # sentences of a similarity matrix
LAST_DRAWN = 0x2190  # beyond it DejaVu Sans has gaps
CHARACTERS_PER_LINE, LINE_INCHES = 31, 0.155


def _spaced(number: int, most: int) -> list[int]:
    return sorted({round(index) for index in np.linspace(0, number - 1, min(number, most))})


def draw_planes(energies: Tensor, title: str = "state of each cell, root mean square over channels") -> Figure:
    """The cube's planes, front at the left, after each step, first at the top; one colour scale.

    Args:
        energies: (T + 1, L, L, L), step, plane, row, column.
        title: says what the numbers are.
    """
    values = energies.detach().cpu().float().numpy()
    steps, planes = _spaced(len(values), MAX_SHOWN), _spaced(values.shape[1], MAX_SHOWN)
    side, cell = values.shape[-1], values.shape[-1] + max(1, values.shape[-1] // 10)
    canvas = np.full((len(steps) * cell, len(planes) * cell), np.nan)  # one picture: a panel each would take seconds to lay out
    for row, step in enumerate(steps):
        for column, plane in enumerate(planes):
            canvas[row * cell :, column * cell :][:side, :side] = values[step, plane]
    figure, axes = new_figure(width=max(6.5, 0.85 * len(planes) + 1.2), height=0.85 * len(steps) + 0.8)
    panel = axes[0, 0]
    top = float(np.quantile(values, 0.995)) or 1.0
    picture = panel.imshow(canvas, vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
    middle = (side - 1) / 2
    ends = {0: "\n(front)", values.shape[1] - 1: "\n(back)"}
    names = [f"plane {plane}{ends.get(plane, '')}" for plane in planes]
    panel.xaxis.tick_top()
    panel.set_xticks([column * cell + middle for column in range(len(planes))], names, fontsize=8)
    panel.set_yticks([row * cell + middle for row in range(len(steps))], [f"step {step}" for step in steps], fontsize=8)
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)
    figure.colorbar(picture, ax=axes, label="standard units", fraction=0.03, aspect=30)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_gate(weights: Tensor) -> Figure:
    """Which expert the cells listen to: by depth after the first, middle and last step, and over steps by expert.

    Args:
        weights: (T, L, S), mean weight over sentences and cells of a plane.
    """
    values = weights.detach().cpu().float().numpy()
    num_steps, side, _ = values.shape
    shown = sorted({0, num_steps // 2, num_steps - 1})
    figure, axes = new_figure(len(shown) + 1, width=3.0, height=2.7)
    for panel, step in zip(axes[0], shown, strict=False):
        bottom = np.zeros(side)
        for expert, colour, share in zip(EXPERTS, COLOURS, values[step].T, strict=True):
            panel.bar(np.arange(side), share, bottom=bottom, color=colour, width=0.9, label=expert)
            bottom += share
        panel.set(title=f"step {step + 1}", xlabel="plane, 0 is the front", ylim=(0, 1))
        panel.set_xticks(_spaced(side, 8))
    axes[0, 0].set_ylabel("mean gate weight")
    axes[0, 0].legend(fontsize=7, loc="lower left", framealpha=0.9)
    for expert, colour, line in zip(EXPERTS, COLOURS, values.mean(1).T, strict=True):
        axes[0, -1].plot(np.arange(1, num_steps + 1), line, ".-", color=colour, label=expert)
    axes[0, -1].axhline(1 / len(EXPERTS), color="0.6", linewidth=0.8, linestyle=":")
    axes[0, -1].set(title="all planes", xlabel="step", ylim=(0, 1))
    axes[0, -1].legend(fontsize=7)
    axes[0, -1].grid(alpha=0.3)
    return figure


def draw_flow(sensitivity: Tensor, lesions: Tensor | None, path: Tensor) -> Figure:
    """Where the signal is: sensitivity of the output to each plane, cost of a lesion there, and the most sensitive cells.

    Args:
        sensitivity: (T + 1, L, L, L), `flow.cell_sensitivity` times the state's mean square: of a change in proportion to it.
        lesions: (T, L), from `flow.lesion_curve`; None leaves it out.
        path: (L, 3), from `flow.saliency_path`.
    """
    by_plane = sensitivity.sum((2, 3)).cpu().float().numpy()
    figure, axes = new_figure(3, width=4.2, height=3.2)
    logarithm = np.log10(np.maximum(by_plane, by_plane.max() * 1e-6))
    heatmap(
        axes[0, 0],
        logarithm,
        "sensitivity of the output",
        "plane, 0 is the front",
        "step",
        "log10 |d output / d state|² |state|²",
    )
    if lesions is None:
        axes[0, 1].set_axis_off()
    else:
        values = lesions.cpu().float().numpy()
        heatmap(axes[0, 1], values, "lesion: plane set to zero", "plane, 0 is the front", "after step", "added FVU")
    for panel in axes[0, : 1 if lesions is None else 2]:
        panel.set_xticks(_spaced(by_plane.shape[1], 10))
        panel.set_yticks(_spaced(len(by_plane) - (panel is axes[0, 1]), 10))
    _, rows, columns = path.cpu().numpy().T
    side = sensitivity.shape[-1]
    place = axes[0, 2].scatter(columns, rows, c=np.arange(len(path)), cmap="viridis", s=60, zorder=3)
    axes[0, 2].plot(columns, rows, color="0.6", linewidth=1)
    same: dict[tuple[int, int], list[int]] = {}
    for plane, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        same.setdefault((row, column), []).append(plane)
    for (row, column), planes in same.items():
        axes[0, 2].annotate(
            ",".join(map(str, planes)), (column, row), xytext=(5, 5), textcoords="offset points", fontsize=7
        )  # fmt: skip
    axes[0, 2].set(title="most sensitive cell of each plane", xlabel="column", ylabel="row")
    axes[0, 2].set(xlim=(-0.7, side - 0.3), ylim=(side - 0.3, -0.7))
    axes[0, 2].grid(alpha=0.3)
    figure.colorbar(place, ax=axes[0, 2], label="plane")
    return figure


def draw_similarity(vectors: Mapping[str, Tensor], labels: Tensor, label_names: Sequence[str]) -> Figure:
    """Cosine of each pair of sentences, sorted by label, as each one sees it; one colour scale.

    Args:
        vectors: who to (N, D), the same sentences; at most `MAX_MATRIX` are shown.
        labels: (N,) int64.
        label_names: what they mean; written where there are few.
    """
    order = torch.argsort(labels.cpu()[:MAX_MATRIX], stable=True)
    sorted_labels = labels.cpu()[:MAX_MATRIX][order]
    borders = torch.nonzero(sorted_labels.diff()).flatten() + 0.5
    ends = [-0.5, *borders.tolist(), len(order) - 0.5]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(ends)]
    names = [label_names[label] for label in sorted_labels.unique_consecutive().tolist()]
    figure, axes = new_figure(len(vectors), width=3.4, height=3.4)
    for panel, (who, values) in zip(axes[0], vectors.items(), strict=True):
        matrix = cosine_matrix(values.cpu()[:MAX_MATRIX][order]).numpy()
        picture = panel.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        panel.set_title(who.replace("_", " "), fontsize=10)
        panel.set(xticks=[], yticks=[], xlabel="sentence")
        if len(names) <= 12:
            for border in borders.tolist():
                panel.axhline(border, color="0.3", linewidth=0.4)
                panel.axvline(border, color="0.3", linewidth=0.4)
    if len(names) <= 12:
        axes[0, 0].set_yticks(middles, names, fontsize=8)
    else:
        axes[0, 0].set_ylabel(f"sentence, sorted by {len(names)} labels")
    figure.colorbar(picture, ax=axes, label="cosine of centred vectors", fraction=0.02)
    return figure


def draw_spectrum(vectors: Mapping[str, Tensor], code_size: int) -> Figure:
    """Variance along each one's own principal directions; a collapse shows as a steep fall.

    Args:
        vectors: who to (N, D) in standard units.
        code_size: K, drawn as a line.
    """
    figure, axes = new_figure(width=6.0, height=3.2)
    panel = axes[0, 0]
    for who, values in vectors.items():
        centred = values.cpu().double() - values.cpu().double().mean(0)
        variances = (torch.linalg.svdvals(centred).square() / len(centred)).numpy()
        variances = variances[variances > 1e-9]
        panel.plot(np.arange(1, len(variances) + 1), variances, linewidth=1.3, label=who.replace("_", " "))
    panel.axvline(code_size, color="0.5", linestyle=":", label=f"numbers of the code: {code_size}")
    panel.set(yscale="log", xlabel="principal direction, by falling variance", ylabel="variance, standard units")
    panel.set_ylim(bottom=1e-4)
    panel.set_title("spectrum of held-out vectors", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure


def draw_table(rows: Sequence[Sequence[str]], headers: Sequence[str], title: str) -> Figure:
    """A table as a picture, with text wrapped in its cells.

    Args:
        rows: texts, as many per row as headers.
        headers: of the columns.
        title: above.
    """
    wrapped = [[textwrap.fill(_drawable(cell), CHARACTERS_PER_LINE) or " " for cell in row] for row in rows]
    lines = [max(cell.count("\n") + 1 for cell in row) for row in wrapped]
    height = LINE_INCHES * (sum(lines) + 0.9 * len(rows) + 4)
    figure, axes = new_figure(width=2.5 * len(headers), height=height)
    panel = axes[0, 0]
    panel.set_axis_off()
    panel.set(xlim=(0, len(headers)), ylim=(height, 0))
    panel.set_title(title, fontsize=10, loc="left")
    top = LINE_INCHES
    for column, header in enumerate(headers):
        panel.text(column + 0.02, top, header, fontsize=9, weight="bold", va="center", parse_math=False)
    top += LINE_INCHES * 1.2
    for row, count in zip(wrapped, lines, strict=True):
        panel.axhline(top, color="0.8", linewidth=0.6)
        for column, cell in enumerate(row):
            panel.text(column + 0.02, top + 0.4 * LINE_INCHES, cell, fontsize=8, va="top", parse_math=False)
        top += LINE_INCHES * (count + 0.9)
    return figure


def _drawable(text: str) -> str:
    """Text with a box for each character that the pictures' font lacks, such as the control bytes of an untrained decoder."""
    return "".join(c if c.isprintable() and ord(c) < LAST_DRAWN else "\u25a1" for c in text)


def draw_examples(decoded: Mapping[str, Sequence[str]], sources: Sequence[str], number: int, title: str) -> Figure:
    """What each one's vectors are decoded to, beside the source.

    Args:
        decoded: who to N sentences.
        sources: N.
        number: of rows.
        title: says how they were decoded.
    """
    headers = ["source", *(who.replace("_", " ") for who in decoded)]
    rows = [[sources[row], *(texts[row] for texts in decoded.values())] for row in range(min(number, len(sources)))]
    return draw_table(rows, headers, title)


def draw_corpus(sentences: Sequence[str], labels: Tensor, label_names: Sequence[str], variances: Tensor) -> Figure:
    """What there is to learn: sentence lengths, how many of each label, and the teacher's spectrum.

    Args:
        sentences: N, of training.
        labels: (N,).
        label_names: what they mean.
        variances: (D,), along the principal components of the training vectors, standard units.
    """
    figure, axes = new_figure(3, width=4.2, height=3.0)
    lengths = [len(sentence.split()) for sentence in sentences]
    axes[0, 0].hist(lengths, bins=np.arange(0, min(max(lengths), 60) + 2) - 0.5, color="#7fb3e6")
    axes[0, 0].set(title="length of training sentences", xlabel="words", ylabel="sentences")
    counts = torch.bincount(labels.cpu(), minlength=len(label_names)).numpy()
    order = np.argsort(-counts)[:12]
    axes[0, 1].barh(np.arange(len(order))[::-1], counts[order], color="#7fb3e6")
    axes[0, 1].set_yticks(np.arange(len(order))[::-1], [label_names[index] for index in order], fontsize=8)
    more = f", the largest {len(order)} of {len(label_names)}" if len(label_names) > len(order) else ""
    axes[0, 1].set(title=f"labels{more}", xlabel="sentences")
    explained = 1 - np.cumsum(variances.cpu().numpy()) / float(variances.sum())
    axes[0, 2].plot(np.arange(1, len(explained) + 1), explained)
    axes[0, 2].set(title="PCA: variance left unexplained", xlabel="numbers of the code", ylabel="FVU, training", ylim=(0, 1))
    axes[0, 2].grid(alpha=0.3)
    return figure

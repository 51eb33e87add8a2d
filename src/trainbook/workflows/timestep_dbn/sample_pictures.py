"""Samples of every model beside the training images nearest to them: new, or remembered."""

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from trainbook.plots import image_grid, new_figure
from trainbook.workflows.timestep_dbn.two_samples import nearest

PER_ROW = 10
HELD_OUT = "held_out"


def draw_neighbours(sets: dict[str, Tensor], train: Tensor, to_pictures: Callable[[Tensor], np.ndarray]) -> Figure:
    """The first ten of each set, none picked, each above its nearest training code with the share of bits that differ.

    Args:
        sets: name to codes, (N, V).
        train: (K, V).
        to_pictures: codes to images, as `plots.image_grid` takes them.
    """
    num_columns = 2
    num_rows = -(-len(sets) // num_columns)
    figure, axes = new_figure(num_columns, num_rows, width=5.0, height=1.55)
    for panel, (name, bits) in zip(axes.flat, sets.items(), strict=False):
        shown = bits[:PER_ROW]
        distances, indices = nearest(shown, train)
        pictures = np.concatenate([to_pictures(shown), to_pictures(train[indices])])
        image_grid(panel, pictures, len(shown), name.replace("_", " "), ["code", "nearest in training"])
        centres = (np.arange(len(shown)) + 0.5) * (pictures.shape[2] + 1) - 1
        panel.set_xticks(centres, [f"{d:.0%}" for d in distances / bits.shape[1]], fontsize=7)
    for panel in list(axes.flat)[len(sets) :]:
        panel.set_axis_off()
    figure.suptitle("samples and their nearest training codes; below: share of bits that differ", fontsize=10)
    return figure


def draw_distances(sets: dict[str, Tensor], train: Tensor) -> Figure:
    """How the distance to the nearest training code is distributed; left of the held-out codes' curve lies what is remembered.

    Args:
        sets: name to codes, (N, V), with "held_out" among them.
        train: (K, V).
    """
    figure, axes = new_figure(width=6.4, height=3.6)
    for index, (name, bits) in enumerate(sets.items()):
        distances = np.sort(nearest(bits, train)[0].cpu().numpy()) / bits.shape[1]
        held_out = name == HELD_OUT
        axes[0, 0].step(
            distances,
            np.arange(1, len(distances) + 1) / len(distances),
            where="post",
            color="black" if held_out else f"C{index}",
            linewidth=2 if held_out or name == "chain" else 1,
            label=name.replace("_", " "),
        )
    axes[0, 0].set(
        title="distance to the nearest training code", xlabel="share of bits that differ", ylabel="share of codes", ylim=(0, 1)
    )
    axes[0, 0].legend(fontsize=8)
    axes[0, 0].grid(alpha=0.3)
    return figure

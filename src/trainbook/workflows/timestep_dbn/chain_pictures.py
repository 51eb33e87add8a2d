"""What the chains' own measurements look like: code length step by step, and how fast their Gibbs chains forget."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainbook.plots import heatmap, new_figure
from trainbook.records import EVALUATION

MEASURED, FIRST = "autocorrelation_by_timestep_level_statistic_and_lag", "autocorrelation_first_timestep"
TERM, OTHER = "/step_nats_per_bit@", "/step_nats_per_bit_other_direction@"


def draw_measured(history: list[dict[str, Any]]) -> dict[str, Figure]:
    """The pictures that the records allow, by name."""
    figures = {}
    if measured := [record for record in history if record["stage"] == EVALUATION]:
        figures["likelihood"] = draw_likelihood(measured[-1])
    for stage in dict.fromkeys(record["stage"] for record in history if MEASURED in record):
        figures[f"autocorrelation_{stage}"] = draw_autocorrelation([r for r in history if r["stage"] == stage and MEASURED in r])
    return figures


def draw_likelihood(metrics: dict[str, Any]) -> Figure:
    """Terms of the bound per timestep from both sides of annealing, and the width between them, for every chain.

    Args:
        metrics: of `likelihood.bracket_metrics`.
    """
    names = list(dict.fromkeys(key.partition(TERM)[0] for key in metrics if TERM in key))
    figure, axes = new_figure(2, width=4.6, height=3.2)
    for color, who in enumerate(names):
        high, low = (_series(metrics, who + part) for part in (TERM, OTHER))
        t = np.arange(1, len(high) + 1)
        label = who.replace("_", " ")
        axes[0, 0].plot(t, high, ".-", color=f"C{color}", label=f"{label}, total {metrics[f'{who}/nats_per_bit']:.3f}")
        axes[0, 0].fill_between(t, low, high, color=f"C{color}", alpha=0.3)
        axes[0, 1].plot(t, high - low, ".-", color=f"C{color}", label=f"{label}, total {np.sum(high - low):.2g}")
    axes[0, 0].set(title="term of the bound", xlabel="timestep t", ylabel="nats per bit")
    axes[0, 1].axhline(0, color="0.6", linewidth=0.8)
    axes[0, 1].set(title="width between the two directions", xlabel="timestep t", ylabel="nats per bit")
    for panel in axes[0]:
        panel.legend(fontsize=7)
    return figure


def draw_autocorrelation(records: list[dict[str, Any]]) -> Figure:
    """Lag by timestep, of the slower statistic, a panel per level, with the sweeps that sampling takes.

    Args:
        records: those that hold a measurement, of consecutive blocks of timesteps.
    """
    records = sorted({record[FIRST]: record for record in records}.values(), key=lambda record: record[FIRST])
    slowest = np.concatenate([np.array(record[MEASURED]).max(2) for record in records])  # (T, F, K + 1)
    sweeps = np.concatenate([np.array(record["sampling_sweeps_by_timestep"]) for record in records])
    timesteps, num_panels, num_lags = slowest.shape
    figure, axes = new_figure(num_panels, width=3.6, height=3.2)
    for index, panel in enumerate(axes[0]):
        shown = slowest[:, index].clip(0, 1)
        heatmap(panel, shown, f"factor {index + 1}", "lag, sweeps", "timestep t", "autocorrelation",
                (-0.5, num_lags - 0.5, 0.5, timesteps + 0.5))  # fmt: skip
        panel.plot(sweeps, np.arange(1, timesteps + 1), "w|", markersize=8, markeredgewidth=2, clip_on=True)
        panel.set_xlim(-0.5, min(num_lags, 2 * max(8, sweeps.max())) - 0.5)
    figure.suptitle("autocorrelation of the Gibbs chain; white: sweeps when sampling", fontsize=10)
    return figure


def _series(metrics: dict[str, Any], prefix: str) -> np.ndarray:
    return np.array([value for key, value in metrics.items() if key.startswith(prefix)])

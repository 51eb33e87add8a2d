"""Curves over iterations: log-likelihoods of EM, held-out loss of the network, the arms of the ablation."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trainbook.plots import new_figure
from trainbook.workflows.graph_diffusion_em.ablation import smoothed, thresholds_of
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.network import ARMS

BRIEF_CURVE = ((0, 0.50), (4, 0.20), (7, 0.13))  # what the original's text printed as expected
EM_SERIES = {
    "log_likelihood": "codebook: log-likelihood,\nnats per patch",
    "distortion": "codebook: distortion\nper coefficient",
    "graph_log_likelihood": "diffusion times: log-likelihood,\nnats per coefficient",
}


def draw_em(config: Config, history: list[dict[str, Any]]) -> Figure:
    """Each EM's objective over iterations, above its change from one to the next on a logarithmic axis."""
    series = {name: [record[name] for record in history if name in record] for name in EM_SERIES}
    series = {name: values for name, values in series.items() if values}
    figure, axes = new_figure(len(series), 2, width=4.2, height=2.5)
    for column, (name, values) in enumerate(series.items()):
        steps, changes = np.arange(1, len(values) + 1), np.diff(values) * (-1 if name == "distortion" else 1)
        axes[0, column].plot(steps, values, ".-", markersize=4)
        axes[0, column].set(title=EM_SERIES[name], xlabel="iteration")
        for sign, marker, label in ((1, "C0.", "gain"), (-1, "rx", "fall")):
            chosen = sign * changes > 0
            axes[1, column].semilogy(steps[1:][chosen], sign * changes[chosen], marker, label=f"{label}: {chosen.sum()}")
        axes[1, column].set(title="change per iteration", xlabel="iteration")
        axes[1, column].legend(fontsize=8)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    return figure


def draw_held_out_loss(config: Config, losses: list[float], history: list[dict[str, Any]]) -> Figure:
    """Training loss by step and held-out loss by epoch, with the brief's lines, and the baselines' on the test pictures."""
    measured = history[-1]
    training = [(record["step"], record["loss"]) for record in history if record["stage"] == "network" and "loss" in record]
    figure, axes = new_figure(width=7.0, height=4.0)
    panel = axes[0, 0]
    first = training[0][0] - 1
    per_epoch = len(training) / config.num_epochs
    panel.plot([(step - first) / per_epoch for step, _ in training], [v for _, v in training], color="0.75", linewidth=0.7,
               label="training batches")  # fmt: skip
    done = [(epoch, value) for epoch, value in enumerate(losses) if value > 0]
    panel.plot(*zip(*done, strict=True), "o-", label="held-out crops", markersize=4)
    panel.plot(
        *zip(*BRIEF_CURVE, strict=True), "s--", color="0.55", markersize=4, label="the brief's curve: projected, not measured"
    )
    panel.axhline(0.5, color="black", linestyle=":", linewidth=0.8)
    panel.annotate("0.50: nothing removed", (0.3, 0.5), va="bottom", fontsize=8)
    panel.axhline(0.13, color="tab:red", linestyle=":", linewidth=0.8)
    panel.annotate("0.13", (config.num_epochs, 0.13), ha="right", va="bottom", fontsize=8, color="tab:red")
    for who, style in (("network", "-."), ("ours", "--"), ("non_local_means", ":")):
        if f"{who}/loss" in measured:
            label = f"{who.replace('_', ' ')} on the test pictures, {measured[f'{who}/loss']:.3f}"
            panel.axhline(measured[f"{who}/loss"], color="tab:green", linestyle=style, linewidth=0.8, label=label)
    panel.set(xlabel="epoch", ylabel=r"loss $|\hat{x}-x|^2 / (2\sigma^2$ pixels$)$", yscale="log")
    ticks = (0.03, 0.05, 0.1, 0.2, 0.5)
    panel.set_yticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.set_ylim(top=0.62)
    panel.legend(fontsize=7, loc="upper right")
    return figure


def draw_arms(config: Config, losses: np.ndarray, seconds: dict[str, float]) -> Figure:
    """Smoothed held-out loss of every arm, mean and range over seeds, with the thresholds; seconds of a step by arm."""
    figure, axes = new_figure(width=7.0, height=4.0)
    panel = axes[0, 0]
    steps = (np.arange(losses.shape[-1]) + 1) * config.ablation_every
    curves = smoothed(losses)
    for index, arm in enumerate(ARMS):
        mean = curves[index].mean(0)
        panel.plot(
            steps, mean, label=f"{arm.replace('_', ' ')}, {1e3 * seconds[arm]:.0f} ms per step", color=f"C{index}", linewidth=1.2
        )
        panel.fill_between(steps, curves[index].min(0), curves[index].max(0), color=f"C{index}", alpha=0.12, linewidth=0)
    for name, limit in thresholds_of(curves).items():
        panel.axhline(limit.mean(), color="0.4", linestyle=":", linewidth=0.8)
        label, end, side = ("1.01 x best of one head", steps[0], "left") if name == "final" else (name, steps[-1], "right")
        panel.annotate(label, (end, limit.mean()), ha=side, va="bottom", fontsize=7)
    panel.set(
        xlabel="step", ylabel="held-out loss", yscale="log", title=f"{losses.shape[1]} paired seeds; bands: lowest to highest"
    )
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=8)
    return figure

"""The pictures that show whether a timestep-specific DBN worked."""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainbook.data import Data
from trainbook.plots import heatmap, image_grid, new_figure
from trainbook.state import TrainState
from trainbook.workflows.timestep_dbn.autoencoder import decode_all, encode_all
from trainbook.workflows.timestep_dbn.chain_pictures import draw_measured
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, flip_schedule
from trainbook.workflows.timestep_dbn.evaluation import (
    bit_errors,
    reverse_steps,
    sample_trajectory,
    samples_of_all,
    start_timestep,
)
from trainbook.workflows.timestep_dbn.hidden_units import draw_hidden_usage, hidden_usage
from trainbook.workflows.timestep_dbn.sample_pictures import HELD_OUT, draw_distances, draw_neighbours
from trainbook.workflows.timestep_dbn.stages import CHAIN

GRID = 10  # images per row
NUM_SHOWN = 8  # samples over t, and the number of t
LEVEL_NAMES = ("fine", "middle", "coarse")


def draw_data(config: Config, data: Data) -> dict[str, Figure]:
    """A grid of training images."""
    figure, axes = new_figure(width=6.5, height=2.6)
    image_grid(axes[0, 0], to_images(data.train["images"][:40]), 20, f"training images ({data.source.split(':')[0]})")
    return {"data": figure}


@torch.no_grad()
def draw(config: Config, data: Data, state: TrainState, history: list[dict[str, Any]]) -> dict[str, Figure]:
    """Reconstructions, schedule, samples over t and of every model, convergence, free-energy gap, hidden units, bit errors."""
    if config.stage == "autoencoder":
        return {"reconstruction": draw_reconstruction(data, state)}
    device, size = data.test["images"].device, data.test["images"].shape[2:]
    schedule = flip_schedule(config.timesteps, config.schedule).to(device)
    model, dbn = state.modules["autoencoder"], state.modules["dbn"]
    test = encode_all(model, data.test["images"][: config.evaluation_images])
    epochs = [record for record in history if record["stage"] == CHAIN]
    train = torch.cat(encode_all(model, data.train["images"]), 1)
    sets = {**samples_of_all(config, state, schedule), HELD_OUT: torch.cat(test, 1)}

    def to_pictures(bits: Tensor) -> np.ndarray:
        return to_images(decode_all(model, bits.split(dbn.level_sizes, 1), size))

    return {
        "reconstruction": draw_reconstruction(data, state),
        "schedule": draw_schedule(schedule),
        "samples": draw_samples(config, data, state, schedule),
        "convergence": draw_convergence(config, epochs),
        "free_energy_gap": draw_gap(config, epochs),
        "hidden_usage": draw_hidden_usage(hidden_usage(dbn, test, schedule), LEVEL_NAMES),
        "neighbours": draw_neighbours(sets, train, to_pictures),
        "distances": draw_distances(sets, train),
        **draw_measured(history),
        "bit_error": draw_bit_errors(bit_errors(config, state, test, schedule), start_timestep(schedule), schedule),
    }


def to_images(images: Tensor) -> np.ndarray:
    """(N, C, H, W) -> (N, H, W) for one channel, else (N, H, W, C)."""
    array = images.detach().cpu().numpy()
    return array[:, 0] if array.shape[1] == 1 else array.transpose(0, 2, 3, 1)


def draw_reconstruction(data: Data, state: TrainState) -> Figure:
    """Held-out images, their reconstruction from bits, from sampled bits, and with one level's replaced by coin flips."""
    model, images = state.modules["autoencoder"], data.test["images"][:GRID]
    codes, size = encode_all(model, images), images.shape[2:]
    sampled = [torch.bernoulli(logit.sigmoid()).flatten(1) for logit in model.encode_logits(images)]
    rows = [images, decode_all(model, codes, size), decode_all(model, sampled, size)]
    for level in range(len(codes)):
        damaged = [torch.bernoulli(torch.full_like(code, 0.5)) if index == level else code for index, code in enumerate(codes)]
        rows.append(decode_all(model, damaged, size))
    labels = ["original", "from bits", "from sampled bits", *(f"{name} level lost" for name in LEVEL_NAMES)]
    figure, axes = new_figure(width=7.0, height=4.4)
    image_grid(
        axes[0, 0],
        to_images(torch.cat(rows)),
        GRID,
        f"held-out images, {sum(c.shape[1] for c in codes)} bits each",
        labels,
    )
    return figure


def draw_schedule(schedule: FlipSchedule) -> Figure:
    """beta_t, c_t and Gamma_t over t."""
    figure, axes = new_figure(3, width=3.4, height=2.7)
    panels = (("per step", schedule.beta, r"$\beta_t$ flips"), ("cumulative", schedule.cumulative, r"$c_t$ flipped"))
    t = np.arange(schedule.timesteps + 1)
    for panel, (title, values, label) in zip(axes[0], panels, strict=False):
        panel.plot(t, values.cpu(), ".-")
        panel.axhline(0.5, color="0.6", linestyle=":", label="fair coin")
        panel.set(title=title, xlabel="timestep t", ylabel=f"probability {label}", ylim=(0, 0.55))
        panel.legend(fontsize=8)
    axes[0, 2].plot(t[1:], schedule.coupling[1:].cpu(), ".-", color="C1")
    axes[0, 2].set(title="coupling to the noisy bit", xlabel="timestep t", ylabel=r"$\Gamma_t$ (nats)", ylim=(0, None))
    return figure


def draw_samples(config: Config, data: Data, state: TrainState, schedule: FlipSchedule) -> Figure:
    """Ancestral samples decoded along the way from noise to image, beside held-out images; nothing is picked."""
    model, dbn, size = state.modules["autoencoder"], state.modules["dbn"], data.test["images"].shape[2:]
    step = reverse_steps(config, state, schedule)["chain"]
    trajectory = sample_trajectory(step, 4 * GRID, sum(dbn.level_sizes), config.timesteps, data.test["images"].device)
    shown = np.unique(np.linspace(0, config.timesteps, NUM_SHOWN).round().astype(int))[::-1]  # t from T to 0
    figure, axes = new_figure(2, width=5.2, height=4.4)
    steps = torch.stack([trajectory[config.timesteps - t][:NUM_SHOWN] for t in shown], 1)  # (samples, t, V)
    decoded = decode_all(model, steps.flatten(0, 1).split(dbn.level_sizes, 1), size)
    image_grid(axes[0, 0], to_images(decoded), len(shown), "one sample per row, noise to image")
    axes[0, 0].set_xticks((np.arange(len(shown)) + 0.5) * (size[1] + 1) - 1, [f"t = {t}" for t in shown], fontsize=8)
    final = decode_all(model, trajectory[-1].split(dbn.level_sizes, 1), size)
    both = torch.cat([final, data.test["images"][: 4 * GRID]])
    labels = ["sampled"] * 4 + ["held-out"] * (len(both) // GRID - 4)
    image_grid(axes[0, 1], to_images(both), GRID, f"{4 * GRID} samples, none picked, temperature 1", labels)
    return figure


def convergence_table(config: Config, epochs: list[dict[str, Any]], metric: str) -> np.ndarray:
    """One metric over (timestep, epoch, level), NaN where nothing was recorded; (T, epochs, levels)."""
    table = np.full((config.timesteps, config.epochs_per_timestep, len(LEVEL_NAMES)), np.nan)
    for record in epochs:
        if "epoch" in record:
            values = np.array(record[f"{metric}_by_timestep_and_level"])
            first = record["first_timestep"] - 1
            table[first : first + len(values), record["epoch"] - 1] = values
    return table


def draw_convergence(config: Config, epochs: list[dict[str, Any]]) -> Figure:
    """Timestep x epoch heatmaps, means over levels, two as the change since epoch 1; a dot where the weights are from."""
    figure, axes = new_figure(3, width=4.2, height=3.2)
    extent = (0.5, config.epochs_per_timestep + 0.5, 0.5, config.timesteps + 0.5)
    error, likelihood, update = (
        convergence_table(config, epochs, name).mean(-1) for name in ("reconstruction_error", "pseudo_likelihood", "update_norm")
    )
    panels = (
        ("reconstruction error since epoch 1", error - error[:, :1], "change of mean |bit - P(bit)|"),
        ("pseudo-likelihood since epoch 1", likelihood - likelihood[:, :1], "gain, nats per bit"),
        ("update norm", update, "root mean square of dW"),
    )
    for panel, (title, values, unit) in zip(axes[0], panels, strict=True):
        heatmap(panel, values, title, "epoch", "timestep t", unit, extent)
    kept = convergence_table(config, epochs, "kept_epoch")
    last = [row[~np.isnan(row).all(-1)][-1] for row in kept if not np.isnan(row).all()]  # (timesteps, levels)
    for level in range(len(LEVEL_NAMES)):
        axes[0, 1].plot([row[level] for row in last], range(1, len(last) + 1), "wo", markeredgecolor="black", markersize=4)
    axes[0, 1].set_title("pseudo-likelihood since epoch 1; o kept", fontsize=10)
    return figure


def draw_gap(config: Config, epochs: list[dict[str, Any]]) -> Figure:
    """Free energy of valid minus train codes over epochs: above zero and rising means overfitting."""
    table = convergence_table(config, epochs, "free_energy_gap")
    figure, axes = new_figure(len(LEVEL_NAMES), width=3.6, height=2.9)
    shown = np.unique(np.linspace(1, config.timesteps, min(5, config.timesteps)).round().astype(int))
    for level, panel in enumerate(axes[0]):
        for index, t in enumerate(shown):
            color = (0.1 + 0.8 * index / max(1, len(shown) - 1), 0.3, 0.6)
            panel.plot(
                np.arange(1, config.epochs_per_timestep + 1),
                table[t - 1, :, level],
                label=f"t = {t}",
                color=color,
                linewidth=1,
            )
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set(
            title=f"{LEVEL_NAMES[level]} level",
            xlabel="epoch",
            ylabel="F(valid) - F(train), nats per bit" if level == 0 else "",
        )
        panel.legend(fontsize=7)
    return figure


def draw_bit_errors(errors: dict[str, list[float]], start: int, schedule: FlipSchedule) -> Figure:
    """Share of wrong bits while the chain and the baselines undo the noise of a held-out code."""
    figure, axes = new_figure(width=5.6, height=3.6)
    t = np.arange(start, -1, -1)
    for who, values in errors.items():
        if who == "no_op":
            axes[0, 0].axhline(values[0], color="0.5", linestyle=":", label="noisy bits left as they are")
        else:
            axes[0, 0].plot(t, values, "o-" if who == "chain" else "s--", markersize=4, label=who.replace("_", " "))
    axes[0, 0].plot(t, schedule.cumulative[: start + 1].flip(0).cpu(), color="0.8", label="forward process, $c_t$")
    axes[0, 0].set_xticks(t)
    axes[0, 0].invert_xaxis()
    axes[0, 0].set(
        title=f"undoing the noise of t = {start} on held-out codes",
        xlabel="timestep t",
        ylabel="share of wrong bits",
        ylim=(0, None),
    )
    axes[0, 0].legend(fontsize=8)
    return figure

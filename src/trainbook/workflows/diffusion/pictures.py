"""The pictures: samples by class, samples over training, from noise to image, and the nearest training images."""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainbook.data import Data
from trainbook.plots import image_grid, new_figure
from trainbook.state import TrainState
from trainbook.workflows.diffusion.config import Config
from trainbook.workflows.diffusion.data import NUM_CLASSES
from trainbook.workflows.diffusion.judge import nearest
from trainbook.workflows.diffusion.model import denoise, draw_samples
from trainbook.workflows.diffusion.training import SNAPSHOTS, UNET

ROWS = 6  # samples of each class
TRAJECTORY_STEPS = 9  # images between noise and sample that are shown
NUM_NEIGHBOURS = 8
CLASSES = ", ".join(str(k) for k in range(NUM_CLASSES))


def draw_data(config: Config, data: Data) -> dict[str, Figure]:
    """Training and held-out images of every class."""
    figure, axes = new_figure(2, width=4.4, height=3.2)
    for panel, split, title in ((axes[0, 0], data.train, "training images"), (axes[0, 1], data.test, "held-out images")):
        columns = [split["images"][split["labels"] == k][:ROWS] for k in range(NUM_CLASSES)]
        rows = min(len(column) for column in columns)
        shown = torch.stack([column[row] for row in range(rows) for column in columns])
        image_grid(panel, to_array(shown), NUM_CLASSES, f"{title}, a column per class")
    return {"data": figure}


def draw(config: Config, data: Data, state: TrainState, history: list[dict[str, Any]]) -> dict[str, Figure]:
    """Samples of every class at both scales, over training, from noise to image, and beside their nearest training images."""
    unet, training = state.modules[UNET], data.train["images"]
    shape = tuple(training.shape[1:])
    plain, _ = draw_samples(unet, config, shape, ROWS * NUM_CLASSES, 1.0)
    guided, _ = draw_samples(unet, config, shape, ROWS * NUM_CLASSES, config.guidance_scale)
    return {
        "samples": draw_scales(config, data, plain, guided),
        "over_training": draw_snapshots(state.modules[SNAPSHOTS]),
        "from_noise": draw_trajectory(config, unet, shape),
        "neighbours": draw_neighbours(plain, data),
    }


def draw_scales(config: Config, data: Data, plain: Tensor, guided: Tensor) -> Figure:
    """Samples without and with guidance beside real images, a column per class."""
    figure, axes = new_figure(3, width=4.2, height=3.0)
    columns = [data.test["images"][data.test["labels"] == k][:ROWS] for k in range(NUM_CLASSES)]
    rows = min(len(column) for column in columns)
    real = torch.stack([column[row] for row in range(rows) for column in columns])
    titles = ("samples, guidance 1", f"samples, guidance {config.guidance_scale:g}", "held-out images")
    for panel, images, title in zip(axes[0], (plain, guided, real), titles, strict=True):
        image_grid(panel, to_array(images), NUM_CLASSES, title)
    return figure


def draw_snapshots(snapshots: torch.nn.Module) -> Figure:
    """The same noise, turned to images by the weights of several steps."""
    number = len(snapshots.steps)
    figure, axes = new_figure(width=5.2, height=0.6 + 0.5 * number)
    labels = [f"step {step}" for step in snapshots.steps]
    image_grid(axes[0, 0], to_array(snapshots.images.flatten(0, 1)), NUM_CLASSES, f"one noise per class {CLASSES}", labels)
    return figure


def draw_trajectory(config: Config, unet: torch.nn.Module, shape: tuple[int, int, int]) -> Figure:
    """From noise to image, a row per class."""
    device = next(unet.parameters()).device
    start = torch.randn(NUM_CLASSES, *shape, generator=torch.Generator().manual_seed(1)).to(device)
    unet.eval()
    steps = [start, *denoise(unet, config, start, torch.arange(NUM_CLASSES, device=device), 1.0)]
    unet.train()
    shown = np.unique(np.linspace(0, len(steps) - 1, TRAJECTORY_STEPS + 1).round().astype(int))
    images = torch.stack([steps[index] for index in shown], dim=1).flatten(0, 1)
    figure, axes = new_figure(width=5.2, height=5.2)
    title = f"from noise to image: DDIM steps {', '.join(map(str, shown))}"
    image_grid(axes[0, 0], to_array((images + 1) / 2), len(shown), title, [f"class {k}" for k in range(NUM_CLASSES)])
    return figure


def draw_neighbours(samples: Tensor, data: Data) -> Figure:
    """Samples above their nearest training images, and how far those are, beside held-out images' distances."""
    training, test = data.train["images"], data.test["images"]
    distances, indices = nearest(samples, training)
    held_out, _ = nearest(test, training)
    figure, axes = new_figure(2, width=5.0, height=2.8)
    chosen = distances.argsort()[:NUM_NEIGHBOURS]
    pairs = torch.cat([samples[chosen], training[indices[chosen]]])
    image_grid(axes[0, 0], to_array(pairs), len(chosen), "the samples nearest to training images", ["sample", "training"])
    bins = np.linspace(0, float(torch.cat([distances, held_out]).max()), 25)
    for values, label in ((held_out, "held-out images"), (distances, "samples")):
        axes[0, 1].hist(
            values.cpu().numpy(), bins, density=True, alpha=0.55, label=f"{label}: median {float(values.median()):.2f}"
        )
    axes[0, 1].set(
        title="distance to the nearest training image", xlabel="Euclidean distance, pixels in [0, 1]", ylabel="density"
    )
    axes[0, 1].legend(fontsize=8)
    return figure


def to_array(images: Tensor) -> np.ndarray:
    """(N, C, H, W) -> (N, H, W) or (N, H, W, 3), for `image_grid`."""
    array = images.detach().cpu().numpy()
    return array[:, 0] if array.shape[1] == 1 else array.transpose(0, 2, 3, 1)

"""The pictures: held-out views with error maps, turntable, depth, quality by view."""

import math
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainbook.data import Data
from trainbook.plots import image_grid, new_figure
from trainbook.state import TrainState
from trainbook.workflows.nerf.config import Config
from trainbook.workflows.nerf.evaluation import baselines, psnr, render_views
from trainbook.workflows.nerf.rays import orbit_poses

MAX_VIEWS = 4  # drawn large
ERROR_LIMIT = 0.3  # of the error maps, white being 1
ORBIT_ELEVATION = math.radians(25)
COLOURS = {"mlp": "C0", "grid": "C1", "nearest_view": "0.45", "mean_colour": "0.75"}


def draw_data(config: Config, data: Data) -> dict[str, Figure]:
    """Training and held-out views, and where the cameras stand."""
    kind = "SYNTHETIC scene" if data.synthetic else "pictures"
    figure, axes = new_figure(3, width=4.0, height=3.6)
    image_grid(axes[0, 0], _array(data.train["images"][:16]), 4, f"{kind}: training views")
    image_grid(axes[0, 1], _array(data.test["images"][:9]), 3, "held-out views")
    for split, marker in (("train", "."), ("valid", "^"), ("test", "x")):
        places = getattr(data, split)["poses"][:, :, 3].cpu().numpy()
        axes[0, 2].plot(places[:, 0], places[:, 1], marker, label=f"{split}: {len(places)}")
    axes[0, 2].set(title="cameras from above", xlabel="x, scene's unit", ylabel="y, scene's unit", aspect="equal")
    axes[0, 2].grid(alpha=0.3)
    axes[0, 2].legend(fontsize=8, loc="upper center", ncols=3, bbox_to_anchor=(0.5, -0.2), frameon=False)
    return {"data": figure}


def draw(config: Config, data: Data, state: TrainState, history: list[dict[str, Any]]) -> dict[str, Figure]:
    """Held-out views beside the truth, views from a turntable, depths, and PSNR by view."""
    test = data.test
    size = tuple(test["images"].shape[1:3])
    seen = {name: render_views(state.modules[name], test["poses"], test["focals"], size) for name in config.field_names}
    colours = {name: view[0] for name, view in seen.items()} | baselines(data)
    return {
        "held_out": draw_held_out(test["images"], colours),
        "turntable": draw_turntable(config, data, state, size),
        "depth": draw_depths(config, test, {name: view[1] for name, view in seen.items()}),
        "psnr_by_view": draw_psnr(test["images"], colours),
    }


def draw_held_out(images: Tensor, colours: dict[str, Tensor]) -> Figure:
    """Rows of views: the truth, everybody's picture, and below it everybody's error."""
    number = min(MAX_VIEWS, len(images))
    shown = [who for who in colours if who != "mean_colour"]
    figure, axes = new_figure(2 * len(shown) + 1, number, width=2.0, height=2.1)
    for row in range(number):
        image_grid(axes[row, 0], _array(images[row, None]), 1, f"held-out view {row}")
        for index, who in enumerate(shown):
            picture, column = colours[who][row], 1 + 2 * index
            decibel = float(psnr(picture[None], images[row, None]))
            image_grid(axes[row, column], _array(picture[None]), 1, f"{who.replace('_', ' ')}, {decibel:.1f} dB")
            error = (picture - images[row]).abs().mean(-1).cpu().numpy()
            drawn = axes[row, column + 1].imshow(error, cmap="magma", vmin=0, vmax=ERROR_LIMIT, interpolation="nearest")
            axes[row, column + 1].set_axis_off()
            axes[row, column + 1].set_title("its error", fontsize=9)
    figure.colorbar(drawn, ax=axes, label="absolute error, mean of colours, white is 1", aspect=40, fraction=0.02)
    return figure


def draw_turntable(config: Config, data: Data, state: TrainState, size: tuple[int, int]) -> Figure:
    """Each field from cameras all around, none of which took a picture."""
    number = config.turntable_views
    azimuths = 2 * math.pi * torch.arange(number) / number
    radius = float(data.train["poses"][:, :, 3].norm(dim=-1).mean())
    poses = orbit_poses(azimuths, torch.full((number,), ORBIT_ELEVATION), radius).to(data.train["poses"].device)
    focals = data.train["focals"].mean().expand(number)
    columns = min(6, number)
    rows = math.ceil(number / columns)
    figure, axes = new_figure(1, len(config.field_names), width=1.5 * columns, height=1.5 * rows + 0.3)
    for panel, name in zip(axes[:, 0], config.field_names, strict=True):
        colours, _ = render_views(state.modules[name], poses, focals, size)
        kind = " of the SYNTHETIC scene" if data.synthetic else ""
        angles = f"every {360 / number:.0f} degrees, {math.degrees(ORBIT_ELEVATION):.0f} degrees up"
        image_grid(panel, _array(colours), columns, f"{name}: turntable{kind}, {angles}")
    return figure


def draw_depths(config: Config, test: dict[str, Tensor], depths: dict[str, Tensor]) -> Figure:
    """Distance to what is seen, beside the exact one where it is known."""
    number = min(2, len(test["poses"]))
    exact = {"exact": test["depths"].clamp(max=config.far)} if "depths" in test else {}
    shown = exact | depths
    lowest = min(float(depth.min()) for depth in shown.values())
    figure, axes = new_figure(len(shown), number, width=2.6, height=2.5)
    for row in range(number):
        for panel, (who, depth) in zip(axes[row], shown.items(), strict=True):
            drawn = panel.imshow(
                depth[row].cpu().numpy(), cmap="viridis_r", vmin=lowest, vmax=config.far, interpolation="nearest"
            )
            panel.set_axis_off()
            panel.set_title(f"{who}, view {row}", fontsize=9)
    figure.colorbar(drawn, ax=axes, label=f"distance, scene's unit; {config.far:g} is the far plane")
    return figure


def draw_psnr(images: Tensor, colours: dict[str, Tensor]) -> Figure:
    """PSNR of every held-out view."""
    figure, axes = new_figure(width=6.4, height=3.2)
    for who, found in colours.items():
        values = psnr(found, images).cpu().numpy()
        label = f"{who.replace('_', ' ')}: mean {values.mean():.1f} dB"
        axes[0, 0].plot(np.arange(len(values)), values, "o-", label=label, color=COLOURS[who])
    axes[0, 0].set(title="quality by held-out view", xlabel="view", ylabel="PSNR, dB", xticks=np.arange(len(images)))
    axes[0, 0].grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _array(images: Tensor) -> np.ndarray:
    return images.detach().cpu().numpy()

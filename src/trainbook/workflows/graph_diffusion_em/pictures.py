"""The pictures that show whether graph-diffusion EM worked, and what it learned."""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainbook.data import Data
from trainbook.plots import image_grid, new_figure
from trainbook.state import TrainState
from trainbook.workflows.graph_diffusion_em.ablation import build_arm
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.curves import draw_arms, draw_em, draw_held_out_loss
from trainbook.workflows.graph_diffusion_em.denoiser import denoise
from trainbook.workflows.graph_diffusion_em.evaluation import judge, methods, noisy_pictures
from trainbook.workflows.graph_diffusion_em.learned import draw_atoms, draw_diffusion, draw_graph, draw_head_maps, draw_heads
from trainbook.workflows.graph_diffusion_em.network import ARMS
from trainbook.workflows.graph_diffusion_em.objective import from_working
from trainbook.workflows.graph_diffusion_em.timing import draw_quality_and_time, seconds_per_step

PANEL = ("noisy", "ours", "network", "bm3d", "patch_mixture", "non_local_means", "total_variation")
INSET_SHARE = 0.22  # of the picture's width that the inset shows
INSET_SIZE = 0.42  # of the panel that it covers
ERROR_RANGE = 0.12  # of the error maps, white being 1
NUM_PANELS = 2  # test pictures drawn large


def to_array(image: Tensor) -> np.ndarray:
    """(C, H, W) -> (H, W) or (H, W, 3), clipped to [0, 1]."""
    array = image.detach().cpu().clamp(0, 1).numpy()
    return array[0] if len(array) == 1 else array.transpose(1, 2, 0)


def draw_data(config: Config, data: Data) -> dict[str, Figure]:
    """Training crops and the held-out pictures."""
    figure, axes = new_figure(2, width=4.6, height=3.0)
    for panel, images, columns, title in (
        (axes[0, 0], data.train["crops"][:40], 10, "training crops"),
        (axes[0, 1], data.test["pictures"][:6], 3, "test pictures"),
    ):
        image_grid(panel, np.stack([to_array(image) for image in images]), columns, title)
    return {"data": figure}


@torch.no_grad()
def draw(config: Config, data: Data, state: TrainState, history: list[dict[str, Any]]) -> dict[str, Figure]:
    """Panels with insets and error maps, curves of EM and loss, the graph, the heads, and what was learned."""
    clean = data.test["pictures"]
    noisy, levels = noisy_pictures(config, data)
    all_methods = methods(config, data, state)
    mixture, time = state.modules["codebook"], state.modules["diffusion_time"]
    figures = {}
    for index in range(min(NUM_PANELS, len(clean))):
        figures[f"panel_{index}"] = draw_panel(config, noisy[index], clean[index], levels[index], all_methods)
    figures["quality_and_time"] = draw_quality_and_time(config, noisy[0], clean[0], levels[0], all_methods, history[-1])
    figures["em"] = draw_em(config, history)
    if "network" in state.modules:
        figures["held_out_loss"] = draw_held_out_loss(config, state.modules["held_out"].losses.tolist(), history)
    if config.ablation_seeds:
        batch = data.train["crops"][: config.batch_size]
        with torch.enable_grad():
            seconds = {
                arm: seconds_per_step(build_arm(config, len(clean[0]), arm).to(batch.device), batch, levels[0]) for arm in ARMS
            }
        figures["four_heads"] = draw_arms(config, state.modules["ablation"].losses.cpu().numpy(), seconds)
    figures["codebook_atoms"] = draw_atoms(config, mixture, clean.shape[1])
    figures["learned_times"] = draw_diffusion(config, mixture, time, noisy[0], levels[0])
    result = denoise(config.model_copy(update={"polish_passes": 0}), mixture, noisy[0], levels[0], time.time(levels[0]))
    if result.graph is not None:
        figures["graph"] = draw_graph(from_working(config, result.pilot), result.graph)
    if result.attention:
        last = result.attention[-1]
        figures["heads"] = draw_heads(config, last, levels[0], clean.shape[1])
        figures["head_maps"] = draw_head_maps(from_working(config, result.pilot), last.shares, result.graph.grid)
    return figures


def draw_panel(config: Config, noisy: Tensor, clean: Tensor, level: float, all_methods: dict[str, Any]) -> Figure:
    """Every method's picture with a zoomed inset above its error, beside the clean one."""
    shown = [who for who in PANEL if who in all_methods]
    figure, axes = new_figure(len(shown) + 1, 2, width=2.5, height=2.7)
    corner = _liveliest(clean)
    _with_inset(axes[0, 0], to_array(clean), corner, "clean")
    axes[1, 0].set_axis_off()
    for column, who in enumerate(shown, 1):
        restored = all_methods[who](noisy, level)
        quality = judge(config, restored, clean, who != "noisy" or config.noise != "gaussian")
        image = from_working(config, restored)
        title = f"{who.replace('_', ' ')}\n{quality.psnr:.2f} dB, SSIM {quality.ssim:.3f}"
        _with_inset(axes[0, column], to_array(image), corner, title)
        error = (image - clean).mean(0).cpu().numpy()
        drawn = axes[1, column].imshow(error, cmap="coolwarm", vmin=-ERROR_RANGE, vmax=ERROR_RANGE, interpolation="nearest")
        axes[1, column].set_axis_off()
    axes[1, 1].set_title("error: restored - clean", fontsize=9)
    figure.colorbar(drawn, ax=axes[1, :], fraction=0.02, aspect=14, label="error, white is 1")
    return figure


def _liveliest(image: Tensor) -> tuple[int, int, int]:
    """Row, column and size of the square with the most detail: the inset."""
    size = max(8, int(INSET_SHARE * image.shape[1]))
    grey = image.mean(0)
    detail = grey.diff(dim=0)[:, :-1].square() + grey.diff(dim=1)[:-1].square()
    sums = torch.nn.functional.avg_pool2d(detail.sqrt()[None, None], size, 2)[0, 0]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    return 2 * row, 2 * column, size


def _with_inset(panel: Any, image: np.ndarray, corner: tuple[int, int, int], title: str) -> None:
    row, column, size = corner
    options = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    panel.imshow(image, **options)
    panel.set_title(title, fontsize=9)
    panel.set_axis_off()
    height, width = image.shape[:2]
    right = column + size / 2 < width / 2  # the inset lies on the other side of what it shows
    low = row + size / 2 < height / 2
    inset = panel.inset_axes([1 - INSET_SIZE if right else 0, 0 if low else 1 - INSET_SIZE, INSET_SIZE, INSET_SIZE])
    inset.imshow(image[row : row + size, column : column + size], **options)
    inset.set(xticks=[], yticks=[])
    x, y = np.array([0, size, size, 0, 0]) + column - 0.5, np.array([0, 0, size, size, 0]) + row - 0.5
    panel.plot(x, y, color="tab:orange", linewidth=1)
    for spine in inset.spines.values():
        spine.set_color("tab:orange")

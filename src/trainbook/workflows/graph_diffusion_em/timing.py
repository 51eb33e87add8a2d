"""Quality against time: how long each method takes per megapixel on this machine. Not among the metrics: it does not repeat."""

import time
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from trainbook.plots import new_figure
from trainbook.workflows.graph_diffusion_em.baselines import Method, bm3d_is_installed
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.network import loss


def seconds_per_megapixel(method: Method, noisy: Tensor, level: float) -> float:
    """CPU time of this process, all threads together, for one picture; on a GPU the time until it is done."""
    return _timed(lambda: method(noisy, level), noisy.device) / (noisy[0].numel() / 1e6)


def seconds_per_step(model: nn.Module, crops: Tensor, level: float) -> float:
    """CPU time of the second of two passes forward and backward over a batch; on a GPU the time until it is done."""
    for _ in range(2):
        seconds = _timed(lambda: loss(model, crops, crops, level, False).backward(), crops.device)
    return seconds


def _timed(work: Callable[[], object], device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    began = clock()
    work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return clock() - began


def draw_quality_and_time(
    config: Config, noisy: Tensor, clean: Tensor, level: float, methods: dict[str, Method], measured: dict[str, Any]
) -> Figure:
    """Mean PSNR over all test pictures against seconds per megapixel, timed on the first."""
    figure, axes = new_figure(width=7.4, height=4.6)
    panel = axes[0, 0]
    placed = []
    for who, method in methods.items():
        if who == "noisy" or f"{who}/psnr_db" not in measured:
            continue
        seconds, quality = seconds_per_megapixel(method, noisy, level), measured[f"{who}/psnr_db"]
        colour = (
            "tab:blue" if who == "ours" else "tab:cyan" if who.startswith("ours") else "tab:orange" if who == "network" else "0.4"
        )
        panel.plot(seconds, quality, "o", color=colour)
        placed.append((seconds, quality, f"{who.replace('_', ' ')} ({seconds:.2g} s)", colour))
    low = min(q for _, q, *_ in placed)
    gap, last = 0.035 * (max(q for _, q, *_ in placed) - low + 0.1), -1e9
    for seconds, quality, text, colour in sorted(placed, key=lambda one: one[1]):
        last = max(quality, last + gap)  # labels of points that lie close stand one above the other, right of all of them
        beside = 1.2 * max(other for other, near, *_ in placed if abs(near - quality) < 2 * gap)
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0}
        panel.annotate(text, (seconds, quality), xytext=(beside, last), fontsize=7, color=colour, va="center", arrowprops=line)
    panel.set_ylim(top=max(panel.get_ylim()[1], last + gap))
    panel.set(xscale="log", xlabel="seconds per megapixel, CPU time of all threads", ylabel="mean PSNR of the test pictures, dB")
    panel.set_xlim(right=panel.get_xlim()[1] * 8)
    title = f"timed on one picture of {noisy.shape[2]} x {noisy.shape[1]} pixels, {torch.get_num_threads()} threads of torch"
    panel.set_title(title if bm3d_is_installed() else title + "; BM3D: not installed", fontsize=9)
    panel.grid(alpha=0.3, which="both")
    return figure

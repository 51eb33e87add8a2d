"""What was learned: atoms of the codebook, diffusion times, the graph's edges, the heads' spectra and maps."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainbook.plots import heatmap, image_grid, new_figure
from trainbook.workflows.graph_diffusion_em.attention import Diffused, head_maps
from trainbook.workflows.graph_diffusion_em.codebook import RIDGE, DiffusionTime
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.denoiser import codebook_estimate, patch_laplacian
from trainbook.workflows.graph_diffusion_em.diffusion import response
from trainbook.workflows.graph_diffusion_em.graph import HEADS, Graph, knn_graph
from trainbook.workflows.graph_diffusion_em.images import middle
from trainbook.workflows.graph_diffusion_em.mixture import GaussianMixture
from trainbook.workflows.graph_diffusion_em.patches import PatchGrid, mean_columns, patch_basis, patchify

NUM_COMPONENTS, NUM_ATOMS = 12, 6
SPECTRUM_SIZE = 32  # pixels of the crop whose spectrum is drawn
NUM_DRAWN_NODES = 3


def draw_atoms(config: Config, mixture: GaussianMixture, channels: int) -> Figure:
    """Leading eigenvectors of the heaviest components, and how fast the eigenvalues of each fall."""
    size, number = config.patch_size, min(NUM_COMPONENTS, len(mixture.weights))
    order = mixture.weights.argsort(descending=True)[:number]
    values, vectors = torch.linalg.eigh(mixture.covariances[order].double())
    values, vectors = values.flip(1), vectors.flip(2)
    coefficients = torch.zeros(number, NUM_ATOMS, channels * size**2, dtype=torch.float64)
    coefficients[..., ~mean_columns(size, channels)] = vectors[..., :NUM_ATOMS].mT.cpu()
    pixels = (coefficients @ patch_basis(size, channels)).view(number * NUM_ATOMS, channels, size, size)
    pixels = 0.5 + 0.5 * pixels / pixels.abs().amax((1, 2, 3), keepdim=True)
    images = pixels[:, 0] if channels == 1 else pixels.permute(0, 2, 3, 1)
    figure, axes = new_figure(2, width=4.6, height=4.6)
    labels = [f"{float(mixture.weights[k]):.1%}" for k in order]
    image_grid(axes[0, 0], images.numpy(), NUM_ATOMS, "leading atoms, one component per row, with its weight", labels)
    for row in range(number):
        axes[0, 1].semilogy(
            255 * values[row].sqrt().cpu().numpy(), color="C0", alpha=0.3 + 0.7 * (number - row) / number, linewidth=1
        )
    axes[0, 1].axhline(config.codebook_floor, color="tab:red", linestyle=":", label="noise floor")
    axes[0, 1].axhline(config.noise_level, color="0.5", linestyle="--", label="noise of this run")
    axes[0, 1].set(title="standard deviation along each atom", xlabel="atom", ylabel="grey levels of 255")
    axes[0, 1].legend(fontsize=8)
    axes[0, 1].grid(alpha=0.3)
    return figure


def draw_diffusion(config: Config, mixture: GaussianMixture, time: DiffusionTime, noisy: Tensor, level: float) -> Figure:
    """Learned diffusion time of every luminance coefficient, its filter, and a crop's spectrum before and after it."""
    size = config.patch_size
    crop = middle(noisy, min(SPECTRUM_SIZE, noisy.shape[1]))
    pilot = codebook_estimate(mixture, crop, level, size, 1)
    graph = knn_graph(pilot, size, config.num_neighbours, config.search_radius)
    values, vectors = torch.linalg.eigh(patch_laplacian(pilot, graph, config.num_heads).to_dense().double())
    times = time.time(level)[: size**2]
    y = patchify(crop, size)[:, : size**2].double()
    spectrum = vectors.T @ (y - y.mean(0))
    after = response(values.clamp(min=0) + RIDGE, "pagerank", times) * spectrum
    figure, axes = new_figure(3, width=4.4, height=3.2)
    heatmap(
        axes[0, 0], times.view(size, size).log10().cpu().numpy(), "learned diffusion time", "horizontal frequency",
        "vertical frequency", r"$\log_{10} \lambda_c,\ \lambda_c = \sigma^2 \kappa_c$",
    )  # fmt: skip
    grid = torch.linspace(0, 2, 200, dtype=torch.float64, device=times.device)
    chosen = [0, 1, size + 1, (size // 2) * (size + 1), size**2 - 1]
    for index, curve in zip(chosen, response(grid, "pagerank", times[chosen]).T, strict=True):
        row, column = divmod(index, size)
        axes[0, 1].plot(grid.cpu().numpy(), curve.cpu().numpy(), label=f"({row}, {column}): {float(times[index]):.2g}")
    axes[0, 1].set(title="filter 1 / (1 + λ l)", xlabel="graph frequency l", ylabel="kept", ylim=(0, 1.02))
    axes[0, 1].legend(fontsize=7, title="coefficient: λ", title_fontsize=7)
    for label, found in (("noisy", spectrum), ("after diffusion", after)):
        energy = found.square().mean(1)
        bins = np.linspace(0, float(values[-1]) + 1e-9, 25)
        which = np.digitize(values.cpu().numpy(), bins) - 1
        means = [float(energy[torch.from_numpy(which == b)].mean()) if (which == b).any() else np.nan for b in range(24)]
        axes[0, 2].semilogy((bins[1:] + bins[:-1]) / 2, means, ".-", label=label)
    axes[0, 2].axhline(level**2, color="0.5", linestyle=":", label="variance of the noise")
    axes[0, 2].set(title="spectrum of a crop on its graph", xlabel="graph frequency l", ylabel="mean energy per coefficient")
    axes[0, 2].legend(fontsize=8)
    for panel in axes[0, 1:]:
        panel.grid(alpha=0.3)
    return figure


def draw_graph(pilot: Tensor, graph: Graph) -> Figure:
    """The neighbours of some patches drawn on the picture: an edge to each, thicker the nearer."""
    grid = graph.grid
    figure, axes = new_figure(NUM_DRAWN_NODES, width=3.6, height=3.8)
    image = pilot.clamp(0, 1).mean(0).cpu().numpy()
    gradient = np.hypot(*np.gradient(image))
    positions = grid.positions().cpu().numpy()
    centre = (grid.size - 1) / 2
    inner = (np.abs(positions - positions.max(0) / 2) < positions.max(0) * 0.3).all(1)
    lively = np.array([gradient[r : r + grid.size, c : c + grid.size].mean() for r, c in positions])
    ranked = np.flatnonzero(inner)[np.argsort(lively[inner])]
    chosen = [ranked[int(share * (len(ranked) - 1))] for share in (0.3, 0.9, 1.0)]
    width = grid.width - grid.size + 1
    for panel, node, title in zip(axes[0], chosen, ("a quiet patch", "a lively patch", "the liveliest patch"), strict=True):
        row, column = positions[node] + centre
        panel.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        others = graph.neighbours[node].cpu().numpy()
        distance = graph.distances[node].cpu().numpy()
        strength = np.exp(-distance / max(1e-12, 2 * np.median(distance)))
        for other, weight in zip(others, strength, strict=True):
            panel.plot(
                [column, other % width + centre],
                [row, other // width + centre],
                color="tab:orange",
                linewidth=2 * weight,
                alpha=0.8,
            )
        panel.plot(others % width + centre, others // width + centre, ".", color="tab:cyan", markersize=4)
        x, y = np.array([0, 1, 1, 0, 0]) * grid.size, np.array([0, 0, 1, 1, 0]) * grid.size
        panel.plot(x + column - centre - 0.5, y + row - centre - 0.5, color="tab:red", linewidth=1.2)
        reach = max(24, grid.size * 3)
        panel.set(xlim=(column - reach, column + reach), ylim=(row + reach, row - reach), xticks=[], yticks=[])
        panel.set_title(
            f"{title}:\n{len(others)} neighbours, rms difference {255 * np.sqrt(distance.mean()):.1f} grey levels", fontsize=9
        )
    return figure


def draw_heads(config: Config, found: Diffused, level: float, channels: int) -> Figure:
    """Share of each head, the deviation that each allows per coefficient, how near each looks, and its EM."""
    size, heads = config.patch_size, found.heads
    names = HEADS if len(heads.shares) == len(HEADS) else tuple(f"head {h}" for h in range(len(heads.shares)))
    figure, axes = new_figure(len(names) + 2, width=2.9, height=2.7)
    axes[0, 0].barh(names[::-1], heads.shares.flip(0).tolist(), color="#7fb3e6")
    for index, (share, near) in enumerate(zip(heads.shares.flip(0).tolist(), heads.narrowness.flip(0).tolist(), strict=True)):
        reach = f"{(0.5 / near) ** 0.5:.1f} px" if near > 1e-6 else "all"
        axes[0, 0].annotate(
            f"{share:.0%}, reach {reach}", (0, index), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes[0, 0].set_title("share of the heads", fontsize=10)
    deviation = (heads.variances[:, : size**2].sqrt() / level).cpu().view(-1, size, size).numpy()
    for index, name in enumerate(names):
        panel = axes[0, index + 1]
        drawn = panel.imshow(deviation[index], vmin=0, vmax=deviation.max(), origin="lower")
        panel.set_title(f"{name}", fontsize=10)
        panel.set(xlabel="horizontal frequency", ylabel="vertical frequency" if index == 0 else "")
    figure.colorbar(drawn, ax=axes[0, 1 : len(names) + 1], label="allowed deviation / σ", fraction=0.02)
    axes[0, -1].plot(range(1, len(found.log_likelihood) + 1), found.log_likelihood, ".-")
    axes[0, -1].set_title("log-likelihood per patch, nats", fontsize=10)
    axes[0, -1].set_xlabel("iteration of the heads' EM")
    axes[0, -1].grid(alpha=0.3)
    return figure


def draw_head_maps(pilot: Tensor, shares: Tensor, grid: PatchGrid) -> Figure:
    """Responsibility of each head for every patch, beside the picture."""
    maps = head_maps(shares, grid).cpu().numpy()
    names = HEADS if len(maps) == len(HEADS) else tuple(f"head {h}" for h in range(len(maps)))
    figure, axes = new_figure(len(maps) + 1, width=2.7, height=2.7)
    axes[0, 0].imshow(pilot.clamp(0, 1).mean(0).cpu().numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes[0, 0].set_title("codebook's estimate", fontsize=10)
    for panel, values, name in zip(axes[0, 1:], maps, names, strict=True):
        drawn = panel.imshow(values, vmin=0, vmax=1, cmap="magma", interpolation="nearest")
        panel.set_title(f"{name}: {values.mean():.0%}", fontsize=10)
    for panel in axes[0]:
        panel.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axes[0, 1:], label="responsibility", fraction=0.02)
    return figure

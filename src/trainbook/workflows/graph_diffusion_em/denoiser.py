"""The whole denoiser: codebook, graph, diffusion, polish, each of which can be left out."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from trainbook.workflows.graph_diffusion_em.attention import Diffused, Heads, diffuse_by_attention
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.diffusion import diffuse
from trainbook.workflows.graph_diffusion_em.graph import (
    Graph,
    head_features,
    head_kernels,
    knn_graph,
    laplacian,
    num_candidates,
)
from trainbook.workflows.graph_diffusion_em.mixture import GaussianMixture, posterior_mean
from trainbook.workflows.graph_diffusion_em.patches import PatchGrid, aggregate, cut, mean_columns, overlay, patchify
from trainbook.workflows.graph_diffusion_em.polish import polish


@dataclass
class Denoised:
    """A denoised picture with what every part made of it; parts that were left out are missing.

    Attributes:
        image: (C, H, W).
        pilot: after the codebook.
        diffused: after the diffusion.
        graph: the one that the diffusion used.
        attention: of the last round.
    """

    image: Tensor
    pilot: Tensor
    diffused: Tensor | None = None
    graph: Graph | None = None
    attention: list[Diffused] = field(default_factory=list)


@torch.no_grad()
def denoise(config: Config, mixture: GaussianMixture, noisy: Tensor, sigma: float, time: Tensor | None = None) -> Denoised:
    """Denoise a picture with white Gaussian noise of known size.

    Args:
        config: which parts, and their settings.
        mixture: of clean patches.
        noisy: (C, H, W).
        sigma: in the picture's units.
        time: of heat, pagerank or explicit diffusion per coefficient, (d,).
    """
    pilot = codebook_estimate(mixture, noisy, sigma, config.patch_size, config.codebook_stride, config.codebook_rank)
    result = Denoised(pilot, pilot)
    if config.diffusion == "attention":
        _attend(config, noisy, sigma, result)
    elif config.diffusion != "none":
        _diffuse(config, noisy, sigma, time, result)
    if config.polish_passes:
        result.image = polish_scales(config, noisy, result.image, sigma)
    return result


def polish_scales(config: Config, noisy: Tensor, image: Tensor, sigma: float) -> Tensor:
    """Polish an estimate at coarse scales first: noise wider than a patch is narrower there, and each step costs a quarter.

    At scale n means over squares of f = 2^n pixels, whose noise is sigma / f, are polished; the change, interpolated, is added.
    Scales at which the picture holds too few patches are left out.

    Source: Facciolo et al. 2017, Conservative scale recomposition for multiscale denoising, for why; not their recomposition.
    """
    for scale in range(config.polish_scales, 0, -1):
        factor = 2**scale
        coarse = avg_pool2d(image, factor)
        if num_candidates(coarse, config.patch_size, config.search_radius) >= config.polish_neighbours:
            change = _polish(config, avg_pool2d(noisy, factor), coarse, sigma / factor) - coarse
            height, width = (length * factor for length in coarse.shape[1:])
            change = interpolate(change[None], (height, width), mode="bilinear", align_corners=False)
            image = image + pad(change, (0, image.shape[2] - width, 0, image.shape[1] - height), mode="replicate")[0]
    return _polish(config, noisy, image, sigma)


def _polish(config: Config, noisy: Tensor, image: Tensor, sigma: float) -> Tensor:
    """All passes at one scale, on the graph of the first: a new one for each adds nothing."""
    size = config.patch_size
    graph = knn_graph(image, size, config.polish_neighbours, config.search_radius, stride=config.polish_stride)
    z, grid = cut(noisy, size), PatchGrid.of(*noisy.shape[1:], size, 1, noisy.device)
    for _ in range(config.polish_passes):
        image = overlay(*polish(z, cut(image, size), graph, sigma), grid)
    return image


def codebook_estimate(mixture: GaussianMixture, noisy: Tensor, sigma: float, size: int, stride: int, rank: int = 0) -> Tensor:
    """Every patch's posterior mean under the mixture, its channel means kept, averaged with the posterior precisions."""
    z = patchify(noisy, size, stride)
    means = mean_columns(size, len(noisy)).to(z.device)
    estimate = z.clone()
    estimate[:, ~means], variance = posterior_mean(mixture, z[:, ~means], sigma, rank)
    share = float(means.float().mean())
    weights = 1 / ((1 - share) * variance + share * sigma**2)
    return aggregate(estimate, weights, PatchGrid.of(*noisy.shape[1:], size, stride, noisy.device))


def _attend(config: Config, noisy: Tensor, sigma: float, result: Denoised) -> None:
    size = config.patch_size
    z = patchify(noisy, size)
    heads = Heads.start(config.num_heads, size, len(noisy), sigma, config.search_radius, noisy)
    for _ in range(config.diffusion_rounds):
        graph = knn_graph(result.image, size, config.num_neighbours, config.search_radius, stride=config.graph_stride)
        centres = patchify(result.image, size)
        found = diffuse_by_attention(z, centres, graph, heads, sigma, config.head_em_steps, config.head_em_nodes)
        heads = found.heads
        result.image = result.diffused = aggregate(found.patches, 1 / found.variances.clamp(min=1e-12), graph.grid)
        result.graph = graph
        result.attention.append(found)


def _diffuse(config: Config, noisy: Tensor, sigma: float, time: Tensor | None, result: Denoised) -> None:
    if time is None:
        raise ValueError("heat, pagerank and explicit diffusion need a time per coefficient")
    size = config.patch_size
    graph = knn_graph(result.pilot, size, config.num_neighbours, config.search_radius)
    operator = patch_laplacian(result.pilot, graph, config.num_heads)
    patches = diffuse(operator, patchify(noisy, size), config.diffusion, time.to(noisy), tolerance=1e-4)
    result.image = result.diffused = aggregate(patches, noisy.new_ones(len(patches)), graph.grid)
    result.graph = graph


def patch_laplacian(pilot: Tensor, graph: Graph, num_heads: int) -> Tensor:
    """Laplacian of a graph with edges at every node: mean of the heads' kernels, or one kernel of the patches' distance."""
    if num_heads == 1:
        scale = graph.distances.median().clamp(min=1e-12)
        return laplacian(graph.neighbours, (-graph.distances / (2 * scale)).exp())
    return laplacian(graph.neighbours, head_kernels(head_features(pilot, graph.grid.size), graph).mean(0))

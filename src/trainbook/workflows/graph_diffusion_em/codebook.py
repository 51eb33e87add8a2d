"""The stages fitted by EM: the codebook of clean patches, and the diffusion times of a graph's coefficients."""

from typing import Any

import torch
from torch import Tensor, nn

from trainbook.data import Data
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.denoiser import codebook_estimate, patch_laplacian
from trainbook.workflows.graph_diffusion_em.diffusion import diffusion_log_likelihood, stiffness_step
from trainbook.workflows.graph_diffusion_em.graph import knn_graph
from trainbook.workflows.graph_diffusion_em.mixture import (
    GaussianMixture,
    codebook_mixture,
    em_step,
    kmeans_step,
    start_mixture,
)
from trainbook.workflows.graph_diffusion_em.noise import add_noise
from trainbook.workflows.graph_diffusion_em.objective import to_working
from trainbook.workflows.graph_diffusion_em.patches import mean_columns, patch_basis, patchify

KMEANS_START = 8  # iterations of k-means before EM
TIME_CROPS, TIME_STEPS = 6, 40  # graphs that the diffusion times are learned on, and iterations of EM
RIDGE = 1e-2  # e in Q = L + e I: what holds the graph's constant signal


class Iterations:
    """A stage of EM: how many iterations are done, kept in `TrainState.stateful`; the parameters are a module's buffers.

    Args:
        total_steps: of the stage.
    """

    def __init__(self, total_steps: int) -> None:
        self.total_steps, self.steps_done = total_steps, 0

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"steps_done": self.steps_done}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.steps_done = saved["steps_done"]


def training_patches(config: Config, data: Data) -> Tensor:
    """Coefficients of patches at random places of the training crops, without the channels' means; (N, d - C)."""
    crops, size = to_working(config, data.train["crops"]), config.patch_size
    generator = torch.Generator().manual_seed(config.seed)
    which = torch.arange(config.codebook_patches) % len(crops)
    places = torch.randint(crops.shape[2] - size + 1, (2, len(which)), generator=generator)
    which, rows, columns = (index.to(crops.device) for index in (which, *places))
    pixels = crops.unfold(2, size, 1).unfold(3, size, 1)[which, :, rows, columns]
    z = pixels.flatten(1) @ patch_basis(size, crops.shape[1]).to(crops).T
    return z[:, ~mean_columns(size, crops.shape[1]).to(z.device)].contiguous()


def start_codebook(config: Config, z: Tensor) -> GaussianMixture:
    """What EM, or k-means, starts from."""
    generator = torch.Generator().manual_seed(config.seed)
    floor = config.codebook_floor / 255
    if config.codebook == "mixture":
        return start_mixture(z, config.num_components, floor, KMEANS_START, generator)
    centres = z[torch.randperm(len(z), generator=generator)[: config.num_components].to(z.device)]
    return codebook_mixture(centres, z, floor)


def codebook_step(config: Config, mixture: GaussianMixture, z: Tensor) -> dict[str, float]:
    """One iteration in place; returns what was reached before it: log-likelihood in nats per patch, or the distortion."""
    if config.codebook == "mixture":
        return {"log_likelihood": em_step(mixture, z)}
    centres, distortion = kmeans_step(mixture.means, z)
    mixture.load_state_dict(codebook_mixture(centres, z, mixture.floor).state_dict())
    return {"distortion": distortion}


def kmeans_codebook(config: Config, z: Tensor) -> GaussianMixture:
    """The hard limit of EM on the same patches from the same start: what is left of the codebook without EM."""
    hard = config.model_copy(update={"codebook": "kmeans"})
    mixture = start_codebook(hard, z)
    for _ in range(config.em_iterations):
        codebook_step(hard, mixture, z)
    return mixture


class DiffusionTime(nn.Module):
    """Stiffness kappa of the graph prior per coefficient; sigma^2 kappa is the diffusion time."""

    def __init__(self, num_coefficients: int, device: str) -> None:
        super().__init__()
        self.register_buffer("stiffness", torch.ones(num_coefficients, dtype=torch.float64, device=device))

    def time(self, sigma: float) -> Tensor:
        """Learned diffusion time lambda = sigma^2 kappa, (d,)."""
        return sigma**2 * self.stiffness


@torch.no_grad()
def graph_spectra(config: Config, mixture: GaussianMixture, crops: Tensor, sigma: float) -> list[tuple[Tensor, Tensor]]:
    """For some crops: eigenvalues q of Q = L + e I and the noisy coefficients in the eigenbasis, float64.

    The graph is that of the codebook's estimate; it and the noise are functions of the seed.
    """
    generator = torch.Generator().manual_seed(config.seed)
    spectra = []
    for index in torch.linspace(0, len(crops) - 1, min(TIME_CROPS, len(crops))).long().tolist():
        clean = crops[index]
        noisy = add_noise(clean.cpu(), sigma, 0.0, generator).to(clean.device)
        pilot = codebook_estimate(mixture, noisy, sigma, config.patch_size, 1)
        graph = knn_graph(pilot, config.patch_size, config.num_neighbours, config.search_radius)
        values, vectors = torch.linalg.eigh(patch_laplacian(pilot, graph, config.num_heads).to_dense().double())
        y = patchify(noisy, config.patch_size).double()
        spectra.append((values.clamp(min=0) + RIDGE, vectors.T @ (y - y.mean(0))))
    return spectra


def time_step(module: DiffusionTime, spectra: list[tuple[Tensor, Tensor]], sigma: float) -> dict[str, float]:
    """One iteration of EM for the stiffness over all graphs, in place; the log-likelihood per coefficient before it.

    The M-step of several graphs, N_g / kappa_g = sum_n q (m^2 + v), adds up both sides.
    """
    numerator, denominator, total = 0, 0.0, 0.0
    for q, spectrum in spectra:
        total += float(diffusion_log_likelihood(q, spectrum, module.stiffness, sigma).sum())
        denominator = denominator + len(q) / stiffness_step(q, spectrum, module.stiffness, sigma)
        numerator += len(q)
    module.stiffness.copy_(numerator / denominator)
    return {"graph_log_likelihood": total / (numerator * len(module.stiffness))}

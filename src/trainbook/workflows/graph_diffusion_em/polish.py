"""A second pass over groups of similar patches: NL-Bayes, each group a Gaussian learned from the pilot estimate."""

# R groups of k patches, d coefficients

import torch
from torch import Tensor

from trainbook.layers import product
from trainbook.workflows.graph_diffusion_em.graph import Graph

CHUNK = 512  # groups at once


def group_posterior(pilot: Tensor, noisy: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Posterior mean of a group's patches under N(m, S), m and S being mean and covariance of their pilot estimates.

    x = m + S (S + sigma^2 I)^{-1} (z - m). With P the k centred pilot patches, S = P^T P / (k - 1), and by the push-through
    identity x = m + (z - m) P^T (P P^T + (k - 1) sigma^2 I)^{-1} P: a k x k system instead of a d x d one.

    Args:
        pilot, noisy: (R, k, d).
        sigma: of the noise.

    Returns:
        Patches (R, k, d), and their mean posterior variance per group, (R,).

    Source: Lebrun, Buades and Morel 2013, A nonlocal Bayesian image denoising algorithm, equation 2.13.
    """
    k, d = pilot.shape[1:]
    mean = pilot.mean(1, keepdim=True)
    centred = pilot - mean
    noise = (k - 1) * sigma**2
    loaded = product(centred, centred.mT)
    loaded.diagonal(dim1=1, dim2=2).add_(noise)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(loaded))
    estimate = product(product(product(noisy - mean, centred.mT), inverse), centred).add_(mean)
    freedom = k - noise * inverse.diagonal(dim1=1, dim2=2).sum(1)  # tr S (S + sigma^2 I)^-1
    return estimate, sigma**2 * (freedom + 1) / d


@torch.no_grad()
def polish(noisy: Tensor, pilot: Tensor, graph: Graph, sigma: float) -> tuple[Tensor, Tensor]:
    """Filter every node's group (itself and its neighbours) and add up what each patch got from all groups.

    Args:
        noisy, pilot: patches of stride 1, (N, d).
        graph: edges of R nodes; every pixel must lie in one of their patches.
        sigma: of the noise.

    Returns:
        Patches (N, d), and the sum of the precisions they were estimated with, (N,); 0 where no group has the patch.
    """
    total = torch.zeros_like(noisy)
    weights = noisy.new_zeros(len(noisy))
    members = torch.cat([graph.grid.nodes().unsqueeze(1), graph.neighbours], 1)
    for part in members.split(CHUNK):
        nodes, shape = part.flatten(), (*part.shape, -1)
        groups = (patches.index_select(0, nodes).view(shape) for patches in (pilot, noisy))
        estimate, variance = group_posterior(*groups, sigma)
        precision = 1 / variance
        total.index_add_(0, nodes, estimate.mul_(precision[:, None, None]).flatten(0, 1))
        weights.index_add_(0, nodes, precision.repeat_interleave(part.shape[1]))
    return total.div_(weights.clamp(min=1e-12).unsqueeze(1)), weights

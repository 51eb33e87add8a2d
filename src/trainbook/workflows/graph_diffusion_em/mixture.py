"""The codebook: a Gaussian mixture of patches fitted by exact EM under a noise floor; k-means as its hard limit."""

# N patches, K components, d coefficients (without the means of the channels)

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainbook.layers import product

CHUNK = 4096  # patches whose outer products are summed at once
ROWS = 512  # patches that are whitened at once, for all components: they stay in the cache
LEAST_RESPONSIBILITY = 1e-2  # components with less are left out of a posterior mean
LEAST_COUNT = 1e-8  # of patches; a component with fewer stays as it is, which is also optimal


@dataclass(frozen=True)
class Statistics:
    """What an E-step hands to the M-step: sums over patches, in float64.

    Attributes:
        count: sum_i r_ik, (K,).
        first: sum_i r_ik z_i, (K, d).
        second: sum_i r_ik z_i z_i^T, (K, d, d).
        log_likelihood: sum_i log p(z_i).
    """

    count: Tensor
    first: Tensor
    second: Tensor
    log_likelihood: float


class GaussianMixture(nn.Module):
    """p(z) = sum_k pi_k N(z; m_k, S_k), whose covariances are at least `floor`^2 I.

    Args:
        weights: pi, (K,).
        means: (K, d).
        covariances: S, (K, d, d).
        floor: standard deviation of the noise under which the patches were seen.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("weights", weights.clone())
        self.register_buffer("means", means.clone())
        self.register_buffer("covariances", covariances.clone())

    def log_joint(self, z: Tensor, extra_variance: float = 0.0) -> Tensor:
        """Log pi_k + log N(z_i; m_k, S_k + v I), with v added to the variance; (N, d) -> (N, K)."""
        K, d = self.means.shape
        eye = torch.eye(d, dtype=torch.float64, device=z.device)
        factor = torch.linalg.cholesky(self.covariances.double() + extra_variance * eye)
        whitening = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)  # L^-1
        offset = whitening @ self.means.double().unsqueeze(2)
        log_scale = self.weights.double().log() - factor.diagonal(dim1=1, dim2=2).log().sum(1)
        log_scale = (log_scale - 0.5 * math.log(2 * math.pi) * d).to(z)
        # L^-1 (z - m) of all components as one product per half, the upper half of L^-1 being zero on the right. A column of ones
        # takes off the means. Rows stand coefficient by coefficient, so that squares are summed over whole vectors of components.
        halves = []
        for begin, end in ((0, d // 2), (d // 2, d)):
            rows = torch.cat([-offset, whitening], 2)[:, begin:end, : end + 1]
            halves.append(rows.transpose(0, 1).reshape(1, -1, end + 1).to(z).transpose(1, 2).contiguous())
        z = torch.cat([z.new_ones(len(z), 1), z], 1)
        found = []
        for part in z.split(ROWS):
            white = [product(part[None, :, : half.shape[1]], half)[0].view(len(part), -1, K) for half in halves]
            squares = sum(one.square_().sum(1) for one in white)
            found.append(torch.add(log_scale, squares, alpha=-0.5))
        return torch.cat(found)

    def low_rank_log_joint(self, z: Tensor, spectrum: tuple[Tensor, Tensor], extra_variance: float, rank: int) -> Tensor:
        """`log_joint` of the mixture whose components keep q directions each, the rest being white; (N, d) -> (N, K).

        `spectrum` is that of the covariances, as torch.linalg.eigh gives it.

        With eigenvectors v of S_k + v I, the q largest eigenvalues l and the mean t of the others,
        (z - m)^T S^-1 (z - m) = |z - m|^2 / t - sum_q (1/t - 1/l) (v . (z - m))^2: q products a component, not d / 2.

        Source: Tipping and Bishop 1999, Mixtures of probabilistic principal component analysers, section 3.
        """
        K, d = self.means.shape
        values, vectors, means = spectrum[0].double() + extra_variance, spectrum[1], self.means.double()
        white, kept = values[:, : d - rank].mean(1), values[:, d - rank :]
        directions = vectors[:, :, d - rank :].double() * (1 / white[:, None] - 1 / kept).clamp(min=0).sqrt().unsqueeze(1)
        offset = (means.unsqueeze(1) @ directions).transpose(0, 2).reshape(1, -1)
        log_scale = self.weights.double().log() - 0.5 * (kept.log().sum(1) + (d - rank) * white.log() + d * math.log(2 * math.pi))
        # One product: rows of directions as in `log_joint`, then 2 m . z / t - |m|^2 / t of all components.
        flat = torch.cat([directions.permute(1, 2, 0).reshape(d, -1), 2 * means.T / white], 1)
        flat = torch.cat([torch.cat([-offset, -(means.square().sum(1) / white)[None]], 1), flat]).to(z)
        z, lengths = torch.cat([z.new_ones(len(z), 1), z], 1), z.square().sum(1, keepdim=True)
        found = []
        for part, length in zip(z.split(ROWS), lengths.split(ROWS), strict=True):
            rows = product(part.unsqueeze(0), flat.unsqueeze(0))[0]
            squares = rows[:, : rank * K].view(len(part), rank, K).square_().sum(1)
            found.append(torch.add(log_scale.to(z), squares.add_(rows[:, rank * K :]) - length / white.to(z), alpha=0.5))
        return torch.cat(found)


def responsibilities(log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """r_ik = softmax_k, (N, K), and log p(z_i), (N,), both in float64."""
    log_joint = log_joint.double()
    log_density = log_joint.logsumexp(1)
    return (log_joint - log_density.unsqueeze(1)).exp_(), log_density


def expectation(mixture: GaussianMixture, z: Tensor) -> Statistics:
    """E-step over all patches, (N, d)."""
    K, d = mixture.means.shape
    r, log_density = responsibilities(mixture.log_joint(z))
    # What a component does not answer for, less than rounding of its own count, is left out. The sums are made in the precision
    # of the patches, chunk by chunk, and added up in float64; a column of ones gives those of first order.
    count, shares = r.sum(0), r.T.to(z.dtype).contiguous()
    least = torch.finfo(z.dtype).eps * count / len(z)
    ones = torch.cat([z, z.new_ones(len(z), 1)], 1)
    sums = z.new_zeros(K, d, d + 1, dtype=torch.float64)
    for k in range(K):
        for part in (shares[k] > least[k]).nonzero().squeeze(1).split(CHUNK):
            near = ones[part]
            weighted = near[:, :d] * shares[k, part, None]
            sums[k] += product(weighted.T.unsqueeze(0), near.unsqueeze(0))[0]
    return Statistics(count, sums[:, :, d], sums[:, :, :d], float(log_density.sum()))


@torch.no_grad()
def maximization(mixture: GaussianMixture, statistics: Statistics) -> None:
    """M-step in place: the exact maximum under S_k >= floor^2 I.

    pi_k = n_k / N, m_k = sum r z / n_k, S_k = V max(Lambda, floor^2) V^T of the weighted scatter V Lambda V^T. The clipping is
    the constrained optimum, not a patch on it, so EM stays monotone.
    """
    n = statistics.count
    alive = n > LEAST_COUNT
    means = statistics.first[alive] / n[alive, None]
    scatter = statistics.second[alive] / n[alive, None, None] - means.unsqueeze(2) * means.unsqueeze(1)
    values, vectors = torch.linalg.eigh(scatter)
    values = values.clamp(min=mixture.floor**2)
    mixture.weights.copy_(n / n.sum())
    mixture.means[alive] = means.to(mixture.means)
    mixture.covariances[alive] = (vectors * values.unsqueeze(1) @ vectors.mT).to(mixture.covariances)


@torch.no_grad()
def em_step(mixture: GaussianMixture, z: Tensor) -> float:
    """One iteration of EM in place; returns the mean log-likelihood per patch before it, in nats."""
    statistics = expectation(mixture, z)
    maximization(mixture, statistics)
    return statistics.log_likelihood / len(z)


@torch.no_grad()
def kmeans_step(centres: Tensor, z: Tensor) -> tuple[Tensor, float]:
    """One iteration of k-means: EM's hard limit, S_k = c I with c -> 0. The distortion never rises.

    Args:
        centres: (K, d).
        z: (N, d).

    Returns:
        New centres (those without patches stay), and the mean squared distance to the nearest old one, per coefficient.
    """
    nearest, distortion = assign(centres, z)
    count = torch.bincount(nearest, minlength=len(centres)).to(z).unsqueeze(1)
    total = torch.zeros_like(centres).index_add_(0, nearest, z)
    return torch.where(count > 0, total / count.clamp(min=1), centres), distortion


def assign(centres: Tensor, z: Tensor) -> tuple[Tensor, float]:
    """Number of the nearest centre, (N,), and the mean squared distance to it per coefficient."""
    squares = centres.square().sum(1)
    scores = torch.cat([torch.addmm(squares, part, centres.T, alpha=-2) for part in z.split(16 * CHUNK)])
    least, nearest = scores.min(1)
    return nearest, float((least.double() + z.double().square().sum(1)).mean()) / z.shape[1]


@torch.no_grad()
def start_mixture(z: Tensor, num_components: int, floor: float, iterations: int, generator: torch.Generator) -> GaussianMixture:
    """A mixture to start EM from: k-means from random patches, then the covariances of its clusters.

    Args:
        z: (N, d), N at least `num_components`.
        num_components: K.
        floor: of the mixture.
        iterations: of k-means.
        generator: of the random patches, on the CPU.
    """
    K, d = num_components, z.shape[1]
    centres = z[torch.randperm(len(z), generator=generator)[:K].to(z.device)].clone()
    for _ in range(iterations):
        centres, _ = kmeans_step(centres, z)
    nearest, _ = assign(centres, z)
    mixture = codebook_mixture(centres, z, floor)
    # Each cluster counts as if it had also seen d patches spread like all of them: a few patches do not span d dimensions.
    pooled = (z - centres[nearest]).T @ (z - centres[nearest]) / len(z)
    for k in range(K):
        members = z[nearest == k] - centres[k]
        covariance = ((members.T @ members + d * pooled) / (len(members) + d)).double()
        values, vectors = torch.linalg.eigh(covariance)
        mixture.covariances[k] = (vectors * values.clamp(min=floor**2) @ vectors.T).to(z)
    return mixture


@torch.no_grad()
def codebook_mixture(centres: Tensor, z: Tensor, floor: float) -> GaussianMixture:
    """The mixture that a k-means codebook stands for: S_k = c I with c the distortion, pi_k the share of its patches."""
    nearest, distortion = assign(centres, z)
    weights = torch.bincount(nearest, minlength=len(centres)).to(z).clamp(min=0.5)
    covariance = max(distortion, floor**2) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return GaussianMixture(weights / weights.sum(), centres, covariance.repeat(len(centres), 1, 1), floor)


@torch.no_grad()
def posterior_mean(mixture: GaussianMixture, z: Tensor, sigma: float, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and mean variance of clean patches given noisy ones, z = x + N(0, sigma^2 I).

    E[x | z] = sum_k r_k [m_k + Sx_k (Sx_k + sigma^2 I)^-1 (z - m_k)] with Sx_k = S_k - floor^2 I. The variance is that within
    components, sum_k r_k tr(Sx_k - Sx_k (Sx_k + sigma^2 I)^-1 Sx_k) / d.

    Args:
        mixture: of clean patches.
        z: (N, d).
        sigma: in the patches' units, positive.
        rank: directions of each component that the responsibilities look at; 0 or d takes all.

    Returns:
        (N, d) and (N,).
    """
    K, d = mixture.means.shape
    extra = sigma**2 - mixture.floor**2
    values, vectors = spectrum = torch.linalg.eigh(mixture.covariances)
    r = (mixture.low_rank_log_joint(z, spectrum, extra, rank) if 0 < rank < d else mixture.log_joint(z, extra)).softmax(1)
    r = torch.where(r >= LEAST_RESPONSIBILITY, r, 0)
    r /= r.sum(1, keepdim=True)
    clean = (values - mixture.floor**2).clamp(min=0)
    kept = clean / (clean + sigma**2)
    gain = vectors * kept.unsqueeze(1) @ vectors.mT
    offset = mixture.means.unsqueeze(1) - mixture.means.unsqueeze(1) @ gain
    affine = torch.cat([gain, offset], 1).to(z)  # x = z gain + offset
    shares, ones = r.T.contiguous(), torch.cat([z, z.new_ones(len(z), 1)], 1)
    estimate = torch.zeros_like(z)
    for k in range(K):
        rows = shares[k].nonzero().squeeze(1)
        if len(rows):
            estimate.index_add_(0, rows, (ones[rows] * shares[k, rows, None]) @ affine[k])
    variance = sigma**2 * kept.mean(1)
    return estimate, r @ variance.to(z)

"""Four-head attention as an E-step: its weights are posterior responsibilities of a mixture over a patch's neighbours."""

# N nodes, k neighbours, H heads, d coefficients

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainbook.workflows.graph_diffusion_em.graph import HEADS, Graph
from trainbook.workflows.graph_diffusion_em.patches import PatchGrid

CHUNK = 1024  # nodes at once
SMALL, LARGE = 0.1, 2.0  # variances that a head starts with outside and inside its own coefficients, in units of sigma^2
NEWTON_STEPS = 4


@dataclass(frozen=True)
class Heads:
    """Parameters of p(z_i | c) = sum_h rho_h sum_j pi^h_ij N(z_i; c_j, diag(t_h) + sigma^2 I).

    pi^h_ij is proportional to exp(-a_h s_ij) over the neighbours of i, with s the squared distance of the corners in pixels.

    Attributes:
        shares: rho, (H,).
        variances: t, (H, d), non-negative.
        narrowness: a = 1 / (2 l^2), (H,), non-negative.
    """

    shares: Tensor
    variances: Tensor
    narrowness: Tensor

    @classmethod
    def start(cls, num_heads: int, size: int, channels: int, sigma: float, radius: int, like: Tensor) -> "Heads":
        """Four named heads, each free in its own coefficients; or any other number, free in all, told apart by their size.

        texture: the higher half of the cosines; structure: the lower half; colour: means and chroma; spatial: none, but near.
        """
        d = channels * size**2
        variances = like.new_full((num_heads, d), SMALL)
        narrowness = like.new_full((num_heads,), 0.5 / radius**2)
        if num_heads == len(HEADS):
            frequency = torch.arange(size, device=like.device)
            band = (frequency[:, None] + frequency).flatten()  # of the luminance
            luminance = torch.arange(d, device=like.device) < size**2
            variances[0, : size**2][band >= size] = LARGE
            variances[1, : size**2][(band > 0) & (band < size)] = LARGE
            variances[2, 0] = LARGE
            variances[2, ~luminance] = LARGE
            narrowness[3] = 0.5 / (radius / 4) ** 2
        else:
            variances *= LARGE / SMALL * 0.5 ** torch.arange(num_heads, device=like.device).unsqueeze(1)
        shares = like.new_full((num_heads,), 1 / num_heads)
        return cls(shares, variances * sigma**2, narrowness)


def squared_offsets(graph: Graph) -> Tensor:
    """s_ij: squared distance of the corners of node i and its neighbour j in pixels, (R, k) float32."""
    width = graph.grid.width - graph.grid.size + 1
    here, there = graph.grid.positions(), graph.neighbours
    rows, columns = there // width - here[:, :1], there % width - here[:, 1:]
    return (rows.square() + columns.square()).float()


def attend(z: Tensor, centres: Tensor, squares: Tensor, heads: Heads, sigma: float) -> tuple[Tensor, Tensor]:
    """E-step: attention weights r_ijh = softmax over (j, h), and log p(z_i | c) in float64.

    Args:
        z: noisy patches, (N, d).
        centres: of each one's neighbours, (N, k, d).
        squares: s, (N, k).
        heads: parameters.
        sigma: of the noise.

    Returns:
        (N, k, H) and (N,).
    """
    total = heads.variances + sigma**2  # (H, d)
    prior = torch.log_softmax(-squares.unsqueeze(2) * heads.narrowness, 1) + heads.shares.log()
    distance = (z.unsqueeze(1) - centres).square_() @ (1 / total).T  # (N, k, H)
    scale = (2 * math.pi * total).log().sum(1)
    joint = (prior - 0.5 * (distance + scale)).flatten(1).double()
    log_density = joint.logsumexp(1)
    weights = (joint - log_density.unsqueeze(1)).exp_().to(z)
    return weights.view(*squares.shape, -1), log_density


@torch.no_grad()
def heads_step(z: Tensor, centres: Tensor, squares: Tensor, heads: Heads, sigma: float) -> tuple[Heads, float]:
    """One step of EM for the heads, the centres held fixed; returns new heads and the log-likelihood per patch of the old ones.

    rho_h = sum r / N; t_hc = max(0, sum r (z_ic - c_jc)^2 / sum r - sigma^2), the optimum under t >= 0; a_h by Newton steps on a
    concave function, each halved until it does not fall. So the log-likelihood never falls. Shapes as in `attend`.
    """
    H = len(heads.shares)
    count = z.new_zeros(H, dtype=torch.float64)
    scatter = z.new_zeros(H, z.shape[1], dtype=torch.float64)
    weights, total = [], 0.0
    for part in torch.arange(len(z), device=z.device).split(CHUNK):
        r, log_density = attend(z[part], centres[part], squares[part], heads, sigma)
        difference = (z[part].unsqueeze(1) - centres[part]).square_().flatten(0, 1)
        scatter += r.flatten(0, 1).T @ difference
        count += r.sum((0, 1))
        total += float(log_density.sum())
        weights.append(r)
    r = torch.cat(weights)
    alive = count.unsqueeze(1) > 1e-8
    variances = torch.where(alive, scatter / count.clamp(min=1e-8).unsqueeze(1) - sigma**2, heads.variances).clamp(min=0)
    narrowness = torch.stack([_narrowness(r[..., h], squares, heads.narrowness[h]) for h in range(H)])
    shares = (count / len(z)).clamp(min=1e-30)
    return Heads(shares.to(z), variances.to(z), narrowness), total / len(z)


def _narrowness(r: Tensor, squares: Tensor, start: Tensor) -> Tensor:
    """Maximum over a >= 0 of sum_ij r_ij log softmax_j(-a s_ij), which is concave; never below its value at the start."""

    def objective(a: Tensor) -> Tensor:
        return (r * torch.log_softmax(-a * squares, 1)).double().sum()

    a, value = start, objective(start)
    mass = r.sum(1)
    for _ in range(NEWTON_STEPS):
        pi = torch.softmax(-a * squares, 1)
        mean = (pi * squares).sum(1)
        slope = (mass * mean - (r * squares).sum(1)).sum()
        curvature = (mass * ((pi * squares.square()).sum(1) - mean.square())).sum().clamp(min=1e-12)
        step = slope / curvature
        for _ in range(20):
            proposal = (a + step).clamp(min=0)
            found = objective(proposal)
            if found >= value:
                a, value = proposal, found
                break
            step = step / 2
    return a


@torch.no_grad()
def denoise_patches(z: Tensor, centres: Tensor, squares: Tensor, heads: Heads, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior mean of clean patches: x_i = sum_jh r_ijh [c_j + g_h (z_i - c_j)] with g_h = t_h / (t_h + sigma^2).

    With one head of equal variances this is (1 - a) A c + a z, a = t / (t + sigma^2): one step of approximate personalised
    PageRank with a learned restart. Per coefficient it is a convex combination of the centres and the noisy patch.

    Returns:
        Patches (N, d), their mean posterior variance (N,), and the share of every head in each (N, H).
    """
    gain = heads.variances / (heads.variances + sigma**2)
    r, _ = attend(z, centres, squares, heads, sigma)
    share = r.sum(1)  # (N, H)
    means = r.transpose(1, 2) @ centres  # sum_j r c, (N, H, d)
    estimate = (means * (1 - gain)).sum(1) + z * (share @ gain)
    return estimate, share @ (sigma**2 * gain.mean(1)), share


@dataclass(frozen=True)
class Diffused:
    """What attention made of a picture's patches: estimates, variances and shares of the heads, and what was learned."""

    patches: Tensor
    variances: Tensor
    shares: Tensor
    heads: Heads
    log_likelihood: list[float]


@torch.no_grad()
def diffuse_by_attention(
    noisy: Tensor, pilot: Tensor, graph: Graph, heads: Heads, sigma: float, em_steps: int, em_nodes: int
) -> Diffused:
    """Learn the heads on a part of the nodes, then take one diffusion step c <- x at all of them.

    Args:
        noisy, pilot: patches of stride 1, (all nodes, d).
        graph: edges of R nodes.
        heads: to start from.
        sigma: of the noise.
        em_steps: iterations of EM.
        em_nodes: evenly spaced nodes it looks at; 0 takes all.
    """
    nodes, squares = graph.grid.nodes(), squared_offsets(graph).to(noisy)
    step = max(1, len(nodes) // em_nodes) if em_nodes else 1
    looked = torch.arange(0, len(nodes), step, device=noisy.device)
    trace = []
    if em_steps:
        z, centres = noisy[nodes[looked]], pilot[graph.neighbours[looked]]
        for _ in range(em_steps):
            heads, value = heads_step(z, centres, squares[looked], heads, sigma)
            trace.append(value)
    patches, variances, shares = [], [], []
    for part in torch.arange(len(nodes), device=noisy.device).split(CHUNK):
        found = denoise_patches(noisy[nodes[part]], pilot[graph.neighbours[part]], squares[part], heads, sigma)
        for parts, one in zip((patches, variances, shares), found, strict=True):
            parts.append(one)
    return Diffused(torch.cat(patches), torch.cat(variances), torch.cat(shares), heads, trace)


def head_maps(shares: Tensor, grid: PatchGrid) -> Tensor:
    """Shares of the heads as pictures, one value per node; (N, H) -> (H, rows, columns)."""
    return shares.T.reshape(-1, len(grid.rows), len(grid.columns))

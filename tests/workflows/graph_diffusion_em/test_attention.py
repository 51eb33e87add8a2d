"""Attention as an E-step: against direct formulas, and its EM ascends."""

import itertools
from dataclasses import replace

import pytest
import torch

from trainbook.workflows.graph_diffusion_em.attention import (
    Heads,
    attend,
    denoise_patches,
    diffuse_by_attention,
    head_maps,
    heads_step,
    squared_offsets,
)
from trainbook.workflows.graph_diffusion_em.diffusion import appnp
from trainbook.workflows.graph_diffusion_em.graph import knn_graph
from trainbook.workflows.graph_diffusion_em.patches import patchify

N, K, H, D = 40, 6, 4, 5


def problem(seed, sigma=0.4):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=g, dtype=torch.float64)

    centres = draw(N, K, D) * 2
    z = centres[:, 0] + sigma * torch.randn(N, D, generator=g, dtype=torch.float64) * (1 + draw(N, 1))
    squares = (draw(N, K) * 40).round()
    shares = draw(H) + 0.1
    return z, centres, squares, Heads(shares / shares.sum(), draw(H, D), draw(H) * 0.1), sigma


def direct(z, centres, squares, heads, sigma):
    """Joint density by loops."""
    joint = torch.zeros(N, K, H, dtype=torch.float64)
    for i in range(N):
        for h in range(H):
            prior = torch.exp(-heads.narrowness[h] * squares[i])
            prior = prior / prior.sum()
            for j in range(K):
                normal = torch.distributions.Normal(centres[i, j], (heads.variances[h] + sigma**2).sqrt())
                joint[i, j, h] = heads.shares[h] * prior[j] * normal.log_prob(z[i]).sum().exp()
    return joint


def test_weights_and_density_are_bayes_rule():
    args = problem(0)
    joint = direct(*args)
    r, log_density = attend(*args)
    torch.testing.assert_close(r, joint / joint.sum((1, 2), keepdim=True))
    torch.testing.assert_close(log_density, joint.sum((1, 2)).log())
    torch.testing.assert_close(r.sum((1, 2)), torch.ones(N, dtype=torch.float64))


def test_patches_are_the_posterior_mean_by_its_formula():
    z, centres, _squares, heads, sigma = args = problem(1)
    joint = direct(*args)
    r = joint / joint.sum((1, 2), keepdim=True)
    gain = heads.variances / (heads.variances + sigma**2)
    expected = torch.zeros(N, D, dtype=torch.float64)
    for h in range(H):
        for j in range(K):
            expected += r[:, j, h, None] * (centres[:, j] + gain[h] * (z - centres[:, j]))
    found, variance, share = denoise_patches(*args)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(share, r.sum(1))
    torch.testing.assert_close(variance, (share * (sigma**2 * gain.mean(1))).sum(1))
    low = torch.minimum(centres.amin(1), z)
    assert ((found >= low - 1e-12) & (found <= torch.maximum(centres.amax(1), z) + 1e-12)).all()  # a convex combination


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0])
def test_em_for_the_heads_never_lowers_the_likelihood(sigma):
    """60 random problems of 15 iterations."""
    for seed in range(20):
        z, centres, squares, heads, _ = problem(seed, sigma)
        values = []
        for _ in range(15):
            heads, value = heads_step(z, centres, squares, heads, sigma)
            values.append(value)
        assert all(b - a >= -1e-10 * abs(b) for a, b in itertools.pairwise(values)), seed
        assert values[-1] > values[0]
        assert float(heads.variances.min()) >= 0
        assert float(heads.shares.sum()) == pytest.approx(1)


def test_a_wrong_variance_is_noticed():
    fell = 0
    for seed in range(20):
        z, centres, squares, heads, sigma = problem(seed)
        values = []
        for _ in range(15):
            heads, value = heads_step(z, centres, squares, heads, sigma)
            heads = replace(heads, variances=heads.variances + sigma**2)  # the noise counted twice
            values.append(value)
        fell += any(b < a - 1e-10 * abs(b) for a, b in itertools.pairwise(values))
    assert fell >= 12


def test_the_m_step_is_the_optimum_by_gradient():
    """At a fixed point the gradient of the likelihood is 0 where the bounds leave it free."""
    z, centres, squares, heads, sigma = problem(3)
    for _ in range(800):
        heads, _ = heads_step(z, centres, squares, heads, sigma)
    leaves = [t.clone().requires_grad_() for t in (heads.shares.log(), heads.variances, heads.narrowness)]
    _, log_density = attend(z, centres, squares, Heads(leaves[0].softmax(0), leaves[1], leaves[2]), sigma)
    log_density.mean().backward()
    assert float(leaves[0].grad.abs().max()) < 1e-4
    used = heads.shares > 1e-3
    assert float(leaves[1].grad[(heads.variances > 1e-6) & used.unsqueeze(1)].abs().max()) < 1e-3
    assert float(leaves[1].grad[heads.variances == 0].clamp(min=0).sum()) < 1e-3  # at the bound it points outwards


def test_gradients_are_those_of_finite_differences():
    z, centres, squares, heads, sigma = (part[:3] if torch.is_tensor(part) else part for part in problem(4))

    def log_likelihood(z, centres, variances, narrowness):
        return attend(z, centres, squares, Heads(heads.shares, variances, narrowness), sigma)[1]

    inputs = tuple(t.clone().requires_grad_() for t in (z, centres, heads.variances, heads.narrowness))
    assert torch.autograd.gradcheck(log_likelihood, inputs)


def test_one_isotropic_head_is_a_step_of_approximate_pagerank():
    z, _, _, _, sigma = problem(5)
    t, a = 0.3, 0.3 / (0.3 + sigma**2)
    neighbours = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i))[:K] for i in range(N)])
    c = torch.rand(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    heads = Heads(torch.ones(1).double(), torch.full((1, D), t, dtype=torch.float64), torch.zeros(1).double())
    squares = torch.zeros(N, K, dtype=torch.float64)
    r, _ = attend(z, c[neighbours], squares, heads, sigma)
    affinity = torch.zeros(N, N, dtype=torch.float64).scatter(1, neighbours, r[..., 0])
    found, _, _ = denoise_patches(z, c[neighbours], squares, heads, sigma)
    torch.testing.assert_close(found, (1 - a) * (affinity @ c) + a * z)
    torch.testing.assert_close(appnp(affinity, z, a, 1), (1 - a) * (affinity @ z) + a * z)


def test_the_order_of_neighbours_and_nodes_does_not_matter():
    z, centres, squares, heads, sigma = problem(6)
    nodes, order = torch.randperm(N), torch.randperm(K)
    found = denoise_patches(z, centres, squares, heads, sigma)
    other = denoise_patches(z[nodes], centres[nodes][:, order], squares[nodes][:, order], heads, sigma)
    for one, another in zip(found, other, strict=True):
        torch.testing.assert_close(one[nodes], another)


def test_named_heads_start_free_in_their_own_coefficients():
    heads = Heads.start(4, 8, 3, 0.1, 10, torch.zeros(1, dtype=torch.float64))
    free = heads.variances > 0.01
    assert free[:3].sum(0).tolist() == [1] * 192  # each coefficient is one head's
    assert not free[3].any()
    assert heads.narrowness[3] > heads.narrowness[0]
    assert free[2].nonzero().squeeze(1).tolist() == [0, *range(64, 192)]
    one = Heads.start(1, 8, 1, 0.1, 10, torch.zeros(1, dtype=torch.float64))
    assert one.variances.unique().numel() == 1


def test_a_flat_picture_is_smoothed_and_heads_share_every_node():
    g = torch.Generator().manual_seed(0)
    noisy = 0.5 + 0.1 * torch.randn(1, 40, 40, generator=g, dtype=torch.float64)
    pilot = torch.full_like(noisy, 0.5) + 0.01 * torch.randn(1, 40, 40, generator=g, dtype=torch.float64)
    graph = knn_graph(pilot, 8, 8, 6, stride=3)
    squares = squared_offsets(graph)
    assert 1 <= float(squares.min()) <= float(squares.max()) <= 72
    start = Heads.start(4, 8, 1, 0.1, 6, noisy)
    found = diffuse_by_attention(patchify(noisy, 8), patchify(pilot, 8), graph, start, 0.1, 8, 0)
    assert all(b >= a - 1e-9 for a, b in zip(found.log_likelihood, found.log_likelihood[1:], strict=False))
    clean = torch.full_like(noisy, 0.5)
    error = (found.patches - patchify(clean, 8, 3)).square().mean()
    assert float(error) < 0.05 * 0.1**2
    torch.testing.assert_close(found.shares.sum(1), torch.ones(len(found.shares), dtype=torch.float64))
    assert head_maps(found.shares, graph.grid).shape == (4, len(graph.grid.rows), len(graph.grid.columns))

"""Exact EM under a noise floor: it ascends, and to the right place."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture as Peer

from trainbook.workflows.graph_diffusion_em import mixture as module
from trainbook.workflows.graph_diffusion_em.mixture import (
    GaussianMixture,
    Statistics,
    assign,
    codebook_mixture,
    em_step,
    expectation,
    kmeans_step,
    maximization,
    posterior_mean,
    responsibilities,
    start_mixture,
)

ROUNDING = 1e-10  # of the log-likelihood


def problem(seed, N=60, K=3, d=4, floor=0.3):
    """Random patches and a random mixture to start from, in float64."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(N, d, generator=g, dtype=torch.float64) * torch.rand(d, generator=g, dtype=torch.float64)
    z[: N // 2] += torch.randn(d, generator=g, dtype=torch.float64)
    root = torch.randn(K, d, d, generator=g, dtype=torch.float64)
    weights = torch.rand(K, generator=g, dtype=torch.float64) + 0.1
    covariances = root @ root.mT + floor**2 * torch.eye(d, dtype=torch.float64)
    return z, GaussianMixture(weights / weights.sum(), z[:K], covariances, floor)


def likelihoods(z, mixture, iterations, step=em_step):
    return [step(mixture, z) for _ in range(iterations)]


def falls(values):
    return [i for i in range(1, len(values)) if values[i] - values[i - 1] < -ROUNDING * abs(values[i])]


@pytest.mark.parametrize("floor", [1e-3, 0.3, 1.0])
def test_the_log_likelihood_never_falls(floor):
    """210 random problems of 20 iterations; with the highest floor most directions are clipped."""
    for seed in range(70):
        z, mixture = problem(seed, floor=floor)
        values = likelihoods(z, mixture, 20)
        assert not falls(values), (seed, falls(values))
        assert values[-1] > values[0]
        assert float(torch.linalg.eigvalsh(mixture.covariances).min()) >= floor**2 * (1 - 1e-9)


@pytest.mark.parametrize("broken", ["mean", "floor"])
def test_a_broken_m_step_is_noticed(broken):
    def step(mixture, z):
        statistics = expectation(mixture, z)
        maximization(mixture, statistics)
        if broken == "mean":
            mixture.means += 0.1
        else:  # added where it should bound
            mixture.covariances += 0.3 * torch.eye(z.shape[1], dtype=z.dtype)
        return statistics.log_likelihood / len(z)

    assert sum(bool(falls(likelihoods(*problem(seed), 20, step))) for seed in range(20)) >= 15


def test_the_e_step_is_bayes_rule_and_its_statistics_are_sums():
    z, mixture = problem(5)
    density = np.array([
        w * multivariate_normal(m, S).pdf(z.numpy())
        for w, m, S in zip(mixture.weights.tolist(), mixture.means.numpy(), mixture.covariances.numpy(), strict=True)
    ]).T  # fmt: skip
    r, log_density = responsibilities(mixture.log_joint(z))
    torch.testing.assert_close(r, torch.from_numpy(density / density.sum(1, keepdims=True)))
    torch.testing.assert_close(log_density, torch.from_numpy(np.log(density.sum(1))))
    statistics = expectation(mixture, z)
    torch.testing.assert_close(statistics.count, r.sum(0))
    torch.testing.assert_close(statistics.first, torch.einsum("nk,ni->ki", r, z))
    torch.testing.assert_close(statistics.second, torch.einsum("nk,ni,nj->kij", r, z, z))


def test_statistics_do_not_depend_on_the_chunks(monkeypatch):
    z, mixture = problem(6)
    whole = expectation(mixture, z)
    monkeypatch.setattr(module, "CHUNK", 7)
    torch.testing.assert_close(expectation(mixture, z).second, whole.second)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_patches_left_out_of_a_component_are_within_rounding(dtype, tolerance):
    """Components far apart, so that most responsibilities are tiny: the sums are those over all patches."""
    z, mixture = problem(14, N=500, K=6, d=7)
    z, mixture = (3 * z).to(dtype), mixture.to(dtype)
    mixture.means.copy_(z[:6])
    r, _ = responsibilities(mixture.log_joint(z))
    assert 0.05 < float((r < torch.finfo(dtype).eps * r.sum(0) / len(z)).double().mean()) < 0.95
    statistics, z = expectation(mixture, z), z.double()
    torch.testing.assert_close(statistics.first, r.T @ z, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(statistics.second, torch.einsum("nk,ni,nj->kij", r, z, z), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rank", [0, 2, 5])
def test_a_low_rank_is_the_mixture_whose_small_eigenvalues_are_their_mean(rank):
    z, mixture = problem(15, K=4, d=6)
    expected, spectrum = [], torch.linalg.eigh(mixture.covariances)
    for weight, mean, covariance in zip(mixture.weights, mixture.means, mixture.covariances, strict=True):
        values, vectors = torch.linalg.eigh(covariance + 0.2 * torch.eye(6))
        values[: 6 - rank] = values[: 6 - rank].mean()
        normal = multivariate_normal(mean.numpy(), (vectors * values @ vectors.T).numpy())
        expected.append(torch.from_numpy(normal.logpdf(z.numpy())) + weight.log())
    found = mixture.low_rank_log_joint(z, spectrum, 0.2, rank)
    torch.testing.assert_close(found, torch.stack(expected, 1))


def test_the_posterior_mean_of_all_directions_is_that_of_high_rank():
    """With all but one direction kept nothing is approximated; with few the estimate differs, but is no worse than the noise."""
    z, mixture = problem(16, N=400, K=5, d=8)
    exact, variance = posterior_mean(mixture, z, 0.5)
    for found, expected in zip(posterior_mean(mixture, z, 0.5, 7), (exact, variance), strict=True):
        torch.testing.assert_close(found, expected)
    error = (posterior_mean(mixture, z, 0.5, 2)[0] - exact).square().mean()
    assert 1e-8 < float(error) < 0.5**2


def test_the_m_step_is_the_constrained_optimum():
    """No random admissible parameters near it, and none found by gradient, have a larger expected log-likelihood."""
    z, mixture = problem(7, d=2, K=2, floor=0.6)
    statistics = expectation(mixture, z)

    def expected(weights, means, covariances):
        total = 0.0
        for k in range(2):
            n, first, second = statistics.count[k], statistics.first[k], statistics.second[k]
            scatter = second - torch.outer(first, means[k]) - torch.outer(means[k], first) + n * torch.outer(means[k], means[k])
            total += n * weights[k].log() - 0.5 * n * covariances[k].logdet()
            total -= 0.5 * (torch.linalg.inv(covariances[k]) * scatter).sum()
        return float(total)

    maximization(mixture, statistics)
    best = expected(mixture.weights, mixture.means, mixture.covariances)
    assert torch.linalg.eigvalsh(mixture.covariances).min() == pytest.approx(0.36)  # the bound is met
    g = torch.Generator().manual_seed(0)
    for scale in (0.3, 0.03, 0.003):
        for _ in range(300):
            noise = scale * torch.randn(2, 2, 2, generator=g, dtype=torch.float64)
            values, vectors = torch.linalg.eigh(mixture.covariances + noise + noise.mT)
            covariances = vectors * values.clamp(min=0.36).unsqueeze(1) @ vectors.mT
            means = mixture.means + scale * torch.randn(2, 2, generator=g, dtype=torch.float64)
            weights = (mixture.weights.log() + scale * torch.randn(2, generator=g, dtype=torch.float64)).softmax(0)
            assert expected(weights, means, covariances) <= best + 1e-9


def test_without_a_floor_it_is_scikit_learns():
    z, mixture = problem(8, N=400, K=3, d=3, floor=1e-6)
    peer = Peer(
        3, covariance_type="full", reg_covar=0, tol=0, max_iter=40,
        weights_init=mixture.weights.numpy(), means_init=mixture.means.numpy(),
        precisions_init=np.linalg.inv(mixture.covariances.numpy()),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="converge"):
        peer.fit(z.numpy())
    likelihoods(z, mixture, 40)
    ours = expectation(mixture, z).log_likelihood / len(z)
    assert ours == pytest.approx(peer.score(z.numpy()), abs=1e-6)
    torch.testing.assert_close(mixture.means, torch.from_numpy(peer.means_), atol=1e-5, rtol=0)


def test_a_planted_mixture_is_found():
    g = torch.Generator().manual_seed(1)
    centres = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]], dtype=torch.float64)
    labels = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 6000, True, generator=g)
    scales = torch.tensor([[0.2, 0.4, 0.6], [0.5, 0.3, 0.3], [0.4, 0.4, 0.2]], dtype=torch.float64)
    z = centres[labels] + scales[labels] * torch.randn(6000, 3, generator=g, dtype=torch.float64)
    mixture = GaussianMixture(
        torch.full((3,), 1 / 3, dtype=torch.float64), centres * 0.5 + 0.5, torch.eye(3).double().repeat(3, 1, 1), 0.05
    )
    likelihoods(z, mixture, 100)
    order = mixture.weights.argsort(descending=True)
    torch.testing.assert_close(mixture.weights[order], torch.tensor([0.5, 0.3, 0.2]).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(mixture.means[order], centres, atol=0.06, rtol=0)
    found = mixture.covariances[order].diagonal(dim1=1, dim2=2).sqrt()
    torch.testing.assert_close(found, scales, atol=0.03, rtol=0)


def test_single_precision_agrees_with_double():
    z, mixture = problem(9, N=3000, K=4, d=8)
    single = GaussianMixture(mixture.weights.float(), mixture.means.float(), mixture.covariances.float(), mixture.floor)
    for _ in range(10):
        assert em_step(single, z.float()) == pytest.approx(em_step(mixture, z), rel=1e-5)


def test_a_component_without_patches_stays_and_nothing_is_nan():
    z, mixture = problem(10)
    mixture.means[1] = 1e3
    before = mixture.covariances[1].clone()
    values = likelihoods(z, mixture, 10)
    assert not falls(values)
    assert torch.equal(mixture.covariances[1], before)
    assert float(mixture.weights[1]) < 1e-8


def test_k_means_never_raises_its_distortion_and_is_scikit_learns():
    z, _ = problem(11, N=300, d=5)
    centres = start = z[:6].clone()
    distortions = []
    for _ in range(20):
        centres, distortion = kmeans_step(centres, z)
        distortions.append(distortion)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(distortions))
    peer = KMeans(6, init=start.numpy(), n_init=1, max_iter=20, tol=0).fit(z.numpy())
    assert assign(centres, z)[1] * z.numel() == pytest.approx(peer.inertia_, rel=1e-9)


def test_k_means_is_the_hard_limit_of_em():
    """With S_k = c I and c -> 0 the responsibilities are the nearest centre's, and the M-step's means are k-means'."""
    z, mixture = problem(12, N=200, d=3, K=4)
    mixture.weights.fill_(0.25)
    mixture.covariances.copy_(1e-6 * torch.eye(3))
    statistics = expectation(mixture, z)
    expected, _ = kmeans_step(mixture.means, z)
    torch.testing.assert_close(statistics.first / statistics.count.unsqueeze(1), expected)


def test_the_posterior_mean_is_that_of_a_grid_integral(monkeypatch):
    """In one dimension: E[x | z] by summing over a fine grid of x."""
    monkeypatch.setattr(module, "LEAST_RESPONSIBILITY", 0.0)
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    mixture = GaussianMixture(
        torch.tensor([0.7, 0.3]).double(),
        torch.tensor([[0.0], [1.0]]).double(),
        one * torch.tensor([0.2, 0.05]).view(2, 1, 1),
        0.1,
    )
    x = torch.linspace(-4, 4, 40001, dtype=torch.float64)
    prior = sum(
        w * torch.distributions.Normal(m, (v - 0.01) ** 0.5).log_prob(x).exp() for w, m, v in ((0.7, 0.0, 0.2), (0.3, 1.0, 0.05))
    )
    for z in (-0.5, 0.2, 0.6, 1.3):
        joint = prior * torch.distributions.Normal(x, 0.3).log_prob(torch.tensor(z).double()).exp()
        found, _ = posterior_mean(mixture, torch.tensor([[z]]).double(), 0.3)
        assert float(found) == pytest.approx(float((x * joint).sum() / joint.sum()), abs=1e-6)


def test_the_variance_is_the_error_for_one_component():
    g = torch.Generator().manual_seed(2)
    root = torch.randn(4, 4, generator=g, dtype=torch.float64)
    clean = root @ root.T
    mixture = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 4).double(), (clean + 0.01 * torch.eye(4)).unsqueeze(0), 0.1)
    x = torch.randn(200_000, 4, generator=g, dtype=torch.float64) @ root.T
    found, variance = posterior_mean(mixture, x + 0.5 * torch.randn(x.shape, generator=g, dtype=torch.float64), 0.5)
    assert float((found - x).square().mean()) == pytest.approx(float(variance[0]), rel=0.01)


def test_start_and_codebook_are_admissible():
    z, _ = problem(13, N=200, d=6)
    mixture = start_mixture(z, 5, 0.2, 5, torch.Generator().manual_seed(0))
    assert float(torch.linalg.eigvalsh(mixture.covariances).min()) >= 0.04 * (1 - 1e-9)
    assert float(mixture.weights.sum()) == pytest.approx(1)
    assert not falls(likelihoods(z, mixture, 30))
    book = codebook_mixture(mixture.means, z, 0.2)
    assert torch.equal(book.covariances[0], book.covariances[0][0, 0] * torch.eye(6, dtype=z.dtype))
    assert isinstance(expectation(book, z), Statistics)

"""Diffusion against dense matrix functions and other libraries, and the EM that learns its time."""

import itertools

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import expm_multiply, spsolve
from scipy.stats import multivariate_normal

from trainbook.workflows.graph_diffusion_em.diffusion import (
    appnp,
    diffuse,
    diffusion_log_likelihood,
    head_stiffness_step,
    response,
    stiffness_step,
)
from trainbook.workflows.graph_diffusion_em.graph import knn_graph, laplacian

TIMES = torch.tensor([0.0, 0.3, 2.0, 30.0], dtype=torch.float64)


def random_laplacian(seed=0, height=12, width=12):
    g = torch.Generator().manual_seed(seed)
    image = torch.rand(1, height, width, generator=g, dtype=torch.float64)
    graph = knn_graph(image, 5, 4, 5)
    return laplacian(graph.neighbours, torch.rand(graph.neighbours.shape, generator=g, dtype=torch.float64))


def signals(N, d=4, seed=0):
    return torch.randn(N, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("method", ["heat", "pagerank"])
def test_the_series_is_the_dense_matrix_function(method):
    L = random_laplacian()
    x = signals(len(L))
    values, vectors = torch.linalg.eigh(L.to_dense())
    expected = vectors @ (response(values, method, TIMES) * (vectors.T @ x))
    found = diffuse(L, x, method, TIMES, tolerance=1e-10)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    rough = diffuse(L, x, method, TIMES, tolerance=1e-3)
    assert 1e-9 < float((rough - expected).norm(dim=0).max()) <= 1e-3 * float(x.norm(dim=0).max())


def test_heat_is_scipys_and_pagerank_a_sparse_solve():
    L = random_laplacian(1)
    sparse, x = scipy.sparse.csr_array(L.to_dense().numpy()), signals(len(L))
    heat = diffuse(L, x, "heat", 1.7, tolerance=1e-12)
    torch.testing.assert_close(heat, torch.from_numpy(expm_multiply(-1.7 * sparse, x.numpy())), atol=1e-10, rtol=0)
    solved = spsolve((scipy.sparse.eye_array(len(L)) + 4.0 * sparse).tocsc(), x.numpy())
    torch.testing.assert_close(diffuse(L, x, "pagerank", 4.0, tolerance=1e-12), torch.from_numpy(solved), atol=1e-10, rtol=0)


def test_responses_lie_in_range():
    eigenvalues = torch.linspace(0, 2, 101, dtype=torch.float64)
    for method in ("heat", "pagerank"):
        values = response(eigenvalues, method, TIMES)
        assert 0 < float(values.min()) <= float(values.max()) == 1
    stable = response(eigenvalues, "explicit", TIMES[:3], num_steps=4)  # t / K <= 1 / 2
    assert 0 <= float(stable.min()) <= float(stable.max()) == 1
    assert float(response(eigenvalues, "explicit", torch.tensor([9.0]), num_steps=4).abs().max()) > 1


@pytest.mark.parametrize("method", ["heat", "pagerank", "explicit"])
def test_the_null_vector_stays_and_the_norm_falls_with_time(method):
    """D^(1/2) 1 is the constant of the normalised Laplacian; on a regular graph it is the constant itself."""
    nodes = torch.arange(20)
    regular = laplacian(torch.stack([(nodes - 1) % 20, (nodes + 1) % 20], 1), torch.ones(20, 2, dtype=torch.float64))
    constant = torch.full((20, 1), 0.7, dtype=torch.float64)
    torch.testing.assert_close(diffuse(regular, constant, method, 3.0, tolerance=1e-12), constant, atol=1e-10, rtol=0)
    L, x = random_laplacian(2), signals(64)
    norms = [diffuse(L, x, method, t, tolerance=1e-10).norm(dim=0) for t in (0.0, 0.5, 1.0, 3.0, 10.0)]
    assert all((b <= a + 1e-9).all() for a, b in itertools.pairwise(norms))


def test_explicit_steps_approach_heat_within_their_bound():
    L = random_laplacian(3)
    dense, t = L.to_dense(), 2.0
    largest = float(torch.linalg.eigvalsh(dense)[-1])
    heat, eye, errors = torch.matrix_exp(-t * dense), torch.eye(len(L), dtype=torch.float64), []
    for K in (8, 16, 32, 64):
        steps = diffuse(L, eye, "explicit", t, num_steps=K)
        errors.append(float(torch.linalg.matrix_norm(steps - heat, 2)))
        assert errors[-1] <= t**2 * largest**2 / (2 * K)
    assert all(a / b == pytest.approx(2, rel=0.1) for a, b in itertools.pairwise(errors))


def test_approximate_pagerank_is_within_its_bound():
    L = random_laplacian(4)
    eye = torch.eye(len(L), dtype=torch.float64)
    A, a = eye - L.to_dense(), 0.2
    exact = a * torch.linalg.inv(eye - (1 - a) * A)
    torch.testing.assert_close(diffuse(L, eye, "pagerank", (1 - a) / a, tolerance=1e-12), exact, atol=1e-10, rtol=0)
    for K in (1, 5, 20, 60):
        assert float(torch.linalg.matrix_norm(appnp(A, eye, a, K) - exact, 2)) <= (1 - a) ** K + 1e-12


def test_the_complete_graph_takes_everything_to_its_mean():
    """There L = I - J / n: heat keeps e^-t of the deviation, pagerank 1 / (1 + t)."""
    n = 9
    everyone = torch.stack([torch.cat([torch.arange(i), torch.arange(i + 1, n)]) for i in range(n)])
    L, x = laplacian(everyone, torch.ones(n, n - 1, dtype=torch.float64)), signals(n)
    for method, share in (("heat", np.exp(-1.3)), ("pagerank", 1 / 2.3)):
        expected = x.mean(0) + share * (x - x.mean(0))
        torch.testing.assert_close(diffuse(L, x, method, 1.3, tolerance=1e-12), expected, atol=1e-10, rtol=0)


def spectral_problem(seed, height=9, width=10, sigma=0.5, ridge=1e-2):
    L = random_laplacian(seed, height, width).to_dense()
    values, vectors = torch.linalg.eigh(L)
    q = values + ridge
    stiffness = torch.tensor([0.5, 5.0], dtype=torch.float64)
    x = vectors @ (signals(len(L), 2, seed) / (stiffness * q.unsqueeze(1)).sqrt())
    y = x + sigma * signals(len(L), 2, seed + 1000)
    return L, q, vectors, y, sigma, ridge


def test_the_likelihood_is_that_of_the_dense_normal():
    L, q, vectors, y, sigma, ridge = spectral_problem(0)
    stiffness = torch.tensor([0.8, 3.0], dtype=torch.float64)
    found = diffusion_log_likelihood(q, vectors.T @ y, stiffness, sigma)
    eye = np.eye(len(L))
    for channel in range(2):
        covariance = np.linalg.inv(float(stiffness[channel]) * (L.numpy() + ridge * eye)) + sigma**2 * eye
        expected = multivariate_normal(np.zeros(len(L)), covariance).logpdf(y[:, channel].numpy())
        assert float(found[channel]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_em_for_the_diffusion_time_ascends_to_the_maximum(seed):
    _, q, vectors, y, sigma, _ = spectral_problem(seed)
    spectrum, stiffness, values = vectors.T @ y, torch.ones(2, dtype=torch.float64), []
    for _ in range(200):
        values.append(diffusion_log_likelihood(q, spectrum, stiffness, sigma))
        stiffness = stiffness_step(q, spectrum, stiffness, sigma)
    values = torch.stack(values)
    assert (values.diff(dim=0) >= -1e-12 * values[1:].abs()).all()
    grid = torch.logspace(-4, 5, 4001, dtype=torch.float64)
    for channel in range(2):
        on_grid = torch.stack([diffusion_log_likelihood(q, spectrum[:, [channel]], k.view(1), sigma) for k in grid[::10]])
        assert float(values[-1, channel]) >= float(on_grid.max()) - 1e-3 * abs(float(on_grid.max()))


def test_the_posterior_mean_is_the_pagerank_filter():
    L, q, vectors, y, sigma, ridge = spectral_problem(3)
    eye, kappa = torch.eye(len(L), dtype=torch.float64), 2.5
    exact = torch.linalg.solve(kappa * (L + ridge * eye) + eye / sigma**2, y / sigma**2)
    time = sigma**2 * kappa
    torch.testing.assert_close(vectors @ (response(q, "pagerank", torch.tensor([time, time]).double()) * (vectors.T @ y)), exact)


@pytest.mark.parametrize("seed", range(10))
def test_the_stiffness_of_several_heads_ascends(seed):
    _, _, _, y, sigma, ridge = spectral_problem(seed, 8, 8)
    laplacians = torch.stack([random_laplacian(seed + h, 8, 8).to_dense() for h in range(3)])
    stiffness, eye, values = torch.ones(3, dtype=torch.float64), torch.eye(len(y), dtype=torch.float64), []
    for _ in range(60):
        Q = ridge * eye + torch.einsum("h,hij->ij", stiffness, laplacians)
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(y)).double(), torch.linalg.inv(Q) + sigma**2 * eye)
        values.append(float(normal.log_prob(y.T).sum()))
        stiffness = head_stiffness_step(laplacians, y, stiffness, sigma, ridge)
    assert all(b >= a - 1e-10 * abs(a) for a, b in itertools.pairwise(values))
    assert values[-1] > values[0]

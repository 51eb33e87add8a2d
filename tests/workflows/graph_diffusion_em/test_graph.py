"""Neighbours against brute force, Laplacians against eigenvalues and closed forms."""

import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from trainbook.workflows.graph_diffusion_em import graph as module
from trainbook.workflows.graph_diffusion_em.graph import HEADS, head_features, head_kernels, knn_graph, laplacian
from trainbook.workflows.graph_diffusion_em.patches import PatchGrid, patchify


def brute_force(image, size, k, radius, stride):
    """Sorted distances to the k nearest patches in the window, and all distances by node, from the coefficients."""
    z = patchify(image, size)
    grid = PatchGrid.of(*image.shape[1:], size, 1)
    places, nodes = grid.positions(), PatchGrid.of(*image.shape[1:], size, stride).nodes()
    distances = (z[nodes].unsqueeze(1) - z).square().mean(2)
    far = (places[nodes].unsqueeze(1) - places).abs().amax(2) > radius
    distances = distances.masked_fill(far, torch.inf).scatter(1, nodes.unsqueeze(1), torch.inf)
    return distances.sort(1).values[:, :k], distances


@pytest.mark.parametrize("tile", [48, 5])
@pytest.mark.parametrize(("channels", "stride", "flat"), [(1, 1, False), (3, 1, False), (1, 3, False), (1, 2, True)])
def test_neighbours_are_those_of_brute_force(channels, stride, flat, tile, monkeypatch):
    """Ties included: of equally near patches any may be taken, but each once."""
    monkeypatch.setattr(module, "TILE", tile)
    image = torch.rand(channels, 22, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if flat:
        image = (image > 0.5).double() * 0.5
        image[:, :12] = 0.0
    graph = knn_graph(image, 4, 6, 5, stride=stride)
    expected, all_distances = brute_force(image, 4, 6, 5, stride)
    torch.testing.assert_close(graph.distances, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(all_distances.gather(1, graph.neighbours), expected, atol=1e-12, rtol=1e-9)
    assert (graph.neighbours.sort(1).values.diff(dim=1) > 0).all()


def test_with_a_window_over_the_picture_it_is_scikit_learns():
    image = torch.rand(1, 18, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = patchify(image, 6)
    found = knn_graph(image, 6, 5, 14)
    _, indices = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(z.numpy()).kneighbors(z.numpy())
    assert torch.equal(found.neighbours, torch.from_numpy(indices[:, 1:]))


def test_the_noise_adds_nothing_to_the_mean_distance():
    """Between equal clean patches the mean of |z_i - z_j|^2 / d - 2 sigma^2 is 0; the raw distance is off by 2 sigma^2."""
    g = torch.Generator().manual_seed(2)
    noise = 0.1 * torch.randn(1, 96, 96, generator=g, dtype=torch.float64)
    z = patchify(noise, 8, 8)
    raw = (z.unsqueeze(1) - z).square().mean(2)
    raw = raw[~torch.eye(len(z), dtype=torch.bool)].mean()
    assert float(raw) == pytest.approx(0.02, rel=0.03)
    graph = knn_graph(noise, 8, 20, 6, sigma=0.1)
    torch.testing.assert_close(graph.distances, (knn_graph(noise, 8, 20, 6).distances - 0.02).clamp(min=0))


def test_too_many_neighbours_are_refused():
    with pytest.raises(ValueError, match="lower num_neighbours"):
        knn_graph(torch.rand(1, 20, 20), 8, 16, 3)


def test_kernels_are_in_range_symmetric_and_tell_what_they_are_named_after():
    g = torch.Generator().manual_seed(3)
    x = torch.arange(48.0, dtype=torch.float64)
    stripes = 0.5 + 0.2 * torch.sin(x)[None, :].expand(48, 48)
    image = torch.stack([torch.cat([stripes[:24], stripes.T[24:]])] * 3)
    image[:, :, 24:] += torch.tensor([0.2, -0.1, -0.1]).view(3, 1, 1)
    features = head_features(image, 8)
    assert tuple(features) == HEADS
    graph = knn_graph(image + 0.01 * torch.randn(image.shape, generator=g, dtype=torch.float64), 8, 24, 10)
    kernels = head_kernels(features, graph)
    assert kernels.shape == (4, *graph.neighbours.shape)
    assert 0 <= float(kernels.min()) <= float(kernels.max()) <= 1
    width = 48 - 8 + 1
    corner = {name: row * width + column for name, (row, column) in {"a": (4, 4), "turned": (34, 4), "red": (4, 34)}.items()}

    def differ(head, one, other):
        return float((features[head][corner[one]] - features[head][corner[other]]).norm())

    assert differ("structure", "a", "turned") > 1.5  # an orientation and its normal: (c, 0) and (-c, 0)
    assert differ("structure", "a", "red") < 0.1
    assert differ("colour", "a", "red") > 3 * differ("colour", "a", "turned")
    assert differ("spatial", "a", "red") == pytest.approx(30 / 8)


def path(n):
    """Neighbours of a path's nodes, its ends naming theirs twice."""
    nodes = torch.arange(n)
    return torch.stack([(nodes - 1).abs(), torch.where(nodes == n - 1, n - 2, nodes + 1)], 1)


def cycle(n):
    nodes = torch.arange(n)
    return torch.stack([(nodes - 1) % n, (nodes + 1) % n], 1)


@pytest.mark.parametrize("seed", range(8))
def test_the_spectrum_lies_from_0_to_below_2(seed):
    g = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 16, 15, generator=g, dtype=torch.float64)
    graph = knn_graph(image, 5, 4, 6)
    weights = torch.rand(graph.neighbours.shape, generator=g, dtype=torch.float64)
    L = laplacian(graph.neighbours, weights).to_dense()
    assert torch.equal(L, L.T)
    values, _vectors = torch.linalg.eigh(L)
    assert float(values[0]) >= -1e-12
    assert float(values[-1]) < 2
    A = torch.eye(len(L)) - L
    degree = 1 / A.diagonal()  # A_ii = 1 / D_i for self-loops of weight 1
    assert float((L @ degree.sqrt()).abs().max()) < 1e-12  # D^(1/2) 1 is the null vector


def test_an_edge_is_there_when_either_end_has_it():
    neighbours = torch.tensor([[1], [2], [1], [0]])
    weights = torch.tensor([[0.5], [0.2], [0.8], [0.4]], dtype=torch.float64)
    K = torch.tensor([[1, 0.5, 0, 0.4], [0.5, 1, 0.8, 0], [0, 0.8, 1, 0], [0.4, 0, 0, 1]], dtype=torch.float64)
    scale = K.sum(1).rsqrt()
    torch.testing.assert_close(laplacian(neighbours, weights).to_dense(), torch.eye(4).double() - scale[:, None] * K * scale)


def test_small_graphs_have_their_closed_forms():
    """Two nodes: 0 and 1. Cycle: (2/3)(1 - cos(2 pi k / n)). Complete graph: 0 once and 1; A is the mean."""
    two = laplacian(torch.tensor([[1], [0]]), torch.ones(2, 1, dtype=torch.float64)).to_dense()
    torch.testing.assert_close(torch.linalg.eigvalsh(two), torch.tensor([0.0, 1.0]).double())
    n = 12
    values = torch.linalg.eigvalsh(laplacian(cycle(n), torch.ones(n, 2, dtype=torch.float64)).to_dense())
    expected = torch.tensor(sorted(2 / 3 * (1 - math.cos(2 * math.pi * k / n)) for k in range(n)), dtype=torch.float64)
    torch.testing.assert_close(values, expected, atol=1e-12, rtol=0)
    everyone = torch.stack([torch.cat([torch.arange(i), torch.arange(i + 1, 7)]) for i in range(7)])
    complete = laplacian(everyone, torch.ones(7, 6, dtype=torch.float64)).to_dense()
    torch.testing.assert_close(torch.eye(7).double() - complete, torch.full((7, 7), 1 / 7).double())


def test_a_paths_laplacian_by_hand():
    D = torch.tensor([2.0, 3.0, 3.0, 2.0], dtype=torch.float64)
    K = torch.eye(4).double() + torch.diag(torch.ones(3), 1).double() + torch.diag(torch.ones(3), -1).double()
    expected = torch.eye(4).double() - K / (D.sqrt()[:, None] * D.sqrt())
    torch.testing.assert_close(laplacian(path(4), torch.ones(4, 2, dtype=torch.float64)).to_dense(), expected)

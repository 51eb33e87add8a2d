"""NL-Bayes against its d x d formula."""

import torch

from trainbook.workflows.graph_diffusion_em.graph import knn_graph
from trainbook.workflows.graph_diffusion_em.patches import patchify
from trainbook.workflows.graph_diffusion_em.polish import group_posterior, polish


def test_a_groups_posterior_is_that_of_its_gaussian():
    g = torch.Generator().manual_seed(0)
    pilot, noisy = (torch.randn(3, 6, 9, generator=g, dtype=torch.float64) for _ in range(2))
    found, variance = group_posterior(pilot, noisy, 0.7)
    for index in range(3):
        mean, S = pilot[index].mean(0), torch.cov(pilot[index].T)
        gain = S @ torch.linalg.inv(S + 0.49 * torch.eye(9).double())
        torch.testing.assert_close(found[index], mean + (noisy[index] - mean) @ gain.T)
        expected = 0.49 * (gain.trace() + 1) / 9
        torch.testing.assert_close(variance[index], expected)


def test_what_a_patch_gets_is_the_mean_over_its_groups_with_their_precisions():
    g = torch.Generator().manual_seed(1)
    pilot = torch.rand(1, 18, 18, generator=g, dtype=torch.float64)
    noisy = patchify(pilot + 0.1 * torch.randn(1, 18, 18, generator=g, dtype=torch.float64), 6)
    z, graph = patchify(pilot, 6), knn_graph(pilot, 6, 5, 4, stride=4)
    found, weights = polish(noisy, z, graph, 0.1)
    total, mass = torch.zeros_like(noisy), torch.zeros(len(noisy), dtype=torch.float64)
    for node, others in zip(graph.grid.nodes(), graph.neighbours, strict=True):
        members = torch.cat([node.view(1), others])
        estimate, variance = group_posterior(z[members].unsqueeze(0), noisy[members].unsqueeze(0), 0.1)
        total[members] += estimate[0] / variance
        mass[members] += 1 / variance
    torch.testing.assert_close(weights, mass)
    torch.testing.assert_close(found[mass > 0], total[mass > 0] / mass[mass > 0, None])


def test_with_no_noise_to_remove_it_changes_nothing():
    pilot = torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = patchify(pilot, 4)
    found, weights = polish(z, z, knn_graph(pilot, 4, 6, 4, stride=2), 1e-4)
    torch.testing.assert_close(found[weights > 0], z[weights > 0], atol=1e-4, rtol=0)

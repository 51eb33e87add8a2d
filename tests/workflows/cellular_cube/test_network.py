"""The network is PCA before training, whatever is switched on; codes, faces, transformers, routers, read-out."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.face import Face, cosine_matrix
from trainbook.workflows.cellular_cube.network import CellularCube
from trainbook.workflows.cellular_cube.principal import best_linear_fvu, fit_principal
from trainbook.workflows.cellular_cube.readout_fit import fit_readout, standardise_readout

SMALL = {
    "side": 4, "channels": 6, "mixed_numbers": 3, "hidden_width": 6, "attention_rank": 2, "value_width": 2,
    "hardware_numbers": 3,
}  # fmt: skip
WIDTH = 24


@pytest.fixture(scope="module")
def vectors():
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(900, WIDTH // 2, generator=generator)
    curved = torch.cat([latent, 0.7 * latent.square()], 1)  # what PCA leaves is a function of what it keeps
    raw = curved @ torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    centred = raw - raw.mean(0)
    return centred / centred.square().mean().sqrt()


def make(vectors, built_side=0, **changes):
    torch.manual_seed(0)
    config = Config(**{**SMALL, **changes})
    return CellularCube(config, fit_principal(vectors), torch.zeros(WIDTH), 1.0, built_side).eval()


OPTIONS = [
    {}, {"face_layout": "identity"}, {"numbers_per_cell": 2}, {"transformer": "hierarchical"}, {"transformer": "attention"},
    {"transformer": "autoencoder"}, {"router_tokens": 3}, {"universal_width": 10}, {"write": "clamp", "num_steps": 5},
    {"expert_norm": "batch"}, {"band_shape": "euclidean"}, {"band_pooling": 2}, {"hardware": "coordinates"},
    {"mixed_numbers": 0}, {"bottleneck_weight": 0.1}, {"num_steps": 6}, {"face_layout": "pyramid"},
    {"face_layout": "pyramid", "side": 5, "mixed_numbers": 2, "numbers_per_cell": 1},
]  # fmt: skip


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
@torch.no_grad()
def test_untrained_it_is_pca(vectors, changes):
    network = make(vectors, **changes)
    size = min(network.config.code_size, WIDTH)
    pca = PCA(size).fit(vectors.numpy())
    expected = pca.inverse_transform(pca.transform(vectors[:20].numpy()))
    np.testing.assert_allclose(network(vectors[:20]).vectors, expected, atol=2e-4)
    if changes.get("router_tokens"):
        network.routers_in = network.routers_out = None
        np.testing.assert_allclose(network(vectors[:20]).vectors, expected, atol=2e-4)


@torch.no_grad()
def test_a_code_as_wide_as_the_vector_loses_nothing(vectors):
    network = make(vectors, numbers_per_cell=2)
    error = (network(vectors).vectors - vectors).square().mean()
    assert float(error) < 1e-6


@torch.no_grad()
def test_a_trained_network_can_go_back_to_pca(vectors):
    network = make(vectors, router_tokens=3, transformer="hierarchical")
    before = network(vectors[:9]).vectors
    for parameter in network.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))
    assert not torch.allclose(network(vectors[:9]).vectors, before, atol=1e-2)
    network.start_at_principal(fit_principal(vectors))
    torch.testing.assert_close(network(vectors[:9]).vectors, before, atol=2e-4, rtol=1e-3)


def test_components_and_what_they_explain_are_those_of_scikit_learn(vectors):
    principal, pca = fit_principal(vectors), PCA().fit(vectors.numpy())
    torch.testing.assert_close(principal.variances.sum(), torch.tensor(float(WIDTH)))
    overlap = principal.components[:8].numpy() @ pca.components_[:8].T
    np.testing.assert_allclose(np.abs(overlap), np.eye(8), atol=1e-3)
    assert best_linear_fvu(principal.variances, 8) == pytest.approx(1 - pca.explained_variance_ratio_[:8].sum(), abs=1e-4)


@pytest.mark.parametrize(
    ("layout", "size", "numbers"),
    [("cosine", 25, 1), ("identity", 25, 1), ("cosine", 50, 2), ("cosine", 9, 1), ("pyramid", 25, 1), ("pyramid", 50, 2)],
)
def test_faces_keep_the_code(layout, size, numbers):
    face = Face(5, numbers, layout, size)
    code = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    laid = face(code)
    torch.testing.assert_close(laid.square().mean((1, 2, 3)), code.square().mean(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(face.modes(laid).flatten(1)[:, :size], code, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", [4, 5, 7, 8, 10, 13])
@pytest.mark.parametrize("numbers", [1, 2])
def test_a_pyramid_is_coarse_first_and_orthonormal(side, numbers):
    """The first numbers change nothing within blocks of 4 x 4 cells, the next nothing within 2 x 2 and no mean over 4 x 4."""
    size = side**2 * numbers
    face = Face(side, numbers, "pyramid", size)
    laid = face(torch.eye(size))
    torch.testing.assert_close(laid.flatten(1) @ laid.flatten(1).T, torch.eye(size), atol=1e-5, rtol=0)
    torch.testing.assert_close(face.modes(laid).flatten(1), torch.eye(size), atol=1e-5, rtol=0)

    def averaged(width):
        means = laid.clone()
        for y in range(0, side, width):
            for x in range(0, side, width):
                block = (slice(None), slice(y, y + width), slice(x, x + width))
                means[block] = laid[block].mean((1, 2), keepdim=True)
        return means

    coarse, middle = (-(-side // width) for width in (4, 2))
    first, second = coarse**2 * numbers, middle**2 * numbers
    torch.testing.assert_close(averaged(4)[:first], laid[:first], atol=1e-6, rtol=0)
    torch.testing.assert_close(averaged(4)[first:], torch.zeros_like(laid[first:]), atol=1e-6, rtol=0)
    torch.testing.assert_close(averaged(2)[:second], laid[:second], atol=1e-6, rtol=0)
    torch.testing.assert_close(averaged(2)[second:], torch.zeros_like(laid[second:]), atol=1e-6, rtol=0)


def test_a_universal_code_looks_the_same_at_every_size():
    """The cosines of one code, sampled coarsely and finely, are one curve."""
    code = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    coarse, fine = (Face(side, 1, "cosine", 6)(code)[0, :, :, 0] for side in (4, 12))
    torch.testing.assert_close(fine[1::3, 1::3], coarse, atol=1e-5, rtol=1e-4)
    identity = cosine_matrix(7) @ cosine_matrix(7).T
    torch.testing.assert_close(identity, torch.eye(7), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_size_free_network_runs_at_other_sizes_with_the_same_weights(vectors):
    small = make(vectors, universal_width=9, hardware="coordinates")
    for side in (6,):
        large = make(vectors, side, universal_width=9, hardware="coordinates")
        large.load_state_dict(small.state_dict())
        error = (large(vectors).vectors - vectors).square().mean()
        assert float(error) == pytest.approx(float((small(vectors).vectors - vectors).square().mean()), abs=1e-4)


@torch.no_grad()
def test_a_bottleneck_adds_noise_only_in_training_and_costs_what_the_formula_says(vectors):
    network = make(vectors, bottleneck_weight=1.0)
    output = network(vectors[:5])
    torch.testing.assert_close(network(vectors[:5]).vectors, output.vectors, atol=0, rtol=0)
    posterior = torch.distributions.Normal(output.code, torch.full_like(output.code, np.exp(-2.0)))
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(output.cost, kl)
    network.train()
    assert not torch.equal(network(vectors[:5]).vectors, network(vectors[:5]).vectors)


@torch.no_grad()
def test_fitting_the_read_out_helps_or_changes_nothing(vectors):
    network = make(vectors)
    train, held = vectors[:700], vectors[700:]

    def unexplained():
        return float((network(held).vectors - held).square().sum() / held.square().sum())

    before = unexplained()
    standardise_readout(network, train)
    assert unexplained() == pytest.approx(before, abs=1e-5)
    found = fit_readout(network, train, held)
    assert unexplained() == pytest.approx(found["valid_fvu"], abs=1e-5)
    assert found["valid_fvu"] < 0.95 * before
    again = fit_readout(network, torch.randn(20, WIDTH), held)  # useless targets: keep what there is
    assert again["valid_fvu"] <= found["valid_fvu"] + 1e-6


def test_routers_write_by_shares_and_say_how_spread_they_are(vectors):
    routers = make(vectors, router_tokens=4).routers_in
    assert 0 < float(routers.path_entropy().detach()) < np.log(4)
    with torch.no_grad():
        routers.paths.zero_()
    assert float(routers.path_entropy().detach()) == pytest.approx(np.log(4))

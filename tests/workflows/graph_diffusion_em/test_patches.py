"""The patch transform against its definition."""

import pytest
import torch
from scipy.fft import dctn

from trainbook.workflows.graph_diffusion_em.patches import PatchGrid, aggregate, cut, mean_columns, overlay, patch_basis, patchify


@pytest.mark.parametrize(("size", "channels"), [(4, 1), (8, 1), (8, 3), (5, 3)])
def test_the_basis_is_orthonormal(size, channels):
    basis = patch_basis(size, channels)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-12, rtol=0)


def test_grey_coefficients_are_scipys_cosine_transform():
    image = torch.rand(1, 11, 9, dtype=torch.float64)
    z = patchify(image, 4, 3)
    grid = PatchGrid.of(11, 9, 4, 3)
    for coefficients, (row, column) in zip(z, grid.positions().tolist(), strict=True):
        expected = dctn(image[0, row : row + 4, column : column + 4].numpy(), norm="ortho")
        torch.testing.assert_close(coefficients.view(4, 4), torch.from_numpy(expected))


@pytest.mark.parametrize(("height", "width", "stride"), [(16, 20, 1), (17, 23, 3), (32, 24, 8), (19, 19, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_aggregate_undoes_patchify_for_any_weights(height, width, stride, channels):
    image = torch.rand(channels, height, width, dtype=torch.float64)
    z = patchify(image, 8, stride)
    grid = PatchGrid.of(height, width, 8, stride)
    assert len(z) == len(grid)
    if (height - 8) % stride == (width - 8) % stride == 0:
        assert len(z) == ((height - 8) // stride + 1) * ((width - 8) // stride + 1)
    weights = torch.rand(len(z), dtype=torch.float64) + 0.1
    torch.testing.assert_close(aggregate(z, weights, grid), image)
    torch.testing.assert_close(overlay(cut(image, 8, stride), weights, grid), image)


def test_aggregate_is_the_weighted_mean_of_what_lies_over_a_pixel():
    z, grid = torch.randn(9, 16, dtype=torch.float64), PatchGrid.of(8, 8, 4, 2)
    weights = torch.rand(9, dtype=torch.float64)
    numerator, denominator = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    for patch, weight, (row, column) in zip(z @ patch_basis(4, 1), weights, grid.positions().tolist(), strict=True):
        numerator[row : row + 4, column : column + 4] += weight * patch.view(4, 4)
        denominator[row : row + 4, column : column + 4] += weight
    torch.testing.assert_close(aggregate(z, weights, grid)[0], numerator / denominator)


def test_white_noise_stays_white():
    torch.manual_seed(0)
    z = patchify(0.3 * torch.randn(3, 256, 256), 4, 4)  # 4,096 patches that do not overlap
    covariance = z.T @ z / len(z)
    error = 0.09 / len(z) ** 0.5  # of an entry off the diagonal; on it sqrt 2 times that
    assert float((covariance - 0.09 * torch.eye(48)).abs().max()) < 6 * error


def test_grey_has_no_chroma_and_means_are_means():
    image = torch.rand(1, 12, 12, dtype=torch.float64).expand(3, -1, -1)
    z = patchify(image, 4)
    assert float(z[:, 16:].abs().max()) < 1e-12
    means = z[:, mean_columns(4, 3)]
    expected = torch.nn.functional.avg_pool2d(image[:1], 4, 1).flatten() * 4 * 3**0.5
    torch.testing.assert_close(means[:, 0], expected)


def test_bad_pictures_are_refused():
    with pytest.raises(ValueError, match="holds no patch"):
        patchify(torch.rand(1, 7, 20), 8)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        patch_basis(8, 2)

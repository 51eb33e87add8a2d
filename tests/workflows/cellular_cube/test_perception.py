"""What a cell perceives, against torch's convolution, the borders by hand, and its gradient by finite differences."""

import pytest
import torch
from torch.nn import functional

from trainbook.workflows.cellular_cube.perception import count_near, perceive


def random(side, channels=2):
    return torch.randn(2, side, side, side, channels, dtype=torch.double, generator=torch.Generator().manual_seed(side))


def convolved(x, kernel):
    """Every channel with one 3 x 3 x 3 kernel, zeros beyond the border."""
    y = x.movedim(-1, 1).flatten(0, 1).unsqueeze(1)
    return functional.conv3d(y, kernel[None, None], padding=1).view(len(x), -1, *x.shape[1:4]).movedim(1, -1)


def test_it_is_a_convolution_with_zeros_beyond():
    x = random(5)
    kernels = torch.zeros(5, 3, 3, 3, dtype=torch.double)
    kernels[0, 1, 1, 1] = 1
    for axis, (low, high) in enumerate((((0, 1, 1), (2, 1, 1)), ((1, 0, 1), (1, 2, 1)), ((1, 1, 0), (1, 1, 2))), 1):
        kernels[(axis, *low)], kernels[(axis, *high)] = -0.5, 0.5
    kernels[4] = 1 / 27
    expected = torch.cat([convolved(x, kernel) for kernel in kernels], -1)
    torch.testing.assert_close(perceive(x, torch.full((5, 5, 5, 1), 27.0), one_sided=False), expected)


def test_at_the_border_differences_are_one_sided_and_means_are_of_the_cells_that_exist():
    x = random(5)
    _, along_z, along_y, along_x, mean = perceive(x, count_near(5)).split(2, -1)
    torch.testing.assert_close(along_z[:, 1:-1], (x[:, 2:] - x[:, :-2]) / 2)
    torch.testing.assert_close(along_z[:, 0], x[:, 1] - x[:, 0])
    torch.testing.assert_close(along_y[:, :, -1], x[:, :, -1] - x[:, :, -2])
    torch.testing.assert_close(along_x[:, :, :, 0], x[:, :, :, 1] - x[:, :, :, 0])
    torch.testing.assert_close(mean[:, 2, 2, 2], x[:, 1:4, 1:4, 1:4].mean((1, 2, 3)))
    torch.testing.assert_close(mean[:, 0, 4, 0], x[:, :2, 3:, :2].mean((1, 2, 3)))


@pytest.mark.parametrize("one_sided", [True, False])
@pytest.mark.parametrize("side", [2, 4])
def test_gradient(side, one_sided):
    near = count_near(side).double()
    x = random(side, 1)[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: perceive(x, near, one_sided), (x,))

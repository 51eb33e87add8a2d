"""Band sums against all pairs of cells, and the split into near, middle and far."""

import pytest
import torch

from trainbook.workflows.cellular_cube.bands import (
    NAMES,
    Bands,
    PooledBands,
    split_neighbours,
)


def brute_force(x, split, shape, wall=None):
    """Name to sums, from the distances of all pairs of cells."""
    cells = torch.cartesian_prod(*[torch.arange(x.shape[1])] * 3)
    apart = (cells[:, None] - cells).abs()
    distance = apart.amax(-1) if shape == "cubic" else apart.square().sum(-1)
    z = cells[:, 0]
    visible = torch.ones_like(distance, dtype=torch.bool) if wall is None else (z[:, None] - wall) * (z - wall) >= 0
    near, middle, far = split.ends
    limits = {"local": (0, near), "functional": (near, middle), "distant": (middle, far), "all": (0, far)}
    return {
        name: (((distance > low) & (distance <= high) & visible).float() @ x.flatten(1, 3)).view(x.shape)
        for name, (low, high) in limits.items()
    }


@pytest.mark.parametrize(("shape", "reach", "wall"), [("cubic", 3, None), ("cubic", 4, 2), ("euclidean", 2.3, None)])
def test_sums_are_those_over_all_pairs_of_cells(shape, reach, wall):
    x = torch.randn(2, 5, 5, 5, 3, generator=torch.Generator().manual_seed(0))
    bands = Bands(5, reach, shape, wall)
    expected = brute_force(x, bands.split, shape, wall)
    names = (*NAMES, "all")
    for name, found in zip(names, bands.sums(x, names), strict=True):
        torch.testing.assert_close(found, expected[name], atol=1e-4, rtol=1e-4)
    counts = brute_force(torch.ones(1, 5, 5, 5, 1), bands.split, shape, wall)
    for name, found in zip(names, bands.means(x, names), strict=True):
        torch.testing.assert_close(found, expected[name] / counts[name].clamp(min=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("reach", "shape"), [(3.5, "euclidean"), (7.4, "euclidean"), (7, "cubic"), (33, "cubic")])
def test_the_split_is_within_four_points_of_10_55_35(reach, shape):
    split = split_neighbours(reach, shape)
    assert sum(split.shares) == pytest.approx(1)
    for share, wanted in zip(split.shares, (0.10, 0.55, 0.35), strict=True):
        assert abs(share - wanted) <= 0.04
    assert "neighbours" in str(split)


def test_known_counts_of_neighbours():
    assert split_neighbours(7.4, "euclidean").num_neighbours == 1742
    assert split_neighbours(7, "cubic").num_neighbours == 15**3 - 1
    assert split_neighbours(7, "cubic").ends == (3, 6, 7)


def test_a_reach_without_three_shells_is_refused():
    with pytest.raises(ValueError, match="three bands need three"):
        split_neighbours(2, "cubic")


def test_pooled_bands_are_the_bands_of_block_means():
    x = torch.randn(1, 6, 6, 6, 2, generator=torch.Generator().manual_seed(1))
    blocks = x.view(1, 3, 2, 3, 2, 3, 2, 2).mean((2, 4, 6))
    coarse = Bands(3, 3, "cubic").means(blocks, ("functional", "all"))
    for found, expected in zip(PooledBands(6, 6, "cubic", 2).means(x, ("functional", "all")), coarse, strict=True):
        spread = expected.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(found, spread)

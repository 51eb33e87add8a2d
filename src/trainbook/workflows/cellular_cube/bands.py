"""Neighbour bands: the cells around a cell, cut by distance into near, middle and far, and sums over each, for all at once."""

# B batch, L side, C channels, R reach in cells

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

CUTS = (0.10, 0.65)  # shares of the neighbours up to the local and up to the functional band; the rest is distant
NAMES = ("local", "functional", "distant")


@dataclass(frozen=True)
class Split:
    """Where the bands end and what share of a neighbourhood inside the cube each one got.

    Attributes:
        ends: distance of the last shell of each band; squared cells for balls, cells for cubes.
        shares: of the neighbours, in the order local, functional, distant.
        num_neighbours: of a cell that has all of them.
    """

    ends: tuple[int, int, int]
    shares: tuple[float, float, float]
    num_neighbours: int

    def __str__(self) -> str:
        shares = "/".join(f"{100 * share:.1f}" for share in self.shares)
        return f"{shares} % of {self.num_neighbours} neighbours"


def split_neighbours(reach: float, shape: str) -> Split:
    """Cut the neighbourhood at 10 % and 65 % of its neighbours; whole shells, so that no direction is preferred.

    Args:
        reach: R, largest distance of a neighbour in cells, at least 1.
        shape: "euclidean", a ball; or "cubic", by the largest coordinate.

    Raises:
        ValueError: when the reach has fewer than three shells of neighbours and so cannot be cut.
    """
    if shape == "cubic":
        distances = range(1, math.floor(reach) + 1)
        sizes = {d: (2 * d + 1) ** 3 - (2 * d - 1) ** 3 for d in distances}
    else:
        sizes = {}
        around = range(-math.floor(reach), math.floor(reach) + 1)
        for offset in itertools.product(around, repeat=3):
            if 0 < (d := sum(a * a for a in offset)) <= reach**2:
                sizes[d] = sizes.get(d, 0) + 1
    shells = sorted(sizes)
    if len(shells) < 3:
        raise ValueError(f"a reach of {reach:.2f} cells has {len(shells)} shells; three bands need three: raise the radius")
    total, counted = sum(sizes.values()), list(itertools.accumulate(sizes[d] for d in shells))
    first = min(range(len(shells) - 2), key=lambda i: abs(counted[i] / total - CUTS[0]))
    second = min(range(first + 1, len(shells) - 1), key=lambda i: abs(counted[i] / total - CUTS[1]))
    near, middle = counted[first] / total, counted[second] / total
    return Split((shells[first], shells[second], shells[-1]), (near, middle - near, 1 - middle), total)


class Bands(nn.Module):
    """Sums over the bands of every cell's neighbourhood; cells beyond the border do not count.

    Cubes: the sum over a cube is a banded 0/1 matrix along each axis, three products of L x L matrices whatever the reach.
    Balls: products in the Fourier domain of a padded grid. Neither lists neighbours.

    Args:
        side: L.
        reach: R in cells.
        shape: "euclidean" or "cubic".
        wall: z of a plane that cells do not see across, or None; cubic only.
    """

    def __init__(self, side: int, reach: float, shape: str, wall: int | None = None) -> None:
        super().__init__()
        self.side, self.shape, self.split = side, shape, split_neighbours(reach, shape)
        if shape == "cubic":
            apart = (torch.arange(side)[:, None] - torch.arange(side)).abs()
            matrices = torch.stack([(apart <= end).float() for end in self.split.ends])
            z = torch.arange(side)
            visible = torch.ones(side, side)
            if wall is not None:
                visible = ((z[:, None] <= wall) & (z <= wall) | (z[:, None] >= wall) & (z >= wall)).float()
            self.register_buffer("matrices", matrices, persistent=False)
            self.register_buffer("matrices_z", matrices * visible, persistent=False)
        elif wall is not None:
            raise ValueError("a wall needs cubic bands")
        else:
            self.padded = side + math.isqrt(self.split.ends[2])
            self.register_buffer("spectra", self._spectra(), persistent=False)
        ones = torch.ones(1, side, side, side, 1)
        counts = torch.cat([self.sums(ones, (name,))[0] for name in (*NAMES, "all")], -1).round()
        self.register_buffer("counts", counts.clamp(min=1), persistent=False)

    def _spectra(self) -> Tensor:
        axis = torch.arange(self.padded)
        axis = torch.minimum(axis, self.padded - axis)
        squared = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
        low = (0, *self.split.ends[:2], 0)
        high = (*self.split.ends, self.split.ends[2])
        kernels = torch.stack([((squared > a) & (squared <= b)).double() for a, b in zip(low, high, strict=True)])
        return torch.fft.rfftn(kernels, dim=(1, 2, 3)).real.float()  # symmetric kernels have real spectra

    def _cube_sum(self, x: Tensor, index: int, planes: Tensor | None) -> Tensor:
        return along_axes(x, self.matrices[index], _of(self.matrices_z[index], planes))

    def sums(self, x: Tensor, names: tuple[str, ...], planes: Tensor | None = None) -> tuple[Tensor, ...]:
        """The sum of x over the named bands of each cell; "all" is the whole neighbourhood without the cell itself.

        Args:
            x: (B, L, L, L, C), axes z, y, x.
            names: of bands.
            planes: (P,), z of the planes whose cells' sums are wanted; all by default.
        """
        if self.shape == "cubic":
            needed = {i for name in names for i in self._ends(name) if i >= 0}
            found = {i: self._cube_sum(x, i, planes) for i in needed}
            found[-1] = x if planes is None else x[:, planes]
            return tuple(found[self._ends(name)[1]] - found[self._ends(name)[0]] for name in names)
        sizes, grid = [self.padded] * 3, slice(0, self.side)
        spectrum = torch.fft.rfftn(x.float(), sizes, dim=(1, 2, 3))
        several = [spectrum * self.spectra[(*NAMES, "all").index(name)][..., None] for name in names]
        whole = (torch.fft.irfftn(one, sizes, dim=(1, 2, 3))[:, grid, grid, grid].to(x.dtype) for one in several)
        return tuple(one if planes is None else one[:, planes] for one in whole)

    @staticmethod
    def _ends(name: str) -> tuple[int, int]:
        """Which cube is taken from which; -1 is the cell itself."""
        return (-1, 2) if name == "all" else (NAMES.index(name) - 1, NAMES.index(name))

    def means(self, x: Tensor, names: tuple[str, ...], planes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Like `sums`, divided by the neighbours that are there; 0 where there are none."""
        counts = self.counts if planes is None else self.counts[:, planes]
        counts = [counts[..., [(*NAMES, "all").index(name)]].to(x.dtype) for name in names]
        return tuple(total / count for total, count in zip(self.sums(x, names, planes), counts, strict=True))


class PooledBands(nn.Module):
    """Bands of a grid coarser by a factor: cells are averaged in blocks first, and each sees what its block sees.

    Args:
        side: L of the fine grid; padded with its border cells to a multiple of the factor.
        reach: R in fine cells.
        shape: of the bands.
        factor: 2 or more.
    """

    def __init__(self, side: int, reach: float, shape: str, factor: int) -> None:
        super().__init__()
        self.side, self.factor, self.coarse = side, factor, -(-side // factor)
        self.bands = Bands(self.coarse, max(reach / factor, 3.0), shape)
        self.split = self.bands.split
        member = torch.arange(side) // factor
        pooling = (torch.arange(self.coarse)[:, None] == member).float()
        self.register_buffer("pooling", pooling / pooling.sum(1, keepdim=True), persistent=False)
        self.register_buffer("member", member, persistent=False)
        self.register_buffer("counts", self._spread(self.bands.counts), persistent=False)

    def _pooled(self, x: Tensor) -> Tensor:
        return along_axes(x, self.pooling)

    def _spread(self, x: Tensor, planes: Tensor | None = None) -> Tensor:
        m = self.member
        return x[:, _of(m, planes)][:, :, m][:, :, :, m]

    def sums(self, x: Tensor, names: tuple[str, ...], planes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Sums over blocks' means; ratios of two such sums are what the functional expert needs."""
        return tuple(self._spread(one, planes) for one in self.bands.sums(self._pooled(x), names))

    def means(self, x: Tensor, names: tuple[str, ...], planes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Means over the bands of blocks."""
        return tuple(self._spread(one, planes) for one in self.bands.means(self._pooled(x), names))


def along_axes(x: Tensor, matrix: Tensor, along_z: Tensor | None = None) -> Tensor:
    """Multiply the three axes of x, (B, L, L, L, C), by a matrix, (M, L); gives (B, M, M, M, C).

    With `along_z`, (P, L), the first of them is multiplied by that instead; gives (B, P, M, M, C).
    """
    size, channels, side, new = x.shape[0], x.shape[-1], matrix.shape[1], matrix.shape[0]
    matrix = matrix.to(x.dtype)
    along_z = matrix if along_z is None else along_z.to(x.dtype)
    rows = size * len(along_z)
    y = torch.matmul(along_z, x.reshape(size, side, -1))
    y = torch.matmul(matrix, y.view(rows, side, -1))
    return torch.matmul(matrix, y.view(rows * new, side, channels)).view(size, -1, new, new, channels)


def _of(rows: Tensor, chosen: Tensor | None) -> Tensor:
    return rows if chosen is None else rows[chosen]


def pooled(x: Tensor, factor: int) -> Tensor:
    """Means over blocks of factor^3 cells; border blocks may be smaller. (B, L, L, L, C) to (B, M, M, M, C)."""
    return functional.avg_pool3d(x.movedim(-1, 1), factor, ceil_mode=True, count_include_pad=False).movedim(1, -1).contiguous()


def spread(x: Tensor, factor: int, side: int) -> Tensor:
    """Each coarse cell's value for all the fine cells of its block."""
    index = torch.arange(side, device=x.device) // factor
    return x[:, index][:, :, index][:, :, :, index]

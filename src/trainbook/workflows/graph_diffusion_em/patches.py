"""Pictures as overlapping patches in an orthonormal basis (cosines times opponent colours), and back."""

# C channels, p patch size, d = C p^2 coefficients, N patches

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """Where patches begin.

    Attributes:
        height, width: of the picture.
        size: p.
        rows, columns: of the patches' upper left corners, int64, ascending; the N patches are their pairs, row by row.
    """

    height: int
    width: int
    size: int
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, height: int, width: int, size: int, stride: int, device: torch.device | str = "cpu") -> "PatchGrid":
        """Every `stride`-th position, and the last one, so that every pixel lies in a patch.

        Raises:
            ValueError: when the picture is smaller than a patch.
        """
        if min(height, width) < size:
            raise ValueError(f"a picture of {height} x {width} pixels holds no patch of {size} x {size}")

        def positions(length: int) -> Tensor:
            places = [*range(0, length - size, stride), length - size]
            return torch.tensor(places, device=device)

        return cls(height, width, size, positions(height), positions(width))

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def nodes(self) -> Tensor:
        """Numbers of these patches among those of stride 1, (N,)."""
        return (self.rows[:, None] * (self.width - self.size + 1) + self.columns).flatten()

    def positions(self) -> Tensor:
        """Row and column of every patch's corner in pixels, (N, 2)."""
        return torch.cartesian_prod(self.rows, self.columns)


@functools.lru_cache(maxsize=32)
def patch_basis(size: int, channels: int) -> Tensor:
    """Orthonormal basis U of patches, its rows being the atoms: 2-D cosines times opponent colours.

    u_k(x) = sqrt((1 + [k > 0]) / p) cos(pi k (2x + 1) / (2p)) along each axis. Colours: (1,1,1)/sqrt 3, (1,0,-1)/sqrt 2,
    (1,-2,1)/sqrt 6. Row c p^2 is the mean of opponent channel c times p.

    Args:
        size: p.
        channels: 1 or 3.

    Returns:
        (d, d) float64 on the CPU; columns are pixels, channel by channel, row by row.
    """
    x, k = torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64)[:, None]
    cosines = torch.cos(math.pi * k * (2 * x + 1) / (2 * size)) * math.sqrt(2 / size)
    cosines[0] /= math.sqrt(2)
    colours = torch.ones(1, 1, dtype=torch.float64)
    if channels == 3:
        colours = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
        colours = colours / colours.norm(dim=1, keepdim=True)
    elif channels != 1:
        raise ValueError(f"pictures have 1 or 3 channels, not {channels}")
    return torch.kron(colours, torch.kron(cosines, cosines))


def patchify(image: Tensor, size: int, stride: int = 1) -> Tensor:
    """Coefficients of a picture's patches, z_i = U P_i y. White noise of variance s^2 stays white noise of variance s^2.

    Args:
        image: (C, H, W).
        size: p.
        stride: s; the last row and column of patches is always among them. Where s divides H - p and W - p,
            N = ((H - p) / s + 1) ((W - p) / s + 1).

    Returns:
        (N, d)
    """
    channels, height, width = image.shape
    grid = PatchGrid.of(height, width, size, stride, image.device)
    windows = image.unfold(1, size, 1).unfold(2, size, 1)  # (C, H-p+1, W-p+1, p, p), a view
    if stride > 1:
        windows = windows[:, grid.rows][:, :, grid.columns]
    pixels = windows.permute(1, 2, 0, 3, 4).reshape(len(grid), -1)
    return pixels @ patch_basis(size, channels).to(image).T


def aggregate(patches: Tensor, weights: Tensor, grid: PatchGrid) -> Tensor:
    """The picture whose pixels are weighted means of the patches over them: x = sum_i w_i P_i^T U^T z_i / sum_i w_i P_i^T 1.

    With w_i the precision of patch i it is the mean of independent estimates of least variance.

    Args:
        patches: coefficients, (N, d).
        weights: positive, (N,).
        grid: where the patches lie.

    Returns:
        (C, H, W)
    """
    size = grid.size
    channels = patches.shape[1] // size**2
    pixels = patches @ patch_basis(size, channels).to(patches)
    pixels = torch.cat([pixels * weights[:, None], weights[:, None].expand(-1, size**2)], 1)
    pixels = pixels.view(len(grid.rows), len(grid.columns), channels + 1, size, size).permute(2, 0, 3, 1, 4)
    lines = patches.new_zeros(channels + 1, len(grid.rows), size, grid.width)  # first along the columns, then along the rows
    for column in range(size):
        lines.index_add_(3, grid.columns + column, pixels[..., column])
    image = patches.new_zeros(channels + 1, grid.height, grid.width)
    for row in range(size):
        image.index_add_(1, grid.rows + row, lines[:, :, row])
    return image[:-1] / image[-1:]


def mean_columns(size: int, channels: int) -> Tensor:
    """Which coefficients are means of an opponent channel, (d,) bool."""
    return (torch.arange(channels * size**2) % size**2) == 0

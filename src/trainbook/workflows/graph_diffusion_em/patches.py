"""Pictures as overlapping patches in an orthonormal basis (cosines times opponent colours), and back."""

# C channels, p patch size, d = C p^2 coefficients, N patches

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from trainbook.layers import product


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


def cut(image: Tensor, size: int, stride: int = 1) -> Tensor:
    """Pixels of a picture's patches, (C, H, W) -> (N, C p^2), channel by channel, row by row.

    The last row and column of patches is always among them. Where s divides H - p and W - p,
    N = ((H - p) / s + 1) ((W - p) / s + 1).
    """
    grid = PatchGrid.of(*image.shape[1:], size, stride, image.device)
    windows = image.unfold(1, size, 1).unfold(2, size, 1)  # (C, H-p+1, W-p+1, p, p), a view
    if stride > 1:
        windows = windows[:, grid.rows[:, None], grid.columns]
    return windows.permute(1, 2, 0, 3, 4).reshape(len(grid), -1)


def patchify(image: Tensor, size: int, stride: int = 1) -> Tensor:
    """Coefficients of a picture's patches, z_i = U P_i y. White noise of variance s^2 stays white noise of variance s^2.

    Args:
        image: (C, H, W).
        size: p.
        stride: s, as in `cut`.

    Returns:
        (N, d)
    """
    pixels, basis = cut(image, size, stride), patch_basis(size, len(image)).to(image)
    return product(pixels.unsqueeze(0), basis.T.unsqueeze(0))[0]


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
    basis = patch_basis(grid.size, patches.shape[1] // grid.size**2).to(patches)
    return overlay(product(patches.unsqueeze(0), basis.unsqueeze(0))[0], weights, grid)


def overlay(pixels: Tensor, weights: Tensor, grid: PatchGrid) -> Tensor:
    """The picture whose pixels are weighted means of the patches over them: `aggregate` of what `cut` gives.

    Args:
        pixels: (N, C p^2).
        weights: positive, (N,).
        grid: where the patches lie.

    Returns:
        (C, H, W)
    """
    size, places = grid.size, (grid.height - grid.size + 1, grid.width - grid.size + 1)
    planes = pixels.T.clone(memory_format=torch.contiguous_format).mul_(weights)
    planes = planes.view(-1, size, size, len(grid.rows), len(grid.columns))
    image = pixels.new_zeros(len(planes), grid.height, grid.width)
    for (i, rows), (j, columns) in itertools.product(_runs(grid.rows), _runs(grid.columns)):
        for down, right in itertools.product(range(size), repeat=2):
            image[:, _moved(rows, down), _moved(columns, right)] += planes[:, down, right, i, j]
    mass = weights.new_zeros(places[0] * places[1]).index_copy_(0, grid.nodes(), weights).view(1, *places)
    return image / (size**2 * avg_pool2d(pad(mass, (size - 1,) * 4), size, 1))


def _runs(begins: Tensor) -> list[tuple[slice, range]]:
    """Patches at equal distances and where they begin, and the last one where it is nearer."""
    places = begins.tolist()
    step = places[1] - places[0] if len(places) > 1 else 1
    even = len(places) - (places[-1] != places[0] + (len(places) - 1) * step)
    runs = [(slice(even), range(places[0], places[even - 1] + 1, step))]
    return runs if even == len(places) else [*runs, (slice(even, None), range(places[-1], places[-1] + 1))]


def _moved(places: range, shift: int) -> slice:
    return slice(places.start + shift, places.stop + shift, places.step)


def mean_columns(size: int, channels: int) -> Tensor:
    """Which coefficients are means of an opponent channel, (d,) bool."""
    return (torch.arange(channels * size**2) % size**2) == 0

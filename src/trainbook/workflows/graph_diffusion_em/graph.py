"""The graph of similar patches: nearest neighbours in a window, four kernels on its edges, and its Laplacian."""

# N nodes, R of them with edges, k neighbours, H heads, d coefficients

import itertools
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from trainbook.workflows.graph_diffusion_em.patches import PatchGrid, patch_basis, patchify

HEADS = ("texture", "structure", "colour", "spatial")
TILE = 512  # nodes that are searched at once, at least a row of them


@dataclass(frozen=True)
class Graph:
    """Each node's nearest neighbours, itself not among them; nodes are the patches of stride 1, row by row.

    Attributes:
        grid: the patches that have edges; with stride 1 all.
        neighbours: node numbers, nearest first, (R, k) int64.
        distances: mean squared difference per coefficient less what noise adds, (R, k).
    """

    grid: PatchGrid
    neighbours: Tensor
    distances: Tensor


def knn_graph(image: Tensor, size: int, num_neighbours: int, radius: int, sigma: float = 0.0, stride: int = 1) -> Graph:
    """Nearest neighbours of patches within a window of (2 radius + 1)^2 offsets.

    delta_ij = max(0, |z_i - z_j|^2 / d - 2 sigma^2), whose mean is the distance of the clean patches. With
    |z_i - z_j|^2 = |z_i|^2 + |z_j|^2 - 2 z_i.z_j the products of a patch with all patches of its window are one correlation,
    whose kernel is the patch. In float32 a distance is off by about 1e-6 for values in [0, 1]. The memory is linear in the
    number of pixels.

    Args:
        image: (C, H, W).
        size: p of the patches.
        num_neighbours: k.
        radius: of the window, in pixels.
        sigma: standard deviation of the noise in `image`.
        stride: between nodes that get edges.

    Raises:
        ValueError: when a window holds fewer than k other patches.
    """
    channels, height, width = image.shape
    grid = PatchGrid.of(height, width, size, stride, image.device)
    lengths = height - size + 1, width - size + 1
    if num_candidates(image, size, radius) < num_neighbours:
        raise ValueError(f"a corner's window holds fewer than {num_neighbours} other patches; lower num_neighbours")
    image = image - image.mean()  # smaller numbers, less rounding
    offsets = torch.arange(-radius, radius + 1, device=image.device)
    shifts = (offsets[:, None] * lengths[1] + offsets).flatten()  # in node numbers
    squares = size**2 * avg_pool2d(image.square().sum(0)[None], size, 1)[0]
    candidates = _windows(pad(squares, (radius,) * 4, value=torch.inf)[None], len(offsets))
    windows, patches = _windows(pad(image, (radius,) * 4), size + 2 * radius), _windows(image, size)
    neighbours, distances = [], []
    for rows in grid.rows.split(max(1, TILE // len(grid.columns))):
        here = rows[:, None], grid.columns
        kernels = patches[:, *here].reshape(-1, 1, size, size)
        places = windows[:, *here].reshape(1, len(kernels), *windows.shape[-2:])
        products = conv2d(places, kernels, groups=len(kernels)).view(channels, -1, len(shifts)).sum(0)
        found = torch.sub(candidates[0, *here].reshape(products.shape), products, alpha=2)
        found[:, len(shifts) // 2] = torch.inf  # itself
        nearest, which = found.topk(num_neighbours, largest=False)
        nodes = (rows[:, None] * lengths[1] + grid.columns).flatten()
        neighbours.append(nodes[:, None] + shifts[which])
        distances.append(nearest + squares[here].view(-1, 1))
    found = torch.cat(distances) / (channels * size**2) - 2 * sigma**2
    return Graph(grid, torch.cat(neighbours), found.clamp_(min=0))


def num_candidates(image: Tensor, size: int, radius: int) -> int:
    """Other patches of a picture, (C, H, W), in the window of a corner's patch: the least of all windows."""
    height, width = (min(length - size + 1, radius + 1) for length in image.shape[1:])
    return max(0, height) * max(0, width) - 1


def _windows(image: Tensor, size: int) -> Tensor:
    """All squares of a picture, (C, H, W) -> (C, H - size + 1, W - size + 1, size, size), a view."""
    return image.unfold(1, size, 1).unfold(2, size, 1)


def head_features(image: Tensor, size: int) -> dict[str, Tensor]:
    """What the four heads compare, for every patch of stride 1.

    texture: log energies of three high cosine bands. structure: (c cos 2a, c sin 2a) of the structure tensor with coherence c
    and angle a. colour: means of the opponent channels over p, and the lowest chroma band. spatial: the corner's row and column
    over p.

    Args:
        image: (C, H, W), a pilot estimate in [0, 1].
        size: p.

    Returns:
        Head to (N, features).
    """
    channels, height, width = image.shape
    z = patchify(image, size)
    frequency = torch.arange(size, device=image.device)
    band = (frequency[:, None] + frequency).flatten()  # of the luminance coefficients
    luminance, edges = z[:, : size**2], torch.linspace(size / 2, 2 * size - 1, 4).tolist()
    energies = [luminance[:, (band >= a) & (band < b)].square().mean(1) for a, b in itertools.pairwise(edges)]
    texture = (torch.stack(energies, 1) + 1e-5).log()  # 1e-5: a grey level of 255, squared
    pixels = (luminance @ patch_basis(size, 1).to(z)).view(-1, size, size)
    down, right = pixels.diff(dim=1)[:, :, :-1], pixels.diff(dim=2)[:, :-1]
    xx, yy, xy = (right * right).mean((1, 2)), (down * down).mean((1, 2)), (right * down).mean((1, 2))
    structure = torch.stack([xx - yy, 2 * xy], 1) / (xx + yy + 1e-4).unsqueeze(1)
    colour = z[:, :: size**2] / size
    if channels == 3:
        colour = torch.cat([colour, z[:, size**2 + 1 :: size**2][:, :2], z[:, size**2 + size :: size**2][:, :2]], 1)
    grid = PatchGrid.of(height, width, size, 1, image.device)
    return {"texture": texture, "structure": structure, "colour": colour, "spatial": grid.positions().to(image) / size}


def head_kernels(features: dict[str, Tensor], graph: Graph, bandwidths: dict[str, float] | None = None) -> Tensor:
    """K^h_ij = exp(-|f^h_i - f^h_j|^2 / (2 t_h^2)) on the edges of a graph.

    Args:
        features: from `head_features`, (N, features) each.
        graph: R nodes with edges.
        bandwidths: head to t_h; by default the median distance over the edges, so that a kernel neither empties nor saturates.

    Returns:
        (H, R, k), values in [0, 1].
    """
    kernels, nodes = [], graph.grid.nodes()
    for name, feature in features.items():
        squares = (feature[nodes, None] - feature[graph.neighbours]).square().sum(-1)
        scale = bandwidths[name] ** 2 if bandwidths else squares.median().clamp(min=1e-12)
        kernels.append((-squares / (2 * scale)).exp_())
    return torch.stack(kernels)


def laplacian(neighbours: Tensor, weights: Tensor) -> Tensor:
    """Symmetric normalised Laplacian L = I - D^{-1/2} K D^{-1/2} with K_ii = 1; its spectrum lies in [0, 2).

    An edge is there when either end has it (union), with the larger of the two weights.

    Args:
        neighbours: (N, k), of every node.
        weights: non-negative, (N, k).

    Returns:
        Sparse CSR, (N, N).
    """
    N, k = neighbours.shape
    rows = torch.arange(N, device=weights.device).repeat_interleave(k)
    columns = neighbours.flatten()
    keys = torch.cat([rows * N + columns, columns * N + rows, torch.arange(N, device=weights.device) * (N + 1)])
    values = torch.cat([weights.flatten(), weights.flatten(), weights.new_ones(N)])
    keys, inverse = keys.unique(return_inverse=True)
    values = values.new_zeros(len(keys)).scatter_reduce_(0, inverse, values, "amax")
    rows, columns = keys // N, keys % N
    degree = values.new_zeros(N).index_add_(0, rows, values)
    scale = degree.rsqrt()
    values = (rows == columns).to(values) - values * (scale[rows] * scale[columns])
    starts = torch.zeros(N + 1, dtype=torch.int64, device=weights.device)
    starts[1:] = torch.bincount(rows, minlength=N).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)  # beta state, and checks that are not made
        return torch.sparse_csr_tensor(starts, columns, values, (N, N), check_invariants=False)

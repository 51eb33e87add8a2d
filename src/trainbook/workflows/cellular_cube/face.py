"""How the numbers of a code lie on a face of the cube: by rank, as coefficients of cosines, or on a pyramid of block sizes."""

# B batch, L side, S = L^2 cells, F numbers per cell, K numbers of the code

import math

import torch
from torch import Tensor, nn


def cosine_matrix(side: int) -> Tensor:
    """(L, L), rows the orthonormal cosines of the discrete cosine transform: A A^T = I."""
    k, n = torch.arange(side)[:, None], torch.arange(side)
    matrix = torch.cos(math.pi * k * (2 * n + 1) / (2 * side)) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix


BLOCKS = (4, 2, 1)  # cells along an edge of a pyramid's levels, coarse first


def pyramid_matrix(side: int) -> tuple[Tensor, Tensor]:
    """(L, L), rows an orthonormal basis of a line of cells, coarse first; and the level of each row, (L,) int64.

    Level l has the means of blocks of 4, 2 or 1 cells (the last block may be smaller) beyond what coarser levels say: the columns
    of their upsampling maps, without each coarse block's last part, which the others determine, orthonormalised in this
    order by QR. Where the side is a multiple of 4 these are the Haar wavelets of two levels.

    Source: Burt and Adelson (1983), The Laplacian Pyramid as a Compact Image Code, for the levels; orthonormal here.
    """
    columns, levels = [], []
    for level, width in enumerate(BLOCKS):
        block = torch.arange(side) // width
        number = -(-side // width)
        chosen = [b for b in range(number) if level == 0 or (b % 2 == 0 and b + 1 < number)]
        columns += [(block == b).double() for b in chosen]
        levels += [level] * len(chosen)
    basis, triangle = torch.linalg.qr(torch.stack(columns, 1))
    return (basis * triangle.diagonal().sign()).T.float().contiguous(), torch.tensor(levels)


class Face(nn.Module):
    """A fixed linear map from codes to faces and back; numbers of high rank become short waves.

    identity: number j lies in cell j // F. cosine: face = A^T Z A with the code's numbers in Z by frequency, orthonormal for
    K = S F. Fewer numbers (a universal base) are scaled by sqrt(S / K), so that cells have the same size at every L. pyramid:
    likewise with A of `pyramid_matrix` and the numbers in Z by level: the first ceil(L / 4)^2 F are constant on blocks of 4 x 4
    cells, those up to ceil(L / 2)^2 F on blocks of 2 x 2.

    Args:
        side: L.
        numbers: F.
        layout: "identity", "cosine" or "pyramid".
        size: K, at most S F.
    """

    def __init__(self, side: int, numbers: int, layout: str, size: int) -> None:
        super().__init__()
        self.side, self.numbers, self.layout, self.size = side, numbers, layout, size
        self.scale = math.sqrt(side**2 * numbers / size)
        matrix, wave = cosine_matrix(side), torch.arange(side)
        rank = wave[:, None] ** 2 + wave**2
        if layout == "pyramid":
            matrix, level = pyramid_matrix(side)
            rank = torch.maximum(level[:, None], level)
        order = torch.arange(side**2) if layout == "identity" else rank.flatten().argsort(stable=True)
        self.register_buffer("cells", order, persistent=False)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, code: Tensor) -> Tensor:
        """(B, K) to (B, L, L, F)."""
        padded = torch.nn.functional.pad(code, (0, self.side**2 * self.numbers - self.size)).view(len(code), -1, self.numbers)
        grid = torch.zeros_like(padded).index_copy(1, self.cells, padded)
        if self.layout == "identity":
            return grid.view(len(code), self.side, self.side, self.numbers)
        return self.scale * self._along_both(grid, self.matrix.T)

    def modes(self, face: Tensor) -> Tensor:
        """(B, L, L, C) to (B, ceil(K / F), C): the inverse of `forward` for every channel."""
        if self.layout != "identity":
            face = self._along_both(face, self.matrix) / self.scale
        return face.reshape(len(face), self.side**2, -1).index_select(1, self.cells[: -(-self.size // self.numbers)])

    def _along_both(self, face: Tensor, matrix: Tensor) -> Tensor:
        size, matrix = len(face), matrix.to(face.dtype)
        rows = torch.matmul(matrix, face.reshape(size, self.side, -1)).view(size * self.side, self.side, -1)
        return torch.matmul(matrix, rows).view(size, self.side, self.side, -1)

"""How the numbers of a code lie on a face of the cube: by rank, or as coefficients of cosines, which suit every size."""

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


class Face(nn.Module):
    """A fixed linear map from codes to faces and back; numbers of high rank become short waves.

    identity: number j lies in cell j // F. cosine: face = A^T Z A with the code's numbers in Z by frequency, orthonormal for
    K = S F. Fewer numbers (a universal base) are scaled by sqrt(S / K), so that cells have the same size at every L.

    Args:
        side: L.
        numbers: F.
        layout: "identity" or "cosine".
        size: K, at most S F.
    """

    def __init__(self, side: int, numbers: int, layout: str, size: int) -> None:
        super().__init__()
        self.side, self.numbers, self.layout, self.size = side, numbers, layout, size
        self.scale = math.sqrt(side**2 * numbers / size)
        frequency = torch.arange(side)
        order = (frequency[:, None] ** 2 + frequency**2).flatten().argsort(stable=True)
        self.register_buffer("cells", order if layout == "cosine" else torch.arange(side**2), persistent=False)
        self.register_buffer("matrix", cosine_matrix(side), persistent=False)

    def forward(self, code: Tensor) -> Tensor:
        """(B, K) to (B, L, L, F)."""
        padded = torch.nn.functional.pad(code, (0, self.side**2 * self.numbers - self.size)).view(len(code), -1, self.numbers)
        grid = torch.zeros_like(padded).index_copy(1, self.cells, padded)
        if self.layout == "identity":
            return grid.view(len(code), self.side, self.side, self.numbers)
        return self.scale * self._along_both(grid, self.matrix.T)

    def modes(self, face: Tensor) -> Tensor:
        """(B, L, L, C) to (B, ceil(K / F), C): the inverse of `forward` for every channel."""
        if self.layout == "cosine":
            face = self._along_both(face, self.matrix) / self.scale
        return face.reshape(len(face), self.side**2, -1).index_select(1, self.cells[: -(-self.size // self.numbers)])

    def _along_both(self, face: Tensor, matrix: Tensor) -> Tensor:
        size, matrix = len(face), matrix.to(face.dtype)
        rows = torch.matmul(matrix, face.reshape(size, self.side, -1)).view(size * self.side, self.side, -1)
        return torch.matmul(matrix, rows).view(size, self.side, self.side, -1)

"""Router cells: tokens that carry the code's numbers across the front face, and the back face's across to the output."""

# B batch, S cells of a face, M tokens, C channels, K numbers of a code, D of a vector

import torch
from torch import Tensor, nn
from torch.nn import functional

PIECE = 8  # numbers of the code that a token attends to together
WIDTH = 32  # of a token


class InRouters(nn.Module):
    """M tokens attend to pieces of the code and write to all cells by row-stochastic paths A (S, M): face += A (tokens W).

    They see the code only, never the vector, so that the code stays the bottleneck. W starts at 0.
    """

    def __init__(self, size: int, cells: int, tokens: int, channels: int) -> None:
        super().__init__()
        pieces = -(-size // PIECE)
        self.missing = pieces * PIECE - size
        self.embed = nn.Linear(PIECE, WIDTH)
        self.place = nn.Parameter(torch.randn(pieces, WIDTH) * 0.5)
        self.queries = nn.Parameter(torch.randn(tokens, WIDTH))
        self.keys, self.values = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.paths = nn.Parameter(torch.randn(cells, tokens))
        self.outward = nn.Linear(WIDTH, channels, bias=False)
        nn.init.zeros_(self.outward.weight)

    def forward(self, code: Tensor) -> Tensor:
        """(B, K) to (B, S, C)."""
        pieces = self.embed(functional.pad(code, (0, self.missing)).view(len(code), -1, PIECE)) + self.place
        weights = torch.softmax(self.queries @ self.keys(pieces).transpose(1, 2) / WIDTH**0.5, -1)
        tokens = functional.gelu(weights @ self.values(pieces))
        return torch.softmax(self.paths, -1) @ self.outward(tokens)

    def path_entropy(self) -> Tensor:
        """Mean entropy of a cell's paths, in nats; log M when all tokens reach it alike."""
        return torch.special.entr(torch.softmax(self.paths, -1)).sum(-1).mean()


class OutRouters(nn.Module):
    """M tokens pool the back face and add to the output: o += W gelu(V (A x)), A row-stochastic, W from 0."""

    def __init__(self, cells: int, tokens: int, channels: int, width: int) -> None:
        super().__init__()
        self.paths = nn.Parameter(torch.randn(tokens, cells))
        self.inward = nn.Linear(channels, WIDTH)
        self.outward = nn.Linear(tokens * WIDTH, width, bias=False)
        nn.init.zeros_(self.outward.weight)

    def forward(self, back: Tensor) -> Tensor:
        """(B, S, C) to (B, D)."""
        tokens = functional.gelu(self.inward(torch.softmax(self.paths, -1) @ back))
        return self.outward(tokens.flatten(1))

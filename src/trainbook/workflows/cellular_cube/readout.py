"""The linear read-out of the back face, in coordinates in which what the experts made stands beside what was only carried."""

# N sentences, F numbers of a back face, E of them in the code's channels, D numbers of a vector

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_DEVIATION = 1e-3  # of a coordinate, as a share of their root mean square: below it there is nothing to scale up


class Surplus(NamedTuple):
    """What a linear map of the code foretells of other features, and the rest's deviations: z = (r - P e - p) / s.

    Attributes:
        slope: (R, E), P.
        offset: (R,), p.
        deviation: (R,), s.
    """

    slope: Tensor
    offset: Tensor
    deviation: Tensor

    def of(self, code: Tensor, rest: Tensor) -> Tensor:
        """(N, E) and (N, R) to (N, R)."""
        return (rest - functional.linear(code, self.slope, self.offset)) / self.deviation


def fit_surplus(code: Tensor, rest: Tensor) -> Surplus:
    """Least squares of the other features on the code, in double precision, and the deviations of what is left.

    Args:
        code: (N, E).
        rest: (N, R).
    """
    e, r = code.double(), rest.double()
    mean_e, mean_r = e.mean(0), r.mean(0)
    slope = torch.linalg.lstsq((e - mean_e).T @ (e - mean_e) + 1e-9 * torch.eye(e.shape[1]).to(e), (e - mean_e).T @ (r - mean_r))
    slope = slope.solution.T
    left = r - mean_r - (e - mean_e) @ slope.T
    deviation = left.square().mean(0).sqrt()
    least = LEAST_DEVIATION * deviation.square().mean().sqrt()
    parts = (slope, mean_r - slope @ mean_e, deviation.clamp(min=max(float(least), 1e-12)))
    return Surplus(*(part.to(code) for part in parts))


def present_rows(targets: Tensor) -> Tensor:
    """Which of (N, D) vectors there are, (N,): one that is missing is a row of NaN."""
    return ~targets.isnan().any(1)


class Readout(nn.Module):
    """o = W [e, (r - P e - p) / s] + b: e the code's channels of the back face, r the others.

    Linear in the back face whatever P, p and s are. Most of r is a linear function of the code that was only carried along;
    gradients of a plain map go there, and what the experts made, small and without it, is learned last or not at all.

    Args:
        cells: of the back face, or modes.
        numbers: of the code per cell; the first channels.
        channels: C.
        width: D.
        with_surplus: keep P, p and s, which `standardise` sets; otherwise the map is plain.
    """

    def __init__(self, cells: int, numbers: int, channels: int, width: int, with_surplus: bool) -> None:
        super().__init__()
        self.cells, self.numbers, self.channels, self.with_surplus = cells, numbers, channels, with_surplus
        self.in_features, self.out_features, self.code_features = cells * channels, width, cells * numbers
        self.weight = nn.Parameter(torch.zeros(width, self.in_features))
        self.bias = nn.Parameter(torch.zeros(width))
        if with_surplus:
            others = self.in_features - self.code_features
            self.register_buffer("slope", torch.zeros(others, self.code_features))
            self.register_buffer("offset", torch.zeros(others))
            self.register_buffer("deviation", torch.ones(others))

    def parts(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Cells (N, cells, C) to the code's channels (N, E) and the others (N, F - E)."""
        return seen[..., : self.numbers].flatten(1), seen[..., self.numbers :].flatten(1)

    def coordinates(self, seen: Tensor) -> Tensor:
        """[e, z], (N, F)."""
        code, rest = self.parts(seen)
        if self.with_surplus:
            rest = Surplus(self.slope, self.offset, self.deviation).of(code, rest)
        return torch.cat([code, rest], 1)

    def forward(self, seen: Tensor) -> Tensor:
        """Cells (N, cells, C) to (N, D)."""
        return functional.linear(self.coordinates(seen), self.weight, self.bias)

    @torch.no_grad()
    def plain(self) -> tuple[Tensor, Tensor]:
        """Weights of e and of r themselves, (D, E) and (D, F - E)."""
        on_code, on_rest = self.weight.tensor_split([self.code_features], 1)
        if not self.with_surplus:
            return on_code, on_rest
        on_rest = on_rest / self.deviation
        return on_code - on_rest @ self.slope, on_rest

    @torch.no_grad()
    def standardise(self, seen: Tensor) -> None:
        """Set P, p and s by these back faces, (N, cells, C), and W and b so that the map stays what it is; a plain map stays."""
        if not self.with_surplus:
            return
        found, (on_code, on_rest) = fit_surplus(*self.parts(seen)), self.plain()
        self.bias += on_rest @ (found.offset - self.offset)
        self.weight.copy_(torch.cat([on_code + on_rest @ found.slope, on_rest * found.deviation], 1))
        for name, value in found._asdict().items():
            getattr(self, name).copy_(value)

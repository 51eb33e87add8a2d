"""What a cell perceives of the 27 cells around it: its state, three differences and a mean."""

# B batch, L side, C channels

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

AXES = (1, 2, 3)  # z, y, x of a state


def perceive(x: Tensor, num_near: Tensor, one_sided: bool = True) -> Tensor:
    """[x, half differences along z, y and x, mean of 3 x 3 x 3 cells].

    Along an axis d_i = (x_{i+1} - x_{i-1}) / 2; at the border x_1 - x_0 and x_{L-1} - x_{L-2}, or as if there were zeros beyond.
    m = (sum over those of the 27 cells that exist) / n.

    Args:
        x: (B, L, L, L, C), L at least 2.
        num_near: (L, L, L, 1), n.
        one_sided: which differences to take at the border.

    Returns:
        (B, L, L, L, 5C); its gradient can be taken once.
    """
    return _Perception.apply(x, num_near.to(x.dtype), one_sided)


def count_near(side: int) -> Tensor:
    """(L, L, L, 1), how many of the 3 x 3 x 3 cells around each lie inside the cube."""
    return _sum_of_27(torch.ones(1, side, side, side, 1))[0]


class _Perception(torch.autograd.Function):
    """Slices added in place and written where they belong: a product with a banded matrix costs L / 3 times the work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_near: Tensor, one_sided: bool) -> Tensor:
        ctx.save_for_backward(num_near)
        ctx.one_sided, last = one_sided, x.shape[1] - 1
        out = x.new_empty(*x.shape[:-1], 5 * x.shape[-1])
        state, *differences, mean = out.split(x.shape[-1], -1)
        state.copy_(x)
        half = x / 2
        for axis, difference in zip(AXES, differences, strict=True):
            inner = difference.narrow(axis, 1, last - 1)
            torch.sub(half.narrow(axis, 2, last - 1), half.narrow(axis, 0, last - 1), out=inner)
            for end, next_to_it, sign in ((0, 1, 1), (last, last - 1, -1)):
                slope = (x if one_sided else half).narrow(axis, next_to_it, 1)
                difference.narrow(axis, end, 1).copy_(sign * (slope - x.narrow(axis, end, 1) if one_sided else slope))
        torch.div(_sum_of_27(x), num_near, out=mean)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        last = gradient.shape[1] - 1
        state, *differences, mean = gradient.split(gradient.shape[-1] // 5, -1)
        total = torch.zeros_like(state, memory_format=torch.contiguous_format)
        for axis, difference in zip(AXES, differences, strict=True):
            total.narrow(axis, 1, last).add_(difference.narrow(axis, 0, last))
            total.narrow(axis, 0, last).sub_(difference.narrow(axis, 1, last))
            if ctx.one_sided:  # the border cell's own share, and the other half of its neighbour's
                for end, next_to_it, sign in ((0, 1, 1), (last, last - 1, -1)):
                    slope = sign * difference.narrow(axis, end, 1)
                    total.narrow(axis, next_to_it, 1).add_(slope)
                    total.narrow(axis, end, 1).sub_(slope, alpha=2)
        (num_near,) = ctx.saved_tensors
        return total.div_(2).add_(state).add_(_sum_of_27(mean / num_near)), None, None


def _sum_of_27(x: Tensor) -> Tensor:
    for axis in AXES:
        total, last = x.clone(memory_format=torch.contiguous_format), x.shape[axis] - 1
        total.narrow(axis, 0, last).add_(x.narrow(axis, 1, last))
        total.narrow(axis, 1, last).add_(x.narrow(axis, 0, last))
        x = total
    return x

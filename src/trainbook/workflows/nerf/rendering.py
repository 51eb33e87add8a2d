"""Volume rendering: densities and colours along rays become pixels."""

# R rays, S samples per ray

from typing import NamedTuple

import torch
from torch import Tensor


class Pixels(NamedTuple):
    """What is seen along rays: colour (R, 3), depth (R,) as the mean distance, opacity (R,) in [0, 1]."""

    colour: Tensor
    depth: Tensor
    opacity: Tensor


def transmittances(optical_depths: Tensor) -> tuple[Tensor, Tensor]:
    """Light that gets through: w_i = T_i - T_(i+1) of each interval and T_(S+1) behind the last, T_i = exp(-sum_(j<i) tau_j).

    T_i - T_(i+1) = T_i (1 - exp(-tau_i)) is the weight of alpha compositing; so all weights and the rest add up to 1.

    Args:
        optical_depths: (R, S), tau_i = sigma_i w_i >= 0.

    Returns:
        Weights (R, S) and the rest (R, 1).

    Source: Max (1995), Optical Models for Direct Volume Rendering; Mildenhall et al. (2020), NeRF, equation 3.
    """
    through = torch.exp(-optical_depths.cumsum(-1))
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=-1)
    return before - through, through[:, -1:]


def composite(densities: Tensor, colours: Tensor, distances: Tensor, widths: Tensor, far: float) -> Pixels:
    """Alpha compositing: C = sum_i w_i c_i + T_(S+1) white, depth = sum_i w_i t_i + T_(S+1) far.

    Args:
        densities: (R, S), sigma_i >= 0, per unit of length.
        colours: (R, S, 3), c_i in [0, 1].
        distances: (R, S), t_i.
        widths: (R, S) or (R, 1), of the intervals.
        far: the far plane, which closes every ray; what is behind it is white, 1.
    """
    weights, rest = transmittances(densities * widths)
    colour = torch.bmm(weights[:, None], colours)[:, 0] + rest
    depth = (weights * distances).sum(-1) + rest[:, 0] * far
    return Pixels(colour, depth, 1 - rest[:, 0])

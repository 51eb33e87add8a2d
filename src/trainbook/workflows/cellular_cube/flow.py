"""Where information passes through the cube: sensitivity of the output to each plane, and what a lesion there costs."""

# B batch, T steps, L side, C channels, D numbers of a vector

from collections.abc import Callable

import torch
from torch import Tensor

Watcher = Callable[[int, Tensor, Tensor | None], Tensor | None]  # step, state (B, L, L, L, C), expert weights
Passes = Callable[[Watcher], Tensor]  # runs the network with a watcher, gives its output (B, D)


def cell_sensitivity(passes: Passes, seed: int, num_probes: int = 4) -> Tensor:
    """Mean over sentences of the squared derivative of the output by each cell's state at each step.

    |d o / d x_t(c)|^2 = E_v |J^T v|^2 for random signs v (Hutchinson), so a handful of backward passes does.

    Args:
        passes: runs the network with gradients enabled.
        seed: of the random signs.
        num_probes: backward passes.

    Returns:
        (T + 1, L, L, L), planes first: sum over the last two axes for a plane's share.
    """
    states: list[Tensor] = []

    def watch(step: int, state: Tensor, weights: Tensor | None) -> Tensor:
        states.append(state if state.requires_grad else state.detach().requires_grad_())
        return states[-1]

    with torch.enable_grad():
        output = passes(watch)
        generator = torch.Generator().manual_seed(seed)
        total = [torch.zeros_like(state[0, ..., 0]) for state in states]
        for _ in range(num_probes):
            signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
            gradients = torch.autograd.grad(output, states, signs, retain_graph=True, allow_unused=True)
            for place, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    place += gradient.square().sum(-1).mean(0) / num_probes
    return torch.stack(total).detach()


@torch.no_grad()
def lesion_curve(passes: Passes, target: Tensor, num_steps: int, side: int) -> Tensor:
    """FVU after setting plane z to zero before step t + 1, less the FVU without a lesion; one pass per entry.

    Args:
        passes: runs the network.
        target: (B, D), standardised.
        num_steps: T.
        side: L.

    Returns:
        (T, L): lesion after t = 0 .. T - 1 steps, of plane z.
    """

    def unexplained(step: int, plane: int) -> Tensor:
        def watch(now: int, state: Tensor, weights: Tensor | None) -> Tensor | None:
            if now != step:
                return None
            mask = torch.ones_like(state[:, :, :1, :1, :1])
            mask[:, plane] = 0
            return state * mask

        return (passes(watch) - target).square().sum() / target.square().sum()

    whole = unexplained(-1, 0)
    return torch.stack([torch.stack([unexplained(step, z) - whole for z in range(side)]) for step in range(num_steps)])


def saliency_path(sensitivity: Tensor) -> Tensor:
    """The most sensitive cell of each plane at the step at which that plane matters most, (L, 3): step, row, column.

    Args:
        sensitivity: (T + 1, L, L, L), from `cell_sensitivity`.
    """
    path = []
    for plane in sensitivity.unbind(1):
        step = int(plane.sum((1, 2)).argmax())
        path.append((step, *divmod(int(plane[step].argmax()), plane.shape[-1])))
    return torch.tensor(path)

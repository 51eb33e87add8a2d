"""The exponential moving average of a module's weights."""

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainbook.distributed import present


def averaged_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without gradients: the start of an exponential moving average of the weights."""
    return copy.deepcopy(module).eval().requires_grad_(False)


class MovingAverage:
    """Lets one module follow another by e <- d e + (1 - d) w in parameters; buffers (batch statistics) are copied.

    Args:
        average: the module that follows, e.
        module: the module followed, w.
        decay: d.
    """

    def __init__(self, average: nn.Module, module: nn.Module, decay: float) -> None:
        self._decay, self._update = decay, get_ema_multi_avg_fn(decay)
        self._averages, self._weights = present(average.parameters()), present(module.parameters())
        self._averaged_buffers, self._buffers = present(average.buffers()), present(module.buffers())

    @torch.no_grad()
    def follow(self, skipped: Tensor | None = None) -> None:
        """Take one step; where `skipped`, a boolean on the device, is true, the parameters stay."""
        if skipped is None:
            self._update(self._averages, self._weights, None)
        else:  # the weight 0 of a skipped step as a tensor, so that the host need not know
            weight = (1 - self._decay) * (~skipped).float()
            torch._foreach_lerp_(self._averages, self._weights, [weight] * len(self._weights))
        if self._buffers:
            torch._foreach_copy_(self._averaged_buffers, self._buffers)

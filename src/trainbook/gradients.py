"""Gradients at less memory, and gradients compared with finite differences."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint


def checkpointed(blocks: Iterable[nn.Module], inputs: Any, enabled: bool = True) -> Any:
    """Run blocks one after another; when enabled keep only what enters each, and compute the rest again for the gradient.

    Dropout repeats its draws, so gradients are equal. Batch normalisation would count a batch twice in its running
    statistics: leave such blocks out.
    """
    for block in blocks:
        inputs = checkpoint(block, inputs, use_reentrant=False) if enabled else block(inputs)
    return inputs


def check_gradients(function: Callable[..., Any], inputs: Mapping[str, Tensor]) -> None:
    """Compare the gradient of a function with finite differences in float64, one input at a time.

    Args:
        function: called with `inputs` by name; deterministic. For a module's weights wrap `torch.func.functional_call`.
        inputs: small tensors; each floating one is checked, away from kinks.

    Raises:
        ValueError: naming the first input whose gradient is wrong.
    """
    values = {name: x.detach().double() if x.is_floating_point() else x for name, x in inputs.items()}
    for name, value in values.items():
        if not value.is_floating_point():
            continue
        try:
            torch.autograd.gradcheck(lambda x, name=name: function(**{**values, name: x}), value.clone().requires_grad_())
        except GradcheckError as error:
            raise ValueError(f"the gradient with respect to {name!r} is not that of finite differences: {error}") from error

"""The attention weights of any module, read while it runs; `plots.draw_attention` shows them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# B batch, H heads, Q queries, K keys


def attention_weights(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Run `module(*args, **kwargs)` once, without gradients and without dropout, and return what it attended to.

    softmax(scale q k^T + mask), row by row over the keys. Seen are `nn.MultiheadAttention` and whatever calls
    `torch.nn.functional.scaled_dot_product_attention`, such as transformers models with `attn_implementation="sdpa"`.
    The run is in evaluation mode; afterwards each part is in the mode it was in. A query whose keys are all masked has the
    weights 0, in `nn.MultiheadAttention` NaN.

    Returns:
        Each operation's weights in the order of execution, (B, H, Q, K) on the module's device, named after the submodule
        that computed them: "layers.0.self_attn", and "layers.0.self_attn:2" when it does so a second time. The module
        itself goes by the name of its class. Dimensions between batch and queries count as heads; without one H is 1.

    Raises:
        ValueError: when no attention was seen.
    """
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper; what is compiled inside runs as written
    reader = _Reader({part: name or type(module).__name__ for name, part in module.named_modules()})
    modes = {part: part.training for part in module.modules()}
    hooks = [part.register_forward_pre_hook(reader.enter) for part in modes]
    hooks += [part.register_forward_hook(reader.leave, always_call=True) for part in modes]
    try:
        for part in modes:  # not eval(): a module may do more there than change its mode
            part.training = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), reader:
            module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes.items():
            part.training = training
    if not reader.weights:
        raise ValueError(
            f"{type(module).__name__} called neither nn.MultiheadAttention nor scaled_dot_product_attention; "
            'a transformers model does after model.set_attn_implementation("sdpa")'
        )
    return reader.weights


class _Reader(TorchFunctionMode):
    """Keeps the weights of each attention that runs under it. Torch's fused encoder layers stand back under any such mode."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.names, self.running, self.weights = names, [], {}

    def enter(self, part: nn.Module, inputs: Any) -> None:
        self.running.append(part)

    def leave(self, part: nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            self._keep(_weights(*args, **kwargs))
        if function is functional.multi_head_attention_forward:  # a second time, so that the run itself is as without us
            weights = function(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})[1]
            self._keep(weights.reshape(-1, *weights.shape[-3:]))  # an input without a batch: B = 1
        return function(*args, **kwargs)

    def _keep(self, weights: Tensor) -> None:
        name = unique = self.names[self.running[-1]]
        number = 1
        while unique in self.weights:
            number += 1
            unique = f"{name}:{number}"
        self.weights[unique] = weights


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """What scaled_dot_product_attention multiplies the values with: W I = W, whatever the mask, scale or grouping of heads."""
    identity = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device).expand(*value.shape[:-2], -1, -1)
    with sdpa_kernel(SDPBackend.MATH):  # a fused kernel may refuse values wider than the keys
        weights = functional.scaled_dot_product_attention(query, key, identity, attn_mask, 0.0, is_causal, **options)
    return weights.reshape(len(weights) if weights.ndim > 2 else 1, -1, *weights.shape[-2:])

"""The optimizer over a module's parameters, with and without weight decay."""

from typing import Any

import torch
from torch import nn

from trainbook.optimization import OptimizationConfig

NORMS = (nn.LayerNorm, nn.RMSNorm)  # those whose weights can have two dimensions; of other norms they have one
FUSED = ("cpu", "cuda")  # one kernel per group instead of some ten per parameter


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in optimizer groups: with weight decay and without, for each factor of the learning rate.

    Without are parameters of at most one dimension, those of norm layers, and those called `bias` or `..._bias`.
    Embeddings decay. A shared parameter appears once; one that does not require a gradient not at all. A parameter with an
    attribute `rate_factor` other than 1 is trained at so many times the rate; its group has that under the same name.
    """
    spared = {id(p) for part in module.modules() if isinstance(part, NORMS) for p in part.parameters(recurse=False)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, weight_decay): [], (1.0, 0.0): []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            last = name.rpartition(".")[2]
            is_spared = parameter.ndim < 2 or id(parameter) in spared or last == "bias" or last.endswith("_bias")
            groups.setdefault((getattr(parameter, "rate_factor", 1.0), 0.0 if is_spared else weight_decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "rate_factor": factor}
        for (factor, decay), parameters in groups.items()
        if parameters
    ]


def make_optimizer(module: nn.Module, config: OptimizationConfig) -> torch.optim.Optimizer:
    """The configured optimizer over `parameter_groups`. AdamW's decay is decoupled, SGD's is added to the gradient."""
    groups = parameter_groups(module, config.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in FUSED for p in parameters) or None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=fused)
    if config.momentum:
        # Fused SGD allocates its buffers without filling them, and a scaler that skips the first step leaves them so:
        # the second step would add uninitialised memory. From zeros, 0 m + g is the same first update.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer

"""Optimizers of RBM parameters: views of a block of timesteps, where their statistics go, AdamW or plain SGD."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainbook.state import TrainState
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.contrastive import Update
from trainbook.workflows.timestep_dbn.rbm import ConditionalRBM


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def rbm_views(rbm: ConditionalRBM, start: int, stop: int, *more: Tensor) -> list[Tensor]:
    """Weight, visible bias, hidden bias, context weight and `more` of some timesteps as leaves that share the module's memory."""
    tensors = (rbm.weight, rbm.visible_bias, rbm.hidden_bias, rbm.context_weight, *more)
    views = [tensor.detach()[start:stop].requires_grad_() for tensor in tensors]
    for view in views:
        view.grad = torch.zeros_like(view)
    return views


def rbm_update(config: Config, view: list[Tensor], rate: float) -> Update:
    """Where an RBM's statistics go: with sgd into the parameters at once, with adam into the gradients."""
    return Update.sgd(view, rate, config.weight_decay) if config.optimizer == "sgd" else Update.gradient(view)


def rbm_adam(config: Config, views: list[list[Tensor]]) -> torch.optim.Optimizer:
    """AdamW for RBM parameters in the order of `rbm_views`; weights decay, biases and what comes after the four do not."""
    groups = [
        {"params": [tensor for view in views for tensor in (view[0], view[3])], "weight_decay": config.weight_decay},
        {"params": [tensor for view in views for tensor in (*view[1:3], *view[4:])], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def attach_optimizer(
    config: Config, state: TrainState, name: str, views: list[list[Tensor]], fresh: bool
) -> Callable[[float], None]:
    """Put an optimizer of these views into the state; returns its step as a function of the rate (nothing to do with sgd)."""
    if config.optimizer == "sgd":
        return lambda rate: None
    optimizer = rbm_adam(config, views)
    if not fresh:
        optimizer.load_state_dict(state.optimizers[name].state_dict())
    state.optimizers[name] = optimizer

    def step(rate: float) -> None:
        _set_rate(optimizer, rate)
        optimizer.step()

    return step

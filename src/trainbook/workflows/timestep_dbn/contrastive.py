"""Contrastive training of the RBMs of some timesteps, with no memory made per step."""

# T timesteps, B batch, V visible units, H hidden units, G context units; z visible, h hidden, g context
# a visible bias, b hidden bias, W weight, U context weight; "+" of the data, "-" of the model

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trainbook.layers import blend_
from trainbook.workflows.timestep_dbn.elementwise import Elementwise
from trainbook.workflows.timestep_dbn.products import Products
from trainbook.workflows.timestep_dbn.random_bits import unit_index
from trainbook.workflows.timestep_dbn.rbm import Block

NegativePhase = Literal["pcd", "recovery", "cd"]

# What the random numbers of a level are used for: the first two, then hidden and visible units of every sweep in turn.
TRANSITION, MESSAGE, FIRST_SWEEP = 0, 1, 2


def num_draws(sweeps: int) -> int:
    """Uses of random numbers on one level in a step with so many Gibbs sweeps."""
    return FIRST_SWEEP + 2 * sweeps + 1


@dataclass(frozen=True)
class Update:
    """Where contrastive statistics go: target <- keep target + scale (E_data - E_model).

    Attributes:
        targets: for weight, visible bias, hidden bias, context weight; (T, ...) each.
        keep: share of the weights' targets that stays.
        keep_bias: share of the biases' targets that stays, 0 or 1.
        scale: of what is added.
    """

    targets: tuple[Tensor, ...]
    keep: float
    keep_bias: float
    scale: float

    @classmethod
    def gradient(cls, parameters: Sequence[Tensor]) -> "Update":
        """Overwrite the parameters' gradients, which an optimizer then reads: -(E_data - E_model)."""
        return cls(tuple(parameter.grad for parameter in parameters), 0.0, 0.0, -1.0)

    @classmethod
    def sgd(cls, parameters: Sequence[Tensor], rate: float, weight_decay: float) -> "Update":
        """Move the parameters themselves, in the pass that makes the statistics: W <- (1 - rate decay) W + rate (...)."""
        return cls(tuple(parameter.detach() for parameter in parameters), 1 - rate * weight_decay, 1.0, rate)

    def at(self, timesteps: slice) -> "Update":
        """The same for some of the timesteps."""
        return replace(self, targets=tuple(target[timesteps] for target in self.targets))


class Phases:
    """What a step on the RBMs of a level works in; `take` says for how many timesteps.

    Args:
        block: the largest block that it is for, for its shapes.
        batch: B.
        dtype: of the operands of products; None for the block's own.

    Attributes:
        visible: [z+; z-], (T, 2B, V); `data` and `model` are its halves.
        hidden: [z+; z-] W and what becomes of it, (T, 2B, H).
        state: the chain's hidden units between two sweeps, (T, B, H).
        signs: 2 z_t - 1, (T, B, V).
        context: g, (T, B, G).
        bias: b + gU, (T, B, H).
        products: with the weights that were loaded.
        visible_index, hidden_index: of the random numbers, (1, B, V) and (1, B, H).
    """

    def __init__(self, block: Block, batch: int, dtype: torch.dtype | None = None) -> None:
        timesteps, V, H = block.weight.shape
        G = block.context_weight.shape[1]
        sizes = {
            "visible": (2 * batch, V), "hidden": (2 * batch, H), "state": (batch, H), "signs": (batch, V),
            "context": (batch, G), "bias": (batch, H),
        }  # fmt: skip
        self._whole = {name: block.weight.new_zeros(timesteps, *size) for name, size in sizes.items()}
        self.products = Products(block, dtype or block.weight.dtype)
        self.visible_index, self.hidden_index = (unit_index(batch, size, block.weight.device) for size in (V, H))
        self.take(timesteps)

    def take(self, timesteps: int) -> "Phases":
        """Work with the first so many timesteps."""
        part = {name: tensor[:timesteps] for name, tensor in self._whole.items()}
        self.visible, self.hidden, self.state = part["visible"], part["hidden"], part["state"]
        self.signs, self.context, self.bias = part["signs"], part["context"], part["bias"]
        self.data, self.model = self.visible.chunk(2, 1)
        return self

    def load(self, block: Block) -> None:
        """The block's weights, and b + gU from the context."""
        self.products.load(block)
        self.bias.copy_(block.hidden_bias.unsqueeze(1))
        if self.context.shape[2]:
            self.products.add_context(self.context, self.bias)


def run_negative_phase(
    block: Block,
    phases: Phases,
    chains: Tensor,
    coupling: Tensor | None,
    start: NegativePhase,
    sweeps: int,
    keys: Tensor,
    kernels: Elementwise,
) -> None:
    """Block Gibbs sampling, `sweeps` times h ~ P(h | z, g) and z ~ P(z | h, z_t); z- is written to `phases`.

    The first h is the chains' own where they are kept as hidden units.

    Args:
        block: the RBMs.
        phases: with `data` and `signs`, loaded with the block; without a coupling the signs are not looked at.
        chains: persistent chains, (T, B, V), or (T, B, H) where there is no context.
        coupling: Gamma_t, (T, 1, 1), or None for RBMs without a condition.
        start: at the persistent chains, at z_t, or at z_{t-1}.
        sweeps: at least 1.
        keys: of the level's random numbers, (uses, T, 2, 1).
        kernels: compiled or eager.
    """
    draws, signs = iter(keys[FIRST_SWEEP:]), None if coupling is None else phases.signs
    hidden, key = chains, next(draws)
    if start != "pcd" or phases.context.shape[2]:
        if start == "recovery":
            torch.add(phases.signs, 1.0, out=phases.model).mul_(0.5)
        visible = {"pcd": chains, "recovery": phases.model, "cd": phases.data}[start]
        hidden = phases.products.with_weight(visible, phases.state)
        kernels.draw_hidden(hidden, phases.bias, phases.hidden_index, key)
    for sweep in range(sweeps):
        if sweep:
            hidden = phases.products.with_weight(phases.model, phases.state)
            kernels.draw_hidden(hidden, phases.bias, phases.hidden_index, next(draws))
        phases.products.with_transposed(hidden, phases.model)
        bias = block.visible_bias.unsqueeze(1)
        kernels.draw_visible(phases.model, bias, coupling, signs, phases.visible_index, next(draws))


def contrastive_update(
    block: Block,
    phases: Phases,
    update: Update,
    kernels: Elementwise,
    message: Tensor | None = None,
    chains: Tensor | None = None,
    key: Tensor | None = None,
) -> None:
    """Gradient of log p averaged over the batch, E_data[z s(.)'] - E_model[z s(.)'] and likewise for a, b and U, applied.

    Both phases share the product z -> h, and the one that makes the statistics and adds them to the target:
    W <- keep W + [z+; z-]' scale [h+; -h-].

    Args:
        block: the RBMs.
        phases: with `visible` and `context`, loaded with the block.
        update: where it goes.
        kernels: compiled or eager.
        message: P(h | z+, g) is written here, (T, B, H), unless None.
        chains: bits drawn from P(h | z-, g) are written here, (T, B, H), unless None.
        key: of their random numbers, (T, 2, 1).

    Source: Hinton (2002), Training Products of Experts; Tieleman (2008) for persistent chains.
    """
    visible, hidden, batch = phases.visible, phases.hidden, phases.data.shape[1]
    weight, visible_bias, hidden_bias, context_weight = update.targets
    scale = visible.new_tensor(update.scale / batch)
    phases.products.with_weight(visible, hidden)
    kernels.weigh_phases(hidden, phases.bias, scale, message, chains, phases.hidden_index, key)
    phases.products.add_outer(visible, hidden, weight, update.keep, scale, kernels)
    blend_(hidden_bias, hidden.sum(1), update.keep_bias)
    blend_(visible_bias, (phases.data.sum(1) - phases.model.sum(1)).mul_(scale), update.keep_bias)
    if phases.context.shape[2]:
        positive, negative = hidden.chunk(2, 1)
        difference = torch.add(positive, negative, out=phases.state)
        phases.products.add_outer(phases.context, difference, context_weight, update.keep, scale, kernels)


def contrastive_step(
    block: Block,
    phases: Phases,
    chains: Tensor,
    coupling: Tensor | None,
    start: NegativePhase,
    sweeps: int,
    update: Update,
    keys: Tensor,
    kernels: Elementwise,
    message: Tensor | None = None,
    run: Callable[[Callable[[], None]], None] = lambda work: work(),
) -> None:
    """Run the negative phase and apply the contrastive statistics; with pcd the chains move on.

    Arguments as of `run_negative_phase` and `contrastive_update`; `run` calls the former.
    """
    run(partial(run_negative_phase, block, phases, chains, coupling, start, sweeps, keys, kernels))
    moves, has_context = start == "pcd", bool(phases.context.shape[2])
    if moves and has_context:
        chains.copy_(phases.model)
    hidden_chains = chains if moves and not has_context else None
    contrastive_update(block, phases, update, kernels, message, hidden_chains, keys[FIRST_SWEEP + 2 * sweeps])

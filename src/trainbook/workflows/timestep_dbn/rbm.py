"""Conditional restricted Boltzmann machines, one per timestep, held and trained as one batched tensor.

p_t(z | z_t, g) ~ exp(-F_t(z; g) + Gamma_t z.(2 z_t - 1)),  F_t(z; g) = -a_t.z - sum_j softplus(b_tj + (z W_t)_j + (g U_t)_j)

With F_t = -log q(z_{t-1}) this is the exact reverse step for every T: the noisy bits act only through the field
Gamma_t (2 z_t - 1) on the visible biases. Source: Gao et al. (2021), Learning Energy-Based Models by Diffusion Recovery
Likelihood, arXiv 2012.08125; Jelincic et al. (2025), arXiv 2510.23972, for the form on bits.
"""

# T timesteps, B batch, V visible units, H hidden units, G context units; z visible, h hidden, g context
# a visible bias, b hidden bias, W weight, U context weight

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from trainbook.layers import blend_, product

INITIAL_INPUT = 0.25  # standard deviation of what a unit receives from all others at the start, before any learning


class ConditionalRBM(nn.Module):
    """T conditional RBMs of one shape; a block of timesteps `[start:stop]` is a view, not a copy.

    Args:
        timesteps: T.
        visible_units: V.
        hidden_units: H.
        context_units: G, 0 for none.
        num_chains: persistent Gibbs chains kept per timestep.
    """

    def __init__(self, timesteps: int, visible_units: int, hidden_units: int, context_units: int, num_chains: int) -> None:
        super().__init__()
        scale = INITIAL_INPUT / math.sqrt(max(visible_units, hidden_units))
        self.weight = nn.Parameter(scale * torch.randn(timesteps, visible_units, hidden_units))
        self.visible_bias = nn.Parameter(torch.zeros(timesteps, visible_units))
        self.hidden_bias = nn.Parameter(torch.zeros(timesteps, hidden_units))
        self.context_weight = nn.Parameter(scale * torch.randn(timesteps, context_units, hidden_units))
        self.register_buffer("chains", torch.bernoulli(torch.full((timesteps, num_chains, visible_units), 0.5)))

    @torch.no_grad()
    def start_from(self, source: int, start: int, stop: int) -> None:
        """Copy the parameters and chains of timestep index `source` to the indices start..stop-1."""
        for tensor in (*self.parameters(), self.chains):
            tensor[start:stop] = tensor[source]

    @torch.no_grad()
    def initialise_visible_bias(self, bit_mean: Tensor) -> None:
        """Set a to the log odds of the bits' means, so that W = 0 is already the independent model.

        Args:
            bit_mean: (T, V), values in [0, 1].
        """
        self.visible_bias.copy_(torch.logit(bit_mean.clamp(0.02, 0.98)))

    def block(self, start: int, stop: int) -> "Block":
        """The parameters of the timestep indices start..stop-1."""
        views = (self.weight, self.visible_bias, self.hidden_bias, self.context_weight)
        return Block(*(tensor[start:stop] for tensor in views))


class Block:
    """Parameters of some timesteps, (T, ...) each, and the distributions they define.

    Args:
        weight: (T, V, H).
        visible_bias: (T, V).
        hidden_bias: (T, H).
        context_weight: (T, G, H).
    """

    def __init__(self, weight: Tensor, visible_bias: Tensor, hidden_bias: Tensor, context_weight: Tensor) -> None:
        self.weight, self.visible_bias, self.hidden_bias, self.context_weight = (
            weight,
            visible_bias,
            hidden_bias,
            context_weight,
        )

    def context_bias(self, context: Tensor) -> Tensor:
        """B + g U, the hidden biases once the context is known; (T, B, G) -> (T, B, H)."""
        bias = self.hidden_bias.unsqueeze(1)
        return product(context, self.context_weight).add_(bias) if context.shape[2] else bias

    def hidden_logit(self, visible: Tensor, context_bias: Tensor) -> Tensor:
        """Log odds of P(h_j = 1 | z, g) = s(b + zW + gU)_j; (T, B, V), (T, B, H) -> (T, B, H)."""
        return product(visible, self.weight).add_(context_bias)

    def visible_logit(self, hidden: Tensor, field: Tensor) -> Tensor:
        """Log odds of P(z_i = 1 | h, z_t) = s(a + hW' + Gamma_t (2 z_t - 1))_i; (T, B, H), (T, B, V) -> (T, B, V)."""
        return product(hidden, self.weight.transpose(1, 2)).add_(field).add_(self.visible_bias.unsqueeze(1))

    def free_energy(self, visible: Tensor, context_bias: Tensor) -> Tensor:
        """F(z; g) = -a.z - sum_j softplus(b_j + (zW)_j + (gU)_j), in nats, without the field.

        Args:
            visible: (T, B, V), values in {0, 1}.
            context_bias: (T, B, H), from `context_bias`.

        Returns:
            (T, B)

        Source: Hinton (2012), A Practical Guide to Training Restricted Boltzmann Machines, section 16.1.
        """
        linear = (visible * self.visible_bias.unsqueeze(1)).sum(-1)
        return -linear - softplus(self.hidden_logit(visible, context_bias)).sum(-1)

    def gibbs(self, visible: Tensor, context_bias: Tensor, field: Tensor, sweeps: int) -> Tensor:
        """Block Gibbs sampling: `sweeps` times h ~ P(h | z, g), then z ~ P(z | h, z_t).

        Args:
            visible: (T, B, V), where the chain starts.
            context_bias: (T, B, H).
            field: (T, B, V), Gamma_t (2 z_t - 1).
            sweeps: at least 0.

        Returns:
            (T, B, V), values in {0, 1}.
        """
        for _ in range(sweeps):
            hidden = sample_bits(self.hidden_logit(visible, context_bias))
            visible = sample_bits(self.visible_logit(hidden, field))
        return visible


def sample_bits(logit: Tensor) -> Tensor:
    """Bits with P(1) = sigmoid(logit), written over the logit.

    `rand < p` costs 17 ns a bit on one core where `torch.bernoulli` costs 24.
    """
    return torch.lt(torch.rand_like(logit), logit.sigmoid_(), out=logit)


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


def contrastive_update(block: Block, data: Tensor, context: Tensor, context_bias: Tensor, model: Tensor, update: Update) -> None:
    """Gradient of log p averaged over the batch, E_data[z s(.)'] - E_model[z s(.)'] and likewise for a, b and U, applied.

    Positive and negative phase share one matrix product: the stack [z+; z-] against [h+; -h-].

    Args:
        block: the RBMs.
        data: z+, (T, B, V).
        context: g, (T, B, G).
        context_bias: (T, B, H).
        model: z-, (T, B, V), the end of the negative chain.
        update: where it goes.

    Source: Hinton (2002), Training Products of Experts; Tieleman (2008) for persistent chains.
    """
    T, B = data.shape[:2]
    scale = update.scale / B
    weight, visible_bias, hidden_bias, context_weight = update.targets
    visible = torch.cat([data, model], 1)  # (T, 2B, V)
    hidden = product(visible, block.weight)  # (T, 2B, H)
    hidden.view(T, 2, B, -1).add_(context_bias.unsqueeze(1)).sigmoid_()
    hidden[:, :B].mul_(scale)
    hidden[:, B:].mul_(-scale)
    product(visible.transpose(1, 2), hidden, out=weight, keep=update.keep)
    blend_(hidden_bias, hidden.sum(1), update.keep_bias)
    blend_(visible_bias, (data.sum(1) - model.sum(1)).mul_(scale), update.keep_bias)
    if context.shape[2]:
        product(context.transpose(1, 2), hidden[:, :B] + hidden[:, B:], out=context_weight, keep=update.keep)


def contrastive_step(
    block: Block,
    chains: Tensor,
    data: Tensor,
    noisy: Tensor,
    context: Tensor,
    context_bias: Tensor,
    field: Tensor,
    negative_phase: Literal["pcd", "recovery", "cd"],
    sweeps: int,
    update: Update,
) -> None:
    """Run the negative phase and apply the contrastive statistics; with pcd the chains move on.

    Args:
        block: the RBMs.
        chains: (T, B, V), persistent chains.
        data: z_{t-1}, (T, B, V).
        noisy: z_t, (T, B, V).
        context: g, (T, B, G).
        context_bias: (T, B, H).
        field: Gamma_t (2 z_t - 1), (T, B, V).
        negative_phase: the Gibbs chain starts at the persistent chains, at z_t, or at z_{t-1}.
        sweeps: of the Gibbs chain.
        update: where the statistics go.
    """
    start = {"pcd": chains, "recovery": noisy, "cd": data}[negative_phase]
    model = block.gibbs(start, context_bias, field, sweeps)
    if negative_phase == "pcd":
        chains.copy_(model)
    contrastive_update(block, data, context, context_bias, model, update)


def log_pseudo_likelihood(block: Block, visible: Tensor, context_bias: Tensor, field: Tensor, max_bits: int = 10**9) -> Tensor:
    """Mean over bits of ln p(z_i | z_{-i}, z_t, g), in nats per bit; exact for every bit looked at.

    The log odds of bit i are a_i + field_i + sum_j [softplus(x_j + (1 - z_i) W_ij) - softplus(x_j - z_i W_ij)], x = b + zW + gU.

    Args:
        block: the RBMs.
        visible: (T, B, V).
        context_bias: (T, B, H).
        field: (T, B, V).
        max_bits: look at so many evenly spread bits when V is larger.

    Returns:
        (T,), averaged over the batch.

    Source: Besag (1975); Hinton (2012), section 16.1, for the free-energy form.
    """
    logit = block.hidden_logit(visible, context_bias)  # (T, B, H)
    num_bits = min(visible.shape[2], max_bits)
    bits = torch.linspace(0, visible.shape[2] - 1, num_bits).long().tolist()
    total = torch.zeros(visible.shape[:2], dtype=visible.dtype, device=visible.device)
    for i in bits:
        bit, row = visible[..., i : i + 1], block.weight[:, i].unsqueeze(1)  # (T, B, 1), (T, 1, H)
        off = logit - bit * row
        odds = (softplus(off + row) - softplus(off)).sum(-1) + block.visible_bias[:, i : i + 1] + field[..., i]
        total += logsigmoid((2 * bit.squeeze(-1) - 1) * odds)
    return total.mean(1) / num_bits

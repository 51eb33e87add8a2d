"""Depth inside a level: a true deep belief network whose top RBM models the hidden units of the layer below.

Layer n has x_{n-1} below and x_n above; x_0 = z_{t-1}, x_1 = h. Layers are trained one after the other; below the top only
the directed steps P(x_{n-1} | x_n) are used, and the posterior Q(x_n | x_{n-1}) is each layer's own. For any top layer

  log p(z | c) >= E_Q[log p_top(x_{D-1} | c) + sum_{n < D} log P(x_{n-1} | x_n, c)] + sum_{n < D} E_Q[H(Q(x_n | x_{n-1}, c))]

(Hinton's bound). A layer starts tied to the one below: W_n = W_{n-1}', biases and conditions exchanged. Then p_top is exactly
the distribution that the layer below gives to x_{n-1}, the bound is tight, and log p is what it was. The noisy bits act on a
layer as they do on the one below it, and through a learned diagonal: D_n (2 Q(x_{n-1} | z_t) - 1) on its visible biases.

Source: Hinton, Osindero and Teh (2006), A Fast Learning Algorithm for Deep Belief Nets.
"""

# T timesteps, B batch, V_l bits and H_l hidden units of level l, n timesteps of a block or number of a layer, D depth

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trainbook.workflows.timestep_dbn.autoencoder import logit_entropy
from trainbook.workflows.timestep_dbn.chain import TimestepDBN, reverse_step
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule
from trainbook.workflows.timestep_dbn.likelihood import Factor, Factors, chain_factors
from trainbook.workflows.timestep_dbn.rbm import Block, ConditionalRBM, sample_bits


class Layer(NamedTuple):
    """One layer of a level under given conditions.

    Attributes:
        block: its RBM, (n, ...).
        context_bias: of the units above, (n, B, .).
        field: on the units below, (n, B, .).
        signs: 2 Q(x_{n-1} | z_t) - 1, what the diagonal multiplies, (n, B, .); None in the first layer.
    """

    block: Block
    context_bias: Tensor
    field: Tensor
    signs: Tensor | None

    def up(self, below: Tensor) -> Tensor:
        """Log odds of the units above given those below."""
        return self.block.hidden_logit(below, self.context_bias)

    def down(self, above: Tensor) -> Tensor:
        """Log odds of the units below given those above."""
        return self.block.visible_logit(above, self.field)


class UpperLayer(ConditionalRBM):
    """The second or a higher layer of a level: the shape of the layer below turned over.

    Args:
        timesteps: T.
        visible_units: of the layer below it is on.
        hidden_units: as many as that layer has below itself.
        num_chains: persistent Gibbs chains kept per timestep.
    """

    def __init__(self, timesteps: int, visible_units: int, hidden_units: int, num_chains: int) -> None:
        super().__init__(timesteps, visible_units, hidden_units, 0, 0)
        self.gain = nn.Parameter(torch.zeros(timesteps, visible_units))
        self.register_buffer("states", torch.bernoulli(torch.full((timesteps, num_chains, visible_units), 0.5)))

    @torch.no_grad()
    def tie(self, below: ConditionalRBM, start: int, stop: int) -> None:
        """Start the timestep indices start..stop-1 as the mirror of the layer below."""
        rows = slice(start, stop)
        self.weight[rows] = below.weight[rows].transpose(1, 2)
        self.visible_bias[rows] = below.hidden_bias[rows]
        self.hidden_bias[rows] = below.visible_bias[rows]
        self.gain[rows] = 0


class Depth(nn.Module):
    """The layers above the first on every level of a chain.

    Args:
        config: for the depth of each level and the chains.
        dbn: the chain, whose levels are the first layers; it stays as it is.
    """

    def __init__(self, config: Config, dbn: TimestepDBN) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for below, depth in zip(dbn.levels, config.depth, strict=True):
            sizes = below.weight.shape[1:]  # V, H, then H, V, then V, H ...
            shapes = [(sizes[n % 2], sizes[1 - n % 2]) for n in range(1, depth)]
            self.levels.append(nn.ModuleList(UpperLayer(config.timesteps, *shape, config.batch_size) for shape in shapes))
        self.register_buffer("sampling_sweeps", dbn.sampling_sweeps.clone())

    def layer(self, number: int) -> dict[int, UpperLayer]:
        """Layer n of every level that has one, by level; n from 2."""
        return {level: uppers[number - 2] for level, uppers in enumerate(self.levels) if len(uppers) > number - 2}

    def layers(
        self,
        level: int,
        block: Block,
        context_bias: Tensor,
        field: Tensor,
        noisy: Tensor,
        start: int,
        stop: int,
        number: int | None = None,
    ) -> list[Layer]:
        """The layers of a level under given conditions, from the first to the top.

        Args:
            level: which.
            block: the first layer's RBMs, (n, ...).
            context_bias: b + gU, (n, B, H).
            field: Gamma_t (2 z_t - 1), (n, B, V).
            noisy: z_t, (n, B, V).
            start, stop: timestep indices.
            number: of layers; None: all.
        """
        found = [Layer(block, context_bias, field, None)]
        above_shift = context_bias - block.hidden_bias.unsqueeze(1)  # the condition alone, as the layer above takes it over
        probability = noisy
        for upper in self.levels[level][: number and number - 1]:
            below = found[-1]
            probability = below.up(probability).sigmoid_()  # Q(x_{n-1} | z_t), means upwards from z_t
            signs = 2 * probability - 1
            own = upper.block(start, stop)
            shift = above_shift + upper.gain[start:stop].unsqueeze(1) * signs
            found.append(Layer(own, own.hidden_bias.unsqueeze(1) + below.field, shift, signs))
            above_shift = below.field
        return found


def deep_factors(dbn: TimestepDBN, depth: Depth, schedule: FlipSchedule) -> Factors:
    """The top layer of every level at states drawn from Q, with what the bound adds below them as `rest`."""
    first_layers = chain_factors(dbn, schedule)

    def factors(clean: Sequence[Tensor], start: int, stop: int) -> list[Factor]:
        return [
            top_factor(factor, depth.layers(level, factor.block, factor.context_bias, factor.field, factor.noisy, start, stop))
            for level, factor in enumerate(first_layers(clean, start, stop))
        ]

    return factors


def top_factor(factor: Factor, layers: Sequence[Layer]) -> Factor:
    """The factor of the top layer from that of the first, at a state drawn from Q: -log p(z) <= E[rest + F - field.x + log Z]."""
    state, rest = factor.state, factor.rest
    for layer in layers[:-1]:
        logit = layer.up(state)
        entropy = logit_entropy(logit).sum(-1)
        above = sample_bits(logit)
        rest = rest + binary_cross_entropy_with_logits(layer.down(above), state, reduction="none").sum(-1) - entropy
        state = above
    top = layers[-1]
    return Factor(top.block, top.context_bias, top.field, state, rest)


@torch.no_grad()
def deep_reverse_step(
    dbn: TimestepDBN, depth: Depth, noisy: Sequence[Tensor], t: int, schedule: FlipSchedule, sweeps: int
) -> list[Tensor]:
    """Sample z_{t-1} given z_t: Gibbs sweeps in the top RBM started upwards from z_t, then one directed pass down.

    Args:
        dbn, depth: the chain and the layers above it.
        noisy: z_t per level, [(B, V_l)].
        t: 1..T.
        schedule: on the bits' device.
        sweeps: Gibbs sweeps of the top RBM.
    """

    def draw(level: int, block: Block, start: Tensor, context_bias: Tensor, field: Tensor) -> Tensor:
        *lower, top = depth.layers(level, block, context_bias, field, start, t - 1, t)
        state = start
        for layer in lower:
            state = sample_bits(layer.up(state))
        state = top.block.gibbs(state, top.context_bias, top.field, sweeps)
        for layer in reversed(lower):
            state = sample_bits(layer.down(state))
        return state

    return reverse_step(dbn, noisy, t, schedule, sweeps, draw)

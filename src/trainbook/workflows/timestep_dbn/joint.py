"""All levels as one Boltzmann machine: E = sum_l E_l([z_l || h_{l+1}], h_l) - field, sampled exactly in two colours.

Bits z_l meet only h_l, and h_l meets h_{l+1} besides: with z of even and h of odd levels in one colour and the rest in the
other, no two units of a colour meet. So it is one RBM whose weight matrix has zero blocks, and Gibbs sampling, annealing and
autocorrelation are those of an RBM at any number of levels. The chain whose levels have samples of h_{l+1} as their context
has the same parameters; with any other kind of context there is no such energy.

Source: Jelincic et al. (2025), arXiv 2510.23972, for a bipartite machine per step.
"""

# T timesteps, B batch, V_l bits and H_l hidden units of level l, n timesteps of a block; A and C units of colours 0 and 1

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trainbook.layers import product
from trainbook.workflows.timestep_dbn.autocorrelation import settle_sweeps
from trainbook.workflows.timestep_dbn.blocks import METRIC_ROWS
from trainbook.workflows.timestep_dbn.chain import TimestepDBN, diffuse, fields, posterior_entropy
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.contrastive import Update
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule
from trainbook.workflows.timestep_dbn.likelihood import Factor, Factors
from trainbook.workflows.timestep_dbn.optimizers import rbm_views
from trainbook.workflows.timestep_dbn.phases import add_phases
from trainbook.workflows.timestep_dbn.rbm import Block, ConditionalRBM, log_pseudo_likelihood, sample_bits
from trainbook.workflows.timestep_dbn.validation import same_numbers

MEAN_FIELD_SWEEPS = 10
METRIC_UNITS = 64  # that the per-epoch pseudo-likelihood looks at


class Machine(NamedTuple):
    """The joint machine of some timesteps under given conditions, as one RBM with colour 0 below and colour 1 above.

    Attributes:
        block: the RBM, (n, ...).
        context_bias: of the units of colour 1, (n, B, C).
        field: on the units of colour 0, (n, B, A).
    """

    block: Block
    context_bias: Tensor
    field: Tensor

    def up(self, below: Tensor) -> Tensor:
        """Log odds of colour 1 given colour 0; (n, B, A) -> (n, B, C)."""
        return self.block.hidden_logit(below, self.context_bias)

    def down(self, above: Tensor) -> Tensor:
        """Log odds of colour 0 given colour 1; (n, B, C) -> (n, B, A)."""
        return self.block.visible_logit(above, self.field)


class JointDBN(nn.Module):
    """The chain's levels, trained together.

    Args:
        config: of a run with context = hidden_sample.
        dbn: the chain it starts from, which stays as it is.
    """

    def __init__(self, config: Config, dbn: TimestepDBN) -> None:
        super().__init__()
        bits, hidden = dbn.level_sizes, [level.weight.shape[2] for level in dbn.levels]
        self.noisy_context = dbn.noisy_context
        self.coarser = [*hidden[1:], 0]  # rows of each context weight that belong to h_{l+1}
        self.levels = nn.ModuleList(
            ConditionalRBM(config.timesteps, *level.weight.shape[1:], level.context_weight.shape[1], 0) for level in dbn.levels
        )
        self.sizes = [[(bits, hidden)[(level + colour) % 2][level] for level in range(len(bits))] for colour in (0, 1)]
        for name, colour in (("hidden_below", 0), ("hidden_above", 1)):  # 1 for a hidden unit, 0 for a bit
            parts = [torch.full((size,), float((level + colour) % 2)) for level, size in enumerate(self.sizes[colour])]
            self.register_buffer(name, torch.cat(parts), persistent=False)
        self.register_buffer(
            "states", torch.bernoulli(torch.full((config.timesteps, config.batch_size, sum(self.sizes[0])), 0.5))
        )
        self.register_buffer("sampling_sweeps", dbn.sampling_sweeps.clone())

    @torch.no_grad()
    def start_from(self, dbn: TimestepDBN, start: int, stop: int) -> None:
        """Take over the chain's parameters of the timestep indices start..stop-1."""
        for own, source in zip(self.parameters(), dbn.levels.parameters(), strict=True):
            own[start:stop] = source[start:stop]

    def views(self, start: int, stop: int) -> list[list[Tensor]]:
        """Parameters of every level for the timestep indices start..stop-1, to be trained."""
        return [rbm_views(level, start, stop) for level in self.levels]

    def join(self, bits: Sequence[Tensor], hidden: Sequence[Tensor], colour: int) -> Tensor:
        """The units of a colour side by side, from those of every level, [(n, B, V_l)] and [(n, B, H_l)]."""
        return torch.cat([(bits, hidden)[(level + colour) % 2][level] for level in range(len(bits))], -1)

    def split(self, below: Tensor, above: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Bits and hidden units of every level, from the units of both colours."""
        colours = [units.split(sizes, -1) for units, sizes in zip((below, above), self.sizes, strict=True)]
        levels = range(len(self.coarser))
        return [colours[level % 2][level] for level in levels], [colours[1 - level % 2][level] for level in levels]

    @torch.no_grad()
    def machine(self, noisy: Sequence[Tensor], schedule: FlipSchedule, start: int, stop: int) -> Machine:
        """The machine of the timestep indices start..stop-1 given z_t per level, [(n, B, V_l)]."""
        rows, shape = slice(start, stop), noisy[0].shape[:2]
        signs = torch.cat([2 * bits - 1 for bits in noisy], -1)
        shifts = []
        for level, coarser in zip(self.levels, self.coarser, strict=True):
            weight = level.context_weight[rows, coarser:]
            shifts.append(product(signs, weight) if weight.shape[1] else signs.new_zeros(*shape, weight.shape[2]))
        field = fields(noisy, schedule.coupling[start + 1 : stop + 1])
        visible_biases, hidden_biases = (
            [getattr(level, name)[rows] for level in self.levels] for name in ("visible_bias", "hidden_bias")
        )
        below, above = (self.join(visible_biases, hidden_biases, colour) for colour in (0, 1))
        block = Block(self._weight(rows), below, above, below.new_zeros(len(below), 0, above.shape[1]))
        return Machine(block, above.unsqueeze(1) + self.join(field, shifts, 1), self.join(field, shifts, 0))

    def _weight(self, rows: slice) -> Tensor:
        """W_l between z_l and h_l, U_l between h_{l+1} and h_l, zero elsewhere; (n, A, C)."""
        first = self.levels[0].weight
        weight = first.new_zeros(len(first[rows]), sum(self.sizes[0]), sum(self.sizes[1]))
        parts = [band.split(self.sizes[1], 2) for band in weight.split(self.sizes[0], 1)]
        for index, (level, coarser) in enumerate(zip(self.levels, self.coarser, strict=True)):
            inner, outer = level.weight[rows], level.context_weight[rows, :coarser]
            parts[index][index].copy_(inner.transpose(1, 2) if index % 2 else inner)
            if coarser and index % 2:
                parts[index][index + 1].copy_(outer.transpose(1, 2))
            elif coarser:
                parts[index + 1][index].copy_(outer)
        return weight

    def relax(
        self, machine: Machine, bits: Sequence[Tensor], sweeps: int, draw: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Both colours after sweeps over all hidden units with the bits held.

        Args:
            machine: under the conditions.
            bits: z per level, [(n, B, V_l)].
            sweeps: the first one starts with all hidden units off.
            draw: log odds to states or means: `sample_bits` for Gibbs sampling, `torch.sigmoid` for mean field.
        """
        off = [bits[0].new_zeros(*bits[0].shape[:2], level.weight.shape[2]) for level in self.levels]
        below, above = (self.join(bits, off, colour) for colour in (0, 1))
        held = below, above
        for _ in range(sweeps):
            below = held[0] + self.hidden_below * draw(machine.down(above))
            above = held[1] + self.hidden_above * draw(machine.up(below))
        return below, above


def joint_factors(joint: JointDBN, schedule: FlipSchedule) -> Factors:
    """The machine as one factor at a state of colour 0: its bits, and hidden units drawn from a mean-field posterior q.

    -log p(z) <= E_q[-log p(A) - log P(z_C | A) + log q(h_A)], with z_C the bits of colour 1 and h_A the hidden units of colour 0.
    """

    def factors(clean: Sequence[Tensor], start: int, stop: int) -> list[Factor]:
        previous, noisy = diffuse(clean, schedule, start, stop)
        machine = joint.machine(noisy, schedule, start, stop)
        below, above = joint.relax(machine, previous, MEAN_FIELD_SWEEPS, torch.sigmoid)
        posterior = machine.down(above)
        drawn = sample_bits(posterior.clone())
        below = torch.where(joint.hidden_below > 0, drawn, below)
        surprise = [
            (binary_cross_entropy_with_logits(logit, units, reduction="none") * counted).sum(-1)
            for logit, units, counted in (
                (machine.up(below), above, 1 - joint.hidden_above),
                (posterior, below, joint.hidden_below),
            )
        ]
        rest = surprise[0] - surprise[1] - posterior_entropy(noisy, clean, schedule, start, stop)
        return [Factor(machine.block, machine.context_bias, machine.field, below, rest)]

    return factors


@torch.no_grad()
def joint_reverse_step(joint: JointDBN, noisy: Sequence[Tensor], t: int, schedule: FlipSchedule, sweeps: int) -> list[Tensor]:
    """Sample z_{t-1} given z_t by Gibbs sweeps of the whole machine, started at z_t.

    Args:
        joint: the machine.
        noisy: z_t per level, [(B, V_l)].
        t: 1..T.
        schedule: on the bits' device.
        sweeps: of both colours.
    """
    noisy = [bits.unsqueeze(0) for bits in noisy]
    machine = joint.machine(noisy, schedule, t - 1, t)
    below, _ = joint.relax(machine, noisy, 1, sample_bits)
    below = machine.block.gibbs(below, machine.context_bias, machine.field, sweeps)
    bits, _ = joint.split(below, sample_bits(machine.up(below)))
    return [level.squeeze(0) for level in bits]


class JointStage:
    """Trains all levels of a block of timesteps together; both phases are Monte Carlo.

    Args:
        config: of the run.
        dbn: the chain to start from.
        joint: what is trained.
        schedule: on the codes' device.
        codes: of the validation images, per level.
    """

    def __init__(
        self, config: Config, dbn: TimestepDBN, joint: JointDBN, schedule: FlipSchedule, codes: Sequence[Tensor]
    ) -> None:
        self._config, self._dbn, self._joint, self._schedule, self._codes = config, dbn, joint, schedule, codes

    def begin(self, start: int, stop: int) -> None:
        """Start from the chain."""
        self._joint.start_from(self._dbn, start, stop)

    def views(self, start: int, stop: int) -> list[list[Tensor]]:
        """Parameters of every level."""
        return self._joint.views(start, stop)

    def update(self, clean: Sequence[Tensor], start: int, stop: int, updates: Sequence[Update]) -> None:
        """Statistics of the hidden units with z_{t-1} held, less those of the free machine."""
        joint, sweeps = self._joint, self._config.gibbs_sweeps
        previous, noisy = diffuse(clean, self._schedule, start, stop)
        machine = joint.machine(noisy, self._schedule, start, stop)
        data, _ = joint.relax(machine, previous, 1 + sweeps, sample_bits)
        chains = joint.states[start:stop]
        if self._config.negative_phase == "pcd":
            begun = chains
        else:
            begun = data if self._config.negative_phase == "cd" else joint.relax(machine, noisy, 1, sample_bits)[0]
        model = machine.block.gibbs(begun, machine.context_bias, machine.field, sweeps)
        if self._config.negative_phase == "pcd":
            chains.copy_(model)
        add_joint_phases(joint, machine, previous, data, model, noisy, updates)

    @torch.no_grad()
    def judge(self, start: int, stop: int, epoch: int) -> dict[str, Any]:
        """Pseudo-likelihood of colour 0 with the hidden units drawn given validation codes, in nats per unit."""
        with same_numbers(self._config.seed, self._codes[0].device):
            previous, noisy = diffuse([code[:METRIC_ROWS] for code in self._codes], self._schedule, start, stop)
            machine = self._joint.machine(noisy, self._schedule, start, stop)
            below, _ = self._joint.relax(machine, previous, 1 + self._config.gibbs_sweeps, sample_bits)
        values = log_pseudo_likelihood(machine.block, below, machine.context_bias, machine.field, METRIC_UNITS)
        return {
            "epoch": epoch,
            "first_timestep": start + 1,
            "mean_joint_pseudo_likelihood": values.mean(),
            "joint_pseudo_likelihood_by_timestep": values,
        }

    def end(self, start: int, stop: int) -> dict[str, Any]:
        """Measure how fast the machine forgets."""
        factors = joint_factors(self._joint, self._schedule)
        return settle_sweeps(self._config, self._joint.sampling_sweeps, factors, self._codes, start, stop)


def add_joint_phases(
    joint: JointDBN,
    machine: Machine,
    target: Sequence[Tensor],
    data: Tensor,
    model: Tensor,
    noisy: Sequence[Tensor],
    updates: Sequence[Update],
) -> None:
    """Gradient of log p(z_{t-1} | z_t) from states of colour 0 in both phases, the other colour as means given them.

    Args:
        joint: the machine's parameters.
        machine: under the conditions.
        target: z_{t-1} per level, [(n, B, V_l)].
        data: colour 0 with those bits, (n, B, A).
        model: colour 0 of the free machine, (n, B, A).
        noisy: z_t per level, [(n, B, V_l)].
        updates: per level.
    """
    free_bits, free_hidden = joint.split(model, machine.up(model).sigmoid_())
    _, held_hidden = joint.split(data, machine.up(data).sigmoid_())
    signs = [2 * bits - 1 for bits in noisy] if joint.noisy_context else []
    for level, update in enumerate(updates):
        context = None
        if update.targets[3].shape[1]:
            held, free = (torch.cat([*hidden[level + 1 : level + 2], *signs], -1) for hidden in (held_hidden, free_hidden))
            context = held, free
        add_phases(update, (target[level], free_bits[level]), (held_hidden[level], free_hidden[level]), context)

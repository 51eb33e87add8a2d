"""The joint machine of all levels against enumeration: energy, two-colour Gibbs sampling, gradient, likelihood, samples."""

# T timesteps, B batch, V_l bits and H_l hidden units of level l; A and C units of colours 0 and 1

import math

import pytest
import torch
from torch import Tensor

from tests.workflows.timestep_dbn.enumeration import (
    DOUBLE,
    all_bits,
    assert_fits,
    gibbs_kernel,
    parameters,
    random_dbn,
    repeat_timestep,
    state_index,
)
from trainbook.errors import UserError
from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.contrastive import Update
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, flip_schedule
from trainbook.workflows.timestep_dbn.joint import (
    JointDBN,
    JointStage,
    Machine,
    add_joint_phases,
    joint_factors,
    joint_reverse_step,
)
from trainbook.workflows.timestep_dbn.rbm import sample_bits

BITS, HIDDEN = [2, 2, 1], [3, 2, 2]  # 3 + 2 + 2 hidden units as `random_dbn` has them: 4096 states of all units


def joint_case(noisy_context: bool = True, scale: float = 0.7) -> tuple[JointDBN, TimestepDBN, FlipSchedule, Tensor]:
    """A joint machine of three levels and two timesteps in double precision, and one z_t."""
    dbn, config = random_dbn(BITS, 2, scale, context="hidden_sample", noisy_context=noisy_context, joint_epochs=1)
    dbn, joint = dbn.double(), JointDBN(config, dbn).double()
    joint.start_from(dbn, 0, 2)
    return joint, dbn, flip_schedule(2, "cosine"), torch.randint(2, (sum(BITS),)).to(DOUBLE)


def machine_of(joint: JointDBN, schedule: FlipSchedule, noisy: Tensor, t: int, copies: int = 1) -> Machine:
    """The machine of one timestep for one z_t, (V,)."""
    given = [bits.expand(1, copies, -1) for bits in noisy.split(BITS)]
    return joint.machine(given, schedule, t - 1, t)


def defined_energies(
    dbn: TimestepDBN, schedule: FlipSchedule, noisy: Tensor, t: int, units: tuple[list[Tensor], list[Tensor]]
) -> Tensor:
    """sum_l E_l([z_l || h_{l+1}], h_l) - field, level by level; units z and h per level, [(S, .)] each -> (S,)."""
    z, h = units
    signs, energy = 2 * noisy - 1, torch.zeros(len(z[0]), dtype=DOUBLE)
    for index, (level, own) in enumerate(zip(dbn.levels, signs.split(BITS), strict=True)):
        W, a, b, U = (parameter[t - 1] for parameter in parameters(level))
        energy = energy - z[index] @ (a + float(schedule.coupling[t]) * own) - h[index] @ b - ((z[index] @ W) * h[index]).sum(1)
        coarser = h[index + 1] if index < 2 else z[0][:, :0]
        context = torch.cat([coarser, signs.expand(len(coarser), -1)] if dbn.noisy_context else [coarser], 1)
        energy = energy - ((context @ U) * h[index]).sum(1)
    return energy


def every_state() -> tuple[Tensor, Tensor]:
    """Units of colours 0 and 1 of every state of the machine, colour 0 fastest; (S, A), (S, C)."""
    states = all_bits(sum(BITS) + sum(HIDDEN))
    return states[:, :5], states[:, 5:]


def log_probabilities(joint: JointDBN, dbn: TimestepDBN, schedule: FlipSchedule, noisy: Tensor, t: int) -> Tensor:
    """log p of every state of all units, from the definition; (2^C, 2^A)."""
    below, above = every_state()
    energy = defined_energies(dbn, schedule, noisy, t, joint.split(below, above))
    return torch.log_softmax(-energy, 0).view(2 ** above.shape[1], 2 ** below.shape[1])


def bits_index(joint: JointDBN) -> Tensor:
    """The row of `all_bits` that the bits of every state stand in, (2^C, 2^A)."""
    below, above = every_state()
    bits, _ = joint.split(below, above)
    return state_index(torch.cat(bits, 1)).view(2 ** above.shape[1], 2 ** below.shape[1])


@pytest.mark.parametrize("noisy_context", [True, False])
def test_two_colours_have_the_energy_of_all_levels(noisy_context):
    joint, dbn, schedule, noisy = joint_case(noisy_context)
    below, above = every_state()
    for t in (1, 2):
        machine = machine_of(joint, schedule, noisy, t)
        block = machine.block
        linear = below @ (block.visible_bias[0] + machine.field[0, 0]) + above @ machine.context_bias[0, 0]
        found = -linear - ((below @ block.weight[0]) * above).sum(1)
        torch.testing.assert_close(
            found, defined_energies(dbn, schedule, noisy, t, joint.split(below, above)), rtol=0, atol=1e-10
        )


def test_no_two_units_of_a_colour_meet_in_any_state():
    joint, dbn, schedule, noisy = joint_case()
    log_p = log_probabilities(joint, dbn, schedule, noisy, 1)
    given_above = log_p - log_p.logsumexp(1, keepdim=True)  # P(A | C)
    marginals = given_above.exp() @ all_bits(5)  # (2^C, A)
    independent = torch.where(all_bits(5) > 0.5, marginals.unsqueeze(1), 1 - marginals.unsqueeze(1)).prod(2)
    torch.testing.assert_close(given_above.exp(), independent, rtol=0, atol=1e-12)


def test_two_colour_gibbs_sampling_leaves_the_machine_invariant():
    joint, dbn, schedule, noisy = joint_case()
    for t in (1, 2):
        machine = machine_of(joint, schedule, noisy, t)
        p = log_probabilities(joint, dbn, schedule, noisy, t).logsumexp(0).exp()  # of colour 0
        kernel = gibbs_kernel(machine.block, machine.context_bias, machine.field)
        torch.testing.assert_close(p @ kernel, p, rtol=0, atol=1e-12)


def test_hidden_units_with_the_bits_held_reach_their_posterior():
    joint, dbn, schedule, noisy = joint_case()
    target, size = torch.tensor([1.0, 0, 0, 1, 1], dtype=DOUBLE), 20_000
    machine = machine_of(joint, schedule, noisy, 1, size)
    given = [bits.expand(1, size, -1) for bits in target.split(BITS)]
    with torch.no_grad():
        below, above = joint.relax(machine, given, 30, sample_bits)
    assert all(torch.equal(found, bits) for found, bits in zip(joint.split(below, above)[0], given, strict=True))
    held = bits_index(joint) == state_index(target)
    posterior = (log_probabilities(joint, dbn, schedule, noisy, 1).exp() * held).sum(0).detach()
    drawn = slice(2, 4)  # h_1 stands between z_0 and z_2
    assert_fits(below[0][:, drawn], torch.zeros(4, dtype=DOUBLE).index_add_(0, state_index(all_bits(5)[:, drawn]), posterior))


Gradients = list[list[Tensor]]


def exact_gradients(joint: JointDBN, dbn: TimestepDBN, schedule: FlipSchedule, noisy: Tensor, target: Tensor) -> Gradients:
    """Gradient of log p(z | z_t) at t = 1 by autograd of the enumerated machine, per level W, a, b, U."""
    log_p = log_probabilities(joint, dbn, schedule, noisy, 1)
    value = log_p[bits_index(joint) == state_index(target)].logsumexp(0)
    leaves = [parameters(level) for level in dbn.levels]
    found = iter(torch.autograd.grad(value, [leaf for level in leaves for leaf in level]))
    return [[next(found)[0] for _ in level] for level in leaves]


def empty_gradients(joint: JointDBN, timesteps: int) -> Gradients:
    """Zeros where the statistics of every level go."""
    return [[torch.zeros(timesteps, *part.shape[1:], dtype=DOUBLE) for part in parameters(level)] for level in joint.levels]


def adding(gradients: Gradients) -> list[Update]:
    """Updates that write the statistics themselves."""
    return [Update(tuple(level), 0.0, 0.0, 1.0) for level in gradients]


@pytest.mark.parametrize("noisy_context", [True, False])
def test_statistics_over_all_states_are_the_exact_gradient(noisy_context):
    joint, dbn, schedule, noisy = joint_case(noisy_context)
    target = torch.tensor([1.0, 0, 0, 1, 1], dtype=DOUBLE)
    log_p = log_probabilities(joint, dbn, schedule, noisy, 1).detach()
    model = log_p.logsumexp(0).exp()  # of colour 0
    data = (log_p.exp() * (bits_index(joint) == state_index(target))).sum(0)
    data = data / data.sum()
    states = all_bits(5)
    chances = torch.outer(data, model).flatten()  # every pair of a held and a free state is a timestep of its own
    first, second = states.repeat_interleave(32, 0).unsqueeze(1), states.repeat(32, 1).unsqueeze(1)
    one = machine_of(joint, schedule, noisy, 1)
    conditions = (part.expand(1024, 1, -1) for part in (one.context_bias, one.field))
    machine = Machine(repeat_timestep(one.block, 0, 1024), *conditions)
    given, aimed = ([bits.expand(1024, 1, -1) for bits in code.split(BITS)] for code in (noisy, target))
    targets = empty_gradients(joint, 1024)
    add_joint_phases(joint, machine, aimed, first, second, given, adding(targets))
    for level, exact in zip(targets, exact_gradients(joint, dbn, schedule, noisy, target), strict=True):
        for found, expected in zip(level, exact, strict=True):
            torch.testing.assert_close(torch.tensordot(chances, found, 1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("negative_phase", ["pcd", "recovery", "cd"])
def test_a_step_of_training_is_the_exact_gradient_on_average(negative_phase):
    joint, dbn, schedule, _ = joint_case(noisy_context=False)
    batch, target = 100_000, torch.tensor([1.0, 0, 0, 1, 1], dtype=DOUBLE)
    config = Config(timesteps=2, context="hidden_sample", negative_phase=negative_phase, gibbs_sweeps=25, joint_epochs=1)
    joint.states = torch.randint(2, (2, batch, 5)).to(DOUBLE)
    targets = empty_gradients(joint, 1)
    with torch.no_grad():  # t = 1: z_{t-1} = z_0
        JointStage(config, dbn, joint, schedule, []).update(target.expand(batch, -1).split(BITS, 1), 0, 1, adding(targets))
    exact = [exact_gradients(joint, dbn, schedule, noisy, target) for noisy in all_bits(5)]
    chances = noise_chances(schedule, target)
    for level, found in enumerate(targets):
        for index, statistics in enumerate(found):
            expected = sum(chance * gradients[level][index] for chance, gradients in zip(chances, exact, strict=True))
            torch.testing.assert_close(statistics[0], expected, rtol=0, atol=0.01)


def noise_chances(schedule: FlipSchedule, target: Tensor) -> Tensor:
    """q(z_1 | z_0) for every z_1."""
    return torch.where(all_bits(5) == target, 1 - schedule.beta[1], schedule.beta[1]).prod(1)


def test_code_length_lies_above_the_truth_and_close_to_it():
    joint, dbn, schedule, _ = joint_case()
    size, target = 20_000, torch.tensor([1.0, 0, 0, 1, 1], dtype=DOUBLE)
    (factor,) = joint_factors(joint, schedule)(target.expand(size, -1).split(BITS, 1), 0, 1)
    block, states = factor.block, all_bits(5)
    energy = block.free_energy(factor.state, factor.context_bias) - (factor.field * factor.state).sum(-1)
    from_above = torch.log1p((factor.context_bias[0] + (states @ block.weight[0]).unsqueeze(1)).exp()).sum(-1)  # (S, B)
    log_z = (states @ (block.visible_bias[0] + factor.field[0]).T + from_above).logsumexp(0)
    found = (factor.rest + energy + log_z)[0]
    here = bits_index(joint) == state_index(target)  # z_0 is known at t = 1: no entropy is taken off
    lengths = [-log_probabilities(joint, dbn, schedule, noisy, 1)[here].logsumexp(0).detach() for noisy in states]
    exact = float(noise_chances(schedule, target) @ torch.stack(lengths))
    error = float(found.std()) / math.sqrt(size)
    assert -4 * error < float(found.mean()) - exact < 0.1
    assert error < 0.02


def test_samples_fit_the_enumerated_machine():
    joint, dbn, schedule, noisy = joint_case()
    size = 20_000
    for t in (1, 2):
        samples = torch.cat(joint_reverse_step(joint, noisy.expand(size, -1).split(BITS, 1), t, schedule, 40), 1)
        p = log_probabilities(joint, dbn, schedule, noisy, t).exp().flatten().detach()
        assert_fits(samples, torch.zeros(32, dtype=DOUBLE).index_add_(0, bits_index(joint).flatten(), p))


@pytest.mark.parametrize("context", ["hidden_mean", "bits"])
def test_other_contexts_are_refused_by_name(context):
    with pytest.raises(UserError, match="joint_epochs needs context = hidden_sample"):
        Config.from_preset("laptop", {"joint_epochs": 3, "context": context})

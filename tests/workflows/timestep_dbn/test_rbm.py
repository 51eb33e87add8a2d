"""The conditional RBM against enumeration: conditionals, kernel, free energy, contrastive gradients."""

# T timesteps, B batch, V visible units, H hidden units, G context units, S = 2^V states
# z visible, h hidden, g context, a and b visible and hidden biases, W weight, U context weight, s logistic function

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.workflows.timestep_dbn.enumeration import (
    DOUBLE,
    all_bits,
    assert_fits,
    chi_square_p_value,
    contrastive_gradients,
    exact_gradients,
    gibbs_kernel,
    parameters,
    random_case,
    repeat_timestep,
    state_index,
)
from trainbook.workflows.timestep_dbn.annealing import log_partition
from trainbook.workflows.timestep_dbn.rbm import Block, Update, contrastive_update, log_pseudo_likelihood


def test_partition_summed_over_visible_equals_summed_over_hidden():
    case = random_case()
    free_energy = case.block.free_energy(all_bits(5).expand(2, -1, -1), case.context_bias[:, :1])  # (T, S)
    h = all_bits(4)
    for t in range(2):
        by_visible = torch.logsumexp(-free_energy[t] + all_bits(5) @ case.field[t, 0], 0)
        W, a = case.block.weight[t], case.block.visible_bias[t]
        by_hidden = torch.logsumexp(h @ case.context_bias[t, 0] + torch.log1p((a + case.field[t, 0] + h @ W.T).exp()).sum(1), 0)
        torch.testing.assert_close(by_visible, by_hidden, rtol=0, atol=1e-10)
        torch.testing.assert_close(by_visible, case.log_joint(t, 0).logsumexp((0, 1)), rtol=0, atol=1e-10)


def test_context_bias_adds_context_times_weight():
    case = random_case()
    torch.testing.assert_close(case.block.context_bias(case.context), case.context_bias, rtol=0, atol=1e-12)


def test_gibbs_conditionals_equal_ratios_of_the_enumerated_joint():
    case, z, h = random_case(), all_bits(5), all_bits(4)
    bias = case.context_bias
    for t in range(2):
        for b in range(3):
            joint = case.log_joint(t, b).exp()  # (2^V, 2^H)
            single = repeat_timestep(case.block, t, 1)
            up = single.hidden_logit(z.unsqueeze(0), bias[t : t + 1, b : b + 1])[0].sigmoid()
            down = single.visible_logit(h.unsqueeze(0), case.field[t : t + 1, b : b + 1])[0].sigmoid()
            torch.testing.assert_close(up, joint @ h / joint.sum(1, keepdim=True), rtol=0, atol=1e-12)
            torch.testing.assert_close(down, joint.T @ z / joint.sum(0).unsqueeze(1), rtol=0, atol=1e-12)


def test_gibbs_sweep_leaves_the_conditional_invariant():
    case = random_case(B=1)
    for t in range(2):
        p = case.probabilities(t, 0)
        kernel = gibbs_kernel(repeat_timestep(case.block, t, 1), case.context_bias[t : t + 1], case.field[t : t + 1])
        torch.testing.assert_close(kernel.sum(1), torch.ones(32, dtype=DOUBLE), rtol=0, atol=1e-12)
        torch.testing.assert_close(p @ kernel, p, rtol=0, atol=1e-12)


def test_gibbs_histogram_fits_the_enumerated_kernel_and_its_limit():
    case, chains = random_case(B=1), 20_000
    bias, field = case.context_bias.expand(-1, chains, -1), case.field.expand(-1, chains, -1)
    start = torch.tensor([1.0, 0, 1, 1, 0], dtype=DOUBLE).expand(2, chains, -1)
    after = {sweeps: case.block.gibbs(start, bias, field, sweeps) for sweeps in (0, 1, 2, 60)}
    assert torch.equal(after[0], start)
    for t in range(2):
        kernel = gibbs_kernel(repeat_timestep(case.block, t, 1), case.context_bias[t : t + 1], case.field[t : t + 1])
        row = state_index(start[t, 0])
        assert_fits(after[1][t], kernel[row])
        assert_fits(after[2][t], (kernel @ kernel)[row])
        assert_fits(after[60][t], case.probabilities(t, 0))
        without_field = torch.softmax(case.log_joint(t, 0, with_field=False).logsumexp(1), 0)
        assert chi_square_p_value(after[60][t], without_field) < 1e-12  # the comparison can fail


def test_free_energy_matches_enumeration():
    case = random_case()
    for b in range(3):
        actual = case.block.free_energy(all_bits(5).expand(2, -1, -1), case.context_bias[:, b : b + 1])
        expected = torch.stack([-case.log_joint(t, b, with_field=False).logsumexp(1) for t in range(2)])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_free_energy_gradient_is_minus_visible_times_hidden_probability():
    case, h = random_case(T=1, B=1), all_bits(4)
    leaves = [tensor.clone().requires_grad_() for tensor in parameters(case.block)]
    block = Block(*leaves)
    for z in all_bits(5)[[0, 6, 21, 31]]:
        energy = block.free_energy(z.view(1, 1, -1), block.context_bias(case.context))
        weight, visible_bias, hidden_bias, context_weight = torch.autograd.grad(energy.sum(), leaves)
        posterior = torch.softmax(case.log_joint(0, 0)[state_index(z)], 0) @ h  # E[h | z] by enumeration
        torch.testing.assert_close(weight[0], -torch.outer(z, posterior), rtol=0, atol=1e-10)
        torch.testing.assert_close(visible_bias[0], -z, rtol=0, atol=1e-10)
        torch.testing.assert_close(hidden_bias[0], -posterior, rtol=0, atol=1e-10)
        torch.testing.assert_close(context_weight[0], -torch.outer(case.context[0, 0], posterior), rtol=0, atol=1e-10)


def test_contrastive_gradient_over_all_states_is_the_exact_gradient():
    case = random_case(T=1, B=1)
    data, states = all_bits(5)[[13]], all_bits(5).unsqueeze(1)  # (S, 1, V)
    block = repeat_timestep(case.block, 0, 32)
    per_state = contrastive_gradients(block, data.expand(32, 1, -1), case.context.expand(32, -1, -1), states)
    for gradient, exact in zip(per_state, exact_gradients(case, data), strict=True):
        torch.testing.assert_close(torch.tensordot(case.probabilities(0, 0), gradient, 1), exact, rtol=0, atol=1e-10)


def test_contrastive_gradient_of_exact_samples_is_unbiased():
    case, draws = random_case(T=1, B=3), 20_000
    data = all_bits(5)[[13, 2, 28]]
    model = torch.stack([all_bits(5)[torch.multinomial(case.probabilities(0, b), draws, replacement=True)] for b in range(3)], 1)
    block = repeat_timestep(case.block, 0, draws)
    sampled = contrastive_gradients(block, data.expand(draws, -1, -1), case.context.expand(draws, -1, -1), model)
    for gradient, exact in zip(sampled, exact_gradients(case, data), strict=True):
        standard_error = gradient.std(0) / math.sqrt(draws)
        assert standard_error.max() < 0.01
        assert ((gradient.mean(0) - exact).abs() < 4 * standard_error).all()


def test_contrastive_divergence_bias_shrinks_with_sweeps():
    case = random_case(T=1, B=1)
    data, states = all_bits(5)[[13]], all_bits(5).unsqueeze(1)
    block = repeat_timestep(case.block, 0, 32)
    per_state = contrastive_gradients(block, data.expand(32, 1, -1), case.context.expand(32, -1, -1), states)
    exact = exact_gradients(case, data)
    kernel = gibbs_kernel(case.block, case.context_bias, case.field)
    biases = []
    for sweeps in (1, 2, 5, 10):
        ends = torch.linalg.matrix_power(kernel, sweeps)[13]  # cd: the chain starts at the data
        gaps = [torch.tensordot(ends, g, 1) - e for g, e in zip(per_state, exact, strict=True)]
        biases.append(float(torch.cat([gap.flatten() for gap in gaps]).norm()))
    assert all(later < earlier for earlier, later in itertools.pairwise(biases))
    assert biases[0] > 1e-2  # one sweep is really biased here
    assert biases[-1] < 1e-6


def test_contrastive_gradient_without_context_leaves_its_gradient_alone():
    case = random_case(G=0)
    gradients = contrastive_gradients(case.block, case.noisy, case.context, 1 - case.noisy)
    assert gradients[3].shape == (2, 0, 4)
    assert all(torch.isfinite(gradient).all() for gradient in gradients[:3])


@pytest.mark.parametrize("max_bits", [10**9, 3])
def test_log_pseudo_likelihood_matches_enumerated_conditionals(max_bits):
    case = random_case()
    visible = torch.randint(2, (2, 3, 5)).to(DOUBLE)
    actual = log_pseudo_likelihood(case.block, visible, case.context_bias, case.field, max_bits)
    looked_at = range(5) if max_bits > 5 else (0, 2, 4)
    for t in range(2):
        logs = []
        for b in range(3):
            p = case.probabilities(t, b)
            for i in looked_at:
                other = visible[t, b].clone()
                other[i] = 1 - other[i]
                here, there = p[state_index(visible[t, b])], p[state_index(other)]
                logs.append((here / (here + there)).log())
        torch.testing.assert_close(actual[t], torch.stack(logs).mean(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 1e-4)])
def test_batched_timesteps_equal_a_loop_over_them(dtype, tolerance):
    case = random_case(T=6, B=8, V=20, H=15, G=7)
    block = Block(*(tensor.to(dtype) for tensor in parameters(case.block)))
    context, field, data, model = (x.to(dtype) for x in (case.context, case.field, case.noisy, 1 - case.noisy.roll(1, 0)))
    hidden = torch.rand(6, 8, 15, dtype=dtype).round()
    bias = block.context_bias(context)
    batched = [
        block.hidden_logit(data, bias),
        block.visible_logit(hidden, field),
        block.free_energy(data, bias),
        log_pseudo_likelihood(block, data, bias, field),
        *contrastive_gradients(block, data, context, model),
    ]
    for t in range(6):
        one, here = Block(*(tensor[t : t + 1] for tensor in parameters(block))), slice(t, t + 1)
        alone_bias = one.context_bias(context[here])
        alone = [
            one.hidden_logit(data[here], alone_bias),
            one.visible_logit(hidden[here], field[here]),
            one.free_energy(data[here], alone_bias),
            log_pseudo_likelihood(one, data[here], alone_bias, field[here]),
            *contrastive_gradients(one, data[here], context[here], model[here]),
        ]
        for together, single in zip(batched, alone, strict=True):
            torch.testing.assert_close(together[here], single, rtol=0, atol=tolerance)


def test_batched_sampling_and_annealing_equal_a_loop_with_the_same_random_numbers(monkeypatch):
    case = random_case(T=5, B=6)
    drawn, original = [], torch.rand_like

    def record(like: Tensor) -> Tensor:
        drawn.append(original(like))
        return drawn[-1].clone()

    monkeypatch.setattr(torch, "rand_like", record)
    together = case.block.gibbs(case.noisy, case.context_bias, case.field, 4)
    num_sampled = len(drawn)
    annealed = log_partition(case.block, case.context_bias, case.field, 5, particles=3)
    for t in range(5):
        here = slice(t, t + 1)
        replay = iter([numbers[here].clone() for numbers in drawn])
        monkeypatch.setattr(torch, "rand_like", lambda like, replay=replay: next(replay))
        one = Block(*(tensor[here] for tensor in parameters(case.block)))
        assert torch.equal(one.gibbs(case.noisy[here], case.context_bias[here], case.field[here], 4), together[here])
        alone = log_partition(one, case.context_bias[here], case.field[here], 5, particles=3)
        torch.testing.assert_close(alone, annealed[:, here], rtol=0, atol=1e-12)
        assert next(replay, None) is None
    assert num_sampled == 8  # h and z once per sweep


def test_sgd_in_place_is_torchs_sgd_on_the_gradients():
    case = random_case(T=3, B=6, V=7, H=5, G=4)
    data, model = (torch.randint(0, 2, (3, 6, 7)).to(DOUBLE) for _ in range(2))
    gradients = contrastive_gradients(case.block, data, case.context, model)
    reference = [parameter.clone() for parameter in parameters(case.block)]
    for tensor, gradient in zip(reference, gradients, strict=True):
        tensor.grad = gradient
    groups = [{"params": reference[::3], "weight_decay": 0.2}, {"params": reference[1:3]}]  # W, U; a, b
    torch.optim.SGD(groups, lr=0.3).step()
    update = Update.sgd(parameters(case.block), 0.3, 0.2)
    contrastive_update(case.block, data, case.context, case.block.context_bias(case.context), model, update)
    for moved, expected in zip(parameters(case.block), reference, strict=True):
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)

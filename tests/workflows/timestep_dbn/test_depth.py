"""Layers above the first against enumeration: the tied start, Hinton's bound, sampling, gradients and training."""

# T timesteps, B batch, V visible units, H hidden units, S = 2^V states; x_0 = z, x_1 = h, x_n units of layer n

import math

import pytest
import torch
from torch import Tensor, nn

from tests.workflows.timestep_dbn.enumeration import (
    DOUBLE,
    all_bits,
    assert_fits,
    chi_square_p_value,
    enumerated_bound,
    parameters,
    product_of_bernoullis,
    random_dbn,
    reverse_matrix,
    state_index,
)
from tests.workflows.timestep_dbn.runs import bits_data, bits_state, drive
from trainbook.errors import UserError
from trainbook.workflows.timestep_dbn.chain import TimestepDBN, fields
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.contrastive import Update
from trainbook.workflows.timestep_dbn.depth import Depth, Layer, deep_factors, deep_reverse_step, top_factor
from trainbook.workflows.timestep_dbn.depth_training import LayerStage, layer_views
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, flip_schedule
from trainbook.workflows.timestep_dbn.later_stages import later_keepers
from trainbook.workflows.timestep_dbn.likelihood import Annealing, Factor, bracket
from trainbook.workflows.timestep_dbn.rbm import Block

SIZES = [4, 3, 3]


def deep_case(depth: tuple[int, int, int], untied: float = 0.0, **choices) -> tuple[TimestepDBN, Depth, FlipSchedule]:
    """A random chain of two timesteps in double precision with tied layers above it, moved off their start by `untied`."""
    dbn, config = random_dbn(SIZES, timesteps=2, depth=depth, **choices)
    dbn, above = dbn.double(), Depth(config, dbn).double()
    for uppers, level in zip(above.levels, dbn.levels, strict=True):
        for below, upper in zip((level, *uppers), uppers, strict=False):
            upper.tie(below, 0, 2)
            for parameter in upper.parameters():
                parameter.data += untied * torch.randn_like(parameter)
    schedule = flip_schedule(2, "cosine")
    return dbn, above, schedule


def layers_of(dbn: TimestepDBN, above: Depth, schedule: FlipSchedule, target: Tensor, noisy: Tensor, t: int) -> list[list[Layer]]:
    """Every level's layers for one z_{t-1} and z_t of all levels side by side, (V,)."""
    bits, given = ([level.view(1, 1, -1) for level in all_levels.split(SIZES)] for all_levels in (target, noisy))
    blocks, field = dbn.blocks(t - 1, t), fields(given, schedule.coupling[t : t + 1])
    contexts = dbn.contexts(blocks, bits, given)
    return [above.layers(level, blocks[level], contexts[level][1], field[level], given[level], t - 1, t) for level in range(3)]


def log_marginal(layer: Layer) -> Tensor:
    """log p(x_{n-1}) of one layer's RBM for every state below, by summing exp(-E) over both kinds of units; (S,)."""
    W, a = layer.block.weight[0].detach(), layer.block.visible_bias[0].detach() + layer.field[0, 0].detach()
    below, above = all_bits(W.shape[0]), all_bits(W.shape[1])
    joint = (below @ a).unsqueeze(1) + above @ layer.context_bias[0, 0].detach() + below @ W @ above.T
    return torch.log_softmax(joint.logsumexp(1), 0)


def directed(layer: Layer) -> Tensor:
    """P(x_{n-1} | x_n) for every pair, (S above, S below), from the definition."""
    W, a = layer.block.weight[0].detach(), layer.block.visible_bias[0].detach() + layer.field[0, 0].detach()
    return product_of_bernoullis((a + all_bits(W.shape[1]) @ W.T).sigmoid(), all_bits(W.shape[0]))


def posterior(layer: Layer) -> Tensor:
    """Q(x_n | x_{n-1}) for every pair, (S below, S above), from the definition."""
    W = layer.block.weight[0].detach()
    return product_of_bernoullis((layer.context_bias[0, 0].detach() + all_bits(W.shape[0]) @ W).sigmoid(), all_bits(W.shape[1]))


def deep_distribution(layers: list[Layer]) -> Tensor:
    """p(z) of the whole stack: the top RBM, then directed steps down; (S,)."""
    p = log_marginal(layers[-1]).exp()
    for layer in reversed(layers[:-1]):
        p = p @ directed(layer)
    return p


def hinton_bound(layers: list[Layer]) -> Tensor:
    """E_Q[log p_top + sum log P(x_{n-1} | x_n)] + sum E_Q[H(Q)] for every z, by enumeration; (S,)."""
    value = log_marginal(layers[-1])
    for layer in reversed(layers[:-1]):
        q = posterior(layer)
        value = (q * (value + directed(layer).log().T - q.log())).sum(1)
    return value


@pytest.mark.parametrize("depth", [(2, 2, 2), (3, 4, 2)])
@pytest.mark.parametrize("noisy_context", [True, False])
def test_tied_layers_leave_the_distribution_unchanged_and_the_bound_tight(depth, noisy_context):
    dbn, above, schedule = deep_case(depth, noisy_context=noisy_context, context="bits")
    for t in (1, 2):
        target, noisy = (torch.randint(2, (sum(SIZES),)).to(DOUBLE) for _ in range(2))
        for layers, expected in zip(layers_of(dbn, above, schedule, target, noisy, t), depth, strict=True):
            assert len(layers) == expected
            alone = log_marginal(layers[0])
            torch.testing.assert_close(deep_distribution(layers).log(), alone, rtol=0, atol=1e-6)
            torch.testing.assert_close(hinton_bound(layers), alone, rtol=0, atol=1e-6)


def test_noisy_bits_reach_a_layer_through_its_diagonal():
    dbn, above, schedule = deep_case((2, 2, 2))
    target, noisy = (torch.randint(2, (sum(SIZES),)).to(DOUBLE) for _ in range(2))
    gains = [uppers[0].gain for uppers in above.levels]
    for gain in gains:
        nn.init.normal_(gain)
    for level, (first, second) in enumerate(layers_of(dbn, above, schedule, target, noisy, 2)):
        context = first.context_bias - first.block.hidden_bias.unsqueeze(1)
        q = (first.context_bias + noisy.split(SIZES)[level] @ first.block.weight).sigmoid()
        torch.testing.assert_close(second.field, context + gains[level][1] * (2 * q - 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [2, 3])
def test_likelihood_of_a_stack_is_hintons_bound_and_lies_below_the_truth(depth):
    dbn, above, schedule = deep_case((depth, 1, 1), untied=0.3)
    target, noisy = (torch.randint(2, (sum(SIZES),)).to(DOUBLE) for _ in range(2))
    layers, draws = layers_of(dbn, above, schedule, target, noisy, 1)[0], 20_000
    many = [Layer(x.block, *(part.expand(1, draws, -1) for part in (x.context_bias, x.field)), None) for x in layers]
    for row in (0, 6, 13):
        state, rest = all_bits(4)[row].expand(1, draws, -1), torch.zeros(1, draws, dtype=DOUBLE)
        top = top_factor(Factor(many[0].block, many[0].context_bias, many[0].field, state, rest), many)
        W, bias = layers[-1].block.weight[0], layers[-1].context_bias[0, 0]
        visible_bias = layers[-1].block.visible_bias[0] + layers[-1].field[0, 0]
        log_z = torch.log1p((bias + all_bits(W.shape[0]) @ W).exp()).sum(1).add(all_bits(W.shape[0]) @ visible_bias).logsumexp(0)
        energy = top.block.free_energy(top.state, top.context_bias) - (top.field * top.state).sum(-1)
        found = (top.rest + energy + log_z)[0].detach()
        bound = hinton_bound(layers)[row]
        assert (found.mean() + bound).abs() < 4 * found.std() / math.sqrt(draws) < 0.05
        assert bound < deep_distribution(layers)[row].log() - 1e-3


def test_code_length_of_a_tied_stack_is_that_of_the_chain():
    dbn, above, _ = deep_case((2, 3, 2), context="bits")
    dbn, above, schedule, size, z_0 = dbn.float(), above.float(), flip_schedule(2, "cosine").to("cpu"), 3000, 700
    exact = enumerated_bound([reverse_matrix(dbn, t, schedule) for t in (1, 2)], schedule, z_0)
    clean = all_bits(sum(SIZES))[[z_0]].float().expand(size, -1).split(SIZES, 1)
    found = bracket(deep_factors(dbn, above, schedule), clean, 2, Annealing(1e-3, 60, 2), "test")
    for side in (found.low, found.high):
        assert ((side.mean(1) - exact[1:]).abs() < 4 * side.std(1) / math.sqrt(size)).all()


def test_samples_of_a_stack_fit_the_enumerated_distribution():
    dbn, above, schedule = deep_case((1, 1, 3), untied=2.0)
    noisy, size = torch.randint(2, (sum(SIZES),)).to(DOUBLE), 20_000
    for t in (1, 2):
        samples = deep_reverse_step(dbn, above, noisy.expand(size, -1).split(SIZES, 1), t, schedule, 40)
        layers = layers_of(dbn, above, schedule, noisy, noisy, t)[2]  # the coarsest level: no other one is its context
        assert_fits(samples[2], deep_distribution(layers).detach())
        assert chi_square_p_value(samples[2], log_marginal(layers[0]).exp()) < 1e-9  # depth 1 is another model


@pytest.mark.parametrize("negative_phase", ["pcd", "recovery", "cd"])
def test_statistics_of_a_layer_are_the_exact_gradient_on_average(negative_phase, monkeypatch):
    dbn, above, schedule = deep_case((1, 1, 2), untied=0.4)
    states, noisy = all_bits(2), torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1, 0, 1], dtype=DOUBLE)
    layer = layers_of(dbn, above, schedule, noisy, noisy, 1)[2][1]
    batch = 4 * 50_000
    config = Config(timesteps=2, hidden_units=(3, 2, 2), depth=(1, 1, 2), negative_phase=negative_phase, gibbs_sweeps=40)
    stage = LayerStage(config, dbn, above, 2, schedule, [], later_keepers(config, {"depth": above})["layer_2_best"])
    data = states.repeat(batch // 4, 1).unsqueeze(0)
    many = Layer(layer.block, *(part.detach().expand(1, batch, -1) for part in layer[1:]))
    monkeypatch.setattr(stage, "_states", lambda clean, start, stop: [(data, many)])
    above.levels[2][0].states = data.expand(2, -1, -1).clone()
    targets = [torch.zeros(1, *view.shape[1:], dtype=DOUBLE) for view in layer_views(above, 2, 0, 1)[0]]
    with torch.no_grad():
        stage.update([], 0, 1, [Update(tuple(targets), 0.0, 0.0, 1.0)])
    upper, first = above.levels[2][0], layers_of(dbn, above, schedule, noisy, noisy, 1)[2][0]
    condition = (first.context_bias - first.block.hidden_bias.unsqueeze(1)).detach()[0, 0]
    a = upper.visible_bias[0] + condition + upper.gain[0] * layer.signs.detach()[0, 0]
    interaction = states @ upper.weight[0] @ all_bits(3).T
    joint = (states @ a).unsqueeze(1) + all_bits(3) @ (upper.hidden_bias[0] + first.field[0, 0]) + interaction
    log_likelihood = torch.log_softmax(joint.logsumexp(1), 0).mean()  # every state is as frequent in the data
    exact = torch.autograd.grad(log_likelihood, [upper.weight, upper.visible_bias, upper.hidden_bias, upper.gain])
    for found, expected in zip((targets[0], targets[1], targets[2], targets[4]), exact, strict=True):
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0.01)
        assert expected[0].abs().max() > 0.02


def test_training_a_layer_raises_the_bound_in_the_unconditional_case():
    patterns = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 1, 1, 1], [1, 0, 1, 0, 0], [0, 1, 0, 1, 0]]).float()
    sizes = [1, 1, 5]
    config = Config(
        timesteps=1, hidden_units=(1, 1, 3), depth=(1, 1, 2), autoencoder_epochs=1, epochs_per_timestep=60, baseline_epochs=1,
        batch_size=32, learning_rate=0.03, weight_decay=0.0, noisy_context=False, gibbs_sweeps=5,
    )  # fmt: skip
    bits = torch.cat([torch.randint(2, (128, 2)).float(), patterns.repeat(32, 1)], 1)
    state = bits_state(config, sizes, 128)
    drive(config, bits_data(bits, bits, bits), state, state.step + 240)
    dbn, above = state.modules["dbn"], state.modules["depth"]
    nn.init.normal_(dbn.levels[2].weight, std=1.5)  # a first layer that fits badly leaves the second something to learn

    def mean_bound() -> tuple[float, float]:
        first = Block(*(part.detach().double() for part in parameters(dbn.blocks(0, 1)[2])))
        nothing = torch.zeros(1, 1, 5, dtype=DOUBLE)  # no coupling: the noisy bits have no say
        layers = above.double().layers(2, first, first.hidden_bias.unsqueeze(1), nothing, nothing, 0, 1)
        above.float()
        rows = state_index(patterns)
        return float(hinton_bound(layers)[rows].mean()), float(deep_distribution(layers).log()[rows].mean())

    above.levels[2][0].tie(dbn.levels[2], 0, 1)
    before, truth_before = mean_bound()
    assert before == pytest.approx(truth_before, abs=1e-6)
    drive(config, bits_data(bits, bits, bits), state, state.step + 240)
    after, truth_after = mean_bound()
    assert before + 0.01 < after <= truth_after + 1e-9


def test_depth_is_given_for_all_levels_or_for_each():
    assert Config.from_preset("laptop", {"depth": 2}).depth == Config.from_preset("laptop", {"depth": "2"}).depth == (2, 2, 2)
    assert Config.from_preset("laptop", {"depth": "1, 3, 2"}).depth == (1, 3, 2)
    with pytest.raises(UserError, match="depth must be at least 1"):
        Config.from_preset("laptop", {"depth": "0, 1, 1"})

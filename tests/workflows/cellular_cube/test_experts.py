"""Experts against dense attention, the autograd Jacobian and a solver for differential equations."""

import pytest
import torch
from scipy.integrate import solve_ivp

from trainbook.workflows.cellular_cube.bands import Bands
from trainbook.workflows.cellular_cube.experts import BatchNorm, DistantExpert, FunctionalExpert, Gate

SIDE, CHANNELS, HARDWARE = 4, 5, 3


@pytest.fixture
def cells():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, SIDE, SIDE, SIDE, CHANNELS, generator=generator, dtype=torch.float64)
    return x, torch.randn(SIDE, SIDE, SIDE, HARDWARE, generator=generator, dtype=torch.float64)


def test_banded_linear_attention_is_dense_attention_over_the_band(cells):
    """All pairs of cells, weights phi(q_i).phi(k_j) where j is in i's band, normalised."""
    x, hardware = cells
    torch.manual_seed(0)
    expert, bands = FunctionalExpert(CHANNELS, HARDWARE, 3, 2).double(), Bands(SIDE, 3, "cubic").double()
    found = expert.attention(x, hardware)
    index = torch.cartesian_prod(*[torch.arange(SIDE)] * 3)
    distance = (index[:, None] - index).abs().amax(-1)
    low, high = bands.split.ends[:2]
    inside = ((distance > low) & (distance <= high)).double()
    queries, keys, values = (part.flatten(1, 3) for part in found)
    weights = queries @ keys.transpose(1, 2) * inside
    total = weights.sum(-1, keepdim=True)
    dense = (weights @ values) / total.clamp(min=1e-3)
    torch.testing.assert_close(expert.messages(found, bands).flatten(1, 3), dense, atol=1e-12, rtol=1e-12)
    assert (total > 1e-3).double().mean() > 0.9


def test_the_trace_of_the_drift_is_that_of_its_jacobian(cells):
    x, hardware = cells
    torch.manual_seed(0)
    expert = DistantExpert(CHANNELS, HARDWARE, 7, 2).double()
    with torch.no_grad():
        expert.time.normal_()
    context = expert.outer(x.roll(1, 0), hardware)[:1, 0, 0, 0]
    state = x[:1, 0, 0, 0]
    jacobian = torch.autograd.functional.jacobian(lambda s: expert.drift(s[None], context, 0.3)[0], state[0])
    torch.testing.assert_close(expert.divergence(state, context, 0.3)[0], jacobian.trace(), atol=1e-12, rtol=1e-12)


def test_the_flow_converges_to_the_solution_at_second_order(cells):
    x, hardware = cells
    torch.manual_seed(0)
    expert = DistantExpert(CHANNELS, HARDWARE, 7, 1).double()
    with torch.no_grad():
        expert.time.normal_()
        expert.state.weight.mul_(2)
    state, context = x[:1, 0, 0, 0], expert.outer(x.roll(1, 0), hardware)[:1, 0, 0, 0].detach()

    def drift(time, y):
        return expert.drift(torch.as_tensor(y)[None], context, time)[0].detach().numpy()

    exact = torch.as_tensor(solve_ivp(drift, (0, 1), state[0].numpy(), rtol=1e-10, atol=1e-12).y[:, -1])
    errors = []
    for steps in (4, 8):
        expert.num_steps = steps
        errors.append(float((expert.flow(state, context)[0].detach() - exact).norm()))
    assert errors[1] < 1e-2
    assert 3 < errors[0] / errors[1] < 5.5


def test_the_gate_weighs_and_its_temperature_hardens(cells):
    x, hardware = cells
    torch.manual_seed(0)
    gate = Gate(CHANNELS, HARDWARE, 8, 3, 1.0).double()
    weights = gate(x, x, hardware)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1], dtype=torch.float64))
    gate.temperature = 0.01
    assert gate(x, x, hardware).amax(-1).mean() > 0.9 > weights.amax(-1).mean()


def test_batch_norm_over_cells_ignores_the_rest_of_the_batch_in_evaluation(cells):
    x, _ = cells
    norm = BatchNorm(CHANNELS).double()
    trained = norm(x)
    assert float(trained.detach().mean().abs()) < 1e-9
    norm.eval()
    torch.testing.assert_close(norm(x)[:1], norm(x[:1]))

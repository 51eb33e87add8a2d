"""Products of a contrastive step in 16 bits: exact where 16 bits are, and gradients of the machine with rounded weights."""

# T timesteps, B batch, V visible units, H hidden units, G context units

import math

import pytest
import torch

from tests.workflows.timestep_dbn.enumeration import all_bits, exact_gradients, parameters, random_case
from trainbook.workflows.timestep_dbn import products
from trainbook.workflows.timestep_dbn.chain_step import largest
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.contrastive import Phases, Update, contrastive_step, contrastive_update, num_draws
from trainbook.workflows.timestep_dbn.elementwise import Elementwise
from trainbook.workflows.timestep_dbn.products import Products, product_dtype
from trainbook.workflows.timestep_dbn.random_bits import RandomKeys
from trainbook.workflows.timestep_dbn.rbm import Block, ConditionalRBM

NARROW = [torch.bfloat16, torch.float16]
KERNELS = Elementwise(False, 4096, "cpu")


def float32_block(T=3, V=6, H=5, G=4) -> Block:
    return Block(*(tensor.float() for tensor in parameters(random_case(T=T, V=V, H=H, G=G).block)))


@pytest.mark.parametrize("dtype", NARROW)
def test_bits_times_weights_of_few_digits_are_exact(dtype):
    block = float32_block()
    block.weight.copy_(torch.randint(-8, 9, block.weight.shape) / 8)  # every sum of six of them has few digits too
    block.context_weight.copy_(torch.randint(-8, 9, block.context_weight.shape) / 8)
    here = Products(block, dtype)
    here.load(block)
    z, h, g = (torch.randint(0, 2, (3, 7, n)).float() for n in (6, 5, 4))
    assert torch.equal(here.with_weight(z, torch.empty(3, 7, 5)), torch.einsum("tbv,tvh->tbh", z, block.weight))
    assert torch.equal(here.with_transposed(h, torch.empty(3, 7, 6)), torch.einsum("tbh,tvh->tbv", h, block.weight))
    out = torch.full((3, 7, 5), 0.5)
    here.add_context(g, out)
    assert torch.equal(out, 0.5 + torch.einsum("tbg,tgh->tbh", g, block.context_weight))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_outer_products_are_added_in_float32_however_small_they_are(dtype, keep):
    a, b = torch.randint(0, 2, (3, 7, 6)).float(), torch.randint(-8, 9, (3, 7, 5)) / 8
    scale = torch.tensor(2.0**-20)  # float16 does not hold a seventh of it
    target = torch.full((3, 6, 5), math.nan) if keep == 0 else torch.ones(3, 6, 5)
    before = target.clone().nan_to_num(0.0)
    Products(float32_block(), dtype).add_outer(a, b * scale, target, keep, scale, KERNELS)
    assert torch.equal(target, keep * before + scale * torch.einsum("tbv,tbh->tvh", a, b))


@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_are_those_of_the_machine_with_rounded_weights(dtype):
    rounded = random_case(T=1, B=1)
    block, states = Block(*(tensor.float() for tensor in parameters(rounded.block))), all_bits(5)
    for target in (rounded.block.weight, rounded.block.context_weight):
        target.copy_(target.to(dtype))
    # The model's side is the exact expectation: each state as often as its probability says, in 2^12 rows.
    counts = (rounded.probabilities(0, 0) * 2**12).round().long()
    model = states.repeat_interleave(counts, 0).float().unsqueeze(0)
    rows = model.shape[1]
    context = rounded.context[:, :1].float()
    phases = Phases(block, rows, dtype)
    phases.data.copy_(states[13].expand(1, rows, -1))
    phases.model.copy_(model)
    phases.context.copy_(context.expand(-1, rows, -1))
    phases.load(block)
    found = [torch.full(tensor.shape, math.nan) for tensor in parameters(block)]
    contrastive_update(block, phases, Update(tuple(found), 0.0, 0.0, -1.0), Elementwise(False, largest([phases]), "cpu"))
    for gradient, exact in zip(found, exact_gradients(rounded, states[[13]]), strict=True):
        assert (gradient - exact).abs().max() < 0.01 * exact.abs().max()


def one_step(dtype: torch.dtype, compiled: bool, context_units: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(3)
    rbm = ConditionalRBM(4, 24, 16, context_units, 8)
    block, phases = rbm.block(0, 4), Phases(rbm.block(0, 4), 8, dtype)
    data, noisy = torch.randint(0, 2, (2, 4, 8, 24)).float()
    keys, coupling = RandomKeys(0, 0, num_draws(2), 4, torch.device("cpu")), torch.ones(4, 1, 1)
    kernels = Elementwise(compiled, largest([phases]), "cpu")
    with torch.no_grad():
        for step in range(3):
            phases.data.copy_(data)
            phases.signs.copy_(2 * noisy - 1)
            phases.load(block)
            update = Update.sgd(list(rbm.parameters()), 0.1, 0.1)
            contrastive_step(block, phases, rbm.chains, coupling, "pcd", 2, update, keys(step), kernels)
    return [tensor.detach().clone() for tensor in (*rbm.parameters(), rbm.chains)]


@pytest.mark.parametrize("context_units", [0, 7])
def test_compiled_and_eager_kernels_give_the_same_bits_and_float32_nearly_the_same(context_units):
    eager, compiled = (one_step(torch.bfloat16, c, context_units) for c in (False, True))
    for one, other in zip(eager, compiled, strict=True):
        assert torch.equal(one, other)
    exact = one_step(torch.float32, False, context_units)
    assert not torch.equal(eager[0], exact[0])
    for one, other in zip(eager[:4], exact[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)


def test_a_slower_format_is_named_once(caplog, monkeypatch):
    seconds = {torch.bfloat16: 1.0, torch.float32: 0.3}
    monkeypatch.setattr(products, "_product_seconds", lambda dtype, device: seconds[dtype])
    product_dtype.cache_clear()
    config = Config(rbm_precision="bfloat16")
    for _ in range(2):
        assert product_dtype(config.rbm_precision, torch.device("cpu")) == torch.bfloat16
    assert caplog.text.count("take 3.33 times as long here as in float32: float32 is the better choice") == 1
    product_dtype.cache_clear()

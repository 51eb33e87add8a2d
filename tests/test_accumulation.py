"""Gradients of micro-batches, whatever memory and form, against those of the whole batch."""

import logging
import math

import pytest
import torch
from torch import nn

from tests.driving import assert_identical
from tests.small_network import (
    OUT_OF_MEMORY,
    Memory,
    correct,
    examples,
    gradient_of,
    hand_over,
    loss_of,
    small_network,
    stepper_of,
    weights_of,
)
from trainbook import accumulation, distributed
from trainbook.accumulation import batch_size, split_batch
from trainbook.errors import UserError
from trainbook.optimization import OptimizationConfig
from trainbook.optimizer import make_optimizer


@pytest.mark.parametrize("sizes", [[24], [12, 12], [6] * 4, [1, 5, 18], [23, 1], [5, 5, 5, 5, 4], [1] * 24])
def test_accumulated_gradient_loss_and_means_equal_those_of_the_large_batch(sizes, monkeypatch):
    network, batch = small_network(torch.float64), examples(24, torch.float64)
    whole, accuracy = loss_of(network, batch), correct(network, batch)
    whole.backward()
    expected, seen = gradient_of(network).clone(), []

    def loss_function(module, batch):
        seen.append(len(batch[0]))
        return loss_of(module, batch), {"accuracy": correct(module, batch), "square": module(batch[0]).square().mean()}

    stepper = stepper_of(network, accumulation=len(sizes))
    if max(sizes) - min(sizes) > 1:  # no number of micro-batches gives such sizes
        cut = list(zip(*(part.split(sizes) for part in batch), strict=True))
        monkeypatch.setattr(accumulation, "split_batch", lambda batch, number: cut)
    square = network(batch[0]).square().mean().detach()
    report = stepper.step(batch, loss_function)
    assert seen == sizes
    torch.testing.assert_close(gradient_of(network), expected, rtol=0, atol=1e-12)
    for name, value in {"loss": whole.detach(), "gradient_norm": expected.norm(), "accuracy": accuracy, "square": square}.items():
        torch.testing.assert_close(report[name], value, rtol=0, atol=1e-12)
        assert not report[name].requires_grad


@pytest.mark.parametrize("number", [1, 3, 10, 64])
@pytest.mark.parametrize("form", [tuple, list, dict])
def test_split_batch_keeps_every_example_once_and_in_order(form, number):
    batch = (torch.arange(10), torch.arange(20).view(10, 2))
    batch = {"a": batch[0], "b": batch[1]} if form is dict else form(batch)
    parts = split_batch(batch, number)
    sizes = [batch_size(part) for part in parts]
    assert len(parts) == min(number, 10)
    assert max(sizes) - min(sizes) <= 1
    for key in batch if form is dict else (0, 1):
        assert torch.equal(torch.cat([part[key] for part in parts]), batch[key])
    assert [part.tolist() for part in split_batch(torch.arange(3), 2)] == [[0, 1], [2]]


@pytest.mark.parametrize("batch", [examples(0), list(examples(0)), {"images": torch.empty(0, 5)}, torch.empty(0)])
def test_an_empty_step_is_refused(batch):
    with pytest.raises(ValueError, match="at least one example"):
        stepper_of(small_network()).step(batch, loss_of)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_share_of_a_larger_batch_counts_by_its_examples(accumulation):
    """The other processes' shares are added elsewhere: this one's loss and gradient weigh n / global_size."""
    network, batch = small_network(torch.float64), examples(10, torch.float64)
    loss_of(network, batch).backward()
    expected, loss = 0.25 * gradient_of(network), 0.25 * loss_of(network, batch).detach()
    report = stepper_of(network, accumulation=accumulation).step(batch, loss_of, global_size=40)
    torch.testing.assert_close(gradient_of(network), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(report["loss"], loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
@pytest.mark.parametrize(
    ("accumulation", "limit", "needed", "sizes"),
    [(1, 11, 2, [6, 6]), (1, 5, 4, [3] * 4), (1, 1, 16, [1] * 12), (3, 3, 6, [2] * 6), (2, 6, 2, [6, 6])],
)
def test_a_step_that_does_not_fit_is_taken_in_smaller_parts(
    accumulation, limit, needed, sizes, error, in_backward, monkeypatch, caplog
):
    monkeypatch.setattr(logging.getLogger("trainbook"), "propagate", True)
    network, batches = small_network(torch.float64), [examples(12, torch.float64, seed=step) for step in range(3)]
    peer = small_network(torch.float64)
    optimizer = make_optimizer(peer, OptimizationConfig())
    stepper, memory = stepper_of(network, accumulation=accumulation), Memory(limit, error, in_backward)
    for step, batch in enumerate(batches):
        memory.sizes.clear()
        with caplog.at_level(logging.WARNING, "trainbook"):
            report = stepper.step(batch, memory)
        optimizer.zero_grad()
        loss = loss_of(peer, batch)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(gradient_of(network), gradient_of(peer), rtol=0, atol=1e-12)
        torch.testing.assert_close(report["loss"], loss.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(weights_of(network), weights_of(peer), rtol=0, atol=1e-9)
        assert memory.sizes[-len(sizes) :] == sizes
        assert step == 0 or memory.sizes == sizes  # only the first step had to find the number
    doublings = round(math.log2(needed / accumulation))
    told = [accumulation * 2**power for power in range(1, doublings + 1)]
    assert len(caplog.records) == doublings
    for record, number in zip(caplog.records, told, strict=True):
        assert f"out of memory at step 0: batches are cut into {number} micro-batches" in record.getMessage()

    other = stepper_of(small_network(torch.float64, seed=3), accumulation=accumulation)
    hand_over(stepper, other)
    memory.sizes.clear()
    other.step(batches[0], memory)
    assert memory.sizes == sizes


def test_parts_that_did_fit_do_not_count_twice():
    """Memory runs out in the second micro-batch: the first one's gradient, loss and batch statistics are forgotten."""
    networks, batch = (
        [nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double() for _ in range(2)],
        examples(12, torch.float64),
    )
    networks[1].load_state_dict(networks[0].state_dict())
    calls = []

    def loss_function(network, batch):
        calls.append(len(batch[0]))
        if len(calls) == 2:
            raise OUT_OF_MEMORY[0]
        return loss_of(network, batch), {"accuracy": correct(network, batch)}

    steppers = [stepper_of(network, accumulation=number, ema_decay=0.5) for network, number in zip(networks, (2, 4), strict=True)]
    report = steppers[0].step(batch, loss_function)
    assert calls == [6, 6, 3, 3, 3, 3]
    assert_identical(report, steppers[1].step(batch, loss_function))
    assert_identical(gradient_of(networks[0]), gradient_of(networks[1]))
    assert_identical(weights_of(networks[0]), weights_of(networks[1]))
    assert_identical(networks[0].state_dict(), networks[1].state_dict())
    assert_identical(steppers[0].ema.state_dict(), steppers[1].ema.state_dict())


def test_memory_and_the_loss_scale_do_not_meet():
    networks, batch = [small_network(), small_network()], examples(12)
    reports = [
        stepper_of(networks[0], precision="float16").step(batch, Memory(3, OUT_OF_MEMORY[0])),
        stepper_of(networks[1], precision="float16", accumulation=4).step(batch, loss_of),
    ]
    assert_identical(*reports)
    assert_identical(networks[0].state_dict(), networks[1].state_dict())


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_a_single_example_that_does_not_fit_ends_the_run(error):
    network, memory = small_network(), Memory(0, error)
    before = weights_of(network)
    with pytest.raises(RuntimeError) as caught:
        stepper_of(network).step(examples(12), memory)
    assert caught.value is error
    assert memory.sizes == [12, 6, 3, 2, 1]  # the largest micro-batch comes first: 12 in 8 parts are 2, 2, 2, 2, 1, 1, 1, 1
    assert torch.equal(weights_of(network), before)


def test_other_errors_pass_through_at_once():
    stepper, memory = stepper_of(small_network()), Memory(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError) as caught:
        stepper.step(examples(12), memory)
    assert caught.value is memory.error
    assert (memory.sizes, stepper.state_dict()["accumulation"]) == ([12], 1)


def small_convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def pictures(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 2, 6, 6, generator=generator), torch.randint(3, (12,), generator=generator)


def test_the_measured_form_is_chosen_once_and_carried_on(monkeypatch):
    measured = []

    def fastest(module, run, precision):
        measured.append((module, run(module).item(), precision))
        return "channels_last", []

    monkeypatch.setattr(accumulation, "fastest_variant", fastest)
    network, plain = small_convolution(), small_convolution()
    choices = {"precision": "bfloat16", "accumulation": 3, "ema_decay": 0.5}
    stepper, other = stepper_of(network, acceleration="measured", **choices), stepper_of(plain, **choices)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(network, [part[:4] for part in pictures(0)]).item()
    for step in range(3):
        stepper.step(pictures(step), loss_of), other.step(pictures(step), loss_of)
    assert measured == [(network, loss, "bfloat16")]  # on the first micro-batch, in the precision of training
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not network[0].weight.is_contiguous()
    torch.testing.assert_close(weights_of(network), weights_of(plain), rtol=0, atol=1e-3)
    torch.testing.assert_close(weights_of(stepper.ema), weights_of(other.ema), rtol=0, atol=1e-3)

    resumed = stepper_of(small_convolution(), acceleration="measured", **choices)
    hand_over(stepper, resumed)
    assert_identical(
        [resumed.step(pictures(step), loss_of) for step in (3, 4)], [stepper.step(pictures(step), loss_of) for step in (3, 4)]
    )
    assert len(measured) == 1
    assert resumed.module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_identical(resumed.state_dict(), stepper.state_dict())


def test_a_module_that_is_fastest_as_written_stays_so(monkeypatch):
    monkeypatch.setattr(accumulation, "fastest_variant", lambda *_: ("as written", []))
    network, plain = small_convolution(), small_convolution()
    for module, acceleration in ((network, "measured"), (plain, "off")):
        stepper = stepper_of(module, acceleration=acceleration)
        [stepper.step(pictures(step), loss_of) for step in range(2)]
        assert stepper.state_dict()["variant"] == "as written"
    assert_identical(network.state_dict(), plain.state_dict())
    assert network[0].weight.is_contiguous()


def test_forms_are_measured_with_micro_batches_that_fit(monkeypatch):
    def fastest(module, run, precision):
        run(module).backward()  # as written: what it raises is raised
        return "as written", []

    monkeypatch.setattr(accumulation, "fastest_variant", fastest)
    network, peer, batch = small_network(), small_network(), examples(12)
    stepper = stepper_of(network, acceleration="measured")
    stepper.step(batch, Memory(4, OUT_OF_MEMORY[0]))
    stepper_of(peer, accumulation=4).step(batch, loss_of)
    assert stepper.state_dict()["accumulation"] == 4
    assert_identical(network.state_dict(), peer.state_dict())


def test_the_compiled_form_trains_the_same_weights():
    networks, called = [small_network(), small_network()], set()

    def loss_function(module, batch):
        called.add(type(module).__name__)
        return loss_of(module, batch)

    for network, acceleration in zip(networks, ("off", "compiled"), strict=True):
        stepper = stepper_of(network, acceleration=acceleration, learning_rate=0.01)
        [stepper.step(examples(12, seed=step), loss_function) for step in range(5)]
    assert called == {"Sequential", "OptimizedModule"}
    assert networks[1].state_dict().keys() == networks[0].state_dict().keys()
    torch.testing.assert_close(weights_of(networks[1]), weights_of(networks[0]), rtol=1e-5, atol=1e-6)


def test_a_weight_that_the_loss_does_not_use_is_named_before_other_processes_wait_for_it(monkeypatch):
    network = small_network()
    network.add_module("idle", nn.Linear(2, 2))
    stepper = stepper_of(network)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(UserError, match=r"idle\.weight, idle\.bias"):
        stepper._accumulator._rehearse(network, examples(4), lambda module, batch: loss_of(module[:-1], batch), step=0)

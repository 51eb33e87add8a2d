"""Each part of a training step against something that does not share its code: torch's schedulers, autograd by hand, sums."""

import copy
import io
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler

from tests.driving import assert_identical
from trainbook import distributed, optim, runtime
from trainbook.errors import RunFailed, UserError
from trainbook.optim import LossStatistics, Stepper, averaged_copy, learning_rate, make_optimizer, parameter_groups, split_batch
from trainbook.optimization import OptimizationConfig


def small_network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def examples(number, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 5, dtype=dtype, generator=generator), torch.randint(3, (number,), generator=generator)


def loss_of(network, batch):
    return functional.cross_entropy(network(batch[0]), batch[1])


def times(factor):
    return lambda network, batch: loss_of(network, batch) * factor


def stepper_of(network, total_steps=100, **choices):
    return Stepper(network, OptimizationConfig(**choices), total_steps)


def weights_of(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def gradient_of(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


# Schedules


def rates(total_steps, **choices):
    config = OptimizationConfig(**choices)
    return [learning_rate(config, step, total_steps) for step in range(total_steps)]


def torch_rates(total_steps, rate, make_scheduler):
    """The rates that torch's scheduler gives to the optimizer, step by step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = make_scheduler(optimizer)
    found = []
    for _ in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step() if len(found) < total_steps else None
    return found


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7, 10, 100, 997])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step", "one_cycle"])
def test_schedules_match_those_of_torch_at_every_step(schedule, share, total_steps):
    divisor = 1 / (25 * share) if share else math.inf  # OneCycleLR divides its start by this to get its end
    peers = {
        "constant": lambda o: lr_scheduler.ConstantLR(o, 1.0),
        "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=total_steps, eta_min=0.3 * share),
        "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, share, total_iters=total_steps),
        "step": lambda o: lr_scheduler.StepLR(o, step_size=4, gamma=0.5),
        "one_cycle": lambda o: lr_scheduler.OneCycleLR(
            o, 0.3, total_steps=total_steps, final_div_factor=divisor, cycle_momentum=False
        ),
    }
    ours = rates(total_steps, schedule=schedule, learning_rate=0.3, final_learning_rate_share=share, step_size=4, step_factor=0.5)
    assert ours == pytest.approx(torch_rates(total_steps, 0.3, peers[schedule]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "step", "one_cycle"])
def test_warm_up_rises_in_equal_steps_to_the_start_of_any_schedule(schedule):
    choices = {"schedule": schedule, "learning_rate": 0.2, "step_size": 3}
    warm, plain = rates(17, warmup_steps=4, **choices), rates(13, **choices)
    assert warm[4:] == plain
    assert warm[:4] == pytest.approx([plain[0] * share for share in (0.2, 0.4, 0.6, 0.8)])


def test_hand_computed_rates():
    assert rates(4, schedule="cosine", learning_rate=1.0) == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    assert rates(6, schedule="linear", learning_rate=1.0, warmup_steps=1, final_learning_rate_share=0.5) == pytest.approx(
        [0.5, 1.0, 0.9, 0.8, 0.7, 0.6]
    )


def test_rates_stay_at_the_end_after_the_last_step_and_below_the_peak_in_an_endless_warm_up():
    for schedule in ("cosine", "linear", "one_cycle"):
        config = OptimizationConfig(schedule=schedule, learning_rate=0.5, final_learning_rate_share=0.1)
        assert learning_rate(config, 1000, 10) == pytest.approx(0.05)
    assert rates(3, warmup_steps=9, learning_rate=1.0) == pytest.approx([0.1, 0.2, 0.3])


def test_the_rate_reaches_the_optimizer():
    network = small_network()
    stepper = stepper_of(network, 10, optimizer="sgd", momentum=0.0, weight_decay=0.0, schedule="linear", learning_rate=0.4)
    for step in range(6):
        before = weights_of(network)
        report = stepper.step(examples(4), loss_of)
        assert report["learning_rate"] == pytest.approx(0.4 * (1 - step / 10))
        torch.testing.assert_close(before - weights_of(network), 0.4 * (1 - step / 10) * gradient_of(network))


# Parameter groups and optimizers


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.convolution = nn.Embedding(4, 6), nn.Conv2d(1, 2, 3)
        self.batch_norm, self.layer_norm, self.square_norm = nn.BatchNorm2d(2), nn.LayerNorm(6), nn.LayerNorm((2, 6))
        self.linear, self.tied, self.frozen = nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Linear(2, 2)
        self.tied.weight = self.embedding.weight
        self.hidden_bias, self.scale = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.ones(()))
        self.frozen.requires_grad_(False)


def test_only_matrices_outside_norms_decay_and_each_parameter_comes_once():
    module = Mixed()
    names = {id(p): name for name, p in module.named_parameters()}
    decayed, undecayed = parameter_groups(module, 0.1)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    assert [names[id(p)] for p in decayed["params"]] == ["embedding.weight", "convolution.weight", "linear.weight"]
    assert sorted(names[id(p)] for p in undecayed["params"]) == sorted(
        ["convolution.bias", "linear.bias", "hidden_bias", "scale"]
        + [f"{norm}_norm.{kind}" for norm in ("batch", "layer", "square") for kind in ("weight", "bias")]
    )


def test_a_group_without_parameters_is_left_out():
    assert [group["weight_decay"] for group in parameter_groups(nn.Linear(2, 2, bias=False), 0.3)] == [0.3]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decay_shrinks_the_weight_by_the_formula_and_spares_the_bias(optimizer):
    network = nn.Linear(3, 2)
    weight, bias = network.weight.detach().clone(), network.bias.detach().clone()
    stepper = stepper_of(network, optimizer=optimizer, learning_rate=0.1, weight_decay=0.5)
    stepper.step(torch.zeros(4, 3), lambda module, batch: (module(batch) * 0).sum())  # gradient 0: only the decay acts
    torch.testing.assert_close(network.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(network.bias, bias)


def test_steps_of_sgd_follow_the_heavy_ball_by_hand():
    network = small_network(torch.float64)
    stepper = stepper_of(network, optimizer="sgd", momentum=0.7, weight_decay=0.0, learning_rate=0.05)
    weights, velocity = weights_of(network), 0.0
    for step in range(4):
        stepper.step(examples(6, torch.float64, seed=step), loss_of)
        velocity = 0.7 * velocity + gradient_of(network)
        weights = weights - 0.05 * velocity
        torch.testing.assert_close(weights_of(network), weights, rtol=1e-12, atol=1e-12)


# Accumulation


def correct(network, batch):
    return (network(batch[0]).argmax(1) == batch[1]).double().mean()


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
        monkeypatch.setattr(optim, "split_batch", lambda batch, number: cut)
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
    sizes = [optim.batch_size(part) for part in parts]
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


# Memory that runs out

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
]


class Memory:
    """A loss function for which memory suffices up to a number of examples; remembers the sizes it was given."""

    def __init__(self, limit, error, in_backward=False):
        self.limit, self.error, self.in_backward, self.sizes = limit, error, in_backward, []

    def __call__(self, network, batch):
        self.sizes.append(len(batch[0]))
        loss = loss_of(network, batch)
        if len(batch[0]) > self.limit:
            if not self.in_backward:
                raise self.error
            loss.register_hook(self.fail)
        return loss

    def fail(self, gradient):
        raise self.error


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
@pytest.mark.parametrize(
    ("accumulation", "limit", "needed", "sizes"),
    [(1, 11, 2, [6, 6]), (1, 5, 4, [3] * 4), (1, 1, 16, [1] * 12), (3, 3, 6, [2] * 6), (2, 6, 2, [6, 6])],
)
def test_a_step_that_does_not_fit_is_taken_in_smaller_parts(
    accumulation, limit, needed, sizes, error, in_backward, monkeypatch, caplog
):
    monkeypatch.setattr(optim.logger, "propagate", True)
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
    assert (memory.sizes, stepper.accumulation) == ([12], 1)


# Clipping


@pytest.mark.parametrize(("clip_norm", "clip_value"), [(0.0, 0.0), (0.05, 0.0), (100.0, 0.0), (0.0, 0.01), (0.1, 0.01)])
def test_clipping_matches_torch_on_a_copy_and_the_norm_by_hand(clip_norm, clip_value):
    network, batch = small_network(), examples(16)
    peer = copy.deepcopy(network)
    loss_of(peer, batch).backward()
    norm = math.sqrt(sum(float(value) ** 2 for value in gradient_of(peer)))
    if clip_norm:
        nn.utils.clip_grad_norm_(peer.parameters(), clip_norm, foreach=False)
    if clip_value:
        nn.utils.clip_grad_value_(peer.parameters(), clip_value, foreach=False)
    report = stepper_of(network, clip_norm=clip_norm, clip_value=clip_value).step(batch, loss_of)
    assert float(report["gradient_norm"]) == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(gradient_of(network), gradient_of(peer), rtol=1e-6, atol=0)
    if clip_norm and not clip_value:
        assert float(gradient_of(network).norm()) == pytest.approx(min(clip_norm, norm), rel=1e-4)
    if clip_value:
        assert float(gradient_of(network).abs().max()) <= clip_value


# Average


def test_average_is_the_closed_form_sum_and_copies_batch_statistics():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    stepper = stepper_of(network, ema_decay=0.8, learning_rate=0.05)
    nn.init.ones_(network[0].weight)  # weights given to the module after the stepper was made
    history = [weights_of(network)]
    for step in range(6):
        stepper.step(examples(9, torch.float64, seed=step), loss_of)
        history.append(weights_of(network))
    expected = 0.8**6 * history[0] + sum(0.2 * 0.8 ** (6 - t) * history[t] for t in range(1, 7))
    torch.testing.assert_close(weights_of(stepper.ema), expected, rtol=1e-12, atol=1e-12)
    assert_identical(dict(stepper.ema.named_buffers()), dict(network.named_buffers()))
    assert int(stepper.ema[1].num_batches_tracked) == 6
    assert not stepper.ema.training
    assert not any(p.requires_grad for p in stepper.ema.parameters())


def test_an_average_exists_exactly_when_the_config_asks_and_a_run_without_steps_is_refused():
    network = small_network()
    assert stepper_of(network).ema is None
    assert stepper_of(network, ema_decay=0.9).ema is not None
    with pytest.raises(ValueError, match="total_steps is 0"):
        stepper_of(network, total_steps=0)


# Precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_digits_are_learned_in_every_precision(precision):
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    choices = {"precision": precision, "learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 10, "accumulation": 2}
    stepper = stepper_of(network, 200, **choices)
    seen = []

    def loss_function(module, batch):
        logits = module(batch[0])
        seen.append(logits.dtype)
        return optim.cross_entropy(logits, batch[1], stepper.config)

    for _ in range(200):
        index = torch.randint(1300, (64,))
        report = stepper.step((images[index], labels[index]), loss_function)
        assert report["loss"].dtype == torch.float32
    assert set(seen) == {getattr(torch, precision)}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    accuracy = (network(images[1300:]).argmax(1) == labels[1300:]).float().mean()
    assert accuracy >= 0.9


def three_steps(precision):
    network = small_network()
    stepper = stepper_of(network, precision=precision, ema_decay=0.5)
    reports = [stepper.step(examples(12, seed=step), loss_of) for step in range(3)]
    return reports, network.state_dict(), stepper.state_dict()


def test_mixed_precision_is_float32_on_a_cpu():
    assert_identical(three_steps("mixed"), three_steps("float32"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_mixed_precision_is_what_the_device_asks_for(precision, monkeypatch):
    asked = []
    monkeypatch.setattr(optim, "mixed_dtype", lambda device: asked.append(device) or precision)
    assert_identical(three_steps("mixed"), three_steps(precision))
    assert asked == ["cpu"]


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        ((6, 0), "float16"),
        ((7, 0), "float16"),
        ((7, 5), "float16"),
        ((8, 0), "bfloat16"),
        ((8, 9), "bfloat16"),
        ((12, 0), "bfloat16"),
    ],
)
def test_a_gpu_asks_by_its_compute_capability(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # as it says on a T4, which emulates it
    monkeypatch.setattr(torch.cuda, "get_device_capability", {"cuda:1": capability}.__getitem__)
    assert runtime.mixed_dtype("cuda:1") == precision


def test_a_half_precision_loss_is_widened_before_it_is_shared_out():
    network = nn.Linear(4, 1, bias=False)
    stepper = stepper_of(network, precision="bfloat16", accumulation=2)
    report = stepper.step(torch.ones(7, 4), lambda module, batch: module(batch).mean())
    assert report["loss"].dtype == torch.float32
    assert torch.isfinite(report["loss"])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_overflow_skips_the_step_halves_the_scale_and_training_goes_on(optimizer):
    network, batch = small_network(), examples(16)
    stepper = stepper_of(network, optimizer=optimizer, precision="float16", ema_decay=0.5, learning_rate=0.01, clip_norm=1.0)
    stepper.scaler.load_state_dict({**stepper.scaler.state_dict(), "scale": 2.0**14})
    twin = copy.deepcopy(network)
    before, average = weights_of(network), weights_of(stepper.ema)
    huge = stepper.step(batch, times(1e5))
    assert huge["loss"].isfinite()  # the loss is sound; its gradient times the scale leaves float16's range
    assert (float(huge["skipped"]), float(huge["gradient_norm"]), float(huge["loss_scale"])) == (1.0, 0.0, 2.0**14)
    assert stepper.scaler.get_scale() == 2.0**13
    assert torch.equal(weights_of(network), before)
    assert torch.equal(weights_of(stepper.ema), average)

    # From here on as if the skipped step had not been: torch's fused SGD would read uninitialised momentum.
    other = stepper_of(twin, optimizer=optimizer, precision="float16", ema_decay=0.5, learning_rate=0.01, clip_norm=1.0)
    other.scaler.load_state_dict({**other.scaler.state_dict(), "scale": 2.0**13})
    for _ in range(1, 4):
        ours, theirs = stepper.step(batch, loss_of), other.step(batch, loss_of)
        assert float(ours["skipped"]) == 0.0
        assert_identical(ours, theirs)
    assert not torch.equal(weights_of(network), before)
    assert_identical(network.state_dict(), twin.state_dict())
    assert_identical(stepper.ema.state_dict(), other.ema.state_dict())

    average = weights_of(stepper.ema)
    assert not torch.equal(average, weights_of(network))
    assert float(stepper.step(batch, times(1e8))["skipped"]) == 1.0
    assert torch.equal(weights_of(stepper.ema), average)  # it does not close in on weights that did not move


def test_the_scaled_step_is_that_of_float32_to_half_precision():
    """Clipping has to act on the gradient without its scale."""
    networks, batch = [small_network(), small_network()], examples(32)
    reports = [
        stepper_of(network, precision=precision, clip_norm=0.1, accumulation=3).step(batch, loss_of)
        for network, precision in zip(networks, ["float32", "float16"], strict=True)
    ]
    torch.testing.assert_close(reports[1]["gradient_norm"], reports[0]["gradient_norm"], rtol=5e-3, atol=0)
    torch.testing.assert_close(gradient_of(networks[1]), gradient_of(networks[0]), rtol=2e-2, atol=2e-4)
    assert float(gradient_of(networks[1]).norm()) == pytest.approx(0.1, rel=1e-3)


# Acceleration


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

    monkeypatch.setattr(optim, "fastest_variant", fastest)
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
    monkeypatch.setattr(optim, "fastest_variant", lambda *_: ("as written", []))
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

    monkeypatch.setattr(optim, "fastest_variant", fastest)
    network, peer, batch = small_network(), small_network(), examples(12)
    stepper = stepper_of(network, acceleration="measured")
    stepper.step(batch, Memory(4, OUT_OF_MEMORY[0]))
    stepper_of(peer, accumulation=4).step(batch, loss_of)
    assert stepper.accumulation == 4
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


# Spikes


def weighted(losses):
    """Mean and deviation where each loss weighs 0.98 of the next, and the first fifty alike: up to there a plain mean."""
    weights = 0.98 ** (len(losses) - np.maximum(np.arange(1.0, len(losses) + 1), 50))
    mean = np.average(losses, weights=weights)
    return float(mean), math.sqrt(np.average((losses - mean) ** 2, weights=weights))


@pytest.mark.parametrize("number", [1, 2, 49, 50, 51, 120, 400])
@pytest.mark.parametrize(
    "to_loss", [float, math.exp], ids=["as they are once one was negative", "logarithms while all are positive"]
)
def test_loss_statistics_are_the_weighted_mean_and_deviation(number, to_loss):
    losses = 2.0 + np.random.default_rng(0).gamma(2.0, size=number)
    losses[0] = losses[0] if to_loss is math.exp else -1.0
    statistics = LossStatistics()
    for loss in [*([5.0, 7.0] if to_loss is float else []), *map(to_loss, losses.tolist())]:
        statistics.add(loss)
    mean, deviation = (float(losses.mean()), float(losses.std())) if number < 50 else weighted(losses)
    assert statistics.mean == pytest.approx(mean, rel=1e-12)
    assert math.sqrt(statistics.variance) == pytest.approx(deviation, rel=1e-12, abs=1e-12)
    floor = max(deviation, 1e-3 * (1 if to_loss is math.exp else abs(mean)))
    for loss, spike in [(mean + 3.99 * floor, False), (mean + 4.01 * floor, number >= 50)]:
        assert statistics.is_spike(to_loss(loss), 4.0) is spike
    assert not statistics.is_spike(-1e9, 4.0)
    assert all(statistics.is_spike(loss, 4.0) for loss in (math.nan, math.inf, -math.inf))


def test_ordinary_noise_and_drops_are_no_spikes():
    """A falling loss with Gaussian noise, and a fall to a tenth at once; at 6 deviations one in a billion is called a spike."""
    generator, statistics = np.random.default_rng(1), LossStatistics()
    steps = np.arange(30_000)
    losses = (2 * np.exp(-steps / 3000) + 0.5 + 0.05 * generator.standard_normal(len(steps))) * np.where(steps > 20_000, 0.1, 1.0)
    for step, loss in enumerate(losses.tolist()):
        assert not statistics.is_spike(loss, 6.0), step
        statistics.add(loss)
    assert statistics.is_spike(losses[10_000], 6.0)


def infinite_gradient(network, batch):
    root = (network[0].weight - network[0].weight.detach()).sqrt().sum()  # 0, with the slope of a root at 0
    return loss_of(network, batch) + root


SPIKES = {
    "loss": (times(1000.0), {"loss", "gradient_norm"}),
    "nan": (times(math.nan), set()),
    "gradient": (infinite_gradient, {"loss"}),
}


def train(stepper, steps, spikes=()):
    """Reports of the steps; `spikes` maps a step to its loss function."""
    return [stepper.step(examples(12, seed=step), dict(spikes).get(step, loss_of)) for step in steps]


def by_hand(network, config, total_steps, path):
    """Plain torch on the steps of a path and no others: (step, factor of the rate) one by one; optimizer and average."""
    optimizer, average = make_optimizer(network, config), averaged_copy(network)
    for step, factor in path:
        for group in optimizer.param_groups:
            group["lr"] = factor * learning_rate(config, step, total_steps)
        optimizer.zero_grad()
        loss_of(network, examples(12, seed=step)).backward()
        optimizer.step()
        with torch.no_grad():
            for e, w in zip(average.parameters(), network.parameters(), strict=True):
                e.lerp_(w, 1 - config.ema_decay)
            for e, w in zip(average.buffers(), network.buffers(), strict=True):
                e.copy_(w)
    return optimizer, average


def assert_same_training(stepper, network, optimizer, average):
    assert_identical(stepper.module.state_dict(), network.state_dict())
    assert_identical(stepper.ema.state_dict(), average.state_dict())
    ours, theirs = stepper.optimizer.state_dict(), optimizer.state_dict()
    for group in (*ours["param_groups"], *theirs["param_groups"]):
        del group["lr"]  # of the last step, which may be one that was left out
    assert_identical(ours, theirs)


CHOICES = {"learning_rate": 0.01, "schedule": "cosine", "ema_decay": 0.9, "spike_deviations": 8.0}
# With spikes at steps 30, 130 and 170 of 180: the steps that the last weights stand on, and the factor of the rate in each.
ORDINARY = [step for step in range(180) if step not in (30, 130, 170)]
PATHS = {
    "skip": [(step, 1.0) for step in ORDINARY],
    "lower_rate": [(step, 0.5 ** sum(spike < step for spike in (30, 130, 170))) for step in ORDINARY],
    "roll_back": [(step, 0.5) for step in range(31, 100)] + [(step, 0.125) for step in range(171, 180)],
}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", SPIKES)
@pytest.mark.parametrize("on_spike", PATHS)
def test_after_spikes_training_is_that_of_a_run_without_them(on_spike, kind, optimizer):
    network, peer = small_network(), small_network()
    spike, finite = SPIKES[kind]
    choices = {**CHOICES, "optimizer": optimizer, "on_spike": on_spike}
    stepper = stepper_of(network, 180, **choices)
    reports = train(
        stepper, range(180), {30: times(math.nan), 130: spike, 170: spike}
    )  # too early for any but one that is not finite
    assert [step for step, report in enumerate(reports) if report["spike"]] == [30, 130, 170]
    assert reports[30].keys() == {"learning_rate", "spike"}
    assert reports[130].keys() == {"learning_rate", "spike"} | finite
    assert reports[129].keys() == {"learning_rate", "spike", "loss", "gradient_norm"}
    assert all(math.isfinite(value) for report in reports for value in report.values())
    factors = [1.0] * 180 if on_spike == "skip" else [1.0] * 31 + [0.5] * 100 + [0.25] * 40 + [0.125] * 9
    config = OptimizationConfig(**choices)
    expected = [factor * learning_rate(config, step, 180) for step, factor in enumerate(factors)]
    assert [report["learning_rate"] for report in reports] == pytest.approx(expected, rel=1e-12)
    assert_same_training(stepper, peer, *by_hand(peer, config, 180, PATHS[on_spike]))


@pytest.mark.parametrize("on_spike", PATHS)
def test_a_spike_leaves_batch_statistics_alone(on_spike):
    """One NaN in an image would stay in the running statistics for ever, and no checkpoint could be written."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def in_input(network, batch):
        return loss_of(network, (batch[0].clone().index_fill_(0, torch.tensor([3]), math.nan), batch[1]))

    network, peer = build(), build()
    stepper = stepper_of(network, 180, **CHOICES, on_spike=on_spike)
    reports = train(stepper, range(180), {30: in_input, 130: times(1000.0), 170: times(1000.0)})
    assert [step for step, report in enumerate(reports) if report["spike"]] == [30, 130, 170]
    assert_same_training(stepper, peer, *by_hand(peer, stepper.config, 180, PATHS[on_spike]))


@pytest.mark.parametrize("on_spike", PATHS)
@pytest.mark.parametrize("cut", [0, 10, 31, 100, 120, 131, 171])
def test_a_run_restored_between_spikes_continues_bit_for_bit(on_spike, cut):
    spikes = {30: times(math.nan), 130: times(1000.0), 170: times(1000.0)}
    stepper, first, second = (stepper_of(small_network(seed=seed), 180, **CHOICES, on_spike=on_spike) for seed in (0, 0, 7))
    whole = train(stepper, range(180), spikes)
    train(first, range(cut), spikes)
    hand_over(first, second)
    assert_identical(train(second, range(cut, 180), spikes), whole[cut:])
    assert_identical(second.state_dict(), stepper.state_dict())
    assert_identical(second.module.state_dict(), stepper.module.state_dict())


def test_a_return_to_steeper_weights_is_no_new_spike():
    """L = w^2 from w = 10, halved per step: back at step 0 the loss is far above its mean of late, and rightly so."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 10.0)
    choices = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 0.25}
    stepper = stepper_of(module, **choices, spike_deviations=6.0, on_spike="roll_back")
    spikes = []
    for step in range(100):
        factor = math.nan if step == 80 else 1.0
        report = stepper.step(torch.ones(4, 1), lambda module, batch, factor=factor: module(batch).square().mean() * factor)
        spikes.append(report["spike"])
    assert [step for step, spike in enumerate(spikes) if spike] == [80]
    assert module.weight.detach().item() == pytest.approx(10 * 0.75**19)  # from step 81 on with half the rate


@pytest.mark.parametrize("on_spike", PATHS)
def test_twenty_spikes_in_a_row_end_the_run_and_nineteen_do_not(on_spike):
    network = small_network()
    stepper = stepper_of(network, **CHOICES, on_spike=on_spike)
    train(stepper, range(5))
    spikes = {step: times(math.nan) for step in range(100) if step != 24}
    assert sum(report["spike"] for report in train(stepper, range(5, 24), spikes)) == 19
    assert train(stepper, [24])[0]["spike"] == 0.0
    train(stepper, range(25, 35), spikes)
    second = stepper_of(small_network(seed=7), **CHOICES, on_spike=on_spike)
    hand_over(stepper, second)
    for each in (stepper, second):
        train(each, range(35, 44), spikes)
        before = weights_of(each.module)
        with pytest.raises(RunFailed, match="20 steps in a row"):
            train(each, [44], spikes)
        assert torch.equal(weights_of(each.module), before)
        assert weights_of(each.module).isfinite().all()


def test_the_rule_changes_nothing_in_an_ordinary_run():
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images, results = images.float() / 16, []
    for deviations in (0.0, 6.0):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
        stepper = stepper_of(network, 600, learning_rate=0.01, ema_decay=0.99, spike_deviations=deviations, on_spike="roll_back")
        reports = []
        for _ in range(600):
            index = torch.randint(1797, (32,))
            reports.append(stepper.step((images[index], labels[index]), loss_of))
        assert ("spike" in reports[0]) == (deviations > 0)
        assert not any(report.pop("spike", 0.0) for report in reports)
        results.append([reports, network.state_dict(), stepper.ema.state_dict(), stepper.optimizer.state_dict()])
    assert_identical(*results)


def test_a_loss_that_drops_or_that_nobody_watches_is_no_spike():
    for deviations, function in ((8.0, times(1e-3)), (0.0, times(1000.0)), (0.0, times(math.nan))):
        stepper = stepper_of(small_network(), **{**CHOICES, "spike_deviations": deviations})
        train(stepper, range(60))
        before = weights_of(stepper.module)
        (report,) = train(stepper, [60], {60: function})
        assert report.get("spike", 0.0) == 0.0
        assert report.keys() >= {"loss", "gradient_norm"}
        assert not torch.equal(weights_of(stepper.module), before)


def test_further_means_of_a_spike_are_reported_when_finite():
    stepper = stepper_of(small_network(), **CHOICES)
    means = {"finite": torch.tensor(2.0), "infinite": torch.tensor(math.inf)}
    report = stepper.step(examples(4), lambda network, batch: (loss_of(network, batch) * math.nan, means))
    assert report.keys() == {"learning_rate", "spike", "finite"}
    assert float(report["finite"]) == 2.0


def by_hand_with_scale(network, config, total_steps, steps):
    optimizer, scaler = make_optimizer(network, config), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, total_steps)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(network, examples(12, seed=step))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def test_a_spike_in_float16_leaves_the_scale_and_an_overflow_is_the_scalers():
    network, peer = small_network(), small_network()
    stepper = stepper_of(network, 80, **CHOICES, precision="float16")
    stepper.scaler.load_state_dict({**stepper.scaler.state_dict(), "scale": 2.0**8})
    spikes = {60: times(50.0), 62: infinite_gradient, 65: times(math.nan)}
    reports = train(stepper, range(80), spikes)
    assert [step for step, report in enumerate(reports) if report["spike"]] == [60, 65]
    assert [step for step, report in enumerate(reports) if report.get("skipped")] == [62]
    assert all(math.isfinite(value) for report in reports for value in report.values())
    assert {"loss", "gradient_norm"} <= reports[60].keys()
    assert {float(report["loss_scale"]) for report in reports[:60] + reports[61:63]} == {2.0**8}  # a finite spike keeps it
    assert float(reports[63]["loss_scale"]) == 2.0**7
    by_hand_with_scale(peer, stepper.config, 80, [step for step in range(80) if step not in (60, 62, 65)])
    torch.testing.assert_close(weights_of(network), weights_of(peer), rtol=0, atol=1e-3)  # scales differ by a power of two
    assert weights_of(network).isfinite().all()


def test_overflows_of_the_scale_are_no_spikes_in_a_row():
    stepper = stepper_of(small_network(), **CHOICES, precision="float16")
    spikes = dict.fromkeys(range(30), infinite_gradient)
    assert not any(report["spike"] for report in train(stepper, range(30), spikes))
    assert stepper.scaler.get_scale() == 2.0 ** (16 - 30)


@pytest.mark.parametrize("kind", ["slices", "pipeline"])
def test_what_needs_the_whole_weights_is_refused_where_they_are_divided(kind, monkeypatch):
    monkeypatch.setattr(optim.distributed, "parallel", lambda: kind)
    for choices in ({"spike_deviations": 5.0, "on_spike": "roll_back"}, {"acceleration": "compiled"}):
        with pytest.raises(UserError, match=f"{list(choices.values())[-1]}.*\n.*--parallel {kind}"):
            stepper_of(small_network(), **choices)


# Checkpoints


def hand_over(one, other):
    """What a checkpoint carries from one stepper to another."""
    file = io.BytesIO()
    torch.save([one.module.state_dict(), one.state_dict()], file)
    file.seek(0)
    for part, saved in zip((other.module, other), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_restored_run_continues_bit_for_bit(optimizer, precision, cut):
    choices = {
        "optimizer": optimizer, "precision": precision, "ema_decay": 0.9, "schedule": "one_cycle", "warmup_steps": 2,
        "clip_norm": 0.5, "learning_rate": 0.05, "accumulation": 2,
    }  # fmt: skip

    def build(seed):
        network = small_network(seed=seed)
        return network, stepper_of(network, 8, **choices)

    def train(stepper, steps):
        for step in steps:  # step 2 overflows in float16, so that the scale at a cut is not the first one
            yield stepper.step(examples(12, seed=step), times(1e8) if step == 2 and precision == "float16" else loss_of)

    network, stepper = build(seed=0)
    whole = list(train(stepper, range(8)))

    _, first_stepper = build(seed=0)
    list(train(first_stepper, range(cut)))
    second, second_stepper = build(seed=7)
    hand_over(first_stepper, second_stepper)
    assert_identical(list(train(second_stepper, range(cut, 8))), whole[cut:])
    assert_identical(second.state_dict(), network.state_dict())
    assert_identical(second_stepper.state_dict(), stepper.state_dict())
    if precision == "float16":
        assert [float(report["skipped"]) for report in whole] == [0, 0, 1, 0, 0, 0, 0, 0]
        assert stepper.scaler.get_scale() == 2.0**15


# Smoothing, recomputation, finite differences


def test_smoothed_cross_entropy_is_the_formula():
    logits, labels = torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    targets = 0.7 * torch.eye(4, dtype=torch.float64)[labels] + 0.3 / 4
    expected = -(targets * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
    found = optim.cross_entropy(logits, labels, OptimizationConfig(label_smoothing=0.3))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert optim.cross_entropy(logits.bfloat16(), labels, OptimizationConfig()).dtype == torch.float32


def test_checkpointed_blocks_have_equal_gradients_and_keep_less():
    torch.manual_seed(0)
    blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 16), nn.Tanh()) for _ in range(4)
    )
    inputs, gradients, kept = torch.randn(32, 16), [], []
    for enabled in (False, True):
        sizes = {}
        blocks.zero_grad()
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.update({x.data_ptr(): x.nbytes}) or x, lambda x: x
        ):
            outputs = optim.checkpointed(blocks, inputs, enabled)
        outputs.square().mean().backward()
        gradients.append(gradient_of(blocks).clone())
        weights = {p.data_ptr() for p in blocks.parameters()}
        kept.append(sum(size for pointer, size in sizes.items() if pointer not in weights))
    assert torch.equal(gradients[0], gradients[1])
    assert kept[1] < kept[0] / 3


class Cube(torch.autograd.Function):
    """x^3, with a backward that is right only for a factor of 3."""

    @staticmethod
    def forward(context, x, factor):
        context.save_for_backward(x)
        context.factor = factor
        return x**3

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return context.factor * x**2 * gradient, None


def test_finite_differences_accept_a_right_gradient_and_name_a_wrong_one():
    inputs = {"left": torch.tensor([0.5, -1.5]), "index": torch.tensor([1, 0]), "right": torch.tensor([1.0, 2.0])}
    optim.check_gradients(lambda left, index, right: Cube.apply(left, 3)[index] * right.sin(), inputs)
    with pytest.raises(ValueError, match="'right'"):
        optim.check_gradients(lambda left, index, right: left[index] * Cube.apply(right, 3.03), inputs)
    with pytest.raises(ValueError, match="'left'"):
        optim.check_gradients(lambda left, index, right: left.detach() + right, inputs)


# The config


def test_the_config_needs_no_torch_and_explains_every_field():
    code = "import sys, trainbook.optimization\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert all(row[4] for row in OptimizationConfig().rows())


@pytest.mark.parametrize(
    "choice", [{"momentum": 1.0}, {"accumulation": 0}, {"ema_decay": 1.0}, {"clip_norm": -1}, {"learning_rate": 0}]
)
def test_values_out_of_range_are_refused(choice):
    with pytest.raises(ValueError, match=next(iter(choice))):
        OptimizationConfig(**choice)


def test_patience_without_validation_is_refused():
    with pytest.raises(ValueError, match="set validate_every"):
        OptimizationConfig(patience=3)
    assert OptimizationConfig(patience=3, validate_every=10).patience == 3


def test_a_weight_that_the_loss_does_not_use_is_named_before_other_processes_wait_for_it(monkeypatch):
    network = small_network()
    network.add_module("idle", nn.Linear(2, 2))
    stepper = stepper_of(network)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(UserError, match=r"idle\.weight, idle\.bias"):
        stepper._rehearse(network, examples(4), lambda module, batch: loss_of(module[:-1], batch))


def test_shared_weights_cannot_be_cut_into_slices():
    tied = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(UserError, match="share a weight"):
        distributed.shard(tied)

"""Each part of a training step against something that does not share its code: torch's schedulers, autograd by hand, sums."""

import copy
import io
import math
import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler

from tests.driving import assert_identical
from trainbook import optim
from trainbook.optim import Stepper, averaged_copy, learning_rate, make_optimizer, parameter_groups, split_batch
from trainbook.optimization import OptimizationConfig


def small_network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def examples(number, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 5, dtype=dtype, generator=generator), torch.randint(3, (number,), generator=generator)


def loss_of(network):
    return lambda batch: functional.cross_entropy(network(batch[0]), batch[1])


def stepper_of(network, total_steps=100, **choices):
    config = OptimizationConfig(**choices)
    ema = averaged_copy(network) if config.ema_decay else None
    return Stepper(network, make_optimizer(network, config), config, total_steps, ema)


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
    before = weights_of(network)
    report = stepper.step(5, [examples(4)], loss_of(network))
    assert report["learning_rate"] == pytest.approx(0.2)
    torch.testing.assert_close(before - weights_of(network), 0.2 * gradient_of(network))


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
    stepper.step(0, [torch.zeros(4, 3)], lambda batch: (network(batch) * 0).sum())  # gradient 0: only the decay acts
    torch.testing.assert_close(network.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(network.bias, bias)


def test_steps_of_sgd_follow_the_heavy_ball_by_hand():
    network = small_network(torch.float64)
    stepper = stepper_of(network, optimizer="sgd", momentum=0.7, weight_decay=0.0, learning_rate=0.05)
    weights, velocity = weights_of(network), 0.0
    for step in range(4):
        stepper.step(step, [examples(6, torch.float64, seed=step)], loss_of(network))
        velocity = 0.7 * velocity + gradient_of(network)
        weights = weights - 0.05 * velocity
        torch.testing.assert_close(weights_of(network), weights, rtol=1e-12, atol=1e-12)


# Accumulation


@pytest.mark.parametrize("sizes", [[24], [12, 12], [6] * 4, [1, 5, 18], [23, 1]])
@pytest.mark.parametrize("lazy", [False, True])
def test_accumulated_gradient_equals_that_of_the_large_batch(sizes, lazy):
    network, (inputs, labels) = small_network(torch.float64), examples(24, torch.float64)
    whole = functional.cross_entropy(network(inputs), labels)
    whole.backward()
    expected = gradient_of(network).clone()
    micro_batches = list(zip(inputs.split(sizes), labels.split(sizes), strict=True))
    stepper = stepper_of(network)
    report = stepper.step(0, iter(micro_batches), loss_of(network), sizes if lazy else None)
    torch.testing.assert_close(gradient_of(network), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(report["loss"], whole.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(report["gradient_norm"], expected.norm(), rtol=0, atol=1e-12)


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


def test_a_batch_in_place_of_micro_batches_and_an_empty_step_are_refused():
    network = small_network()
    stepper = stepper_of(network)
    with pytest.raises(TypeError, match=r"pass \[batch\]"):
        stepper.step(0, examples(4)[0], loss_of(network))
    with pytest.raises(ValueError, match="at least one example"):
        stepper.step(0, [], loss_of(network))
    with pytest.raises(ValueError, match="zip"):
        stepper.step(0, [examples(4), examples(4)], loss_of(network), sizes=[4])


# Clipping


@pytest.mark.parametrize(("clip_norm", "clip_value"), [(0.0, 0.0), (0.05, 0.0), (100.0, 0.0), (0.0, 0.01), (0.1, 0.01)])
def test_clipping_matches_torch_on_a_copy_and_the_norm_by_hand(clip_norm, clip_value):
    network, batch = small_network(), examples(16)
    peer = copy.deepcopy(network)
    loss_of(peer)(batch).backward()
    norm = math.sqrt(sum(float(value) ** 2 for value in gradient_of(peer)))
    if clip_norm:
        nn.utils.clip_grad_norm_(peer.parameters(), clip_norm, foreach=False)
    if clip_value:
        nn.utils.clip_grad_value_(peer.parameters(), clip_value, foreach=False)
    report = stepper_of(network, clip_norm=clip_norm, clip_value=clip_value).step(0, [batch], loss_of(network))
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
    history = [weights_of(network)]
    for step in range(6):
        stepper.step(step, [examples(9, torch.float64, seed=step)], loss_of(network))
        history.append(weights_of(network))
    expected = 0.8**6 * history[0] + sum(0.2 * 0.8 ** (6 - t) * history[t] for t in range(1, 7))
    torch.testing.assert_close(weights_of(stepper.ema), expected, rtol=1e-12, atol=1e-12)
    assert_identical(dict(stepper.ema.named_buffers()), dict(network.named_buffers()))
    assert int(stepper.ema[1].num_batches_tracked) == 6
    assert not stepper.ema.training
    assert not any(p.requires_grad for p in stepper.ema.parameters())


def test_a_stepper_that_contradicts_its_config_is_refused():
    network = small_network()
    for config, ema, steps in [({"ema_decay": 0.9}, None, 5), ({}, averaged_copy(network), 5), ({}, None, 0)]:
        config = OptimizationConfig(**config)
        with pytest.raises(ValueError, match=r"ema_decay|total_steps"):
            Stepper(network, make_optimizer(network, config), config, steps, ema)


# Precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_digits_are_learned_in_every_precision(precision):
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    stepper = stepper_of(network, 200, precision=precision, learning_rate=1e-2, schedule="cosine", warmup_steps=10)
    seen = []

    def loss_function(batch):
        logits = network(batch[0])
        seen.append(logits.dtype)
        return optim.cross_entropy(logits, batch[1], stepper.config)

    for step in range(200):
        index = torch.randint(1300, (64,))
        report = stepper.step(step, split_batch((images[index], labels[index]), 2), loss_function)
        assert report["loss"].dtype == torch.float32
    assert set(seen) == {getattr(torch, precision)}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    accuracy = (network(images[1300:]).argmax(1) == labels[1300:]).float().mean()
    assert accuracy >= 0.9


def test_a_half_precision_loss_is_widened_before_it_is_shared_out():
    network = nn.Linear(4, 1, bias=False)
    stepper = stepper_of(network, precision="bfloat16")
    report = stepper.step(0, [torch.ones(3, 4), torch.ones(4, 4)], lambda batch: network(batch).mean())
    assert report["loss"].dtype == torch.float32
    assert torch.isfinite(report["loss"])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_overflow_skips_the_step_halves_the_scale_and_training_goes_on(optimizer):
    network, batch = small_network(), examples(16)
    stepper = stepper_of(network, optimizer=optimizer, precision="float16", ema_decay=0.5, learning_rate=0.01, clip_norm=1.0)
    stepper.scaler.load_state_dict({**stepper.scaler.state_dict(), "scale": 2.0**14})
    twin = copy.deepcopy(network)
    before, average = weights_of(network), weights_of(stepper.ema)
    huge = stepper.step(0, [batch], lambda batch: loss_of(network)(batch) * 1e5)
    assert huge["loss"].isfinite()  # the loss is sound; its gradient times the scale leaves float16's range
    assert (float(huge["skipped"]), float(huge["gradient_norm"]), float(huge["loss_scale"])) == (1.0, 0.0, 2.0**14)
    assert stepper.scaler.get_scale() == 2.0**13
    assert torch.equal(weights_of(network), before)
    assert torch.equal(weights_of(stepper.ema), average)

    # From here on as if the skipped step had not been: torch's fused SGD would read uninitialised momentum.
    other = stepper_of(twin, optimizer=optimizer, precision="float16", ema_decay=0.5, learning_rate=0.01, clip_norm=1.0)
    other.scaler.load_state_dict({**other.scaler.state_dict(), "scale": 2.0**13})
    for step in range(1, 4):
        ours, theirs = stepper.step(step, [batch], loss_of(network)), other.step(step, [batch], loss_of(twin))
        assert float(ours["skipped"]) == 0.0
        assert_identical(ours, theirs)
    assert not torch.equal(weights_of(network), before)
    assert_identical(network.state_dict(), twin.state_dict())
    assert_identical(stepper.ema.state_dict(), other.ema.state_dict())

    average = weights_of(stepper.ema)
    assert not torch.equal(average, weights_of(network))
    assert float(stepper.step(4, [batch], lambda batch: loss_of(network)(batch) * 1e8)["skipped"]) == 1.0
    assert torch.equal(weights_of(stepper.ema), average)  # it does not close in on weights that did not move


def test_the_scaled_step_is_that_of_float32_to_half_precision():
    """Clipping has to act on the gradient without its scale."""
    networks, batch = [small_network(), small_network()], examples(32)
    reports = [
        stepper_of(network, precision=precision, clip_norm=0.1).step(0, split_batch(batch, 3), loss_of(network))
        for network, precision in zip(networks, ["float32", "float16"], strict=True)
    ]
    torch.testing.assert_close(reports[1]["gradient_norm"], reports[0]["gradient_norm"], rtol=5e-3, atol=0)
    torch.testing.assert_close(gradient_of(networks[1]), gradient_of(networks[0]), rtol=2e-2, atol=2e-4)
    assert float(gradient_of(networks[1]).norm()) == pytest.approx(0.1, rel=1e-3)


# Checkpoints


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_restored_run_continues_bit_for_bit(optimizer, precision, cut):
    choices = {
        "optimizer": optimizer, "precision": precision, "ema_decay": 0.9, "schedule": "one_cycle", "warmup_steps": 2,
        "clip_norm": 0.5, "learning_rate": 0.05,
    }  # fmt: skip

    def build(seed):
        network = small_network(seed=seed)
        return network, stepper_of(network, 8, **choices)

    def train(network, stepper, steps):
        for step in steps:  # step 2 overflows in float16, so that the scale at a cut is not the first one
            factor = 1e8 if step == 2 and precision == "float16" else 1.0
            batch = split_batch(examples(12, seed=step), 2)
            yield stepper.step(step, batch, lambda batch, factor=factor: loss_of(network)(batch) * factor)

    network, stepper = build(seed=0)
    whole = list(train(network, stepper, range(8)))

    first, first_stepper = build(seed=0)
    list(train(first, first_stepper, range(cut)))
    file = io.BytesIO()
    torch.save([first.state_dict(), first_stepper.optimizer.state_dict(), first_stepper.state_dict()], file)
    file.seek(0)
    second, second_stepper = build(seed=7)
    parts = (second, second_stepper.optimizer, second_stepper)
    for part, saved in zip(parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    assert_identical(list(train(second, second_stepper, range(cut, 8))), whole[cut:])
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

"""A training step's clipping, precision and checkpoints against torch on a copy and against itself uncut."""

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from tests.driving import assert_identical
from tests.small_network import (
    examples,
    gradient_of,
    hand_over,
    loss_of,
    small_network,
    stepper_of,
    times,
    weights_of,
)
from trainbook import accumulation, distributed, runtime
from trainbook.errors import UserError
from trainbook.losses import cross_entropy


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
        return cross_entropy(logits, batch[1], stepper.config)

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
    monkeypatch.setattr(accumulation, "mixed_dtype", lambda device: asked.append(device) or precision)
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


@pytest.mark.parametrize("kind", ["slices", "pipeline"])
def test_what_needs_the_whole_weights_is_refused_where_they_are_divided(kind, monkeypatch):
    monkeypatch.setattr(distributed, "parallel", lambda: kind)
    for choices in ({"spike_deviations": 5.0, "on_spike": "roll_back"}, {"acceleration": "compiled"}):
        with pytest.raises(UserError, match=f"{list(choices.values())[-1]}.*\n.*--parallel {kind}"):
            stepper_of(small_network(), **choices)

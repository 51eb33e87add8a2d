"""Loss spikes: the statistics against numpy, and training with spikes against plain torch on the steps that remain."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from tests.driving import assert_identical
from tests.small_network import examples, hand_over, loss_of, small_network, stepper_of, times, weights_of
from trainbook.averaging import averaged_copy
from trainbook.errors import RunFailed
from trainbook.optimization import OptimizationConfig
from trainbook.optimizer import make_optimizer
from trainbook.schedule import learning_rate
from trainbook.spikes import LossStatistics


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

"""Laws of the temperature: bounds, direction, resume, and the hypergradient against brute force."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from trainbook.workflows.distillation.losses import kd_loss
from trainbook.workflows.distillation.temperature import LAWS, hypergradient, make_law

LOW, HIGH, START = 1.0, 10.0, 4.0


def law_of(name):
    return make_law(name, START, LOW, HIGH, total_steps=100, steps_per_epoch=10)


@pytest.mark.parametrize("name", LAWS)
def test_temperature_stays_within_its_bounds(name):
    for signal in (0.0, 1e6, -1e6):
        law = law_of(name)
        for step in range(300):
            law.update(step, signal)
            assert LOW <= law.at(step) <= HIGH


@pytest.mark.parametrize("name", LAWS)
def test_a_law_goes_on_from_its_state(name):
    signals = torch.randn(60, generator=torch.Generator().manual_seed(0)).tolist()
    whole, first, second = law_of(name), law_of(name), law_of(name)
    for step, signal in enumerate(signals):
        whole.update(step, signal)
        (first if step < 30 else second).update(step, signal)
        if step == 29:
            second.load_state_dict(first.state_dict())
    assert second.at(60) == whole.at(60)
    assert second.state_dict() == whole.state_dict()


def test_constant_and_cosine():
    assert [law_of("constant").at(step) for step in (0, 50, 99)] == [START] * 3
    cosine = law_of("cosine")
    assert [cosine.at(step) for step in (0, 50, 100)] == pytest.approx([HIGH, (LOW + HIGH) / 2, LOW])


def test_plateau_skips_the_first_epoch_and_follows_the_gain():
    law = law_of("plateau")
    law.update(0, 90.0)
    assert law.at(1) == START
    law.update(1, 90.05)  # a gain of 0.05 points
    assert law.at(2) == pytest.approx(START * 1.1)
    law.update(2, 90.35)  # 0.3: neither slow nor fast
    assert law.at(3) == pytest.approx(START * 1.1)
    law.update(3, 92.0)
    assert law.at(4) == pytest.approx(START)
    law.update(4, 91.0)  # it got worse
    assert law.at(5) == pytest.approx(START * 1.1)


class Reverse(torch.autograd.Function):
    """The gradient reversal layer as its paper has it: identity forward, -strength times the gradient backward."""

    @staticmethod
    def forward(ctx, value, strength):
        ctx.strength = strength
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.strength * gradient, None


def test_adversarial_is_gradient_descent_behind_a_reversal_layer():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    law = law_of("adversarial")
    coordinate = torch.tensor(math.log((START - LOW) / (HIGH - START)), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([coordinate], lr=0.1)
    for step in range(150):
        strength = (1 - math.cos(math.pi * min(step / 10, 10) / 10)) / 2
        optimizer.zero_grad()
        kd_loss(student, teacher, LOW + (HIGH - LOW) * Reverse.apply(coordinate, strength).sigmoid()).backward()
        optimizer.step()
        leaf = torch.tensor(law.at(step), dtype=torch.float64, requires_grad=True)
        kd_loss(student, teacher, leaf).backward()
        law.update(step, float(leaf.grad))
    assert law.coordinate == pytest.approx(coordinate.item(), rel=1e-9)
    assert law.at(150) != pytest.approx(START, abs=1e-3)


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh(), nn.Linear(8, 4)).double()


def task(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs, valid, weight = draw(32, 6), draw(64, 6), 2 * draw(6, 4)
    labels = (inputs @ weight + 2 * draw(32, 4)).argmax(1)  # noisy, so that soft targets help
    teacher, valid_labels = scale * inputs @ weight, (valid @ weight).argmax(1)

    def training_loss(model, temperature):
        logits = model(inputs)
        return 0.5 * functional.cross_entropy(logits, labels) + 0.5 * kd_loss(logits, teacher, temperature)

    def validation_loss(model):
        return functional.cross_entropy(model(valid), valid_labels)

    return training_loss, validation_loss


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch_norm"])
@pytest.mark.parametrize("temperature", [1.5, 4.0])
def test_hypergradient_matches_brute_force(norm, temperature):
    training_loss, validation_loss = task()
    rate, step = 0.1, 1e-4

    def loss_after_one_step(value):
        student = network(norm)
        training_loss(student, torch.tensor(value, dtype=torch.float64)).backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= rate * parameter.grad
        return validation_loss(student).item()

    brute = (loss_after_one_step(temperature + step) - loss_after_one_step(temperature - step)) / (2 * step)
    student = network(norm)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    found = hypergradient(student, training_loss, validation_loss, temperature, rate)
    assert found == pytest.approx(brute, rel=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_hyper_moves_to_where_a_constant_temperature_would_do_better(scale):
    """For a teacher whose logits are ten times too small or too large."""
    training_loss, validation_loss = task(scale)

    def train(law, learns):
        student = network(norm=False)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for step in range(100):
            if learns:
                law.update(step, hypergradient(student, training_loss, validation_loss, law.at(step), 0.1))
            optimizer.zero_grad()
            training_loss(student, law.at(step)).backward()
            optimizer.step()
        return validation_loss(student).item()

    law = law_of("hyper")
    learned = train(law, learns=True)
    start = train(make_law("constant", START, LOW, HIGH, 100, 10), learns=False)
    reached = train(make_law("constant", law.at(100), LOW, HIGH, 100, 10), learns=False)
    assert abs(law.at(100) - START) > 1
    assert reached < start
    assert learned < start


@pytest.mark.parametrize(("start", "low", "high"), [(4.0, 5.0, 2.0), (4.0, 0.0, 9.0), (1.0, 2.0, 6.0)])
def test_impossible_bounds_are_refused(start, low, high):
    with pytest.raises(ValueError, match="temperature"):
        make_law("hyper", start, low, high, 10, 1)

"""Weights of several teachers: their identities, and specialists of digits that only a gate can put together."""

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

from trainbook.workflows.distillation.gate import (
    choose_gate,
    confidence_weights,
    cross_entropies,
    entropy_weights,
    fit_gate,
    mixture_logits,
    mixture_nll,
    uniform_weights,
)
from trainbook.workflows.distillation.losses import kd_loss

M, B, C = 3, 50, 4


def random_teachers(seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(M, B, C, generator=generator), torch.randint(C, (B,), generator=generator)


def network(seed, inputs, labels, steps=150):
    """A small classifier of digits, trained on what it is given."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels), train_size=900, random_state=0)
    train, rest, train_labels, rest_labels = parts
    held, test, held_labels, test_labels = train_test_split(rest, rest_labels, train_size=179, random_state=0)
    return {"train": (train, train_labels), "held": (held, held_labels), "test": (test, test_labels)}


@pytest.fixture(scope="module")
def specialists(digits):
    """Logits of teachers that know 0 to 4, 5 to 9 and 3 to 6, on held-out and test images."""
    images, labels = digits["train"]
    models = []
    for first, last in ((0, 4), (5, 9), (3, 6)):
        known = (labels >= first) & (labels <= last)
        models.append(network(first, images[known], labels[known]))
    return {split: torch.stack([model(digits[split][0]) for model in models]) for split in ("held", "test")}


def accuracy(logits, weights, labels):
    return float((mixture_logits(logits, weights, 1.0).argmax(1) == labels).double().mean())


def test_weights_sum_to_one():
    logits, labels = random_teachers()
    for weights in (
        uniform_weights(logits),
        entropy_weights(logits),
        confidence_weights(logits, labels),
        fit_gate(logits, labels, 0)(logits),
    ):
        assert weights.shape == (B, M)
        torch.testing.assert_close(weights.sum(1), torch.ones(B))
        assert bool((weights >= 0).all())


def test_permuting_teachers_permutes_weights():
    logits, labels = random_teachers()
    order = torch.tensor([2, 0, 1])
    for rule in (uniform_weights, entropy_weights, lambda t: confidence_weights(t, labels)):
        torch.testing.assert_close(rule(logits[order]), rule(logits)[:, order])
    gate, other = fit_gate(logits, labels, 0), fit_gate(logits[order], labels, 0)
    expected = gate(logits)[:, order]
    # The fit itself amplifies the rounding of sums in another order; what it starts from and what it finds are the same.
    torch.testing.assert_close(other.known_for, gate.known_for[order])
    torch.testing.assert_close(
        mixture_nll(logits[order], other(logits[order]), labels).mean(),
        mixture_nll(logits, gate(logits), labels).mean(),
        rtol=0.02,
        atol=0,
    )
    gate.known_for.copy_(gate.known_for[order])
    torch.testing.assert_close(gate(logits[order]), expected)


def test_one_teacher_is_itself_exactly():
    logits, labels = random_teachers()
    logits, student = logits[:1], random_teachers(5)[0][0]
    for weights in (uniform_weights(logits), entropy_weights(logits), confidence_weights(logits, labels)):
        assert torch.equal(weights, torch.ones(B, 1))
    choice = choose_gate(logits, labels, 0)
    assert torch.equal(choice.weights(logits), torch.ones(B, 1))
    mixed = mixture_logits(logits, choice.weights(logits), 4.0)
    assert torch.equal(kd_loss(student, mixed, 4.0), kd_loss(student, logits[0], 4.0))


def test_mixture_is_the_weighted_mean_of_probabilities():
    logits, labels = random_teachers()
    weights = torch.rand(B, M, generator=torch.Generator().manual_seed(1)).softmax(1)
    expected = sum(weights[:, m, None] * (logits[m] / 3.0).softmax(1) for m in range(M))
    torch.testing.assert_close((mixture_logits(logits, weights, 3.0) / 3.0).softmax(1), expected)
    at_one = sum(weights[:, m, None] * logits[m].softmax(1) for m in range(M))
    torch.testing.assert_close(mixture_nll(logits, weights, labels), -at_one[torch.arange(B), labels].log())


def test_a_weight_of_zero_leaves_the_teacher_out():
    logits, labels = random_teachers()
    weights = functional.one_hot(torch.ones(B, dtype=torch.int64), M).float()
    torch.testing.assert_close(mixture_logits(logits, weights, 2.0).softmax(1), logits[1].softmax(1))
    torch.testing.assert_close(mixture_nll(logits, weights, labels), cross_entropies(logits, labels)[:, 1])


def test_confidence_weights_match_their_formula():
    logits, labels = random_teachers()
    for b in range(B):
        errors = torch.stack([functional.cross_entropy(logits[m, b][None], labels[b][None]) for m in range(M)])
        torch.testing.assert_close(confidence_weights(logits, labels)[b], (1 - errors.exp() / errors.exp().sum()) / (M - 1))


def test_gate_puts_specialists_together(digits, specialists):
    choice = choose_gate(specialists["held"], digits["held"][1], 0)
    assert choice.rule == "learned", choice.why
    logits, labels = specialists["test"], digits["test"][1]
    learned, uniform = (accuracy(logits, rule(logits), labels) for rule in (choice.weights, uniform_weights))
    assert learned >= uniform + 0.10
    assert learned > 0.9


@pytest.mark.parametrize("scale", [1.0, 10.0], ids=["unsure", "sure"])
def test_a_random_teacher_is_left_out(digits, scale):
    images, labels = digits["train"]
    models = [network(seed, images[part], labels[part]) for seed, part in ((0, slice(0, 400)), (1, slice(400, 800)))]
    generator = torch.Generator().manual_seed(0)

    def logits_of(split):
        images = digits[split][0]
        return torch.stack([*(model(images) for model in models), scale * torch.randn(len(images), 10, generator=generator)])

    choice = choose_gate(logits_of("held"), digits["held"][1], 0)
    weights = choice.gate(logits_of("test")).mean(0)
    assert weights[2] < 0.02
    assert choice.rule != "uniform"


def test_a_gate_that_gains_nothing_is_not_used(caplog):
    """One teacher three times: no weights can be better than any others."""
    logits, labels = random_teachers()
    with caplog.at_level("INFO", logger="trainbook"):
        choice = choose_gate(logits[:1].expand(M, -1, -1), labels, 0)
    assert choice.rule != "learned"
    assert "instead" in caplog.text
    assert not any(gain > error for gain, error in choice.gains.values())


def test_fitting_leaves_the_global_generator_alone():
    logits, labels = random_teachers()
    before = torch.get_rng_state()
    fit_gate(logits, labels, 3)
    assert torch.equal(torch.get_rng_state(), before)

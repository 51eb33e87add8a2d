"""The losses: least at a perfect reconstruction, bounded, and what each one is for."""

import math

import pytest
import torch

from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.losses import (
    Pair,
    diversity,
    emergence,
    output_loss,
    reconstruction,
    relational,
    similarity,
    temperature,
    triplet,
)

ALL = Config(relational_weight=1, diversity_weight=1, triplet_weight=1)
LABELS = torch.arange(24) % 3


@pytest.fixture
def target():
    return torch.randn(24, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pair(target, output):
    return Pair(target + 0.3, output + 0.3, target, output)


def test_the_total_is_least_at_a_perfect_reconstruction(target):
    """Zero there, with no slope, and more in every other of many directions and at every distance."""
    output = target.clone().requires_grad_()
    best, _ = output_loss(ALL, pair(target, output), LABELS, 0.3)
    (slope,) = torch.autograd.grad(best, output)
    assert float(best.detach().abs()) < 1e-12
    assert float(slope.abs().max()) < 1e-9
    generator = torch.Generator().manual_seed(1)
    for distance in (1e-3, 1e-2, 0.1, 1.0, 10.0):
        for _ in range(20):
            other = target + distance * torch.randn(target.shape, generator=generator, dtype=torch.float64)
            assert float(output_loss(ALL, pair(target, other), LABELS, 0.3)[0]) > 0
    shrunk = output_loss(ALL, pair(target, 0.9 * target), LABELS, 0.3)[0]
    assert float(shrunk) > 0


def test_the_original_emergence_term_is_not_least_there(target):
    """w_r m - w_e log m: descent from near a perfect reconstruction leads away, to a squared error of w_e / w_r."""
    output = (target + 1e-3).requires_grad_()
    optimizer = torch.optim.Adam([output], 0.05)
    for _ in range(400):
        error = (output - target).square().mean()
        loss = error - 0.2 * error.log()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((output - target).square().mean().detach()) == pytest.approx(0.2, rel=0.05)


def test_emergence_is_bounded_and_knows_specialists(target):
    even = torch.full((100, 3), 1 / 3)
    specialists = torch.eye(3)[torch.arange(99) % 3]
    one = torch.eye(3)[torch.zeros(99, dtype=torch.long)]
    found = [float(emergence(w.mean(0), torch.special.entr(w).sum(1).mean())) for w in (even, specialists, one)]
    assert found == pytest.approx([math.log(3), 0.0, math.log(3)], abs=1e-6)


def test_diversity_punishes_collapse_and_does_not_pay_for_spread(target):
    assert float(diversity(pair(target, target))) == 0
    assert float(diversity(pair(target, 0 * target))) > 0.5
    line = target[:, :1] @ torch.ones(1, 10, dtype=torch.float64)
    assert float(diversity(pair(target, line))) > 0.1
    far = float(diversity(pair(target, 0 * target)))
    assert far <= float(target.std(0, correction=0).mean()) + 1e-2


def test_relational_loss_is_scipys_divergence_and_ignores_rotation(target):
    generator = torch.Generator().manual_seed(3)
    other = target + 0.5 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    tau, total = 0.2, 0.0
    a, b = (torch.nn.functional.normalize(v + 0.3) for v in (target, other))
    for row in range(len(target)):
        keep = [c for c in range(len(target)) if c != row]
        p, q = (torch.softmax(v[row] @ v[keep].T / tau, 0) for v in (a, b))
        total += float((p * (p / q).log()).sum())
    assert float(relational(pair(target, other), tau)) == pytest.approx(tau**2 * total / len(target), rel=1e-9)
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64))[0]
    turned = Pair(target, target @ rotation, target, target @ rotation)
    assert float(relational(turned, tau)) == pytest.approx(0, abs=1e-12)


def test_the_temperature_falls_to_a_tenth_by_a_cosine():
    assert [temperature(ALL, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.5, 0.275, 0.05])


def test_the_mean_has_a_squared_error_of_one_and_cosine_is_torchs(target):
    units = target / target.square().mean().sqrt()
    assert float(reconstruction(pair(units, 0 * units))) == pytest.approx(1)
    expected = 1 - torch.cosine_similarity(units + 0.3, torch.full_like(units, 0.3)).mean()
    assert float(similarity(pair(units, 0 * units))) == pytest.approx(float(expected))


def test_the_triplet_loss_wants_the_teachers_order_only(target):
    assert float(triplet(pair(target, target), LABELS)) == 0
    assert float(triplet(pair(target, target.flip(0)), LABELS)) > 0.01
    assert float(triplet(pair(target, target), torch.zeros(24, dtype=torch.long))) == 0

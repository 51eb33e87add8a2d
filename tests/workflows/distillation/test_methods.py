"""The table of methods: any of them trains, and what CRD keeps is what its paper says."""

import math

import pytest
import torch
from torch import nn

from trainbook.workflows.distillation.methods import (
    CRD_MOMENTUM,
    CRD_TEMPERATURE,
    METHODS,
    Contrast,
    Outputs,
    SoftLoss,
    warmup_weight,
)

N, B, C = 40, 8, 4


class Network(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(1, channels, 3, padding=1), nn.Linear(channels, C)

    def forward(self, images):
        maps = self.convolution(images).relu()
        features = maps.mean((2, 3))
        return Outputs(self.classifier(features), features, maps)


def labels():
    return torch.arange(N) % C


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_its_own_loss(method):
    torch.manual_seed(0)
    student, teacher, images = Network(3), Network(8).requires_grad_(False), torch.randn(N, 1, 6, 6)
    indices = torch.arange(B)
    outputs = teacher(images[indices])
    loss = SoftLoss(method, student(images[indices]), outputs, labels())
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=0.01)
    values = []
    for _ in range(40):
        value = loss(student(images[indices]), outputs, labels()[indices], indices, METHODS[method].temperature)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]


def test_what_a_method_needs_must_be_there():
    with pytest.raises(ValueError, match="features"):
        SoftLoss("rkd", Outputs(torch.zeros(B, C)), Outputs(torch.zeros(B, C)), labels())


def test_negatives_are_of_other_classes_and_uniform():
    torch.manual_seed(0)
    uneven = torch.tensor([0] * 5 + [1] * 20 + [3] * 15)[torch.randperm(N)]
    contrast = Contrast(3, 3, uneven)
    indices = torch.arange(N)
    drawn = torch.cat([contrast.draw_negatives(indices) for _ in range(200)], 1)  # (N, 200 N)
    assert not bool((uneven[drawn] == uneven[:, None]).any())
    for index in range(N):
        counts = torch.bincount(drawn[index], minlength=N)[uneven != uneven[index]].double()
        expected = drawn.shape[1] / len(counts)
        assert float((counts - expected).abs().max()) < 6 * math.sqrt(expected)


def test_contrast_matches_loops(monkeypatch):
    torch.manual_seed(0)
    contrast = Contrast(5, 7, labels()).double()
    student, teacher = torch.randn(B, 5).double(), torch.randn(B, 7).double()
    indices = torch.tensor([3, 17, 0, 39, 8, 21, 5, 30])
    negatives = contrast.draw_negatives(indices)
    monkeypatch.setattr(contrast, "draw_negatives", lambda _: negatives)
    banks = {"student": contrast.student_bank.clone(), "teacher": contrast.teacher_bank.clone()}

    def point(layer, row):
        vector = [sum(w * x for w, x in zip(r, row, strict=True)) + b for r, b in zip(*layer, strict=True)]
        length = math.sqrt(sum(v * v for v in vector))
        return [v / length for v in vector]

    expected, points = 0.0, {}
    for side, other, features in (("student", "teacher", student), ("teacher", "student", teacher)):
        module = getattr(contrast, side)
        layer = module.weight.tolist(), module.bias.tolist()
        points[side] = [point(layer, row) for row in features.tolist()]
        bank = banks[other].tolist()
        powers = [
            [
                math.exp(sum(a * b for a, b in zip(p, bank[partner], strict=True)) / CRD_TEMPERATURE)
                for partner in [int(i), *n.tolist()]
            ]
            for p, i, n in zip(points[side], indices, negatives, strict=True)
        ]
        normaliser = sum(map(sum, powers)) / sum(map(len, powers)) * N
        noise = negatives.shape[1] / N
        for row in powers:
            p = [value / normaliser for value in row]
            expected -= math.log(p[0] / (p[0] + noise)) + sum(math.log(noise / (q + noise)) for q in p[1:])
    assert contrast(student, teacher, indices).item() == pytest.approx(expected / B, rel=1e-9)
    for side in ("student", "teacher"):
        moved = CRD_MOMENTUM * banks[side][indices] + (1 - CRD_MOMENTUM) * torch.tensor(points[side]).double()
        moved = moved / moved.norm(dim=1, keepdim=True)
        bank = getattr(contrast, f"{side}_bank")
        torch.testing.assert_close(bank[indices], moved, rtol=1e-6, atol=1e-6)
        rest = torch.ones(N, dtype=torch.bool)
        rest[indices] = False
        assert torch.equal(bank[rest], banks[side][rest])


def test_the_normaliser_is_estimated_once_and_travels_with_the_state():
    torch.manual_seed(0)
    contrast, indices = Contrast(3, 3, labels()), torch.arange(B)
    contrast(torch.randn(B, 3), torch.randn(B, 3), indices)
    first = contrast.normalisers.clone()
    contrast(torch.randn(B, 3), torch.randn(B, 3), indices)
    assert torch.equal(contrast.normalisers, first)
    assert bool((first > 0).all())
    other = Contrast(3, 3, labels())
    other.load_state_dict(contrast.state_dict())
    assert torch.equal(other.student_bank, contrast.student_bank)
    assert torch.equal(other.normalisers, first)


def test_warmup_rises_to_one():
    weights = [warmup_weight(step, 100, 0.2) for step in range(100)]
    assert weights[0] == pytest.approx(1 / 20)
    assert weights[9] == pytest.approx(0.5)
    assert weights[19:] == [1.0] * 81
    assert warmup_weight(0, 100, 0.0) == 1.0

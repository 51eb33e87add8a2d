"""Losses against their formulas written as loops in float64, and the identities between them."""

import math

import pytest
import torch
from torch.nn import functional

from trainbook.workflows.distillation.losses import (
    attention_loss,
    dist_loss,
    dkd_loss,
    hint_loss,
    kd_loss,
    noise_contrastive_loss,
    rkd_loss,
    standardised,
    standardised_kd_loss,
)

B, C, T = 6, 5, 3.0


def logits(seed, *shape):
    return 2 * torch.randn(*(shape or (B, C)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER = logits(0), logits(1)
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def softmax(row, temperature=1.0):
    powers = [math.exp(x / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def huber(x, y):
    d = abs(x - y)
    return 0.5 * d * d if d < 1 else d - 0.5


def kd_by_loops(student, teacher, temperature):
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    return temperature**2 * sum(kl(softmax(t, temperature), softmax(s, temperature)) for s, t in rows) / len(student)


def test_kd_matches_loops():
    assert kd_loss(STUDENT, TEACHER, T).item() == pytest.approx(kd_by_loops(STUDENT, TEACHER, T), rel=1e-12)


def test_kd_gradient_keeps_its_scale_with_temperature():
    # For T far above the logits the gradient tends to that of half the squared difference of centred logits, over C.
    student = STUDENT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(student, TEACHER, 1e4), student)
    centred = (STUDENT - STUDENT.mean(1, keepdim=True)) - (TEACHER - TEACHER.mean(1, keepdim=True))
    torch.testing.assert_close(gradient, centred / C / B, rtol=0, atol=1e-4)


def test_dkd_matches_loops():
    total = 0.0
    for s, t, y in zip(STUDENT.tolist(), TEACHER.tolist(), LABELS.tolist(), strict=True):
        p_s, p_t = softmax(s, T), softmax(t, T)
        target = kl([p_t[y], 1 - p_t[y]], [p_s[y], 1 - p_s[y]])
        rest_s, rest_t = ([p for c, p in enumerate(row) if c != y] for row in (p_s, p_t))
        non_target = kl([p / sum(rest_t) for p in rest_t], [p / sum(rest_s) for p in rest_s])
        total += 1.0 * target + 8.0 * non_target
    assert dkd_loss(STUDENT, TEACHER, LABELS, T).item() == pytest.approx(T**2 * total / B, rel=1e-12)


def test_dkd_with_kd_weights_is_kd():
    target = (TEACHER / T).softmax(1).gather(1, LABELS[:, None])[:, 0]
    decoupled = dkd_loss(STUDENT, TEACHER, LABELS, T, alpha=1.0, beta=1 - target)
    torch.testing.assert_close(decoupled, kd_loss(STUDENT, TEACHER, T), rtol=1e-12, atol=0)


def test_dkd_stays_finite_for_a_teacher_that_is_sure():
    teacher = 200.0 * functional.one_hot(LABELS, C).float()
    student = STUDENT.float().requires_grad_()
    (gradient,) = torch.autograd.grad(dkd_loss(student, teacher, LABELS, 1.0), student)
    assert bool(torch.isfinite(gradient).all())


def test_standardised_logits_ignore_scale_and_offset():
    torch.testing.assert_close(standardised(3.7 * STUDENT - 11.0), standardised(STUDENT), rtol=1e-12, atol=1e-12)
    z = standardised(STUDENT)
    torch.testing.assert_close(z.mean(1), torch.zeros(B).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.std(1), torch.ones(B).double(), rtol=1e-12, atol=0)


def test_standardised_kd_matches_loops():
    def z(row):
        mean = sum(row) / C
        deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / (C - 1))
        return [(x - mean) / deviation for x in row]

    student, teacher = (torch.tensor([z(row) for row in m.tolist()]) for m in (STUDENT, TEACHER))
    expected = kd_by_loops(student.double(), teacher.double(), 2.0)
    assert standardised_kd_loss(STUDENT, TEACHER, 2.0).item() == pytest.approx(expected, rel=1e-5)


def test_standardised_kd_of_equal_logits_has_a_finite_gradient():
    student = torch.zeros(B, C, requires_grad=True)
    (gradient,) = torch.autograd.grad(standardised_kd_loss(student, TEACHER.float(), 2.0), student)
    assert bool(torch.isfinite(gradient).all())


def test_dist_matches_loops():
    p_s, p_t = ([softmax(row, T) for row in m.tolist()] for m in (STUDENT, TEACHER))
    rows = sum(pearson(s, t) for s, t in zip(p_s, p_t, strict=True)) / B
    columns = sum(pearson([r[c] for r in p_s], [r[c] for r in p_t]) for c in range(C)) / C
    assert dist_loss(STUDENT, TEACHER, T).item() == pytest.approx(T**2 * (2 - rows - columns), rel=1e-6)


def test_losses_of_a_copy_are_zero():
    features, maps = logits(2, B, 7), logits(3, B, 4, 6, 6)
    values = (
        kd_loss(TEACHER, TEACHER, T),
        dkd_loss(TEACHER, TEACHER, LABELS, T),
        standardised_kd_loss(TEACHER, TEACHER, T),
        dist_loss(TEACHER, TEACHER, T),
        hint_loss(maps, maps),
        attention_loss(maps, maps),
        rkd_loss(features, features),
    )
    assert [float(value) for value in values] == pytest.approx([0.0] * 7, abs=1e-6)


def test_hint_matches_loops():
    student, teacher = logits(4, 2, 3, 4, 4), logits(5, 2, 3, 4, 4)
    differences = [(a - b) ** 2 for a, b in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    assert hint_loss(student, teacher).item() == pytest.approx(sum(differences) / len(differences), rel=1e-12)


def test_attention_matches_loops():
    student, teacher = logits(4, 2, 3, 4, 4), logits(5, 2, 6, 4, 4)

    def attention(image):
        values = [sum(image[c][i][j] ** 2 for c in range(len(image))) for i in range(4) for j in range(4)]
        length = math.sqrt(sum(v * v for v in values))
        return [v / length for v in values]

    total = sum(
        (a - b) ** 2
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
        for a, b in zip(attention(s), attention(t), strict=True)
    )
    assert attention_loss(student, teacher).item() == pytest.approx(total / 32, rel=1e-12)


def test_attention_pools_the_larger_map():
    small = logits(6, 2, 3, 4, 4).abs()
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert attention_loss(small, large).item() == pytest.approx(0.0, abs=1e-15)


def rkd_by_loops(student, teacher):
    def relations(points):
        number = len(points)
        distances = [[math.dist(a, b) for b in points] for a in points]
        mean = sum(map(sum, distances)) / (number * (number - 1))
        cosines = {}
        for j in range(number):
            for i in range(number):
                for k in range(number):
                    if i == j or k == j:
                        cosines[j, i, k] = 0.0
                        continue
                    top = sum((a - b) * (c - b) for a, b, c in zip(points[i], points[j], points[k], strict=True))
                    cosines[j, i, k] = top / (distances[i][j] * distances[k][j])
        return [d / mean for row in distances for d in row], list(cosines.values())

    (d_s, a_s), (d_t, a_t) = relations(student.tolist()), relations(teacher.tolist())
    distance = sum(map(huber, d_s, d_t)) / len(d_s)
    return 25 * distance + 50 * sum(map(huber, a_s, a_t)) / len(a_s)


def test_rkd_matches_loops():
    student, teacher = logits(7, B, 3), logits(8, B, 4)
    assert rkd_loss(student, teacher).item() == pytest.approx(rkd_by_loops(student, teacher), rel=1e-10)


def test_rkd_ignores_scale_shift_and_rotation():
    student, teacher = logits(7, B, 4), logits(8, B, 4)
    rotation, _ = torch.linalg.qr(logits(9, 4, 4))
    moved = 5.0 * student @ rotation + 2.0
    torch.testing.assert_close(rkd_loss(moved, teacher), rkd_loss(student, teacher), rtol=1e-10, atol=0)
    assert float(rkd_loss(5.0 * teacher @ rotation + 2.0, teacher)) == pytest.approx(0.0, abs=1e-12)


def test_noise_contrastive_matches_loops():
    scores, normaliser, number = logits(10, B, 9), 37.0, 50
    noise = 8 / number
    total = 0.0
    for row in scores.tolist():
        p = [math.exp(score) / normaliser for score in row]
        total -= math.log(p[0] / (p[0] + noise)) + sum(math.log(noise / (q + noise)) for q in p[1:])
    assert noise_contrastive_loss(scores, normaliser, number).item() == pytest.approx(total / B, rel=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: kd_loss(s, t, T),
        lambda s, t: dkd_loss(s, t, LABELS, T),
        lambda s, t: standardised_kd_loss(s, t, 2.0),
        lambda s, t: dist_loss(s, t, T),
        rkd_loss,
        lambda s, t: attention_loss(s.reshape(B, C, 1, 1).expand(B, C, 1, 1), t.reshape(B, C, 1, 1)),
        lambda s, t: hint_loss(s.reshape(B, C, 1, 1), t.reshape(B, C, 1, 1)),
        lambda s, t: noise_contrastive_loss(s, 20.0, 40),
    ],
    ids=["kd", "dkd", "logit_std", "dist", "rkd", "attention", "hint", "crd"],
)
def test_gradients_match_finite_differences(loss):
    assert torch.autograd.gradcheck(lambda student: loss(student, TEACHER), STUDENT.clone().requires_grad_())


def test_temperature_gradient_matches_finite_differences():
    assert torch.autograd.gradcheck(lambda t: kd_loss(STUDENT, TEACHER, t), torch.tensor(T, dtype=torch.float64).requires_grad_())

"""Scores against scikit-learn, against sums done by hand, and against a search."""

import numpy as np
import pytest
import torch
from sklearn import metrics

from trainbook.workflows.distillation.scores import (
    bias_for_class,
    calibration_error,
    confusion,
    recall,
    reliability,
    score,
    with_bias,
)


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(300, 5, generator=generator) * 2, torch.randint(5, (300,), generator=generator)
    return logits, labels, torch.randn(300, 5, generator=generator)


def test_accuracy_likelihood_confusion_and_recall_are_scikit_learns(answers):
    logits, labels, _ = answers
    chosen, probabilities = logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    found = score(logits, labels)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, chosen))
    assert found.nll == pytest.approx(metrics.log_loss(labels, probabilities))
    assert (confusion(logits, labels).numpy() == metrics.confusion_matrix(labels, chosen)).all()
    assert recall(logits, labels, 3) == pytest.approx(metrics.recall_score(labels, chosen, labels=[3], average="macro"))
    assert (found.agreement, found.divergence) == (None, None)


def test_faithfulness_by_sums(answers):
    logits, labels, teacher = answers
    found = score(logits, labels, teacher)
    p, q = (each.double().softmax(1).numpy() for each in (teacher, logits))
    assert found.divergence == pytest.approx((p * np.log(p / q)).sum() / 300)
    assert found.agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert score(teacher, labels, teacher).divergence == pytest.approx(0, abs=1e-12)


def test_calibration_error_by_hand():
    """Four images at confidence 0.7, one of them right, and four at 0.9, all right: (|0.25 - 0.7| + |1 - 0.9|) / 2."""
    confidence = torch.tensor([0.7] * 4 + [0.9] * 4)
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    labels = torch.tensor([0, 1, 1, 1, 0, 0, 0, 0])
    assert calibration_error(logits, labels) == pytest.approx((0.45 + 0.1) / 2, abs=1e-6)


def test_calibration_error_bin_by_bin(answers):
    logits, labels, _ = answers
    confidence, chosen = logits.double().softmax(1).max(1)
    total = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            gap = (chosen == labels)[inside].double().mean() - confidence[inside].mean()
            total += float(inside.double().mean() * gap.abs())
    assert calibration_error(logits, labels) == pytest.approx(total)
    assert reliability(logits, labels)[0].sum() == 300


def test_the_bias_of_a_class_is_the_likeliest_one(answers):
    logits, labels, _ = answers
    logits = logits - 6 * torch.nn.functional.one_hot(torch.tensor(2), 5)  # never chosen
    found = bias_for_class(logits, labels, 2)
    losses = {b: score(with_bias(logits, 2, b), labels).nll for b in np.arange(found - 2, found + 2, 0.01)}
    assert min(losses, key=losses.get) == pytest.approx(found, abs=0.011)
    assert recall(logits, labels, 2) == 0 < recall(with_bias(logits, 2, found), labels, 2)

"""Losses against their formulas."""

import torch

from trainbook.losses import cross_entropy
from trainbook.optimization import OptimizationConfig


def test_smoothed_cross_entropy_is_the_formula():
    logits, labels = torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    targets = 0.7 * torch.eye(4, dtype=torch.float64)[labels] + 0.3 / 4
    expected = -(targets * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
    found = cross_entropy(logits, labels, OptimizationConfig(label_smoothing=0.3))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert cross_entropy(logits.bfloat16(), labels, OptimizationConfig()).dtype == torch.float32

"""Losses with the choices of a run's config."""

from torch import Tensor
from torch.nn import functional

from trainbook.optimization import OptimizationConfig


def cross_entropy(logits: Tensor, labels: Tensor, config: OptimizationConfig) -> Tensor:
    """Mean cross entropy in float32 with smoothed labels, in nats.

    L = -sum_c q_c log softmax(logits)_c with q = (1 - e) onehot(label) + e / C, e = label_smoothing.

    Args:
        logits: (B, C) of any float type.
        labels: (B,) int64.
        config: its `label_smoothing`.
    """
    return functional.cross_entropy(widened(logits), labels, label_smoothing=config.label_smoothing)


def widened(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor

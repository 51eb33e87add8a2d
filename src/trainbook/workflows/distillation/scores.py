"""How well a classifier does on labelled images: accuracy, likelihood, calibration, confusion, faithfulness to its teacher."""

# N images, C classes

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Scores:
    """Of one network on the test images.

    Attributes:
        accuracy: share that is right.
        nll: mean negative log-likelihood of the labels, in nats.
        ece: expected calibration error, see `calibration_error`.
        agreement: share of images on which it and the teacher choose one class; None without a teacher.
        divergence: mean KL(teacher || network), in nats; None without a teacher.
    """

    accuracy: float
    nll: float
    ece: float
    agreement: float | None
    divergence: float | None


def score(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> Scores:
    """Scores from logits; (N, C), (N,), (N, C)."""
    agreement = divergence = None
    if teacher_logits is not None:
        agreement = float((logits.argmax(1) == teacher_logits.argmax(1)).float().mean())
        log_p = (functional.log_softmax(each.double(), 1) for each in (logits, teacher_logits))
        divergence = float(functional.kl_div(*log_p, reduction="batchmean", log_target=True))
    right = (logits.argmax(1) == labels).double().mean()
    nll = functional.cross_entropy(logits.double(), labels)
    return Scores(float(right), float(nll), calibration_error(logits, labels), agreement, divergence)


def reliability(logits: Tensor, labels: Tensor, bins: int = CALIBRATION_BINS) -> tuple[Tensor, Tensor, Tensor]:
    """Per bin of confidence: how many images, their mean confidence and their accuracy (NaN in an empty bin); (bins,) each.

    The bins divide (0, 1] evenly; confidence is the largest probability.
    """
    confidence, chosen = logits.double().softmax(1).max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(place, minlength=bins).double()
    sums = [torch.bincount(place, each, minlength=bins) for each in (confidence, (chosen == labels).double())]
    return count, sums[0] / count, sums[1] / count


def calibration_error(logits: Tensor, labels: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """ECE = sum_b n_b / N |accuracy_b - confidence_b|.

    Source: Guo et al. (2017), On Calibration of Modern Neural Networks, equation 5.
    """
    count, confidence, accuracy = reliability(logits, labels, bins)
    return float((count / count.sum() * (accuracy - confidence).abs()).nansum())


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts by true class (row) and chosen class (column), (C, C)."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def bias_for_class(logits: Tensor, labels: Tensor, number: int) -> float:
    """What to add to one class's logit so that the labels are likeliest; found by bisection on the derivative.

    d/db sum_i log p(label_i) = #(label = class) - sum_i p_i(class), which falls in b.

    Args:
        logits: (N, C).
        labels: (N,).
        number: the class.
    """
    logits, wanted = logits.double(), float((labels == number).sum())
    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        shifted = with_bias(logits, number, middle)
        low, high = (middle, high) if float(shifted.softmax(1)[:, number].sum()) < wanted else (low, middle)
    return (low + high) / 2


def with_bias(logits: Tensor, number: int, bias: float) -> Tensor:
    """Logits with something added to one class's; (N, C)."""
    return logits + bias * functional.one_hot(torch.tensor(number), logits.shape[1]).to(logits)


def recall(logits: Tensor, labels: Tensor, number: int) -> float:
    """Share of a class's images that are found."""
    return float((logits.argmax(1)[labels == number] == number).double().mean())

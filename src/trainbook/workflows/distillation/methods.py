"""The methods of distillation by name: what each needs of both networks, its published weights, and its own parameters."""

# B batch, C classes, D features, N training examples, M size of the space where CRD compares

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainbook.workflows.distillation.losses import (
    attention_loss,
    dist_loss,
    dkd_loss,
    hint_loss,
    kd_loss,
    noise_contrastive_loss,
    rkd_loss,
    standardised_kd_loss,
)


class Outputs(NamedTuple):
    """What a network gives for a batch.

    Attributes:
        logits: (B, C).
        features: of the last layer before the classifier, (B, D), or None where no method needs them.
        feature_map: of the last convolution, (B, channels, height, width), or None.
    """

    logits: Tensor
    features: Tensor | None = None
    feature_map: Tensor | None = None


class Method(NamedTuple):
    """L = hard_weight cross_entropy + soft_weight loss, by default.

    Attributes:
        needs: the field of `Outputs` that it compares.
        hard_weight, soft_weight: as published.
        temperature: as published; a method that compares features does not use it.
        warmup: share of the steps over which the soft weight rises to its value.
    """

    needs: str
    hard_weight: float
    soft_weight: float
    temperature: float = 4.0
    warmup: float = 0.0


METHODS = {
    "kd": Method("logits", 0.1, 0.9),
    # Without the rise DKD collapsed on every seed of small networks; published: 20 of 240 epochs.
    "dkd": Method("logits", 1.0, 1.0, warmup=0.15),
    "logit_std": Method("logits", 0.1, 9.0, temperature=2.0),
    "dist": Method("logits", 1.0, 1.0),
    "fitnets": Method("feature_map", 1.0, 100.0),
    "attention": Method("feature_map", 1.0, 1000.0),
    "rkd": Method("features", 1.0, 1.0),
    "crd": Method("features", 1.0, 0.8),
}
CRD_SIZE, CRD_TEMPERATURE, CRD_MOMENTUM, CRD_NEGATIVES = 128, 0.07, 0.5, 16384


def warmup_weight(step: int, total_steps: int, warmup: float) -> float:
    """min(1, (step + 1) / (warmup total_steps)): the rise of the soft weight, 1 without one."""
    return min(1.0, (step + 1) / (warmup * total_steps)) if warmup else 1.0


class SoftLoss(nn.Module):
    """The loss of one method between a student and one teacher, with what it learns itself: a regressor, a memory bank.

    Its parameters are trained along with the student's; its buffers belong in the checkpoint.

    Args:
        method: a key of `METHODS`.
        student, teacher: outputs for any batch, for their sizes.
        train_labels: (N,) int64, of the whole training set: CRD draws its negatives from other classes.
    """

    def __init__(self, method: str, student: Outputs, teacher: Outputs, train_labels: Tensor) -> None:
        super().__init__()
        self.method = method
        needed = METHODS[method].needs
        if getattr(student, needed) is None or getattr(teacher, needed) is None:
            raise ValueError(f"{method} compares {needed}, which the networks did not give")
        if method == "fitnets":
            self.regressor = Regressor(student.feature_map, teacher.feature_map)
        if method == "crd":
            self.contrast = Contrast(student.features.shape[1], teacher.features.shape[1], train_labels)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor, indices: Tensor, temperature: Tensor | float) -> Tensor:
        """The loss, a scalar, without its weight.

        Args:
            student: its outputs.
            teacher: its outputs, detached.
            labels: (B,) int64.
            indices: (B,) int64, which training examples these are.
            temperature: T.
        """
        match self.method:
            case "kd":
                return kd_loss(student.logits, teacher.logits, temperature)
            case "dkd":
                return dkd_loss(student.logits, teacher.logits, labels, temperature)
            case "logit_std":
                return standardised_kd_loss(student.logits, teacher.logits, temperature)
            case "dist":
                return dist_loss(student.logits, teacher.logits, temperature)
            case "fitnets":
                return hint_loss(self.regressor(student.feature_map), teacher.feature_map)
            case "attention":
                return attention_loss(student.feature_map, teacher.feature_map)
            case "rkd":
                return rkd_loss(student.features, teacher.features)
            case "crd":
                return self.contrast(student.features, teacher.features, indices)
        raise ValueError(f"{self.method!r} is none of {', '.join(METHODS)}")


class Regressor(nn.Module):
    """Brings the student's feature map to the teacher's channels (1 x 1 convolution, batch norm) and size (pooling)."""

    def __init__(self, student_map: Tensor, teacher_map: Tensor) -> None:
        super().__init__()
        self.size = teacher_map.shape[2:]
        self.convolution = nn.Conv2d(student_map.shape[1], teacher_map.shape[1], 1, bias=False)
        self.norm = nn.BatchNorm2d(teacher_map.shape[1])

    def forward(self, student_map: Tensor) -> Tensor:
        """(B, student's channels, any, any) -> the teacher's shape."""
        return self.norm(self.convolution(functional.adaptive_avg_pool2d(student_map, self.size)))


class Contrast(nn.Module):
    """CRD: a linear map of either network's features to the unit sphere, and the points of all training examples there.

    The student's point must be closer to the teacher's stored point of the same image than to those of other classes,
    and the other way round. All products with the bank are one matrix product, from which the negatives are picked: for
    the published 16,384 negatives that is fewer operations than gathering their vectors.

    Args:
        student_size, teacher_size: D of each.
        train_labels: (N,) int64.

    Source: Tian, Krishnan and Isola (2020), section 3 and the authors' settings (128, 0.07, 0.5, 16,384).
    """

    def __init__(self, student_size: int, teacher_size: int, train_labels: Tensor) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(student_size, CRD_SIZE), nn.Linear(teacher_size, CRD_SIZE)
        number, device = len(train_labels), train_labels.device
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, functional.normalize(torch.randn(number, CRD_SIZE, device=device), dim=1))
        self.register_buffer("normalisers", torch.zeros(2, device=device))  # 0: not estimated yet
        counts = torch.bincount(train_labels)
        if int((counts > 0).sum()) < 2:
            raise ValueError("CRD draws negatives from other classes, and the training set has one class only")
        self.register_buffer("train_labels", train_labels)
        self.register_buffer("by_class", train_labels.argsort(stable=True))  # example numbers, class after class
        self.register_buffer("class_sizes", counts)
        self.register_buffer("class_starts", counts.cumsum(0) - counts)

    def draw_negatives(self, indices: Tensor) -> Tensor:
        """Examples of other classes, uniformly and with repetition; (B,) -> (B, K)."""
        labels, number = self.train_labels[indices], len(self.train_labels)
        sizes, starts = self.class_sizes[labels][:, None], self.class_starts[labels][:, None]
        drawn = torch.rand(len(indices), min(CRD_NEGATIVES, number), device=indices.device, dtype=torch.float64)
        places = (drawn * (number - sizes)).long()
        return self.by_class[places + sizes * (places >= starts)]  # skips the own class

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor) -> Tensor:
        """The sum of both directions' `noise_contrastive_loss`; then the bank takes in the batch's points.

        Args:
            student, teacher: features, (B, D_s) and (B, D_t).
            indices: (B,) int64.
        """
        points = functional.normalize(self.student(student), dim=1), functional.normalize(self.teacher(teacher), dim=1)
        partners = torch.cat([indices[:, None], self.draw_negatives(indices)], 1)
        loss = student.new_zeros(())
        for side, (point, bank) in enumerate(zip(points, (self.teacher_bank, self.student_bank), strict=True)):
            # A copy: the bank changes below, before the backward pass needs it as it is now.
            scores = (point @ bank.clone().T).gather(1, partners) / CRD_TEMPERATURE
            with torch.no_grad():  # estimated on the first batch, without reading it on the host
                estimate = scores.exp().mean() * len(bank)
                self.normalisers[side] = torch.where(self.normalisers[side] > 0, self.normalisers[side], estimate)
            loss = loss + noise_contrastive_loss(scores, self.normalisers[side].clone(), len(bank))
        with torch.no_grad():
            for point, bank in zip(points, (self.student_bank, self.teacher_bank), strict=True):
                moved = CRD_MOMENTUM * bank[indices] + (1 - CRD_MOMENTUM) * point
                bank[indices] = functional.normalize(moved, dim=1)
        return loss

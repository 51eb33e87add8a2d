"""Distillation losses: what a student is made to take over from a teacher. Pure functions, each a mean over the batch."""

# B batch, C classes, D features of a network's last layer, s student, t teacher, T temperature, K negatives

import torch
from torch import Tensor
from torch.nn import functional

from trainbook.losses import widened

EPSILON = 1e-7  # keeps a standard deviation and a correlation finite where all values are equal


def kullback_leibler(log_teacher: Tensor, log_student: Tensor) -> Tensor:
    """KL(p_t || p_s) = sum_c p_t,c (log p_t,c - log p_s,c) per example, in nats; (B, C) log-probabilities -> (B,)."""
    return functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Hinton's soft-target loss, T^2 KL(softmax(t / T) || softmax(s / T)), whose gradient keeps its scale as T grows.

    Args:
        student_logits, teacher_logits: (B, C).
        temperature: T > 0; a scalar tensor may require a gradient.

    Source: Hinton, Vinyals and Dean (2015), Distilling the Knowledge in a Neural Network, section 2.
    """
    log_student = functional.log_softmax(widened(student_logits) / temperature, 1)
    log_teacher = functional.log_softmax(widened(teacher_logits) / temperature, 1)
    return temperature**2 * kullback_leibler(log_teacher, log_student).mean()


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: Tensor | float,
    alpha: Tensor | float = 1.0,
    beta: Tensor | float = 8.0,
) -> Tensor:
    """Decoupled distillation, T^2 (alpha TCKD + beta NCKD), averaged over the batch.

    TCKD compares the two probabilities (label, any other class); NCKD the distribution over the other classes. With
    alpha = 1 and beta = 1 - p_t(label) the sum is `kd_loss`, which lets beta fade where the teacher is sure.

    Args:
        student_logits, teacher_logits: (B, C).
        labels: (B,) int64.
        temperature: T > 0.
        alpha, beta: numbers, or (B,).

    Source: Zhao et al. (2022), Decoupled Knowledge Distillation, equation 7; 8 is its most used beta.
    """
    student, teacher = widened(student_logits) / temperature, widened(teacher_logits) / temperature
    columns = torch.arange(student.shape[1] - 1, device=labels.device)
    others = columns + (columns >= labels[:, None])  # (B, C - 1), all classes but the label

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        rest = logits.gather(1, others)
        pair = torch.stack([logits.gather(1, labels[:, None])[:, 0], rest.logsumexp(1)], 1)
        return functional.log_softmax(pair, 1), functional.log_softmax(rest, 1)

    (student_pair, student_rest), (teacher_pair, teacher_rest) = split(student), split(teacher)
    target = kullback_leibler(teacher_pair, student_pair)
    non_target = kullback_leibler(teacher_rest, student_rest)
    return temperature**2 * (alpha * target + beta * non_target).mean()


def standardised(logits: Tensor) -> Tensor:
    """Logits without their own scale and offset: (x - mean x) / std x over the classes of each example, (B, C).

    Source: Sun et al. (2024), Logit Standardization in Knowledge Distillation, algorithm 1.
    """
    logits = widened(logits)
    variance, mean = torch.var_mean(logits, 1, keepdim=True)
    return (logits - mean) * (variance + EPSILON**2).rsqrt()


def standardised_kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """`kd_loss` of `standardised` logits, so that the student need not match the teacher's range of logits."""
    return kd_loss(standardised(student_logits), standardised(teacher_logits), temperature)


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson correlation of each row of one matrix with the same row of the other; (R, N), (R, N) -> (R,)."""
    one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
    return functional.cosine_similarity(one, other, dim=1, eps=EPSILON)


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """T^2 [(1 - mean correlation of rows) + (1 - mean correlation of columns)] of the two (B, C) probability matrices.

    Source: Huang et al. (2022), Knowledge Distillation from A Stronger Teacher, equations 8 to 10.
    """
    student = (widened(student_logits) / temperature).softmax(1)
    teacher = (widened(teacher_logits) / temperature).softmax(1)
    rows, columns = correlation(student, teacher).mean(), correlation(student.T, teacher.T).mean()
    return temperature**2 * (2 - rows - columns)


def hint_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared difference of a feature map, the student's already brought to the teacher's channels.

    Args:
        student_map, teacher_map: (B, channels, height, width).

    Source: Romero et al. (2015), FitNets, equation 3.
    """
    return functional.mse_loss(widened(student_map), widened(teacher_map))


def attention_map(feature_map: Tensor) -> Tensor:
    """Where a layer is active: sum over channels of A^2, flattened, of unit length; (B, channels, h, w) -> (B, h w)."""
    return functional.normalize(widened(feature_map).square().sum(1).flatten(1), dim=1)


def attention_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared difference of the two `attention_map`s; the larger map is pooled to the smaller one's size.

    Source: Zagoruyko and Komodakis (2017), Paying More Attention to Attention, section 3.1.
    """
    size = min(student_map.shape[2:], teacher_map.shape[2:])
    pooled = [functional.adaptive_avg_pool2d(widened(m), size) for m in (student_map, teacher_map)]
    return functional.mse_loss(*map(attention_map, pooled))


def rkd_loss(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Relational distillation: the student's features shall lie to each other as the teacher's do.

    Huber losses of all distances |x_i - x_j| over their mean, and of all cosines of the angle at j between i and k.

    Args:
        student, teacher: features, (B, D_s) and (B, D_t).
        distance_weight, angle_weight: of the two losses.

    Source: Park et al. (2019), Relational Knowledge Distillation, equations 4 to 9; weights of its section 4.
    """

    def relations(features: Tensor) -> tuple[Tensor, Tensor]:
        # Exact distances: through a product, those of near neighbours would be all rounding.
        distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        number = len(features) * (len(features) - 1)
        directions = functional.normalize(features[None] - features[:, None], dim=2)  # at j: j, i, D
        return distances / (distances.sum() / number).clamp(min=EPSILON), directions @ directions.transpose(1, 2)

    (student_distances, student_angles), (teacher_distances, teacher_angles) = (relations(widened(f)) for f in (student, teacher))
    distance = functional.smooth_l1_loss(student_distances, teacher_distances)
    return distance_weight * distance + angle_weight * functional.smooth_l1_loss(student_angles, teacher_angles)


def noise_contrastive_loss(scores: Tensor, normaliser: Tensor | float, num_examples: int) -> Tensor:
    """Tell the one true partner of each example from K drawn at random, given exp(similarity / temperature).

    With p = exp(score) / Z and the noise's K / N:
    L = -mean_b [log p_0 / (p_0 + K / N) + sum_k log (K / N) / (p_k + K / N)].

    Args:
        scores: similarity over temperature, (B, 1 + K), the true partner first.
        normaliser: Z, estimated once.
        num_examples: N, of the training set.

    Source: Tian, Krishnan and Isola (2020), Contrastive Representation Distillation, equations 9 to 11.
    """
    # log(p / (p + m)) = -softplus(log m - log p): no sum of small and large numbers.
    log_ratio = scores - torch.as_tensor(normaliser, device=scores.device, dtype=scores.dtype).log()
    log_noise = torch.log(torch.tensor((scores.shape[1] - 1) / num_examples, device=scores.device, dtype=scores.dtype))
    true = functional.softplus(log_noise - log_ratio[:, 0])
    false = functional.softplus(log_ratio[:, 1:] - log_noise).sum(1)
    return (true + false).mean()

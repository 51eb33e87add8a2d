"""The losses of the cube. All that depend on the output are at their minimum where it equals the target."""

# B batch, D numbers of a vector

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainbook.losses import widened
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.experts import NAMES
from trainbook.workflows.cellular_cube.network import CellularCube, Output
from trainbook.workflows.cellular_cube.readout import present_rows
from trainbook.workflows.cellular_cube.text_decoder import text_loss

MARGIN = 0.2  # of the triplet loss, in cosine
MAX_EMERGENCE = math.log(len(NAMES))
END_SHARE = 0.1  # of the relational temperature, at the end


class Pair(NamedTuple):
    """What a loss compares, in the teacher's units and standardised, all (B, D)."""

    target: Tensor
    output: Tensor
    target_standardised: Tensor
    output_standardised: Tensor


def reconstruction(pair: Pair) -> Tensor:
    """Mean squared error of standardised vectors; 1 for the mean predictor."""
    return (pair.output_standardised - pair.target_standardised).square().mean()


def present_reconstruction(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the vectors that there are; 0 where there is none.

    Args:
        output, target: (B, D), standardised; a target that is missing is a row of NaN.
    """
    present = present_rows(target)
    error = torch.where(present[:, None], widened(output) - target, 0.0)
    return error.square().sum() / (present.sum().clamp(min=1) * target.shape[1])


def similarity(pair: Pair) -> Tensor:
    """1 - mean cosine."""
    return 1 - torch.cosine_similarity(pair.output, pair.target).mean()


def relational(pair: Pair, temperature: float) -> Tensor:
    """tau^2 KL(softmax(cos of targets / tau) || softmax(cos of outputs / tau)), over the other sentences of the batch.

    Source: Hinton et al. (2015), Distilling the Knowledge in a Neural Network, section 2, with similarities for logits.
    """
    itself = torch.eye(len(pair.target), dtype=torch.bool, device=pair.target.device)
    logs = []
    for vectors in (pair.target, pair.output):
        unit = functional.normalize(vectors)
        logs.append(((unit @ unit.T).masked_fill(itself, -torch.inf) / temperature).log_softmax(-1))
    difference = (logs[0] - logs[1]).masked_fill(itself, 0.0)
    return temperature**2 * (logs[0].exp() * difference).sum(-1).mean()


def temperature(config: Config, progress: float) -> float:
    """Of the relational loss: from its start to a tenth by a cosine; progress from 0 to 1."""
    start = config.relational_temperature
    return start * (END_SHARE + (1 - END_SHARE) * (1 + math.cos(math.pi * progress)) / 2)


def diversity(pair: Pair) -> Tensor:
    """mean_d max(0, s_d(target) - s_d(output)) + mean over d != e of max(0, |c_de(output)| - |c_de(target)|).

    s_d are deviations over the batch, c_de covariances: a collapse of either kind costs, more spread than the target's does
    not pay, and the loss lies between 0 and a bound that only the batch sets.

    Source: Bardes et al. (2022), VICReg, equations 1 and 3, with the target's own statistics for the constants.
    """
    target, output = (vectors - vectors.mean(0) for vectors in (pair.target_standardised, pair.output_standardised))
    deviations = [(vectors.square().mean(0) + 1e-6).sqrt() for vectors in (target, output)]
    hinge = functional.relu(deviations[0] - deviations[1]).mean()
    excess = functional.relu((output.T @ output).abs() - (target.T @ target).abs()) / len(target)
    size = target.shape[1]
    return hinge + (excess.sum() - excess.diagonal().sum()) / max(size * (size - 1), 1)


def emergence(weights: Tensor, entropy: Tensor) -> Tensor:
    """Log 3 - I(expert; cell), I = H(mean_i w_i) - mean_i H(w_i) in [0, log 3]: 0 when cells divide the experts evenly.

    Args:
        weights: (3,), mean_i w_i.
        entropy: (), mean_i H(w_i), in nats.
    """
    return MAX_EMERGENCE - (torch.special.entr(weights).sum() - entropy)


def triplet(pair: Pair, labels: Tensor) -> Tensor:
    """Mean over sentences a of max(0, min(margin, gap_T) - gap), gap = cos(a, p) - cos(a, n) of the outputs, gap_T of targets.

    p is the sentence of a's label that is farthest for the teacher, n the nearest of another label among those farther than p:
    the teacher's own order is asked for, no more, so that it costs nothing at a perfect reconstruction.

    Args:
        pair: of the batch.
        labels: (B,).
    """
    unit_target, unit_output = functional.normalize(pair.target), functional.normalize(pair.output)
    cosines, outputs = unit_target @ unit_target.T, unit_output @ unit_output.T
    same = labels[:, None] == labels
    others = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = cosines.masked_fill(~others, torch.inf).min(1)
    farther = ~same & (cosines < positive.values[:, None])
    negative = cosines.masked_fill(~farther, -torch.inf).max(1)
    usable = others.any(1) & farther.any(1)
    wanted = (positive.values - negative.values).clamp(max=MARGIN)
    rows = torch.arange(len(labels), device=labels.device)
    gap = outputs[rows, positive.indices] - outputs[rows, negative.indices]
    return (functional.relu(wanted - gap).masked_fill(~usable, 0.0)).sum() / usable.sum().clamp(min=1)


def output_loss(config: Config, pair: Pair, labels: Tensor, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses that depend on the output, and its parts; least where output = target.

    Args:
        config: its weights.
        pair: of the batch.
        labels: (B,), for the triplets.
        progress: share of the phase that is done, for the temperature.
    """
    parts = {"reconstruction": reconstruction(pair), "cosine_distance": similarity(pair)}
    total = config.reconstruction_weight * parts["reconstruction"] + config.similarity_weight * parts["cosine_distance"]
    if config.relational_weight:
        parts["relational"] = relational(pair, temperature(config, progress))
        total = total + config.relational_weight * parts["relational"]
    if config.diversity_weight:
        parts["diversity"] = diversity(pair)
        total = total + config.diversity_weight * parts["diversity"]
    if config.triplet_weight:
        parts["triplet"] = triplet(pair, labels)
        total = total + config.triplet_weight * parts["triplet"]
    return total, parts


def pair_of(network: CellularCube, target: Tensor, output: Tensor) -> Pair:
    """Standardised targets and outputs in both units, in float32 or wider."""
    output = widened(output)
    return Pair(network.restored(target), network.restored(output), target, output)


def cube_loss(
    config: Config, model: nn.Module, batch: dict[str, Tensor], progress: float, decoder: nn.Module | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its parts.

    Args:
        config: of the run.
        model: the network, or what stands for it where several processes train.
        batch: "embeddings" (B, D) and "labels" (B,); for the heads their teachers' vectors, for the decoder "tokens" (B, L).
        progress: share of the phase that is done.
        decoder: to text, frozen: what it makes of the output is to be the sentence.
    """
    network: CellularCube = getattr(model, "module", model)
    vectors, labels = batch["embeddings"], batch["labels"]
    output: Output = model(vectors)
    total, parts = output_loss(config, pair_of(network, vectors, output.vectors), labels, progress)
    for name, found in output.further.items():
        if name in batch:  # synthetic vectors have one teacher only
            parts[f"{name}_error"] = present_reconstruction(found, batch[name])
            total = total + config.further_weight * network.agreement[name] * parts[f"{name}_error"]
    if decoder is not None and "tokens" in batch:
        parts["text_nats"] = text_loss(decoder, {"embeddings": output.vectors, "tokens": batch["tokens"]})
        total = total + config.text_weight * parts["text_nats"]
    if config.emergence_weight:
        parts["emergence"] = emergence(output.run.weights, output.run.entropy)
        total = total + config.emergence_weight * parts["emergence"]
    if config.sparsity_weight:
        parts["magnitude"] = output.run.magnitude
        total = total + config.sparsity_weight * parts["magnitude"]
    if config.bottleneck_weight:
        parts["code_nats"] = output.cost.mean()
        total = total + config.bottleneck_weight * parts["code_nats"]
    if config.prefix_weight:
        size = config.code_size >> int(torch.randint(1, 3, ()))  # a half or a quarter
        shorter: Output = model(vectors, prefix=max(size, 1))
        parts["prefix"] = reconstruction(pair_of(network, vectors, shorter.vectors))
        total = total + config.prefix_weight * parts["prefix"]
    return total, {name: part.detach() for name, part in parts.items()}

"""Several teachers as one: how much each counts for each example, from rules or learned on held-out labels."""

# M teachers, B examples, C classes, a weights with sum_m a_m = 1, p_m = softmax(logits of teacher m)

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainbook.losses import widened

logger = logging.getLogger("trainbook")

RULES = ("uniform", "entropy", "ca_mkd", "learned")
HIDDEN = 32
ENTROPY_BONUS = 0.01  # nats of the loss per nat of the weights' entropy
FIT_STEPS, FIT_DECAY = 60, 0.01
FOLDS = 5


def uniform_weights(logits: Tensor) -> Tensor:
    """1 / M each; (M, B, C) -> (B, M)."""
    return logits.new_full((logits.shape[1], len(logits)), 1 / len(logits))


def entropy_weights(logits: Tensor) -> Tensor:
    """Who is surer counts more: a = softmax_m(-H(p_m)), H in nats; (M, B, C) -> (B, M)."""
    log_p = functional.log_softmax(widened(logits), 2)
    return (log_p.exp() * log_p).sum(2).T.softmax(1)


def confidence_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """a_m = (1 - softmax_m(CE_m)) / (M - 1), CE_m the teacher's cross entropy: who knows the label counts more.

    Args:
        logits: (M, B, C).
        labels: (B,) int64; this rule cannot teach on unlabelled examples.

    Returns:
        (B, M)

    Source: Zhang, Chen and Wang (2022), Confidence-Aware Multi-Teacher Knowledge Distillation, equation 3.
    """
    if len(logits) == 1:
        return uniform_weights(logits)
    return (1 - cross_entropies(logits, labels).softmax(1)) / (len(logits) - 1)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Each teacher's cross entropy on each example, in nats; (M, B, C), (B,) -> (B, M)."""
    log_p = functional.log_softmax(widened(logits), 2)
    return -log_p.gather(2, labels.expand(len(logits), -1)[:, :, None])[:, :, 0].T


def mixture_logits(logits: Tensor, weights: Tensor, temperature: Tensor | float) -> Tensor:
    """Logits of one teacher whose softmax at T is the mixture sum_m a_m softmax(t_m / T): T times its logarithm.

    Of a single teacher they are its own, so that nothing changes.

    Args:
        logits: (M, B, C).
        weights: a, (B, M).
        temperature: T.

    Returns:
        (B, C)
    """
    if len(logits) == 1:
        return logits[0]
    log_p = functional.log_softmax(widened(logits) / temperature, 2)
    return temperature * torch.logsumexp(weights.T.log()[:, :, None] + log_p, 0)


def mixture_nll(logits: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """-log sum_m a_m p_m(label) of each example, in nats; (M, B, C), (B, M), (B,) -> (B,)."""
    return -torch.logsumexp(weights.log() - cross_entropies(logits, labels), 1)


class Gate(nn.Module):
    """Attention over teachers: a = softmax_m g(what teacher m says, what all say on average, what m is known for).

    One network g scores every teacher, so that the order of the teachers does not matter. What a teacher is known for is
    its mean probability of the label, class by class, on the examples the gate was fitted on. A teacher says its logits
    (less their mean), probabilities, entropy and log-sum-exp. Needs no image, hence works from stored logits.

    Args:
        num_teachers, num_classes: M and C.
    """

    def __init__(self, num_teachers: int, num_classes: int) -> None:
        super().__init__()
        said = 2 * num_classes + 2
        self.register_buffer("known_for", torch.zeros(num_teachers, num_classes))
        self.register_buffer("mean", torch.zeros(said))
        self.register_buffer("scale", torch.ones(said))
        self.scorer = nn.Sequential(nn.Linear(2 * said + 2 * num_classes, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def forward(self, logits: Tensor) -> Tensor:
        """Weights; (M, B, C) -> (B, M)."""
        own = (said_by(logits) - self.mean) / self.scale  # (M, B, 2C + 2)
        known = self.known_for[:, None].expand(-1, logits.shape[1], -1)
        trust = known * functional.softmax(widened(logits), 2)  # how good it is where it puts its probability
        inputs = torch.cat([own, own.mean(0, keepdim=True).expand_as(own), known, trust], 2)
        return self.scorer(inputs)[:, :, 0].T.softmax(1)

    def describe(self, logits: Tensor, labels: Tensor) -> None:
        """Take in what the teachers are known for, and the inputs' mean and spread, from held-out examples."""
        said = said_by(logits)
        self.mean.copy_(said.mean((0, 1)))
        self.scale.copy_(said.std((0, 1)).clamp(min=1e-3))
        correct = cross_entropies(logits, labels).neg().exp()  # (B, M)
        sums = torch.zeros_like(self.known_for.T).index_add_(0, labels, correct.to(self.known_for))
        self.known_for.copy_((sums / torch.bincount(labels, minlength=len(sums)).clamp(min=1)[:, None]).T)


def said_by(logits: Tensor) -> Tensor:
    """Centred logits, probabilities, entropy and log-sum-exp of the centred logits; (M, B, C) -> (M, B, 2C + 2)."""
    centred = widened(logits) - widened(logits).mean(2, keepdim=True)
    log_p = functional.log_softmax(centred, 2)
    entropy = -(log_p.exp() * log_p).sum(2, keepdim=True)
    return torch.cat([centred, log_p.exp(), entropy, centred.logsumexp(2, keepdim=True)], 2)


def fit_gate(logits: Tensor, labels: Tensor, seed: int) -> Gate:
    """Fit a gate to examples that no teacher was trained on: minimise mixture NLL - 0.01 H(a) + 0.01 |W|^2 by L-BFGS.

    Args:
        logits: (M, N, C), of held-out examples.
        labels: (N,) int64.
        seed: of the scorer's first weights; the global generators stay as they are.
    """
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        gate = Gate(len(logits), logits.shape[2])
    gate = gate.to(logits.device)
    gate.describe(logits, labels)
    optimizer = torch.optim.LBFGS(gate.parameters(), max_iter=FIT_STEPS, line_search_fn="strong_wolfe")
    matrices = [parameter for parameter in gate.parameters() if parameter.ndim > 1]

    def objective() -> Tensor:
        weights = gate(logits)
        entropy = torch.special.entr(weights).sum(1).mean()
        decay = FIT_DECAY * sum(matrix.square().sum() for matrix in matrices)
        loss = mixture_nll(logits, weights, labels).mean() - ENTROPY_BONUS * entropy + decay
        optimizer.zero_grad()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return gate.requires_grad_(False).eval()


@dataclass(frozen=True)
class Choice:
    """What speaks for a learned gate, and what is used.

    Attributes:
        rule: "learned", "uniform" or "best teacher".
        gate: the gate fitted to all held-out examples.
        best_teacher: the one with the lowest held-out NLL.
        nll: mean held-out NLL of "learned" (out of fold), "uniform" and "best teacher", in nats.
        gains: over either other, the mean difference in NLL and its standard error.
        why: in one sentence.
    """

    rule: str
    gate: Gate
    best_teacher: int
    nll: dict[str, float]
    gains: dict[str, tuple[float, float]]
    why: str

    def weights(self, logits: Tensor) -> Tensor:
        """Of the rule that is used; (M, B, C) -> (B, M)."""
        if self.rule == "learned":
            return self.gate(logits)
        if self.rule == "uniform":
            return uniform_weights(logits)
        chosen = torch.full((logits.shape[1],), self.best_teacher, device=logits.device)
        return functional.one_hot(chosen, len(logits)).to(logits.dtype)


def choose_gate(logits: Tensor, labels: Tensor, seed: int) -> Choice:
    """Fit a gate and keep it only if, out of fold, it beats uniform weights and the best teacher by over a standard error.

    Otherwise the better of these two is used, and the log says so.

    Args:
        logits: (M, N, C), of held-out examples; N at least 5.
        labels: (N,) int64.
        seed: of the folds and the gate.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    learned = torch.empty(len(labels), dtype=torch.float64, device=labels.device)
    for fold in order.chunk(FOLDS):
        rest = order[~torch.isin(order, fold)]
        gate = fit_gate(logits[:, rest], labels[rest], seed)
        learned[fold] = mixture_nll(logits[:, fold], gate(logits[:, fold]), labels[fold]).double()
    single = cross_entropies(logits, labels).double()
    best = int(single.mean(0).argmin())
    others = {"uniform": mixture_nll(logits, uniform_weights(logits), labels).double(), "best teacher": single[:, best]}
    nll = {"learned": float(learned.mean()), **{name: float(values.mean()) for name, values in others.items()}}
    gains = {}
    for name, values in others.items():
        difference = values - learned
        gains[name] = float(difference.mean()), float(difference.std() / len(labels) ** 0.5)
    fallback = min(others, key=nll.__getitem__)
    rule = "learned" if all(gain > error for gain, error in gains.values()) else fallback
    evidence = ", ".join(f"{gain:+.4f} nats over {name} (standard error {error:.4f})" for name, (gain, error) in gains.items())
    why = f"the learned gate gains {evidence} out of fold: " + (
        "it is used" if rule == "learned" else f"too little, {rule} is used instead"
    )
    logger.info(why)
    return Choice(rule, fit_gate(logits, labels, seed), best, nll, gains, why)

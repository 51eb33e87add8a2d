"""Easy sentences first, and synthetic ones before all: batches as a function of (seed, step)."""

# D numbers of a vector

import torch
from torch import Tensor

from trainbook import distributed
from trainbook.data import Batches
from trainbook.workflows.cellular_cube.principal import Principal

FULL_FROM = 0.5  # share of the steps after which all sentences are in
SHRINKAGE = 0.1  # of the covariance towards a multiple of the identity


class Curriculum:
    """Batches drawn from the easiest share q(t) of the sentences: from `start` to all, by a line, in the first half.

    Easy is what PCA with the cube's width of code leaves little of: hardness |e - P e|^2.

    Args:
        source: "embeddings" (N, D) standardised, and others of N entries.
        principal: of the training vectors.
        code_size: K.
        start: share at the first step.
        total_steps: of the phase.
        seed, batch_size, batch_scaling: as of `data.Batches`.
    """

    def __init__(
        self,
        source: dict[str, Tensor],
        principal: Principal,
        code_size: int,
        start: float,
        total_steps: int,
        seed: int,
        batch_size: int,
        batch_scaling: str,
    ) -> None:
        plain = Batches(source, seed, batch_size, batch_scaling)
        self.batch_size, self.per_epoch = plain.batch_size, plain.per_epoch
        vectors = source["embeddings"]
        hardness = (vectors - principal.reconstructed(vectors, code_size)).square().sum(1)
        order = hardness.argsort(stable=True)
        self.source = {name: tensor[order] for name, tensor in source.items()}
        self.start, self.total_steps, self.seed = start, total_steps, seed

    def share(self, step: int) -> float:
        """q(t), of the sentences in use."""
        return min(1.0, self.start + (1 - self.start) * step / max(1.0, FULL_FROM * self.total_steps))

    def __call__(self, step: int) -> dict[str, Tensor]:
        """The batch of a step, without repetition within it."""
        number = max(self.batch_size, int(self.share(step) * len(self.source["embeddings"])))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = distributed.share(torch.randperm(number, generator=generator)[: self.batch_size])
        return {name: tensor[chosen.to(tensor.device)] for name, tensor in self.source.items()}


def synthetic_vectors(principal: Principal, number: int, seed: int) -> Tensor:
    """SYNTHETIC vectors e ~ N(mean, (1 - s) Sigma + s I): the teacher's covariance, shrunk; standardised, (number, D).

    The best any network can do on them is PCA: 1 - (shrunk) sum_{i <= k} l_i / sum l.

    Args:
        principal: of the teacher's standardised vectors.
        number: of vectors.
        seed: of the numbers.
    """
    noise = torch.randn(number, len(principal.mean), generator=torch.Generator().manual_seed(seed))
    deviations = shrunk_variances(principal).sqrt()
    return (noise * deviations.cpu() @ principal.components.cpu()).to(principal.mean)


def shrunk_variances(principal: Principal) -> Tensor:
    """(D,), of the synthetic vectors along the components."""
    return (1 - SHRINKAGE) * principal.variances + SHRINKAGE * principal.variances.mean()

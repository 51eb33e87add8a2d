"""Training on a second domain without losing the first: a reservoir of old vectors, and a pull towards old weights."""

# D numbers of a vector

from collections.abc import Callable

import torch
from torch import Tensor, nn

FISHER_SENTENCES = 64


class Reservoir:
    """A uniform sample of a stream of unknown length.

    Args:
        size: items kept.
        seed: of which.

    Source: Vitter (1985), Random Sampling with a Reservoir, algorithm R.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seen, self.items = size, 0, torch.empty(0, dtype=torch.int64)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, items: Tensor) -> None:
        """Offer items, (n,) int64, one after another; each of those seen so far is kept with the same probability."""
        for item in items.tolist():
            self.seen += 1
            if len(self.items) < self.size:
                self.items = torch.cat([self.items, torch.tensor([item])])
                continue
            place = int(torch.randint(self.seen, (), generator=self._generator))
            if place < self.size:
                self.items[place] = item


class Replay:
    """Batches of a second domain in which a share comes from a reservoir of the first; a function of (seed, step).

    Args:
        batches: of the second domain.
        old: name to tensor, the reservoir's examples.
        share: of each batch.
        seed: of the run.
    """

    def __init__(self, batches: Callable[[int], dict[str, Tensor]], old: dict[str, Tensor], share: float, seed: int) -> None:
        self.batches, self.old, self.share, self.seed = batches, old, share, seed
        self.batch_size = batches.batch_size
        self.per_epoch = batches.per_epoch

    def __call__(self, step: int) -> dict[str, Tensor]:
        """The batch of a step."""
        batch = self.batches(step)
        size = len(batch["embeddings"])
        number = round(self.share * size)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randint(len(self.old["embeddings"]), (number,), generator=generator).to(batch["embeddings"].device)
        return {name: torch.cat([tensor[: size - number], self.old[name][chosen]]) for name, tensor in batch.items()}


class Elastic(nn.Module):
    """lambda / 2 sum_p F_p (p - p*)^2 over parameters: p* those of the first domain, F their diagonal Fisher information.

    Args:
        network: whose parameters; they are zero information until `remember`.

    Source: Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks, equation 3.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, parameter in network.named_parameters():
            self.register_buffer(_key("fisher", name), torch.zeros_like(parameter))
            self.register_buffer(_key("anchor", name), parameter.detach().clone())

    def remember(self, network: nn.Module, vectors: Tensor, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
        """Take the network's weights for p* and estimate F from squared gradients of single sentences.

        The squared error is half the negative log-likelihood of a Gaussian; F is its mean squared gradient, sentence by
        sentence: squaring a batch's mean gradient would give something else.

        Args:
            network: with the first domain's weights.
            vectors: (N, D), of which the first few are used.
            loss: (network, one sentence (1, D)) -> its loss.
        """
        number = min(FISHER_SENTENCES, len(vectors))
        parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        for name, parameter in parameters.items():
            self.get_buffer(_key("anchor", name)).copy_(parameter.detach())
            self.get_buffer(_key("fisher", name)).zero_()
        for vector in vectors[:number].split(1):
            gradients = torch.autograd.grad(loss(network, vector), list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    self.get_buffer(_key("fisher", name)).add_(gradient.square() / number)

    def forward(self, network: nn.Module) -> Tensor:
        """Half the weighted squared distance from the anchor, ()."""
        parts = [
            (self.get_buffer(_key("fisher", name)) * (p - self.get_buffer(_key("anchor", name))).square()).sum()
            for name, p in network.named_parameters()
        ]
        return 0.5 * torch.stack(parts).sum()


def _key(kind: str, name: str) -> str:
    return f"{kind}_{name.replace('.', '__')}"

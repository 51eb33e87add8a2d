"""Vectors to text, the plain way: the known sentence whose vector is nearest. Always fluent, so it proves meaning only."""

# N queries, M known sentences, D numbers of a vector

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

QUERIES_AT_ONCE = 1024


def nearest(bank: Tensor, queries: Tensor) -> Tensor:
    """Index of the known vector with the highest cosine to each query, (N,) int64 on the CPU.

    Args:
        bank: (M, D), raw vectors of training sentences.
        queries: (N, D), raw.
    """
    known = functional.normalize(bank, dim=1)
    return torch.cat([(functional.normalize(part, dim=1) @ known.T).argmax(1) for part in queries.split(QUERIES_AT_ONCE)]).cpu()


def retrieve(bank: Tensor, bank_sentences: Sequence[str], queries: Tensor) -> list[str]:
    """The nearest known sentence of each query."""
    return [bank_sentences[index] for index in nearest(bank, queries).tolist()]


def own_sentence_recall(outputs: Tensor, targets: Tensor) -> float:
    """Share of outputs whose nearest of all targets is their own: recall at 1 with the answers in the bank.

    Args:
        outputs, targets: (N, D), raw, row by row of the same sentence.
    """
    return float((nearest(targets, outputs) == torch.arange(len(targets))).double().mean())

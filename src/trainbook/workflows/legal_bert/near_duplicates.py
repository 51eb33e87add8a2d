"""Texts that nearly repeat each other."""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

LEAST_OVERLAP = 0.6


def near_pairs(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Pairs of a text and one of the others that nearly repeat each other, (2, pairs): their places in the two lists.

    |A and B| / |A or B| >= `LEAST_OVERLAP`, the Jaccard index of the sets of three-word sequences.
    """
    counter = CountVectorizer(ngram_range=(3, 3), binary=True, token_pattern=r"(?u)\b\w+\b", dtype=np.float32)
    try:
        counter.fit([*texts, *others])
    except ValueError:  # no text has three words
        return np.argwhere(np.array(texts)[:, None] == np.array(others)).T
    a, b = counter.transform(texts), counter.transform(others)
    both = (a @ b.T).tocoo()
    sizes_a, sizes_b = (np.asarray(matrix.sum(1)).ravel() for matrix in (a, b))
    either = sizes_a[both.row] + sizes_b[both.col] - both.data
    return np.stack([both.row, both.col])[:, both.data >= LEAST_OVERLAP * either]

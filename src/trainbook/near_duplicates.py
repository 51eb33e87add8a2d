"""Texts that nearly repeat each other: what must not stand on both sides of a split."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text."""
    return re.findall(r"[^\W_]+", text.lower())


def word_sequences(text: str, length: int) -> set[tuple[str, ...]]:
    """All sequences of so many neighbouring words of a text; of a shorter text all its words as one, of an empty one none."""
    found = words(text)
    return {tuple(found[start : start + length]) for start in range(max(1, len(found) - length + 1))} if found else set()


def near_pairs(texts: Sequence[str], least: float, length: int = 1) -> np.ndarray:
    """Pairs of texts whose sets A, B of word sequences have Jaccard similarity |A and B| / |A or B| >= t, all of them.

    That needs a common element among the |A| - ceil(t |A|) + 1 rarest of A, and likewise of B, so only texts that share such an
    element are compared. Texts without a word are in no pair.

    Args:
        texts: N texts.
        least: t in (0, 1].
        length: words of a sequence; 1 compares sets of words.

    Returns:
        (2, pairs) int64, the places of the two, the smaller first.

    Source: Chaudhuri et al. (2006), A Primitive Operator for Similarity Joins, the prefix filter.
    """
    sets = [word_sequences(text, length) for text in texts]
    frequency = Counter(element for one in sets for element in one)
    postings: dict[tuple[str, ...], list[int]] = defaultdict(list)
    pairs = []
    for index, one in enumerate(sets):
        kept = len(one) - math.ceil(least * len(one) - 1e-9) + 1
        rare = sorted(one, key=lambda element: (frequency[element], element))[:kept]
        for other in sorted({candidate for element in rare for candidate in postings[element]}):
            common = len(one & sets[other])
            if common >= least * (len(one) + len(sets[other]) - common) - 1e-9:
                pairs.append((other, index))
        for element in rare:
            postings[element].append(index)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2).T

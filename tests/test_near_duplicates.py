"""Pairs of texts that nearly repeat each other, against all pairs."""

import itertools

import numpy as np
import pytest

from trainbook.near_duplicates import near_pairs, word_sequences


def test_pairs_are_those_of_the_definition():
    texts = [
        "One, two three four five six seven!",
        "one two three four five six seven",
        "one two three four five six eight",  # of three words each: 4 of 6 in common with the first two
        "seven six five four three two one",
    ]
    assert near_pairs(texts, 0.6, 3).T.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert near_pairs(texts, 0.7, 3).T.tolist() == [[0, 1]]
    assert near_pairs(texts, 1.0).T.tolist() == [[0, 1], [0, 3], [1, 3]]  # the same words


def test_short_texts_are_compared_whole_and_empty_ones_not_at_all():
    assert word_sequences("a b", 3) == {("a", "b")}
    assert near_pairs(["a b", "c d", "A b.", "", "!"], 0.5, 3).T.tolist() == [[0, 2]]


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("least", [0.3, 0.5, 0.6, 0.7, 1.0])
def test_none_is_missed_by_looking_at_rare_words_only(least, length):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(list("abcdefgh"), generator.integers(1, 9))) for _ in range(150)]
    sets = []
    for letters in map(str.split, texts):
        neighbours = zip(*(letters[start:] for start in range(length)), strict=False)
        sets.append(set(neighbours) or {tuple(letters)})
    every = itertools.combinations(range(len(texts)), 2)
    expected = {(i, j) for i, j in every if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= least - 1e-12}
    found = near_pairs(texts, least, length).T.tolist()
    assert {tuple(pair) for pair in found} == expected
    assert len(found) == len(expected) > 5

"""Measures of decoded text against worked examples and enumeration; floors below ceilings."""

import math

import numpy as np
import pytest
import torch

from trainbook.workflows.cellular_cube.phrase_scores import (
    BOUNDARY,
    PhraseJudge,
    TrigramModel,
    chrf,
    distinct_2,
    share_of_the_way,
    token_f1,
)
from trainbook.workflows.cellular_cube.retrieval import retrieve
from trainbook.workflows.cellular_cube.teachers import TfidfSvd


def test_token_f1_counts_repeats():
    assert token_f1("the the cat", "the cat sat") == pytest.approx(2 * 2 / 6)
    assert token_f1("The cat sat!", "the cat sat") == 1
    assert token_f1("dog", "cat") == 0
    assert token_f1("", "cat") == 0


def test_chrf_of_a_worked_example():
    # abc against abd: unigrams 2/3, bigrams 1/2, trigrams 0/1; no longer ones. Precision = recall = mean.
    assert chrf("abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # ab against abcd: P = (1 + 1)/2, R = (2/4 + 1/3)/2; F2 = 5PR/(4P + R)
    recall = (2 / 4 + 1 / 3) / 2
    assert chrf("a b", "abcd") == pytest.approx(5 * recall / (4 + recall))
    assert chrf("same text", "same text") == 1
    assert chrf("", "text") == 0


def test_trigram_probabilities_sum_to_one_and_known_sentences_surprise_less():
    model = TrigramModel(["the cat sat", "the cat ran", "a dog ran"])
    words = sorted(model.vocabulary)
    assert BOUNDARY in words
    for context in ((BOUNDARY, BOUNDARY), ("the", "cat"), ("zebra", "cat"), ("zebra", "yak")):
        total = sum(model.probability((*context, word)) for word in [*words, "unknown"])
        assert total == pytest.approx(1, abs=1e-12)
    v = len(words) + 1
    expected = (
        0.5 * 1 / 2 + 0.3 * 1 / 2 + 0.15 * 1 / 12 + 0.05 / v
    )  # sat after "the cat": 1 of 2; after cat: 1 of 2; 1 of 12 words
    assert model.probability(("the", "cat", "sat")) == pytest.approx(expected)
    assert model.perplexity(["the cat sat"]) < model.perplexity(["sat the cat"]) < model.perplexity(["zebra yak emu"])
    assert model.seen_share(["the cat sat"]) == 1
    assert model.seen_share(["sat cat the"]) == 0
    uniform = TrigramModel(["one two", "two one"])
    surprise = [-math.log(uniform.probability(gram)) for gram in ((BOUNDARY, BOUNDARY, "one"), (BOUNDARY, "one", "two"))]
    surprise.append(-math.log(uniform.probability(("one", "two", BOUNDARY))))
    assert uniform.perplexity(["one two"]) == pytest.approx(math.exp(np.mean(surprise)))


def test_distinct_pairs():
    assert distinct_2(["a b c", "a b d"]) == 3 / 4
    assert distinct_2(["alone"]) == 0


def test_share_of_the_way_and_its_interval():
    generator = np.random.default_rng(0)
    floor, ceiling = generator.random(400), 1 + generator.random(400)
    half = (floor + ceiling) / 2
    assert share_of_the_way(half, floor, ceiling, 0) == pytest.approx((0.5, 0.5, 0.5))
    noisy = half + generator.standard_normal(400)
    share, low, high = share_of_the_way(noisy, floor, ceiling, 0)
    assert low < share < high
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(noisy - half) / math.sqrt(400), rel=0.2)
    assert math.isnan(share_of_the_way(half, ceiling, floor, 0)[0])


def test_the_judge_orders_teacher_copies_noise_and_nothing():
    subjects, things = ("matrix", "graph", "image", "sound"), ("inverse", "trace", "colour", "mean", "size", "root")
    train = [
        f"Compute the {thing} of a {subject} by its {rest}." for subject in subjects for thing in things for rest in things[:2]
    ]
    test = [f"Return the {thing} of one {subject}." for subject in subjects for thing in things]
    train_labels, test_labels = torch.arange(4).repeat_interleave(12), torch.arange(4).repeat_interleave(6)
    teacher = TfidfSvd(train)
    bank, queries = torch.from_numpy(teacher.embed(train)), torch.from_numpy(teacher.embed(test))
    judge = PhraseJudge(teacher, bank, train_labels, train, queries, test_labels, test)
    generator = torch.Generator().manual_seed(0)
    noisy = queries + 0.3 * torch.randn(queries.shape, generator=generator)
    mean = bank.mean(0, keepdim=True).expand_as(queries)
    random = torch.randn(queries.shape, generator=generator)
    vectors = {"teacher": queries, "cube": noisy, "mean_vector": mean, "random_vector": random}
    table = judge.table(
        {who: retrieve(bank, train, v) for who, v in vectors.items()}, "teacher", ("mean_vector", "random_vector"), 0
    )
    assert table["teacher/label_match"] == 1
    assert table["teacher/reencoded_cosine"] > table["cube/reencoded_cosine"] > table["mean_vector/reencoded_cosine"]
    assert 0 < table["cube/reencoded_cosine_share_low"] < table["cube/reencoded_cosine_share"] < 1
    assert table["mean_vector/unique_outputs"] == 1 / 24  # collapse shows
    assert table["teacher/seen_trigrams"] == 1  # a known sentence is fluent by construction
    assert "teacher/chrf_share" not in table

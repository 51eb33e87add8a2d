"""Probes, compositionality and retrieval: what can be read is found, what cannot is at chance."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

from trainbook.workflows.cellular_cube.compositionality import PENALTIES, composition_r2, compositionality
from trainbook.workflows.cellular_cube.probes import probe_accuracy, probe_table, surface_labels
from trainbook.workflows.cellular_cube.retrieval import nearest, own_sentence_recall, retrieve


def clusters(number, seed, spread=0.3):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, number)
    return (np.eye(4)[labels] @ np.eye(4, 6) + spread * generator.standard_normal((number, 6))).astype(np.float32), labels


def test_a_probe_reads_clusters_and_its_controls_do_not():
    (train, train_labels), (test, test_labels) = clusters(300, 0), clusters(200, 1)
    blind = np.random.default_rng(2).standard_normal((300, 6)), np.random.default_rng(3).standard_normal((200, 6))
    table = probe_table({"teacher": (train, test), "blind": blind}, (train_labels, test_labels), "intent_accuracy", seed=0)
    assert table["teacher/intent_accuracy"] > 0.9
    assert table["blind/intent_accuracy"] < 0.4
    assert table["shuffled_labels/intent_accuracy"] < 0.4
    assert table["chance/intent_accuracy"] == np.mean(test_labels == np.bincount(train_labels).argmax())
    assert probe_table({"teacher": (train, test)}, (train_labels * 0, test_labels * 0), "any", seed=0) == {}
    assert np.isnan(probe_accuracy(train, train_labels * 0, test, test_labels, seed=0))


def test_surface_labels_follow_their_rules():
    texts = ["The 3 dogs ran.", "We met Ada there.", "a b c d e f g h i j k"]
    found = surface_labels(texts)
    assert found["has_number"].tolist() == [1, 0, 0]
    assert found["has_name"].tolist() == [0, 1, 0]
    assert found["is_long"].tolist() == [0, 0, 1]


def triples(number, seed):
    generator = np.random.default_rng(seed)
    halves = generator.standard_normal((number, 2, 5))
    mix = np.random.default_rng(9).standard_normal((10, 5))
    whole = halves.reshape(number, -1) @ mix + 0.5 * generator.standard_normal((number, 5))
    return np.concatenate([whole[:, None], halves], axis=1)


def test_composition_matches_ridge_at_the_best_penalty_and_broken_pairs_fall_to_zero():
    train, test = triples(400, 0), triples(300, 1)
    found = composition_r2(train, test)
    scores = []
    for penalty in PENALTIES:
        model = Ridge(penalty).fit(train[:, 1:].reshape(400, -1), train[:, 0])
        error = np.square(test[:, 0] - model.predict(test[:, 1:].reshape(300, -1))).sum()
        scores.append(1 - error / np.square(test[:, 0] - train[:, 0].mean(0)).sum())
    assert any(found == pytest.approx(score, abs=1e-9) for score in scores)
    assert found > 0.9
    noisy = {"teacher": train, "cube": train + np.random.default_rng(2).standard_normal(train.shape)}
    table = compositionality(noisy, {"teacher": test, "cube": test}, seed=0)
    assert table["teacher/composition_share"] == 1
    assert 0 < table["cube/composition_share"] < 1
    assert table["shuffled_pairs/composition_r2"] < 0.05


def test_the_nearest_known_sentence_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(40, 6, generator=generator), torch.randn(15, 6, generator=generator)
    expected = NearestNeighbors(n_neighbors=1, metric="cosine").fit(bank.numpy()).kneighbors(queries.numpy())[1][:, 0]
    assert nearest(bank, queries).tolist() == expected.tolist()
    names = [f"sentence {index}" for index in range(40)]
    assert retrieve(bank, names, bank[[3, 5]] * 7) == ["sentence 3", "sentence 5"]
    assert own_sentence_recall(bank + 1e-3, bank) == 1
    assert own_sentence_recall(bank.flip(0), bank) == 0

"""The data path: standard units, what decoding needs, teachers that can be checked."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.workflows.cellular_cube.test_sentences import SHARED, needs_text
from trainbook.errors import UserError
from trainbook.workflows.cellular_cube import sentences, teachers
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.data import load_data
from trainbook.workflows.cellular_cube.teachers import TfidfSvd, load_teacher, mean_pool, minilm_folder

needs_minilm = pytest.mark.skipif(
    teachers.importlib.util.find_spec(teachers.MINILM_PACKAGE) is None, reason=f"no MiniLM: {teachers.MINILM_REMEDY}"
)


def load(tmp_path, kept=None, **fields):
    return load_data(Config.from_preset("smoke", fields), SimpleNamespace(device="cpu", data_folder=tmp_path, kept=kept or {}))


def test_vectors_are_in_standard_units_and_can_be_taken_back(tmp_path):
    data = load(tmp_path)
    train = data.train["embeddings"]
    assert train.dtype == torch.float32
    assert data.train["labels"].dtype == torch.int64
    assert [len(getattr(data, name)["labels"]) for name in ("train", "valid", "test")] == [112, 24, 24]
    torch.testing.assert_close(train.mean(0), torch.zeros(train.shape[1]), atol=1e-5, rtol=0)
    assert float(train.square().mean()) == pytest.approx(1, abs=1e-4)  # the mean predictor's squared error
    raw = data.teacher.embed(data.sentences["test"])
    np.testing.assert_allclose(data.raw(data.test["embeddings"]), raw, atol=1e-6)
    torch.testing.assert_close(data.standardised(torch.from_numpy(raw)), data.test["embeddings"])
    assert data.num_first_domain == 5
    assert data.synthetic is False
    other_seed = load(tmp_path, seed=5)
    assert other_seed.sha256 == data.sha256
    assert torch.equal(other_seed.train["embeddings"], train)


def test_what_a_run_keeps_is_the_same_data_where_the_packages_are_others(tmp_path, monkeypatch):
    data = load(tmp_path)
    monkeypatch.setattr(sentences, "PACKAGES", sentences.PACKAGES[:4])
    assert load(tmp_path).sha256 != data.sha256
    again = load(tmp_path, data.kept)
    assert again.sha256 == data.sha256
    assert (again.sentences, again.label_names, again.source, again.licence, again.kept) == (
        data.sentences, data.label_names, data.source, data.licence, data.kept,
    )  # fmt: skip
    assert all(torch.equal(again.train[name], data.train[name]) for name in data.train)


def test_no_sentence_is_in_two_splits(tmp_path):
    data = load(tmp_path, max_sentences=300)
    texts = [text for name in ("train", "valid", "test") for text in data.sentences[name]]
    assert len(set(texts)) == len(texts) == 300


@needs_text
def test_triples_point_at_a_sentence_and_its_halves(tmp_path):
    data = load(tmp_path, corpus="mixed", text_folder=str(SHARED), max_sentences=2000, held_out_sentences=400)
    for split in ("train", "test"):
        triples = data.triples[split]
        assert len(triples) > 20
        assert data.label_names[int(getattr(data, split)["labels"][triples[0, 1]])] == "first half"
        shared = 0
        for whole, first, second in triples.tolist():
            texts = [set(data.sentences[split][row].lower().split()) for row in (whole, first, second)]
            shared += len(texts[0] & (texts[1] | texts[2])) / len(texts[0])
        assert shared / len(triples) > 0.7  # a whole sentence has most words of its halves


def test_tfidf_svd_is_the_truncated_decomposition():
    texts = ["the cat sat", "the dog sat", "a dog barked", "birds sing songs", "dogs and cats sing", "the songs of birds"]
    teacher = TfidfSvd(texts)
    vectors = teacher.embed(texts)
    counts = teacher._tfidf.transform(texts).toarray()
    left, values, _ = np.linalg.svd(counts, full_matrices=False)
    expected = (left * values)[:, : teacher.width]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-4)
    assert not teacher.embed(["quux"]).any()
    assert TfidfSvd(texts[:5]).revision != teacher.revision


def test_mean_pool_leaves_padding_out():
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]])
    torch.testing.assert_close(mean_pool(states, torch.tensor([[1, 1, 0]])), torch.tensor([[2.0, 3.0]]))


def test_a_missing_or_changed_minilm_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "MINILM_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(UserError, match="--no-deps"):
        minilm_folder()
    package = tmp_path / "changed_minilm"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not run')")
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(teachers, "MINILM_PACKAGE", "changed_minilm")
    with pytest.raises(UserError, match="is not the file"):
        minilm_folder()


@needs_minilm
def test_minilm_puts_a_paraphrase_nearer_than_the_same_words():
    vectors = load_teacher("minilm", [], "cpu").embed(
        ["The bank refused the loan.", "The lender turned down the credit.", "The river bank was flooded.", "short"]
    )
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors.shape == (4, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1
    alone = load_teacher("minilm", [], "cpu").embed(["short"])
    np.testing.assert_allclose(alone[0], vectors[3], atol=1e-5)  # padding changes nothing


@needs_minilm
@needs_text
def test_minilm_vectors_of_real_text_are_read_back_the_second_time(tmp_path):
    fields = {"corpus": "mixed", "teacher": "minilm_768", "text_folder": str(SHARED)}
    first, second = (load(tmp_path, **fields) for _ in range(2))
    number, width = first.train["embeddings"].shape
    assert width == 768
    assert 100 <= number <= 112  # the three sentences of a row stay together
    assert (first.cache_hit_rate, second.cache_hit_rate) == (0, 1)
    assert torch.equal(first.train["embeddings"], second.train["embeddings"])
    assert first.num_first_domain == 151
    assert 0 < int((first.train["labels"] < 151).sum()) < number
    assert "CC BY-SA 4.0" in first.licence


def test_distilbert_without_a_network_says_what_to_do(monkeypatch):
    def unreachable(place, **options):
        raise OSError("We couldn't connect to the hub\nmore")

    monkeypatch.setattr(teachers, "_load", unreachable)
    with pytest.raises(UserError, match="--teacher minilm"):
        load_teacher("distilbert", [], "cpu")

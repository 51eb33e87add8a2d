"""Pooling by definition, slices by length against one padded batch, transformers' own model, pretrained folders, metrics."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import BertConfig, BertForSequenceClassification

from trainbook.errors import UserError
from trainbook.seeding import seed_step
from trainbook.workflows.legal_bert.config import Config
from trainbook.workflows.legal_bert.data import load_data
from trainbook.workflows.legal_bert.evaluation import answer, evaluate, export, f1_by_label
from trainbook.workflows.legal_bert.model import make_model
from trainbook.workflows.legal_bert.pictures import words_of
from trainbook.workflows.legal_bert.training import build, train

RUNTIME = SimpleNamespace(device="cpu", data_folder=None, kept={})
CONFIG = Config(width=16, num_heads=2, num_layers=2, max_sequence_length=24)


def texts(number=9, longest=20):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (number, longest), generator=generator)
    lengths = torch.randint(3, longest + 1, (number, 1), generator=generator)
    return ids.masked_fill(torch.arange(longest) >= lengths, 0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return make_model(CONFIG, 3, 50).eval()


def test_pooling_is_the_weighted_mean_and_the_maximum_of_a_texts_own_tokens(model):
    h, is_text = model.encode(texts())
    with torch.no_grad():
        weights, pooled = model.token_weights(h, is_text), model.pool(h, is_text)
        for n, length in enumerate(is_text.sum(1).tolist()):
            own = h[n, :length]
            a = (own @ model.attention.weight[0] + model.attention.bias).softmax(0)
            torch.testing.assert_close(weights[n, :length], a)
            assert (weights[n, length:] == 0).all()
            torch.testing.assert_close(pooled[n], torch.cat([a @ own, own.max(0).values]))


def test_slices_by_length_change_nothing(model):
    ids = texts()
    with torch.no_grad():
        sliced = model(ids)
        whole = model.classifier(model.pool(*model.encode(ids)))
        one_by_one = torch.cat([model(ids[n : n + 1]) for n in range(len(ids))])
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(sliced, one_by_one)


def test_with_the_first_token_it_is_the_bert_of_transformers():
    """Without transformers' extra dense layer, which is taken out of theirs by making it the identity of a small number."""
    torch.manual_seed(0)
    ours = make_model(CONFIG.model_copy(update={"pooling": "first"}), 3, 50).eval()
    theirs = BertForSequenceClassification(BertConfig(**{**ours.config.to_dict(), "attn_implementation": "eager"})).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    scale = 1e-3  # tanh(s x) / s is x for small s
    with torch.no_grad():
        theirs.bert.pooler.dense.weight.copy_(scale * torch.eye(16))
        theirs.bert.pooler.dense.bias.zero_()
        theirs.classifier.weight.div_(scale)
        ids = texts()
        expected = theirs(input_ids=ids, attention_mask=(ids != 0).long()).logits
        torch.testing.assert_close(ours(ids), expected, rtol=1e-3, atol=1e-4)


def test_a_pretrained_folder_is_loaded_and_others_are_refused(tmp_path, monkeypatch):
    torch.manual_seed(3)
    BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                             intermediate_size=32)).save_pretrained(tmp_path / "bert")  # fmt: skip
    config = Config(pretrained=str(tmp_path / "bert"))
    one, two = (make_model(config, 3, 0) for _ in range(2))
    assert one.num_labels == 3
    assert torch.equal(one.bert.embeddings.word_embeddings.weight, two.bert.embeddings.word_embeddings.weight)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries a network for a while
    with pytest.raises(UserError, match="train from scratch"):
        make_model(Config(pretrained="nobody/no-such-model"), 3, 0)


def test_checkpointed_layers_give_the_same_gradient():
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        config = CONFIG.model_copy(update={"gradient_checkpointing": is_checkpointed, "dropout": 0.0})
        model = make_model(config, 3, 50).train()
        model(texts()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_f1_is_scikit_learns():
    random = np.random.default_rng(0)
    truth, said = random.integers(0, 5, 200), random.integers(0, 6, 200) % 5
    weights = random.integers(0, 3, (10, 200)).astype(float)
    found = f1_by_label(truth, said, weights, 6)
    for row, scores in zip(weights, found, strict=True):
        expected = f1_score(truth, said, labels=range(6), average=None, sample_weight=row, zero_division=0)
        np.testing.assert_allclose(scores, expected)


def test_word_pieces_join_with_their_weights():
    tokens, weights = ["[CLS]", "in", "##sur", "##ance", "law", "[SEP]"], np.array([0.1, 0.2, 0.1, 0.2, 0.3, 0.1])
    words = words_of(tokens, weights)
    assert [word for word, _ in words] == ["[CLS]", "insurance", "law", "[SEP]"]
    assert [weight for _, weight in words] == pytest.approx([0.1, 0.5, 0.3, 0.1])


def test_metrics_and_the_report_of_where_tfidf_wins_agree():
    config = Config.from_preset("smoke", {"max_clauses": 0, "num_epochs": 1})
    data = load_data(config, RUNTIME)
    seed_step(0, 0)
    state = build(config, data, RUNTIME)
    for _ in train(config, data, state):
        pass
    metrics, found = evaluate(config, data, state), answer(config, data, state)
    for who, said in found.said.items():
        assert metrics[f"{who}/micro_f1"] == pytest.approx(f1_score(found.truth, said, average="micro"))
        assert metrics[f"{who}/macro_f1"] == pytest.approx(
            f1_score(found.truth, said, average="macro", labels=range(found.truth.max() + 1))
        )
    assert metrics["tfidf_svm/micro_f1"] > 0.6 > metrics["majority/micro_f1"]
    assert metrics["tfidf_svm/error_above_model"] == pytest.approx(metrics["model/micro_f1"] - metrics["tfidf_svm/micro_f1"])
    files = export(config, data, state, metrics)
    assert "TF-IDF wins" in files["where_tfidf_wins.txt"].splitlines()[0]
    alone = round(metrics["tfidf_svm/right_alone"] * len(found.truth))
    assert f"Texts that only TF-IDF gets right: {alone} of {len(found.truth)}" in files["where_tfidf_wins.txt"]
    assert '"WordPiece"' in files["tokenizer.json"]

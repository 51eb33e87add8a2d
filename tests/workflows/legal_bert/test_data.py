"""Splits by document, near duplicates, WordPiece, files in both shapes, and every refusal."""

import builtins
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast

from trainbook.brief import read_brief
from trainbook.errors import UserError
from trainbook.workflows.legal_bert.clauses import read_clauses
from trainbook.workflows.legal_bert.config import Config
from trainbook.workflows.legal_bert.data import (
    SPECIAL,
    label_names,
    load_data,
    to_bytes,
    to_texts,
    tokenizer_of,
    wordpiece,
)
from trainbook.workflows.legal_bert.licences import licence_clauses

BRIEF = Path(__file__).parents[4] / "shared/notes/training.yaml"
RUNTIME = SimpleNamespace(device="cpu", data_folder=None, kept={})
WORDS = ["company", "shall", "pay", "rent", "notice", "term", "audit", "books", "law", "state", "sell", "assign", "consent"]


@pytest.fixture(scope="module")
def embedded():
    return load_data(Config(), RUNTIME)


def test_the_licence_clauses_are_real_and_split_by_paragraph(embedded):
    assert embedded.synthetic is False
    assert "numpy" in embedded.source
    parts = [set(getattr(embedded, split)["groups"].tolist()) for split in ("train", "valid", "test")]
    assert not (parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2])
    assert embedded.sha256 == load_data(Config(seed=9), RUNTIME).sha256
    assert sum(len(getattr(embedded, split)["labels"]) for split in ("train", "valid", "test")) == len(licence_clauses())
    assert "numpy" in " ".join(to_texts(embedded.test["packages"]))


def test_training_texts_that_nearly_repeat_held_out_ones_are_taken_out(tmp_path):
    path = write(tmp_path / "mine.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    repeated = {"label": "law", "text": "this very text stands in each of the documents"}
    rows += [{**repeated, "doc": document} for document in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = load_data(of_file(path), RUNTIME)
    assert repeated["text"] not in to_texts(data.train["text"])
    assert to_texts(data.test["text"]).count(repeated["text"]) == 6
    assert len(data.train["labels"]) == 150 * 0.7 - 21


def test_wordpiece_encodes_as_berts_own_tokenizer_does_with_the_same_vocabulary(tmp_path):
    texts = [clause.text for clause in licence_clauses()]
    tokenizer = wordpiece(tuple(texts), 600)
    vocabulary = tokenizer.get_vocab()
    assert [tokenizer.id_to_token(i) for i in range(5)] == SPECIAL
    assert len(vocabulary) == 600
    tokenizer.no_truncation()
    tokenizer.no_padding()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    theirs = BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=True)
    for text in texts[::40]:
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"]


def test_every_process_learns_the_same_vocabulary():
    texts = tuple(clause.text for clause in licence_clauses()[:300])
    code = "from trainbook.workflows.legal_bert.data import wordpiece\n"
    code += f"print(wordpiece({texts!r}, 500).to_str())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert json.loads(there)["model"]["vocab"] == wordpiece(texts, 500).get_vocab()


def test_tokens_end_with_separators_and_padding(embedded):
    tokenizer, ids = tokenizer_of(Config(), embedded), embedded.test["ids"]
    assert (ids[:, 0] == 2).all()
    lengths = (ids != 0).sum(1)
    assert (ids.gather(1, lengths[:, None] - 1) == 3).all()
    assert (
        tokenizer.decode(ids[0].tolist()).replace(" ", "")[:20]
        == to_texts(embedded.test["text"])[0].lower().replace(" ", "")[:20]
    )


def test_texts_survive_as_bytes():
    texts = ["", "a", "§ 7: Übergabe – „Ware“", "\U0001f600"]
    assert to_texts(to_bytes(texts)) == texts


def write(path, number=120, labels=("rent", "audit", "law")):
    random = np.random.default_rng(0)
    rows = []
    for index in range(number):
        label = labels[index % len(labels)]
        text = " ".join([*random.choice(WORDS, 12), label, *random.choice(WORDS, 3)])
        rows.append({"doc": index // 4, "label": label, "text": text})
    if path.suffix == ".csv":
        path.write_text("doc,label,text\n" + "".join(f"{r['doc']},{r['label']},{r['text']}\n" for r in rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def of_file(path, **changes):
    return Config(dataset="file", data_file=str(path), vocabulary_size=100, **changes)


def test_jsonl_and_csv_are_the_same_data(tmp_path):
    one, two = (load_data(of_file(write(tmp_path / name)), RUNTIME) for name in ("mine.jsonl", "mine.csv"))
    assert one.sha256 == two.sha256
    assert one.synthetic is None
    assert label_names(one) == ["audit", "law", "rent"]
    assert torch.equal(one.test["ids"], two.test["ids"])
    alone = read_clauses(of_file(tmp_path / "mine.csv", group_field="nothing"), {})
    assert len(set(alone.groups)) == 120


def test_bad_files_are_refused_with_a_remedy(tmp_path):
    path = write(tmp_path / "mine.jsonl")
    for changes, message in (({"text_field": "body"}, "entry 1 has no text in body"), ({"label_field": "doc"}, "no text in doc")):
        with pytest.raises(UserError, match=message):
            load_data(of_file(path, **changes), RUNTIME)
    for content, message in (("{", "cannot read"), ("[1]\n", "no JSON objects")):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            load_data(of_file(tmp_path / "bad.jsonl"), RUNTIME)
    for number, labels, message in ((12, ("a", "b", "c"), "too few"), (40, ("a",), "same label"), (30, ("a", "b"), "documents")):
        with pytest.raises(UserError, match=message):
            load_data(of_file(write(tmp_path / "few.jsonl", number, labels)), RUNTIME)


def test_what_is_out_of_reach_says_what_to_do(monkeypatch):
    real = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(UserError, match="pip install datasets"):
        load_data(Config(dataset="lexglue"), RUNTIME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries a network for a while
    with pytest.raises(UserError, match="cannot get the tokenizer of nobody/no-such-model"):
        load_data(Config(pretrained="nobody/no-such-model"), RUNTIME)


def test_lexglue_keeps_its_own_split(monkeypatch):
    """The loader's own half, with what `datasets` returns put in its place."""
    rows = {
        split: [{"text": f"{word} {split} number {i} of clause", "label": i % 2} for i in range(40)]
        for split, word in (("train", "rent"), ("validation", "law"), ("test", "audit"))
    }

    class Rows(list):
        features = {"label": SimpleNamespace(names=["Adjustments", "Waivers"])}  # noqa: RUF012

    module = SimpleNamespace(
        load_dataset=lambda name, task: {split: Rows(part) for split, part in rows.items()},
        exceptions=SimpleNamespace(DatasetsError=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = load_data(Config(dataset="lexglue", vocabulary_size=100), RUNTIME)
    assert [len(part["labels"]) for part in (data.train, data.valid, data.test)] == [40, 40, 40]
    assert label_names(data) == ["Adjustments", "Waivers"]
    assert all("audit test" in text for text in to_texts(data.test["text"]))
    few = read_clauses(Config(dataset="lexglue", max_clauses=10), {})
    assert len(few.texts) == 30


def test_the_brief_loads_as_it_stands():
    if not BRIEF.is_file():
        pytest.skip(f"the file that was given is not at {BRIEF}")
    config = Config.from_preset("laptop", read_brief(BRIEF, "legal_bert", Config).overrides)
    given = {"seed": 42, "num_epochs": 100, "batch_size": 32, "precision": "mixed", "clip_norm": 1.0, "learning_rate": 2e-5}
    given |= {"max_sequence_length": 512, "weight_decay": 0.01}
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dataset": "file"}, "data_file"), ({"data_file": "x"}, "data_file"), ({"num_heads": 3}, "num_heads")],
)
def test_a_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)

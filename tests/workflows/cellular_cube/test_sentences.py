"""Corpora: real sentences, no leakage, one answer everywhere, clear errors."""

import http.server
import itertools
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from trainbook.errors import UserError
from trainbook.files import file_sha256
from trainbook.workflows.cellular_cube import sentences
from trainbook.workflows.cellular_cube.downloads import FILES, TextFile, fetch

PLACES = [folder / "shared/data/text" for folder in Path(__file__).parents]  # beside the project, or one of its worktrees
SHARED = next((place for place in PLACES if place.is_dir()), None)
needs_text = pytest.mark.skipif(SHARED is None, reason="CLINC150 and WikiSplit are not in ../shared/data/text")


def test_docstrings_are_real_sentences_of_several_packages_and_the_same_again():
    corpus = sentences.docstrings(150)
    again = sentences.docstrings(150)
    assert corpus.sentences == again.sentences
    assert 150 <= len(corpus.sentences) <= 210
    assert len(corpus.label_names) == len(sentences.PACKAGES)
    assert set(corpus.labels) == set(range(len(corpus.label_names)))
    assert corpus.synthetic is False
    assert all(name in corpus.source for name in ("numpy", "scipy", "torch"))
    assert "Apache-2.0" in corpus.licence
    normalised = [sentences.normalised(text) for text in corpus.sentences]
    assert len(set(normalised)) == len(normalised)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Compute the inverse of a matrix. It must be\nsquare.\n\nMore.", "Compute the inverse of a matrix."),
        ("Return a :class:`~torch.Tensor` of the ``mean``\nof all entries", "Return a Tensor of the mean of all entries."),
        ("See :func:`the mean <numpy.mean>` of all entries.", "See mean of all entries."),
        ("foo(x) -> y", ""),
        ("lower case is a fragment of something else.", ""),
        ("Too short.", ""),
        ("", ""),
    ],
)
def test_first_sentence_has_no_markup_and_is_prose(docstring, expected):
    assert sentences.first_sentence(docstring) == expected


def test_source_with_a_bad_escape_or_bad_syntax_does_no_harm():
    assert list(sentences.first_sentences('def f():\n    "Find every \\d number in text."\n')) == []  # has a backslash
    assert list(sentences.first_sentences("def f(:\n")) == []
    source = 'class A:\n    """A class that says what it is."""\n'
    assert list(sentences.first_sentences(source)) == ["A class that says what it is."]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 1.0])
def test_near_duplicates_match_all_pairs(threshold):
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(list("abcdefgh"), generator.integers(1, 6))) for _ in range(120)]
    sets = [set(text.split()) for text in texts]
    reached = np.eye(len(texts), dtype=bool)
    for i, j in itertools.combinations(range(len(texts)), 2):
        reached[i, j] = reached[j, i] = len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold - 1e-12
    for _ in range(8):  # the transitive closure by squaring
        reached = (reached.astype(int) @ reached.astype(int)) > 0
    groups = sentences.near_duplicates(texts, threshold)
    np.testing.assert_array_equal(groups[:, None] == groups[None], reached)


def corpus_of(groups):
    texts = [f"sentence number {index}" for index in range(len(groups))]
    groups = np.array(groups)
    return sentences.Corpus(texts, np.zeros(len(groups), dtype=np.int64), ("one",), groups, "made up", "none", True)


def test_no_group_is_on_two_sides_and_every_sentence_once():
    generator = np.random.default_rng(1)
    corpus = corpus_of(np.unique(generator.integers(0, 60, 200), return_inverse=True)[1])
    parts = sentences.split(corpus, 150, 40)
    groups = [set(corpus.groups[part]) for part in parts.values()]
    assert not any(a & b for a, b in itertools.combinations(groups, 2))
    joined = np.concatenate(list(parts.values()))
    assert len(set(joined)) == len(joined) == 150
    assert abs(len(parts["test"]) - 20) <= 10
    assert abs(len(parts["valid"]) - 20) <= 10


def test_too_few_or_too_similar_sentences_are_refused():
    with pytest.raises(UserError, match="too few"):
        sentences.split(corpus_of(range(20)), 20, 16)
    with pytest.raises(UserError, match="near copies"):
        sentences.split(corpus_of([0] * 100), 100, 20)


def test_a_text_file_is_read_line_by_line_without_repeats(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("The first line.\n\nthe FIRST line!\nÜber den Fluss.\n---\n", encoding="utf-8")
    corpus = sentences.text_file(path)
    assert corpus.sentences == ["The first line.", "Über den Fluss."]
    assert corpus.synthetic is None
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="cannot read text_file"):
        sentences.text_file(path)


def test_wikisplit_rows_that_share_a_sentence_share_a_group(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text(
        "A and B .\tA is here . <::::> B is here .\n"
        "A and C .\tA is here . <::::> C is here .\n"
        "D and E .\tD is here . <::::> E is here .\n"
    )
    corpus = sentences.wikisplit([path])
    assert len(corpus.sentences) == 8
    assert corpus.groups.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert corpus.labels.tolist() == [0, 1, 2, 0, 2, 0, 1, 2]
    assert corpus.triples.tolist() == [[0, 1, 2], [3, 1, 4], [5, 6, 7]]
    path.write_text("no splitter here\n")
    with pytest.raises(UserError, match="without"):
        sentences.wikisplit([path])


@needs_text
def test_published_corpora_have_their_published_sizes(tmp_path):
    clinc = sentences.clinc150(fetch(FILES["clinc150"], str(SHARED), tmp_path))
    assert len(clinc.label_names) == 151  # Larson et al. 2019: 150 intents, and out of scope
    assert 23_000 < len(clinc.sentences) <= 23_700
    wiki = sentences.wikisplit(fetch(FILES["wikisplit"], str(SHARED), tmp_path))
    assert len(sentences.wikisplit_triples(fetch(FILES["wikisplit"], str(SHARED), tmp_path))) == 15_000
    parts = sentences.split(wiki, 4000, 1000)
    groups = [set(wiki.groups[part]) for part in parts.values()]
    assert not any(a & b for a, b in itertools.combinations(groups, 2))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def test_a_file_is_downloaded_once_checked_and_refused_when_it_is_another(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "text.tsv").write_text("whole\tfirst <::::> second\n")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path / "site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/text.tsv"
    file = TextFile("wikisplit/text.tsv", url, file_sha256(tmp_path / "site" / "text.tsv"))
    try:
        (path,) = fetch((file,), "", tmp_path / "data")
    finally:
        server.shutdown()
        server.server_close()
    assert path.read_text().startswith("whole")
    assert fetch((file,), "", tmp_path / "data") == [path]  # without the server
    path.write_text("another")
    with pytest.raises(UserError, match="SHA-256"):
        fetch((file,), "", tmp_path / "data")
    with pytest.raises(UserError, match=r"cannot get wikisplit/text\.tsv from http"):
        fetch((file,), "", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="there is no"):
        fetch((file,), str(tmp_path / "empty"), tmp_path / "data")

"""A teacher from a file: each row stays with its line, what does not fit is said, and a run with it resumes and travels."""

import functools
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from tests.driving import Drive, assert_same_run
from tests.workflows.cellular_cube.test_data import load
from trainbook import bundles
from trainbook.errors import UserError
from trainbook.records import RunFolder
from trainbook.spec import RunSpec
from trainbook.workflows.cellular_cube import sentences
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.phrase_scores import PhraseJudge
from trainbook.workflows.cellular_cube.vector_file import FileTeacher, read_vectors

WIDTH = 24


@functools.cache
def real_sentences():
    return sentences.docstrings(150).sentences


def write(folder, number=200, change=None, suffix=".npy"):
    """Real sentences with blank, wordless and repeated lines between; SYNTHETIC vectors, a row per line that is not blank.

    Returns:
        The fields of a config, and the row of each line.
    """
    lines = real_sentences()[:number]
    lines[7:7] = ["", lines[2].upper(), "   "]
    lines[3:3] = ["---", lines[1]]
    rows = np.random.default_rng(0).standard_normal((sum(bool(line.strip()) for line in lines), WIDTH)).astype(np.float32)
    (folder / "mine.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = rows if change is None else change(rows)
    path = folder / f"mine{suffix}"
    if suffix == ".npy":
        np.save(path, rows)
    else:
        save_file({"vectors": torch.from_numpy(rows).bfloat16()}, str(path))
    of_line: dict[str, np.ndarray] = {}
    for line, row in zip((line.strip() for line in lines if line.strip()), rows, strict=False):
        of_line.setdefault(line.lower(), row)
    return {"corpus": "file", "text_file": str(folder / "mine.txt"), "teacher": "file", "vector_file": str(path)}, of_line


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_every_sentence_keeps_the_row_of_its_line(tmp_path, suffix):
    fields, of_line = write(tmp_path, suffix=suffix)
    data = load(tmp_path, **fields)
    assert "---" not in data.sentences["train"]
    for split in ("train", "valid", "test"):
        expected = np.stack([of_line[sentence.lower()] for sentence in data.sentences[split]])
        tolerance = 1e-5 if suffix == ".npy" else 0.03  # bfloat16 in the file
        np.testing.assert_allclose(data.raw(getattr(data, split)["embeddings"]), expected, atol=tolerance)
    assert data.synthetic is None
    assert "the user's own" in data.source
    again = load(tmp_path, **fields)
    assert again.sha256 == data.sha256
    other, _ = write(tmp_path, change=lambda rows: rows + 1)
    assert suffix != ".npy" or load(tmp_path, **other).sha256 != data.sha256


def test_rows_lie_on_disk_until_they_are_asked_for(tmp_path):
    np.save(tmp_path / "mine.npy", np.zeros((5, 3), dtype=np.float16))
    assert isinstance(read_vectors(tmp_path / "mine.npy"), np.memmap)
    assert read_vectors(tmp_path / "mine.npy").dtype == np.float16


def bad(rows, row, value):
    rows = rows.copy()
    rows[row, 3] = value
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"has \d+ rows, and text_file has \d+ lines that are not blank"),
        (lambda rows: rows.astype(np.int64), r"holds int64 of shape"),
        (lambda rows: rows[:, 0], r"holds float32 of shape \(\d+,\)"),
        (lambda rows: rows[:, :0], r"holds float32 of shape \(\d+, 0\)"),
        (lambda rows: bad(rows, slice(20, 60), np.nan), r"holds NaN for \d+ train sentences, the first: '"),
        (lambda rows: bad(rows, slice(20, 60), np.inf), "holds infinite numbers, the first for '"),
        (lambda rows: bad(rows.astype(np.float64), slice(20, 60), 1e300), "holds infinite numbers, the first for '"),
        (lambda rows: np.ones_like(rows), "the same vector"),
        (lambda rows: rows.astype(object), "Python objects"),
    ],
)
def test_what_does_not_fit_is_said_before_training(tmp_path, change, message):
    fields, _ = write(tmp_path, change=change)
    with pytest.raises(UserError, match=message):
        load(tmp_path, **fields)


def test_a_dropped_line_may_lack_its_vector(tmp_path):
    fields, _ = write(tmp_path, change=lambda rows: bad(rows, slice(3, 5), np.nan))  # of "---" and of a repeated line
    assert bool(load(tmp_path, **fields).train["embeddings"].isfinite().all())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("no.npy", None, "No such file"), ("no.safetensors", b"\x00" * 20, "cannot read"), ("text.npy", b"words", "cannot read")],
)
def test_a_file_that_cannot_be_read_is_said(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_vectors(tmp_path / name)
    save_file({"a": torch.zeros(3, 2), "b": torch.zeros(3, 2)}, str(tmp_path / "two.safetensors"))
    np.savez(tmp_path / "many.npz", a=np.zeros((3, 2)))
    for other, complaint in (("two.safetensors", "2 tensors, not one"), ("many.npz", "several arrays")):
        with pytest.raises(UserError, match=complaint):
            read_vectors(tmp_path / other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "file"}, "needs vector_file"),
        ({"vector_file": "mine.npy"}, "vector_file goes with file"),
        ({"teacher": "file", "vector_file": "mine.npy"}, "set corpus = file"),
        ({"further_teachers": ["tfidf_svd"]}, "must differ"),
        ({"further_teachers": "minilm,minilm"}, "must differ"),
        ({"further_teachers": ["file"]}, "needs vector_file"),
        ({"text_weight": 0.1, "decoder_epochs": 0}, "set decoder_epochs"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Config(**changes)


def test_new_text_has_no_vector_and_is_judged_without(tmp_path):
    fields, of_line = write(tmp_path)
    corpus = sentences.text_file(Path(fields["text_file"]))
    teacher = FileTeacher(Path(fields["vector_file"]), corpus)
    known, vectors = corpus.sentences[:6], torch.from_numpy(teacher.embed(corpus.sentences[:6]))
    np.testing.assert_array_equal(vectors, [of_line[sentence.lower()] for sentence in known])
    assert np.isnan(teacher.embed(["never written"])).all()
    judge = PhraseJudge(teacher, vectors, torch.arange(6), known, vectors, torch.arange(6), known)
    found = judge.scores(known)
    np.testing.assert_allclose(found["reencoded_cosine"], 1, atol=1e-6)
    assert judge.scores([*known[:5], "never written"]).keys() == {"token_f1", "chrf"}
    decoded = {"cube": [*known[:5], "new"], "teacher": known, "mean_vector": [known[0]] * 6}
    table = judge.table(decoded, "teacher", ("mean_vector",), 0)
    assert table["teacher/reencoded_cosine"] == pytest.approx(1)
    assert not {"cube/reencoded_cosine", "cube/reencoded_cosine_share"} & table.keys()
    assert "cube/token_f1_share" in table


def test_text_and_vectors_go_into_a_bundle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields, _ = write(Path())
    spec = RunSpec(workflow="cellular_cube", preset="smoke", overrides=fields, run_id="mine")
    box = bundles.build_box(spec, tmp_path / "box")
    assert RunSpec.read(box / "run.toml").config().vector_file == "mine.npy"
    for name in ("mine.txt", "mine.npy"):
        assert (box / name).read_bytes() == Path(name).read_bytes()
        assert f"  {name}\n" in (box / "SHA256SUMS").read_text()


@pytest.mark.parametrize("role", ["teacher", pytest.param("further_teachers", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, role):
    """The file's teacher, or TF-IDF with the file's vectors beside it, and the text decoder in the loss."""
    fields, _ = write(tmp_path, change=None if role == "teacher" else lambda rows: bad(rows, slice(0, 200, 9), np.nan))
    fields |= {"text_weight": 0.5, "fine_tune_epochs": 0, "max_sentences": 96, "held_out_sentences": 32}
    if role == "further_teachers":
        fields |= {"teacher": "tfidf_svd", "further_teachers": ["file"]}
    whole = Drive(tmp_path / "runs", "whole", fields, "cellular_cube", checkpoint_seconds=3600)
    assert whole() == 0
    records = [json.loads(line) for line in whole.folder.metrics.read_text().splitlines()]
    assert list(dict.fromkeys(record["stage"] for record in records)) == ["text_decoder", "main", "readout"]
    first = next(record["step"] for record in records if record["stage"] == "main")
    for step in (first + 2,) if role == "teacher" else (first - 4, first + 2):
        stopped = Drive(tmp_path / "runs", "stopped", fields, "cellular_cube", signal_step=step, signal_number=signal.SIGTERM)
        assert stopped() == 0
    assert json.loads(RunFolder(tmp_path / "runs" / "stopped").run_json.read_text())["status"] == "stopped"
    assert Drive(tmp_path / "runs", "stopped", fields, "cellular_cube")() == 0
    assert_same_run(stopped.folder, whole.folder)

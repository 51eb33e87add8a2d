"""Held-out scores of the model beside TF-IDF with a linear SVM and the commonest label, and where TF-IDF wins."""

# N texts, R resamples, C labels

import functools
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from tabulate import tabulate

from trainbook.comparison import ABOVE, HIGH, LOW
from trainbook.data import Data
from trainbook.state import TrainState
from trainbook.workflows.legal_bert.config import Config
from trainbook.workflows.legal_bert.data import label_names, to_texts, tokenizer_of
from trainbook.workflows.legal_bert.training import MODEL, logits_of

RESAMPLES = 1000
RESAMPLE_SEED = 20_261_128
ENDS = (0.025, 0.975)
SVM, MAJORITY = "tfidf_svm", "majority"


@dataclass(frozen=True)
class Answers:
    """Labels of the test texts: the truth, (N,), and what each one said, by name."""

    truth: np.ndarray
    said: dict[str, np.ndarray]


def answer(config: Config, data: Data, state: TrainState) -> Answers:
    """Everybody's answers on the test texts."""
    train, test = (tuple(to_texts(part["text"])) for part in (data.train, data.test))
    labels = tuple(data.train["labels"].tolist())
    model = logits_of(state.modules[MODEL].eval(), data.test).argmax(1).cpu().numpy()
    commonest = np.bincount(labels).argmax()
    said = {"model": model, SVM: np.array(_svm(train, labels, test)), MAJORITY: np.full(len(test), commonest)}
    return Answers(data.test["labels"].cpu().numpy(), said)


@functools.lru_cache(maxsize=2)
def _svm(train: tuple[str, ...], labels: tuple[int, ...], test: tuple[str, ...]) -> tuple[int, ...]:
    """Words and pairs of words, weighted by rarity, and a linear support vector machine: LexGLUE's baseline."""
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LinearSVC(C=1.0, random_state=0))
    return tuple(pipeline.fit(train, labels).predict(test).tolist())


def evaluate(config: Config, data: Data, state: TrainState) -> dict[str, float]:
    """Metrics named "<who>/<metric>", with 95 % intervals from resampled documents.

    micro_f1: share of texts that are right, as each has one label. macro_f1: mean over labels of F1. f1@<label>: of one label.
    "<baseline>/error_above_model": share of wrong answers less the model's. tfidf_svm/right_alone and model/right_alone: share of
    texts that only one of the two gets right.
    """
    found, names = answer(config, data, state), label_names(data)
    _, place = np.unique(data.test["groups"].cpu().numpy(), return_inverse=True)
    drawn = np.random.default_rng(RESAMPLE_SEED).multinomial(
        place.max() + 1, np.full(place.max() + 1, 1 / (place.max() + 1)), RESAMPLES
    )
    weights = np.concatenate([np.ones((1, len(place))), drawn[:, place]])
    right = {who: (said == found.truth).astype(float) for who, said in found.said.items()}
    shares = {who: weights @ values / weights.sum(1) for who, values in right.items()}
    metrics: dict[str, float] = {}
    for who, said in found.said.items():
        scores = f1_by_label(found.truth, said, weights, len(names))
        metrics |= _interval(f"{who}/micro_f1", shares[who]) | _interval(f"{who}/macro_f1", scores.mean(1))
        if who != "model":
            metrics |= _interval(f"{who}/error{ABOVE}model", shares["model"] - shares[who])
        if who != MAJORITY:
            metrics |= {f"{who}/f1@{_plain(name)}": float(score) for name, score in zip(names, scores[0], strict=True)}
    metrics["model/right_alone"] = float((right["model"] * (1 - right[SVM])).mean())
    metrics[f"{SVM}/right_alone"] = float((right[SVM] * (1 - right["model"])).mean())
    return metrics


def f1_by_label(truth: np.ndarray, said: np.ndarray, weights: np.ndarray, num_labels: int) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN) of each label, 0 where it is neither said nor true, (R, C).

    Args:
        truth, said: (N,).
        weights: (R, N).
        num_labels: C.
    """
    is_true, is_said = ((values[:, None] == np.arange(num_labels)).astype(float) for values in (truth, said))
    hits, total = weights @ (is_true * is_said), weights @ (is_true + is_said)
    return np.where(total > 0, 2 * hits / np.where(total > 0, total, 1), 0)


def export(config: Config, data: Data, state: TrainState, metrics: dict[str, float]) -> dict[str, str]:
    """Where TF-IDF wins and where it does not, as text; and the tokenizer, for whoever loads the weights."""
    found, names = answer(config, data, state), label_names(data)
    rows = []
    for index, name in enumerate(names):
        ours, theirs = (metrics[f"{who}/f1@{_plain(name)}"] for who in ("model", SVM))
        number = int((data.train["labels"] == index).sum()), int((found.truth == index).sum())
        rows.append([name, *number, f"{ours:.3f}", f"{theirs:.3f}", f"{ours - theirs:+.3f}"])
    rows.sort(key=lambda row: float(row[-1]))
    headers = ["label", "train", "test", "F1 of BERT", "F1 of TF-IDF + SVM", "difference"]
    lines = [_verdict(metrics), "", tabulate(rows, headers), ""]
    texts, packages = to_texts(data.test["text"]), to_texts(data.test["packages"])
    ours, theirs = found.said["model"], found.said[SVM]
    for title, chosen in (
        ("Texts that only TF-IDF gets right", (theirs == found.truth) & (ours != found.truth)),
        ("Texts that only BERT gets right", (ours == found.truth) & (theirs != found.truth)),
    ):
        lines.append(f"{title}: {chosen.sum()} of {len(texts)}")
        wrong = np.flatnonzero(chosen)
        for index in wrong[:: max(1, len(wrong) // 8)][:8]:
            said = ours[index] if ours[index] != found.truth[index] else theirs[index]
            lines.append(f"- {names[found.truth[index]]}, taken for {names[said]}: {texts[index][:160]}")
            if packages[index]:
                lines.append(f"  in {packages[index][:80]}")
        lines.append("")
    return {"where_tfidf_wins.txt": "\n".join(lines), "tokenizer.json": tokenizer_of(config, data).to_str()}


def _verdict(metrics: dict[str, float]) -> str:
    low, high = (-metrics[f"{SVM}/error{ABOVE}model{end}"] for end in (HIGH, LOW))
    difference = metrics[f"{SVM}/micro_f1"] - metrics["model/micro_f1"]
    word = "TF-IDF wins" if low > 0 else "BERT wins" if high < 0 else "no evidence that either is better"
    return f"TF-IDF + SVM less BERT, micro-F1: {difference:+.3f} ({low:+.3f} to {high:+.3f}): {word}."


def _plain(name: str) -> str:
    """A label's name inside the name of a metric, where a slash has a meaning."""
    return name.replace("/", " or ")


def _interval(name: str, resamples: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(resamples[1:], ENDS)
    return {name: float(resamples[0]), name + LOW: float(low), name + HIGH: float(high)}

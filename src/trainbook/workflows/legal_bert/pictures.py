"""The pictures of a run: attention drawn over words, the confusion matrix, F1 by label, and where TF-IDF wins."""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from trainbook.attention import attention_weights
from trainbook.data import Data
from trainbook.plots import draw_attention, heatmap, new_figure
from trainbook.state import TrainState
from trainbook.workflows.legal_bert.config import Config
from trainbook.workflows.legal_bert.data import label_names, to_texts, tokenizer_of
from trainbook.workflows.legal_bert.evaluation import MAJORITY, SVM, Answers, answer, f1_by_label
from trainbook.workflows.legal_bert.model import PADDING
from trainbook.workflows.legal_bert.training import MODEL

NUM_TEXTS, MAX_WORDS = 6, 60  # of the picture of words
LINE_CHARACTERS = 150
MAX_LABELS = 30  # in the confusion matrix and among the bars; the commonest ones
NUM_BINS = 4  # of text length, with equally many texts in each
MAX_TOKENS = 24  # in the heatmaps of attention


def draw_data(config: Config, data: Data) -> dict[str, Figure]:
    """Labels by number of training texts, and how long the texts are."""
    figure, axes = new_figure(2, width=5.0, height=3.4)
    names, numbers = label_names(data), np.bincount(data.train["labels"].cpu().numpy())
    order = numbers.argsort()[-MAX_LABELS:]
    axes[0, 0].barh([names[index] for index in order], numbers[order], color="#7fb3e6")
    axes[0, 0].set(title="labels", xlabel="training texts")
    axes[0, 0].tick_params(axis="y", labelsize=7)
    for split in ("train", "valid", "test"):
        lengths = (getattr(data, split)["ids"] != PADDING).sum(1).cpu().numpy()
        axes[0, 1].hist(lengths, 24, density=True, histtype="step", label=f"{split}, {len(lengths)} texts")
    axes[0, 1].set(title=f"length; at most {config.max_sequence_length} are read", xlabel="tokens", ylabel="density")
    axes[0, 1].legend(fontsize=8)
    return {"data": figure}


def draw(config: Config, data: Data, state: TrainState, history: list[dict[str, Any]]) -> dict[str, Figure]:
    """Confusion, F1 by label, where TF-IDF wins, attention over words and between tokens."""
    found, names = answer(config, data, state), label_names(data)
    figures = {
        "confusion": draw_confusion(found, names),
        "f1_by_label": draw_f1(found, names),
        "where_tfidf_wins": draw_lengths(data, found),
    }
    if config.pooling == "attention_max":
        figures["attention_over_words"] = draw_words(config, data, state, found, names)
    ids = data.test["ids"][:1]
    length = min(int((ids != PADDING).sum()), MAX_TOKENS)
    tokens = [tokenizer_of(config, data).id_to_token(token) for token in ids[0, :length].tolist()]
    figures["attention"] = draw_attention(attention_weights(state.modules[MODEL], ids[:, :length]), tokens)
    return figures


def draw_confusion(found: Answers, names: list[str]) -> Figure:
    """Share of each true label that the model takes for each other."""
    shown = np.sort(np.bincount(found.truth, minlength=len(names)).argsort()[::-1][:MAX_LABELS])
    table = np.array([[((found.truth == i) & (found.said["model"] == j)).sum() for j in shown] for i in shown], float)
    table /= table.sum(1, keepdims=True).clip(1)
    figure, axes = new_figure(width=3.4 + 0.3 * len(shown), height=2.6 + 0.26 * len(shown))
    heatmap(axes[0, 0], table[::-1], "what the model took each label for", "said", "true", "share of the true label's texts")
    axes[0, 0].set_xticks(range(len(shown)), [names[index] for index in shown], rotation=60, ha="right", fontsize=7)
    axes[0, 0].set_yticks(range(len(shown)), [names[index] for index in shown[::-1]], fontsize=7)
    for row, column in zip(*np.nonzero(table[::-1] >= 0.05), strict=True):
        value = table[::-1][row, column]
        axes[0, 0].text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color="black" if value > 0.6 else "white"
        )
    return figure


def draw_f1(found: Answers, names: list[str]) -> Figure:
    """F1 of each label by the model and by TF-IDF, where TF-IDF is furthest ahead at the top."""
    once = np.ones((1, len(found.truth)))
    ours, theirs = (f1_by_label(found.truth, found.said[who], once, len(names))[0] for who in ("model", SVM))
    order = (theirs - ours).argsort()[-MAX_LABELS:]
    figure, axes = new_figure(width=6.4, height=1.2 + 0.3 * len(order))
    places = np.arange(len(order))
    axes[0, 0].hlines(places, ours[order], theirs[order], color="0.8", lw=2)
    axes[0, 0].plot(ours[order], places, "o", color="#2b7bba", label="BERT")
    axes[0, 0].plot(theirs[order], places, "s", color="tab:orange", label="TF-IDF + SVM")
    axes[0, 0].set_yticks(places, [names[index] for index in order], fontsize=8)
    axes[0, 0].set(title="F1 by label, on the test texts", xlabel="F1")
    axes[0, 0].grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    return figure


def draw_lengths(data: Data, found: Answers) -> Figure:
    """Share of right answers over the length of the text, and who is right alone."""
    words = np.array([len(text.split()) for text in to_texts(data.test["text"])])
    bins = np.array_split(words.argsort(kind="stable"), NUM_BINS)
    labels = [f"{words[part].min()} to {words[part].max()}" for part in bins]
    figure, axes = new_figure(2, width=4.6, height=3.0)
    for who, colour in (("model", "#2b7bba"), (SVM, "tab:orange"), (MAJORITY, "0.6")):
        right = found.said[who] == found.truth
        shares = np.array([right[part].mean() for part in bins])
        error = 1.96 * np.sqrt(shares * (1 - shares) / [len(part) for part in bins])
        name = {"model": "BERT", SVM: "TF-IDF + SVM"}.get(who, "commonest label")
        axes[0, 0].errorbar(labels, shares, error, fmt="o-", color=colour, capsize=2, ms=4, lw=1.2, label=name)
    axes[0, 0].set(title="right answers, with 95 % intervals", xlabel="words in the text", ylabel="share", ylim=(0, 1.02))
    axes[0, 0].legend(fontsize=7, ncols=3, loc="lower center")
    ours, theirs = (found.said[who] == found.truth for who in ("model", SVM))
    shares = {
        "both right": ours & theirs,
        "BERT alone": ours & ~theirs,
        "TF-IDF alone": ~ours & theirs,
        "neither": ~ours & ~theirs,
    }
    places = np.arange(len(shares))[::-1]
    axes[0, 1].barh(places, [part.mean() for part in shares.values()], color="#7fb3e6")
    for place, part in zip(places, shares.values(), strict=True):
        axes[0, 1].annotate(f"{part.mean():.1%}", (0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes[0, 1].set_yticks(places, list(shares))
    axes[0, 1].set(title="who is right", xlabel="share of the test texts")
    return figure


@torch.no_grad()
def draw_words(config: Config, data: Data, state: TrainState, found: Answers, names: list[str]) -> Figure:
    """Test texts with each word shaded by the legal attention's weight, half of them wrongly labelled where there are so many."""
    model, tokenizer = state.modules[MODEL].eval(), tokenizer_of(config, data)
    is_right = found.said["model"] == found.truth
    wrong = _spread(np.flatnonzero(~is_right), NUM_TEXTS // 2)
    chosen = [*_spread(np.flatnonzero(is_right), NUM_TEXTS - len(wrong)), *wrong]
    shown = []
    for index in chosen:
        ids = data.test["ids"][index : index + 1]
        ids = ids[:, : int((ids != PADDING).sum())]
        weights = model.token_weights(*model.encode(ids))[0].cpu().numpy()
        shown.append(words_of([tokenizer.id_to_token(token) for token in ids[0].tolist()], weights)[:MAX_WORDS])
    num_lines = max(sum(len(word) + 1 for word, _ in words) // LINE_CHARACTERS + 1 for words in shown)
    figure, axes = new_figure(num_rows=len(chosen), width=10.4, height=0.4 + 0.2 * num_lines)
    for panel, index, words in zip(axes[:, 0], chosen, shown, strict=True):
        top = max(weight for _, weight in words)
        column = line = 0
        for word, weight in words:
            if column + len(word) > LINE_CHARACTERS:
                column, line = 0, line + 1
            box = {"facecolor": "tab:orange", "alpha": weight / top, "edgecolor": "none", "pad": 0.8}
            style = {"fontsize": 8, "family": "monospace", "va": "top", "parse_math": False}
            height = 0.95 - line / num_lines
            panel.text(column / LINE_CHARACTERS, height, word, bbox=box, transform=panel.transAxes, **style)
            column += len(word) + 1
        truth, said = names[found.truth[index]], names[found.said["model"][index]]
        title = f"{truth}: right" if truth == said else f"{truth}, taken for {said}"
        panel.set_title(f"{title}; darkest word: {top:.0%} of the attention", fontsize=9, loc="left", parse_math=False)
        panel.set_axis_off()
    return figure


def _spread(indices: np.ndarray, most: int) -> np.ndarray:
    """At most so many of some indices, from all over them, since the texts of a label stand together."""
    return indices[np.linspace(0, len(indices) - 1, min(most, len(indices))).astype(int)]


def words_of(tokens: list[str], weights: np.ndarray) -> list[tuple[str, float]]:
    """Word pieces joined to words, each with the sum of its pieces' weights; [CLS] and [SEP] stay as they are."""
    words: list[tuple[str, float]] = []
    for token, weight in zip(tokens, weights.tolist(), strict=True):
        if token.startswith("##") and words:
            words[-1] = (words[-1][0] + token[2:], words[-1][1] + weight)
        else:
            words.append((token, weight))
    return words

"""What a linear classifier can read from vectors, beside the teacher, PCA of the same width, and labels that mean nothing."""

# N sentences, D numbers of a vector

import re
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

MAX_ITERATIONS = 200
MAX_EXAMPLES = 5000  # of training, drawn by seed


def probe_accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, seed: int) -> float:
    """Test accuracy of multinomial logistic regression on standardised features, L2 with C = 1.

    Args:
        train, test: (N, D) and (M, D).
        train_labels, test_labels: (N,) and (M,) int64.
        seed: draws at most `MAX_EXAMPLES` of the training ones.

    Returns:
        NaN where the training labels are all the same.
    """
    chosen = np.random.default_rng(seed).permutation(len(train))[:MAX_EXAMPLES]
    if len(np.unique(train_labels[chosen])) < 2:
        return float("nan")
    scaler = StandardScaler().fit(train[chosen])
    model = LogisticRegression(max_iter=MAX_ITERATIONS, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of a probe do not matter
        model.fit(scaler.transform(train[chosen]), train_labels[chosen])
    return float((model.predict(scaler.transform(test)) == test_labels).mean())


def probe_table(
    features: Mapping[str, tuple[np.ndarray, np.ndarray]],
    labels: tuple[np.ndarray, np.ndarray],
    name: str,
    seed: int,
    control: str = "teacher",
) -> dict[str, float]:
    """Accuracy of each one's features; of the most frequent label; and of the control's with shuffled training labels.

    Args:
        features: who ("cube", "teacher", "pca", ...) to (training, test) features.
        labels: training and test labels.
        name: of the metric, such as "intent_accuracy".
        seed: of the draw and the shuffle.
        control: whose features the shuffled labels are probed on.

    Returns:
        "<who>/<name>", with "chance" and "shuffled_labels" among who; empty where there is only one label.
    """
    train_labels, test_labels = labels
    if len(np.unique(train_labels)) < 2:
        return {}
    found = {
        f"{who}/{name}": probe_accuracy(train, train_labels, test, test_labels, seed) for who, (train, test) in features.items()
    }
    shuffled = np.random.default_rng(seed).permutation(train_labels)
    found[f"shuffled_labels/{name}"] = probe_accuracy(features[control][0], shuffled, features[control][1], test_labels, seed)
    values, counts = np.unique(train_labels, return_counts=True)
    found[f"chance/{name}"] = float((test_labels == values[counts.argmax()]).mean())
    return found


def surface_labels(sentences: Sequence[str]) -> dict[str, np.ndarray]:
    """What a rule can read off each text, (N,) int64: whether it has a number, has a name, and is long.

    A name is a capitalised word after the first, so lower-case corpora have none; sentence vectors know nothing of single
    tokens, so presence is all that is asked. Long is more than ten words.
    """
    rules = {
        "has_number": lambda text: bool(re.search(r"\d", text)),
        "has_name": lambda text: bool(re.search(r"\s[A-Z][a-z]+", text)),
        "is_long": lambda text: len(text.split()) > 10,
    }
    return {name: np.array([int(rule(text)) for text in sentences], dtype=np.int64) for name, rule in rules.items()}

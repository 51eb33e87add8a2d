"""Whether a sentence's vector follows from those of the two sentences it was split into."""

# N triples, D numbers of a vector

import numpy as np
from sklearn.linear_model import RidgeCV

PENALTIES = np.logspace(-2, 5, 8)


def composition_r2(train: np.ndarray, test: np.ndarray) -> float:
    """Held-out R^2 of a ridge regression of the whole's vector on its halves', the penalty chosen on the training triples.

    R^2 = 1 - sum |z - z^|^2 / sum |z - mean z of train|^2, over all numbers together.

    Args:
        train, test: (N, 3, D): whole, first half, second half.
    """
    halves, whole = train[:, 1:].reshape(len(train), -1), train[:, 0]
    predicted = RidgeCV(PENALTIES).fit(halves, whole).predict(test[:, 1:].reshape(len(test), -1))
    return float(1 - np.square(test[:, 0] - predicted).sum() / np.square(test[:, 0] - whole.mean(0)).sum())


def compositionality(
    train: dict[str, np.ndarray], test: dict[str, np.ndarray], seed: int, reference: str = "teacher"
) -> dict[str, float]:
    """R^2 of each one's vectors, as a share of the reference's, and the floor where halves are those of other sentences.

    Args:
        train, test: who to (N, 3, D) triples of their vectors.
        seed: of the shuffle of halves.
        reference: whose R^2 the share is of.

    Returns:
        "<who>/composition_r2", "<who>/composition_share" and "shuffled_pairs/composition_r2".
    """
    values = {who: composition_r2(train[who], test[who]) for who in train}
    generator = np.random.default_rng(seed)
    broken = []
    for triples in (train[reference], test[reference]):
        other = generator.permutation(len(triples))
        broken.append(np.concatenate([triples[:, :1], triples[other, 1:]], axis=1))
    return {
        **{f"{who}/composition_r2": value for who, value in values.items()},
        **{f"{who}/composition_share": value / values[reference] for who, value in values.items() if values[reference] > 0},
        "shuffled_pairs/composition_r2": composition_r2(*broken),
    }

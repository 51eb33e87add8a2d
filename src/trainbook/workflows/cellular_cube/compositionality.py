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
    """R^2 with which each one's halves foretell the reference's whole, also as a share of what the reference's own halves do.

    The whole is always the reference's: one's own may be easier to foretell because less of the sentence is left in it.
    The floor gives each whole the halves of another sentence.

    Args:
        train, test: who to (N, 3, D) triples of their vectors.
        seed: of the shuffle of halves.
        reference: whose whole is foretold.

    Returns:
        "<who>/composition_r2", "<who>/composition_share" and "shuffled_pairs/composition_r2".
    """

    def joined(whole: np.ndarray, halves: np.ndarray) -> np.ndarray:
        return np.concatenate([whole[:, :1], halves[:, 1:]], axis=1)

    values = {who: composition_r2(*(joined(part[reference], part[who]) for part in (train, test))) for who in train}
    generator = np.random.default_rng(seed)
    broken = [joined(part[reference], generator.permutation(part[reference])) for part in (train, test)]
    return {
        **{f"{who}/composition_r2": value for who, value in values.items()},
        **{f"{who}/composition_share": value / values[reference] for who, value in values.items() if values[reference] > 0},
        "shuffled_pairs/composition_r2": composition_r2(*broken),
    }

"""Is a decoded sentence a meaningful phrase: six measures, each with what the teacher reaches and what chance reaches."""

# N sentences, D numbers of a vector

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainbook.comparison import HIGH, LOW
from trainbook.near_duplicates import words
from trainbook.workflows.cellular_cube.retrieval import nearest
from trainbook.workflows.cellular_cube.teachers import Teacher

CHRF_ORDER, CHRF_BETA = 6, 2
INTERPOLATION = (0.5, 0.3, 0.15, 0.05)  # weights of trigram, bigram, unigram and uniform probabilities
NUM_RESAMPLES = 1000
BOUNDARY = "\n"  # before the first and after the last word; no word contains it
HEADLINE = ("reencoded_cosine", "label_match", "token_f1", "chrf")  # measures that have a floor and a ceiling


def token_f1(decoded: str, source: str) -> float:
    """Harmonic mean of precision and recall of words, counted with repeats, as SQuAD does; 0 where none is shared."""
    found, wanted = Counter(words(decoded)), Counter(words(source))
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total()) if common else 0.0


def chrf(decoded: str, source: str) -> float:
    """Character n-gram F score, n = 1..6, recall weighing twice as much as precision; spaces do not count. In [0, 1].

    F = (1 + b^2) P R / (b^2 P + R), P and R averaged over the n for which both texts have n-grams.

    Source: Popovic (2015), chrF: character n-gram F-score for automatic MT evaluation.
    """
    precisions, recalls = [], []
    texts = ["".join(text.split()) for text in (decoded, source)]
    for n in range(1, CHRF_ORDER + 1):
        found, wanted = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        if found and wanted:
            common = (found & wanted).total()
            precisions.append(common / found.total())
            recalls.append(common / wanted.total())
    precision, recall = (float(np.mean(values)) if values else 0.0 for values in (precisions, recalls))
    weighted = CHRF_BETA**2 * precision + recall
    return (1 + CHRF_BETA**2) * precision * recall / weighted if weighted else 0.0


class TrigramModel:
    """Words' probabilities given the two before them: relative frequencies of three orders and a uniform one, interpolated.

    p(w | u, v) = a_3 c(uvw) / c(uv) + a_2 c(vw) / c(v) + a_1 c(w) / c + a_0 / (V + 1); an order whose context was never seen
    passes its weight on to the lower ones. The V known words, the end of a sentence among them, and one unknown word.

    Args:
        sentences: of training.

    Source: Jelinek, Mercer (1980), Interpolated estimation of Markov source parameters.
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        self._counts = [Counter() for _ in range(3)]
        self._contexts = [Counter() for _ in range(3)]
        for sentence in sentences:
            for gram in trigrams(sentence):
                for order in range(3):
                    self._counts[order][gram[2 - order :]] += 1
                    self._contexts[order][gram[2 - order : 2]] += 1
        self.vocabulary = {gram[0] for gram in self._counts[0]}

    def probability(self, gram: tuple[str, str, str]) -> float:
        """p(w | u, v) of (u, v, w); a word that is not known counts as the unknown one."""
        probability, weight = 0.0, 0.0
        for order, share in zip((2, 1, 0), INTERPOLATION, strict=False):
            weight += share
            context = self._contexts[order][gram[2 - order : 2]]
            if context:
                probability += weight * self._counts[order][gram[2 - order :]] / context
                weight = 0.0
        return probability + (INTERPOLATION[3] + weight) / (len(self.vocabulary) + 1)

    def perplexity(self, sentences: Sequence[str]) -> float:
        """Exp of the mean surprise per word, ends of sentences included."""
        surprises = [-math.log(self.probability(gram)) for sentence in sentences for gram in trigrams(sentence)]
        return math.exp(sum(surprises) / len(surprises))

    def seen_share(self, sentences: Sequence[str]) -> float:
        """Share of the sentences' trigrams, with boundaries, that training had."""
        grams = [gram for sentence in sentences for gram in trigrams(sentence)]
        return sum(gram in self._counts[2] for gram in grams) / len(grams)


def trigrams(sentence: str) -> list[tuple[str, str, str]]:
    """Of words, with two boundaries before the first and one after the last."""
    padded = [BOUNDARY, BOUNDARY, *words(sentence), BOUNDARY]
    return list(zip(padded, padded[1:], padded[2:], strict=False))


def distinct_2(sentences: Sequence[str]) -> float:
    """Different word pairs as a share of all word pairs; low when a decoder repeats itself.

    Source: Li et al. (2016), A Diversity-Promoting Objective Function for Neural Conversation Models.
    """
    pairs = [pair for sentence in map(words, sentences) for pair in itertools.pairwise(sentence)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


class PhraseJudge:
    """Scores decoded sentences against their sources.

    Args:
        teacher: embeds what was decoded.
        train_vectors: (M, D) raw, of the training sentences.
        train_labels: (M,).
        train_sentences: M, also what fluency is measured by.
        vectors, labels, sentences: the same of the N sources.
    """

    def __init__(
        self,
        teacher: Teacher,
        train_vectors: Tensor,
        train_labels: Tensor,
        train_sentences: Sequence[str],
        vectors: Tensor,
        labels: Tensor,
        sentences: Sequence[str],
    ) -> None:
        self._teacher, self._train_vectors, self._train_labels = teacher, train_vectors.cpu(), train_labels.cpu()
        self._vectors, self._labels, self._sentences = vectors.cpu(), labels.cpu(), sentences
        self._language = TrigramModel(train_sentences)
        self._of_text: dict[str, np.ndarray] = {}  # decoders often write the same sentence

    def scores(self, decoded: Sequence[str]) -> dict[str, np.ndarray]:
        """Per sentence, (N,) each: cosine of the decoded sentence's vector with the source's; whether the known sentence
        nearest to it has the source's label; token F1; chrF. Without the first two where the teacher cannot embed new text.
        """
        new = sorted(set(decoded) - self._of_text.keys())
        if new:
            self._of_text.update(zip(new, self._teacher.embed(new), strict=True))
        again = torch.from_numpy(np.stack([self._of_text[text] for text in decoded]))
        found = {
            "token_f1": np.array([token_f1(text, source) for text, source in zip(decoded, self._sentences, strict=True)]),
            "chrf": np.array([chrf(text, source) for text, source in zip(decoded, self._sentences, strict=True)]),
        }
        if again.isnan().any():
            return found
        return {
            "reencoded_cosine": functional.cosine_similarity(again, self._vectors).numpy().astype(float),
            "label_match": (self._train_labels[nearest(self._train_vectors, again)] == self._labels).numpy().astype(float),
            **found,
        }

    def fluency(self, decoded: Sequence[str]) -> dict[str, float]:
        """Perplexity and share of seen trigrams under the training sentences, distinct-2, and the share of unique outputs."""
        return {
            "perplexity": self._language.perplexity(decoded),
            "seen_trigrams": self._language.seen_share(decoded),
            "distinct_2": distinct_2(decoded),
            "unique_outputs": len(set(decoded)) / len(decoded),
        }

    def table(
        self, decoded: Mapping[str, Sequence[str]], ceiling: str, floors: Sequence[str], seed: int, prefix: str = ""
    ) -> dict[str, float]:
        """All measures of everybody, and what share of the way from floor to ceiling each one goes.

        Args:
            decoded: who ("cube", "teacher", "pca", "mean_vector", "random_vector") to N sentences.
            ceiling: who decodes the teacher's own vectors.
            floors: who decode vectors that know nothing; for each measure the best of them is the floor.
            seed: of the bootstrap.
            prefix: before each measure's name, such as "retrieved_".

        Returns:
            "<who>/<prefix><measure>"; for all but floors and ceiling also "..._share" with "_low" and "_high", where the
            ceiling is above the floor.
        """
        scores = {who: self.scores(texts) for who, texts in decoded.items()}
        found = {}
        for who, texts in decoded.items():
            values = {name: float(value.mean()) for name, value in scores[who].items()} | self.fluency(texts)
            found |= {f"{who}/{prefix}{name}": value for name, value in values.items()}
        for name in (name for name in HEADLINE if all(name in of_one for of_one in scores.values())):
            floor = max((scores[who][name] for who in floors), key=lambda values: values.mean())
            for who in decoded.keys() - {ceiling, *floors}:
                share, low, high = share_of_the_way(scores[who][name], floor, scores[ceiling][name], seed)
                if not math.isnan(share):
                    key = f"{who}/{prefix}{name}_share"
                    found |= {key: share, key + LOW: low, key + HIGH: high}
        return found


def share_of_the_way(values: np.ndarray, floor: np.ndarray, ceiling: np.ndarray, seed: int) -> tuple[float, float, float]:
    """(mean values - mean floor) / (mean ceiling - mean floor) and its 95 % interval by resampling sentences.

    Args:
        values, floor, ceiling: (N,), of the same sentences.
        seed: of the resampling.

    Returns:
        Share, low and high; NaN where the ceiling is not above the floor by more than chance.

    Source: Efron (1979), Bootstrap methods; the percentile interval.
    """
    counts = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), NUM_RESAMPLES)
    columns = np.stack([values - floor, ceiling - floor], 1)
    above = columns.mean(0)
    resampled = counts @ columns
    if np.quantile(resampled[:, 1], 0.025) <= 0:
        return math.nan, math.nan, math.nan
    resampled = resampled[resampled[:, 1] > 0]
    low, high = np.quantile(resampled[:, 0] / resampled[:, 1], [0.025, 0.975])
    return float(above[0] / above[1]), float(low), float(high)

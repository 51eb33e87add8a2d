"""The cube's data: sentences, their teacher's vectors in standard units, and what decoding and probes need beside them."""

# N sentences, D numbers of a vector

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainbook.data import Data
from trainbook.runtime import Runtime
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.embedding_cache import EmbeddingCache
from trainbook.workflows.cellular_cube.sentences import Corpus, kept_corpora, read_corpora, split
from trainbook.workflows.cellular_cube.teachers import Teacher, load_teacher

logger = logging.getLogger("trainbook")

MEGABYTE = 1_000_000
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class SentenceData(Data):
    """Vectors of sentences: each split has "embeddings", (N, D) in standard units, and "labels", (N,) int64.

    Attributes:
        sentences: split to its N texts.
        label_names: what the labels mean.
        num_first_domain: labels below this belong to the first domain: CLINC150's with corpus = mixed, else the lower half.
        mean: (D,) of the raw training vectors; on the CPU.
        scale: root of the mean square over all entries of (raw training vector - mean): one number for all dimensions.
        teacher: what made the vectors, and can embed what is decoded.
        cache_hit_rate: share of the vectors that were read instead of computed.
        triples: split to (R, 3) int64, rows of a whole sentence and of the halves it was split into; WikiSplit's only.
    """

    sentences: Mapping[str, tuple[str, ...]]
    label_names: tuple[str, ...]
    num_first_domain: int
    mean: Tensor
    scale: float
    teacher: Teacher
    cache_hit_rate: float
    triples: Mapping[str, Tensor]

    def standardised(self, raw: Tensor) -> Tensor:
        """(raw - mean) / scale."""
        return (raw - self.mean.to(raw)) / self.scale

    def raw(self, standardised: Tensor) -> Tensor:
        """The teacher's units again: standardised * scale + mean."""
        return standardised * self.scale + self.mean.to(standardised)


def load_data(config: Config, runtime: Runtime) -> SentenceData:
    """Sentences of the config's corpus, split, and their vectors; the split depends on the corpus only, not on the seed.

    Raises:
        UserError: when the text or the teacher cannot be had, or there are too few sentences.
    """
    corpora = read_corpora(config, runtime.data_folder, runtime.kept)
    sentences: dict[str, list[str]] = {name: [] for name in SPLITS}
    labels: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    triples: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    label_names: list[str] = []
    for corpus in corpora:
        parts = split(corpus, config.max_sentences // len(corpora), config.held_out_sentences // len(corpora))
        for name, indices in parts.items():
            triples[name].append(_triples_within(corpus.triples, indices, len(sentences[name])))
            sentences[name] += [corpus.sentences[index] for index in indices]
            labels[name].append(corpus.labels[indices] + len(label_names))
        label_names += corpus.label_names
    teacher = load_teacher(config.teacher, sentences["train"], runtime.device)
    vectors, hit_rate = _vectors(config, runtime, teacher, sentences)
    mean, scale = standard_units(vectors["train"])
    tensors = {
        name: {
            "embeddings": torch.from_numpy((vectors[name] - mean) / np.float32(scale)),
            "labels": torch.from_numpy(np.concatenate(labels[name])),
        }
        for name in SPLITS
    }
    return SentenceData(
        **tensors,
        source=f"{_joined(corpora, 'source')}; vectors: {teacher.description}",
        licence=_joined(corpora, "licence"),
        sha256=_sha256(sentences, labels, teacher),
        synthetic=corpora[0].synthetic,
        kept=kept_corpora(config, corpora),
        sentences={name: tuple(texts) for name, texts in sentences.items()},
        label_names=tuple(label_names),
        num_first_domain=len(corpora[0].label_names) if len(corpora) > 1 else (len(label_names) + 1) // 2,
        mean=torch.from_numpy(mean),
        scale=scale,
        teacher=teacher,
        cache_hit_rate=hit_rate,
        triples={name: torch.from_numpy(np.concatenate(found)) for name, found in triples.items()},
    ).to(runtime.device)


def standard_units(raw: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean per dimension, (D,) float32, and root mean square over all entries of what differs from it, of (N, D) vectors.

    In these units the mean squared error of predicting the mean is 1, so a model's is its fraction of variance unexplained.
    """
    mean = raw.mean(0, dtype=np.float64)
    return mean.astype(np.float32), float(np.sqrt(np.square(raw - mean).mean()))


def _vectors(
    config: Config, runtime: Runtime, teacher: Teacher, sentences: Mapping[str, list[str]]
) -> tuple[dict[str, np.ndarray], float]:
    if config.teacher == "tfidf_svd":  # quicker to compute than to read, and another one for every training set
        return {name: teacher.embed(texts) for name, texts in sentences.items()}, 0.0
    cache = EmbeddingCache(runtime.data_folder / "embeddings", config.embedding_cache_megabytes * MEGABYTE)
    identity = (teacher.model, teacher.revision, teacher.pooling)
    every = [text for texts in sentences.values() for text in texts]
    rows = cache.fetch(identity, teacher.width, every, teacher.embed)
    logger.info("teacher vectors: %d of %d were kept from before (%.0f %%)", cache.hits, len(every), 100 * cache.hit_rate)
    borders = np.cumsum([len(texts) for texts in sentences.values()])[:-1]
    return dict(zip(sentences, np.split(rows, borders), strict=True)), cache.hit_rate


def _triples_within(triples: np.ndarray, indices: np.ndarray, offset: int) -> np.ndarray:
    """Those triples of a corpus that are wholly in a part of it, as rows of that part, which begins at `offset`."""
    rows = np.full(max(int(triples.max(initial=-1)), int(indices.max())) + 1, -1)
    rows[indices] = np.arange(len(indices)) + offset
    found = rows[triples]
    return found[(found >= 0).all(1)]


def _joined(corpora: list[Corpus], name: str) -> str:
    return "; ".join(getattr(corpus, name) for corpus in corpora)


def _sha256(sentences: Mapping[str, list[str]], labels: Mapping[str, list[np.ndarray]], teacher: Teacher) -> str:
    """Of texts, labels and the teacher's identity: a vector's last bits depend on the processor, and are left out."""
    digest = hashlib.sha256("\n".join((teacher.model, teacher.revision, teacher.pooling)).encode())
    for name in sentences:
        digest.update("\n".join(sentences[name]).encode())
        digest.update(np.concatenate(labels[name]).tobytes())
    return digest.hexdigest()

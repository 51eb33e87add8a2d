"""The cube's data: sentences, their teacher's vectors in standard units, and what decoding and probes need beside them."""

# N sentences, D numbers of a vector

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainbook.data import Data
from trainbook.errors import UserError
from trainbook.runtime import Runtime
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.embedding_cache import EmbeddingCache
from trainbook.workflows.cellular_cube.readout import present_rows
from trainbook.workflows.cellular_cube.sentences import Corpus, kept_corpora, read_corpora, split
from trainbook.workflows.cellular_cube.similarity import linear_cka
from trainbook.workflows.cellular_cube.teachers import Teacher, TfidfSvd, load_teacher
from trainbook.workflows.cellular_cube.vector_file import FileTeacher

logger = logging.getLogger("trainbook")

MEGABYTE = 1_000_000
SPLITS = ("train", "valid", "test")
LEAST_VECTORS = 2  # of a further teacher in each split


class Further(NamedTuple):
    """A further teacher, whose vectors are in each split under its name: (N, D) in standard units, NaN where there is none.

    Attributes:
        mean, scale: of its raw training vectors, as of `SentenceData`.
        agreement: with the main teacher: linear CKA of the training vectors of sentences that both have, in [0, 1].
    """

    mean: Tensor
    scale: float
    agreement: float


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
        further: name of each further teacher to what is known of it.
    """

    sentences: Mapping[str, tuple[str, ...]]
    label_names: tuple[str, ...]
    num_first_domain: int
    mean: Tensor
    scale: float
    teacher: Teacher
    cache_hit_rate: float
    triples: Mapping[str, Tensor]
    further: Mapping[str, Further] = field(default_factory=dict, kw_only=True)

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
    teacher, *others = [
        FileTeacher(Path(config.vector_file), corpora[0])
        if name == "file"
        else load_teacher(name, sentences["train"], runtime.device)
        for name in (config.teacher, *config.further_teachers)
    ]
    vectors, hit_rate = _vectors(config, runtime, teacher, sentences)
    _check_all_there(vectors, sentences)
    mean, scale = standard_units(vectors["train"])
    tensors = {
        name: {
            "embeddings": torch.from_numpy((vectors[name] - mean) / np.float32(scale)),
            "labels": torch.from_numpy(np.concatenate(labels[name])),
        }
        for name in SPLITS
    }
    further = {}
    for name, other in zip(config.further_teachers, others, strict=True):
        found, _ = _vectors(config, runtime, other, sentences)
        further[name] = _add_further(name, {part: torch.from_numpy(rows) for part, rows in found.items()}, tensors)
    descriptions = "; further vectors: ".join(one.description for one in (teacher, *others))
    return SentenceData(
        **tensors,
        source=f"{_joined(corpora, 'source')}; vectors: {descriptions}",
        licence=_joined(corpora, "licence"),
        sha256=_sha256(sentences, labels, (teacher, *others)),
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
        further=further,
    ).to(runtime.device)


def _check_all_there(vectors: Mapping[str, np.ndarray], sentences: Mapping[str, list[str]]) -> None:
    for name in SPLITS:
        missing = np.flatnonzero(np.isnan(vectors[name]).any(1))
        if len(missing):
            raise UserError(
                f"vector_file holds NaN for {len(missing)} {name} sentences, the first: {sentences[name][missing[0]]!r}",
                "leave such lines and rows out; only a further teacher may lack vectors",
            )
    if not np.ptp(vectors["train"], axis=0).any():
        raise UserError("the teacher gives all training sentences the same vector", "give vectors that differ")


def _add_further(name: str, raw: Mapping[str, Tensor], tensors: Mapping[str, dict[str, Tensor]]) -> Further:
    """Put a further teacher's vectors into the splits; a row of zeros, as TF-IDF has for unknown words, is none either."""
    there = {part: present_rows(rows) & rows.any(1) for part, rows in raw.items()}
    for part, present in there.items():
        if int(present.sum()) < LEAST_VECTORS:
            few = f"the further teacher {name} has {int(present.sum())} {part} vectors"
            raise UserError(few, f"give at least {LEAST_VECTORS}, or leave this teacher out")
    mean, scale = standard_units(raw["train"][there["train"]].numpy())
    if not scale:
        raise UserError(f"the further teacher {name} gives all training sentences the same vector", "leave it out")
    for part, present in there.items():
        rows = (raw[part] - torch.from_numpy(mean)) / scale
        tensors[part][name] = rows.masked_fill(~present[:, None], torch.nan)
    train, both = tensors["train"], there["train"]
    return Further(torch.from_numpy(mean), scale, min(1.0, linear_cka(train["embeddings"][both], train[name][both])))


def standard_units(raw: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean per dimension, (D,) float32, and root mean square over all entries of what differs from it, of (N, D) vectors.

    In these units the mean squared error of predicting the mean is 1, so a model's is its fraction of variance unexplained.
    """
    mean = raw.mean(0, dtype=np.float64)
    return mean.astype(np.float32), float(np.sqrt(np.square(raw - mean).mean()))


def _vectors(
    config: Config, runtime: Runtime, teacher: Teacher, sentences: Mapping[str, list[str]]
) -> tuple[dict[str, np.ndarray], float]:
    if isinstance(teacher, TfidfSvd | FileTeacher):  # quicker than to read them from the cache, and others for every training set
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


def _sha256(sentences: Mapping[str, list[str]], labels: Mapping[str, list[np.ndarray]], teachers: Sequence[Teacher]) -> str:
    """Of texts, labels and the teachers' identities: a vector's last bits depend on the processor, and are left out."""
    identities = [part for teacher in teachers for part in (teacher.model, teacher.revision, teacher.pooling)]
    digest = hashlib.sha256("\n".join(identities).encode())
    for name in sentences:
        digest.update("\n".join(sentences[name]).encode())
        digest.update(np.concatenate(labels[name]).tobytes())
    return digest.hexdigest()

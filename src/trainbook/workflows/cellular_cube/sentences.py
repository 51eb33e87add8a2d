"""Sentences to carry through the cube, with labels and provenance, split so that no sentence's near copy is held out from it."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from trainbook.errors import UserError
from trainbook.near_duplicates import near_pairs, words
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.downloads import FILES, fetch

# Module, distribution and licence; all are requirements of the kit, or of one of them.
PACKAGES = (
    ("numpy", "numpy", "BSD-3-Clause"),
    ("scipy", "scipy", "BSD-3-Clause"),
    ("sklearn", "scikit-learn", "BSD-3-Clause"),
    ("skimage", "scikit-image", "BSD-3-Clause"),
    ("networkx", "networkx", "BSD-3-Clause"),
    ("matplotlib", "matplotlib", "PSF-style"),
    ("torch", "torch", "BSD-3-Clause"),
    ("torchvision", "torchvision", "BSD-3-Clause"),
    ("transformers", "transformers", "Apache-2.0"),
)
SPLIT_SEED = 20_261_127  # of the choice and the split of sentences, which belong to the data, not to the run
NEAR_DUPLICATE = 0.7  # Jaccard similarity of two sentences' word sets from which they stay on one side of the split
SPARE = 1.3  # sentences read per sentence wanted, for those that turn out to be duplicates
MIN_WORDS, MAX_WORDS = 4, 40
WIKISPLIT_PARTS = ("unsplit", "first half", "second half")
KEPT = "docstrings.json"
SPLITTER = "<::::>"  # between the halves in WikiSplit's second column


@dataclass(frozen=True)
class Corpus:
    """Sentences, each once.

    Attributes:
        sentences: texts, no two equal after `normalised`.
        labels: (N,) int64, indices into `label_names`.
        label_names: what the labels mean.
        groups: (N,) int64; sentences of a group are never on two sides of a split.
        source, licence: where they come from.
        synthetic: False for what people wrote, None where nobody told.
        triples: (R, 3) indices of a whole sentence and of the halves it was split into.
        rows: (N,) int64, of a text file: which of its lines that are not blank each sentence was.
        num_rows: how many such lines there are.
    """

    sentences: list[str]
    labels: np.ndarray
    label_names: tuple[str, ...]
    groups: np.ndarray
    source: str
    licence: str
    synthetic: bool | None
    triples: np.ndarray = field(default_factory=lambda: np.empty((0, 3), dtype=np.int64))
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    num_rows: int = 0


def read_corpora(config: Config, data_folder: Path, kept: Mapping[str, str]) -> list[Corpus]:
    """The corpora that a config names: one, or CLINC150 and WikiSplit for "mixed".

    Args:
        config: which, and how many sentences.
        data_folder: for downloads.
        kept: what the run kept, see `kept_corpora`: other versions of the packages have other docstrings.

    Raises:
        UserError: when a file cannot be read or had.
    """
    if config.corpus == "docstrings":
        return [_docstrings(**json.loads(kept[KEPT])) if KEPT in kept else docstrings(config.max_sentences)]
    if config.corpus == "file":
        return [text_file(Path(config.text_file))]
    names = ("clinc150", "wikisplit") if config.corpus == "mixed" else (config.corpus,)
    read = {"clinc150": clinc150, "wikisplit": wikisplit}
    return [read[name](fetch(FILES[name], config.text_folder, data_folder)) for name in names]


def kept_corpora(config: Config, corpora: Sequence[Corpus]) -> dict[str, str]:
    """What `read_corpora` needs to find the same sentences on a machine with other packages: file name to text."""
    if config.corpus != "docstrings":
        return {}
    (corpus,) = corpora
    fields = {name: getattr(corpus, name) for name in ("sentences", "label_names", "source", "licence")}
    return {KEPT: json.dumps({**fields, "labels": corpus.labels.tolist()}, indent=0)}


def normalised(sentence: str) -> str:
    """Lower-case words and numbers with single spaces: what makes two sentences the same."""
    return " ".join(words(sentence))


def docstrings(number: int) -> Corpus:
    """First sentences of docstrings in installed scientific packages, about equally many from each; the label is the package.

    Files are read without being imported, in an order that depends on their names only.

    Args:
        number: how many are wanted; there may be fewer, or up to a third more.
    """
    quota = round(SPARE * number / len(PACKAGES)) + 1
    texts, labels, names, versions = [], [], [], []
    for module, distribution, licence in PACKAGES:
        found = _of_package(module, quota)
        if found:
            texts += found
            labels += [len(names)] * len(found)
            names.append(module)
            versions.append(f"{distribution} {importlib.metadata.version(distribution)} ({licence})")
    texts, labels = _without_repeats(texts, labels)
    source = "first sentences of the docstrings of " + ", ".join(version.rpartition(" ")[0] for version in versions)
    return _docstrings(texts, labels, names, source, "each package's: " + ", ".join(versions))


def _docstrings(sentences: list[str], labels: Sequence[int], label_names: Sequence[str], source: str, licence: str) -> Corpus:
    groups = near_duplicates(sentences, NEAR_DUPLICATE)
    return Corpus(sentences, np.array(labels), tuple(label_names), groups, source, licence, synthetic=False)


def _of_package(module: str, quota: int) -> list[str]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return []
    root = Path(spec.origin).parent
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    names = [name for name in names if "test" not in name and "_vendor" not in name and "externals" not in name]
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        for sentence in first_sentences((root / name).read_text(encoding="utf-8", errors="replace")):
            found.setdefault(normalised(sentence), sentence)
            if len(found) == quota:
                return list(found.values())
    return list(found.values())


def first_sentences(source: str) -> Iterator[str]:
    """First sentences of the docstrings in Python source; those that are not plain English prose are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            sentence = first_sentence(ast.get_docstring(node) or "")
            if sentence:
                yield sentence


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring without markup, or "" where that is no prose."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    paragraph = re.sub(r":[\w:+-]+:`~?(?:[^`<]*<)?([^`>]*)>?`", lambda match: match[1].rpartition(".")[2], paragraph)
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph.replace("`", "").replace("*", ""))[0].strip()
    sentence = sentence.rstrip(".:") + "."
    letters = sum(character.isalpha() or character == " " for character in sentence)
    is_prose = (
        MIN_WORDS <= len(sentence.split()) <= MAX_WORDS
        and sentence.isascii()
        and sentence[0].isupper()
        and letters >= 0.9 * len(sentence)
        and not re.search(r"\b(Args|Returns|Parameters):|[<>{}=|\\\[\]]|--|::", sentence)
    )
    return sentence if is_prose else ""


def clinc150(paths: Sequence[Path]) -> Corpus:
    """Queries to an assistant; the label is one of 150 intents, or "oos" for out of scope."""
    content = json.loads(paths[0].read_text())
    pairs = [pair for split in sorted(content) for pair in content[split]]
    names = tuple(sorted({intent for _, intent in pairs}))
    index = {name: label for label, name in enumerate(names)}
    texts, labels = _without_repeats([query for query, _ in pairs], [index[intent] for _, intent in pairs])
    source = "CLINC150 (Larson et al. 2019), github.com/clinc/oos-eval"
    return Corpus(texts, labels, names, np.arange(len(texts)), source, "CC BY 3.0", synthetic=False)


def wikisplit(paths: Sequence[Path]) -> Corpus:
    """Sentences of Wikipedia and the two that each was split into; the label is which; the three share a group."""
    rows = wikisplit_triples(paths)
    texts = [text for row in rows for text in row]
    kept, labels, row_of = _without_repeats(texts, [*range(3)] * len(rows), np.arange(len(rows)).repeat(3).tolist())
    index = {normalised(text): place for place, text in enumerate(kept)}
    triples = np.array([[index[normalised(text)] for text in row] for row in rows], dtype=np.int64)
    # A half that two rows share ties both rows together.
    ties = [(int(row_of[place]), row) for row, places in enumerate(triples) for place in places]
    groups = _components(np.array(ties).T, len(rows))[row_of]
    source = "WikiSplit (Botha et al. 2018), tune, validation and test, github.com/google-research-datasets/wiki-split"
    return Corpus(kept, labels, WIKISPLIT_PARTS, groups, source, "CC BY-SA 4.0", synthetic=False, triples=triples)


def wikisplit_triples(paths: Sequence[Path]) -> list[tuple[str, str, str]]:
    """(whole sentence, first half, second half) of every row.

    Raises:
        UserError: when a row has another form.
    """
    triples = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            whole, _, halves = line.partition("\t")
            first, splitter, second = halves.partition(SPLITTER)
            if not splitter:
                raise UserError(f"{path} has a line without {SPLITTER}: {line[:60]!r}", "fetch WikiSplit's file again")
            triples.append((whole.strip(), first.strip(), second.strip()))
    return triples


def text_file(path: Path) -> Corpus:
    """The user's own sentences, one a line; without labels.

    Raises:
        UserError: when it cannot be read.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read text_file {path}: {error}", "name a UTF-8 text file with one sentence a line") from None
    lines = [line for line in lines if line]
    kept = [row for row, line in enumerate(lines) if words(line)]
    texts, labels, rows = _without_repeats([lines[row] for row in kept], [0] * len(kept), kept)
    groups, source = near_duplicates(texts, NEAR_DUPLICATE), f"file {path.name}"
    return Corpus(texts, labels, ("unlabelled",), groups, source, "the user's", None, rows=rows, num_rows=len(lines))


def _without_repeats(texts: list[str], *columns: list[int]) -> tuple:
    """The first of sentences that are the same, with what the other columns hold for it as int64 arrays."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        first.setdefault(normalised(text), index)
    kept = list(first.values())
    return [texts[index] for index in kept], *(np.array(column, dtype=np.int64)[kept] for column in columns)


def near_duplicates(texts: Sequence[str], threshold: float) -> np.ndarray:
    """Groups of sentences that are joined by chains of pairs whose word sets have Jaccard similarity >= threshold.

    Args:
        texts: N sentences.
        threshold: in (0, 1].

    Returns:
        (N,) int64 group numbers.
    """
    return _components(near_pairs(texts, threshold), len(texts))


def _components(pairs: np.ndarray, number: int) -> np.ndarray:
    """Group of each of so many nodes, (number,), of a graph with these edges, (2, pairs)."""
    rows, columns = pairs
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(number, number))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def split(corpus: Corpus, number: int, held_out: int) -> dict[str, np.ndarray]:
    """Indices of the sentences of train, valid and test: whole groups in an order that depends on the corpus only.

    Args:
        corpus: of at least 2 held_out sentences.
        number: sentences wanted in all; fewer when there are fewer.
        held_out: of these for valid and test together, half each.

    Raises:
        UserError: when there are too few sentences, or all are near copies of each other.
    """
    if len(corpus.sentences) < max(2 * held_out, 6):
        raise UserError(
            f"{len(corpus.sentences)} different sentences are too few to hold {held_out} out: {corpus.source}",
            "give more sentences, or lower held_out_sentences and max_sentences",
        )
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    place = torch.randperm(int(corpus.groups.max()) + 1, generator=generator).numpy()
    order = np.argsort(place[corpus.groups], kind="stable")[:number]
    # A group that straddles a border goes to the earlier part as a whole.
    begins = np.flatnonzero(np.diff(corpus.groups[order], prepend=-1))
    borders = [begins[min(np.searchsorted(begins, end), len(begins) - 1)] for end in (held_out - held_out // 2, held_out)]
    parts = dict(zip(("test", "valid", "train"), np.split(order, borders), strict=True))
    if min(map(len, parts.values())) == 0:
        raise UserError(f"{corpus.source}: too many sentences are near copies of each other", "give more different sentences")
    return {name: parts[name] for name in ("train", "valid", "test")}

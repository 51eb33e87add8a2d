"""The data of a run: texts split by document, near duplicates taken out of training, tokens by a WordPiece learned from it."""

# N texts, L tokens, C labels

import functools
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.model_selection import GroupShuffleSplit
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer

from trainbook.data import Data, content_sha256
from trainbook.errors import UserError
from trainbook.near_duplicates import near_pairs
from trainbook.runtime import Runtime
from trainbook.workflows.legal_bert.clauses import SPLIT_SEED, Clauses, kept_clauses, read_clauses
from trainbook.workflows.legal_bert.config import Config
from trainbook.workflows.legal_bert.licences import NEAR_REPEAT, WORDS_COMPARED

VALID_SHARE, TEST_SHARE = 0.1, 0.2
LEAST_TEXTS = 5  # of a label
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def load_data(config: Config, runtime: Runtime) -> Data:
    """Texts and their tokens, on the runtime's device.

    Every split has ids, (N, L) int64 with 0 behind a text's end; labels, (N,) int64; groups, (N,) int64, the document; and
    text, label_text and packages, (N, bytes) uint8, which `to_texts` reads.

    Raises:
        UserError: when texts cannot be had or there are too few of a label.
    """
    clauses = read_clauses(config, runtime.kept)
    names = sorted(set(clauses.labels))
    rare = [name for name in names if clauses.labels.count(name) < LEAST_TEXTS]
    if rare or len(names) < 2:
        what = f"too few texts of: {', '.join(rare)}" if rare else "all texts have the same label"
        raise UserError(what, f"give at least {LEAST_TEXTS} texts of each of two or more labels")
    parts = _split(clauses)
    texts = [clauses.texts[index] for index in parts["train"]]
    if config.pretrained:
        encode = functools.partial(_encode_pretrained, pretrained_tokenizer(config.pretrained), config.max_sequence_length)
    else:
        encode = functools.partial(_encode, wordpiece(tuple(texts), config.vocabulary_size), config.max_sequence_length)
    numbers = {name: index for index, name in enumerate(names)}
    groups = {name: index for index, name in enumerate(dict.fromkeys(clauses.groups))}
    splits = {}
    for name, part in parts.items():
        chosen = [clauses.texts[index] for index in part]
        labels = [clauses.labels[index] for index in part]
        splits[name] = {
            "ids": encode(chosen),
            "labels": torch.tensor([numbers[label] for label in labels]),
            "groups": torch.tensor([groups[clauses.groups[index]] for index in part]),
            "text": to_bytes(chosen),
            "label_text": to_bytes(labels),
            "packages": to_bytes([clauses.packages[index] for index in part]),
        }
    digest = content_sha256([to_bytes(clauses.texts), to_bytes(clauses.labels), to_bytes(clauses.groups)])
    synthetic = None if clauses.is_real is None else not clauses.is_real
    return Data(
        **splits,
        source=clauses.source,
        licence=clauses.licence,
        sha256=digest,
        synthetic=synthetic,
        kept=kept_clauses(config, clauses),
    ).to(runtime.device)


def _split(clauses: Clauses) -> dict[str, np.ndarray]:
    """Indices of train, valid and test by document; what nearly repeats a held-out text is taken out of train."""
    if any(clauses.parts):
        parts = np.array(clauses.parts)
        split = {name: np.flatnonzero(parts == name) for name in ("train", "valid", "test")}
    else:
        groups = np.array(clauses.groups)
        if len(set(clauses.groups)) < 10:
            raise UserError(f"{len(set(clauses.groups))} documents cannot be split", "give texts of at least 10 documents")
        rest, test = next(GroupShuffleSplit(1, test_size=TEST_SHARE, random_state=SPLIT_SEED).split(groups, groups=groups))
        cut = GroupShuffleSplit(1, test_size=VALID_SHARE / (1 - TEST_SHARE), random_state=SPLIT_SEED)
        train, valid = (rest[part] for part in next(cut.split(rest, groups=groups[rest])))
        split = {"train": train, "valid": valid, "test": test}
    held_out = np.concatenate([split["valid"], split["test"]])
    number = len(split["train"])
    texts = [clauses.texts[index] for index in (*split["train"], *held_out)]
    first, second = near_pairs(texts, NEAR_REPEAT, WORDS_COMPARED)
    split["train"] = np.delete(split["train"], first[(first < number) & (second >= number)])
    missing = set(clauses.labels) - {clauses.labels[index] for index in split["train"]}
    if missing:
        raise UserError(f"no training text has the label {', '.join(sorted(missing))}", "give more documents with it")
    return split


@functools.lru_cache(maxsize=4)
def wordpiece(texts: tuple[str, ...], size: int) -> Tokenizer:
    """A WordPiece of so many tokens at most, learned from the texts: lower case, split at spaces and punctuation, as BERT's.

    Source: Schuster and Nakajima (2012), Japanese and Korean Voice Search; Devlin et al. (2019), BERT.
    """
    learner = _bert_tokenizer(models.WordPiece(unk_token="[UNK]"))
    characters = {character for text in texts for character in learner.normalizer.normalize_str(text) if not character.isspace()}
    # Named first, pieces inside words get their numbers in a fixed order. Else the order is another in every process, and so is
    # the choice between pairs that are equally frequent.
    inside = ["##" + character for character in sorted(characters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=SPECIAL + inside, min_frequency=2, show_progress=False, limit_alphabet=len(characters)
    )
    learner.train_from_iterator(texts, trainer)
    tokenizer = _bert_tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))  # which knows no special pieces
    tokenizer.add_special_tokens(SPECIAL)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def _bert_tokenizer(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def tokenizer_of(config: Config, data: Data) -> Tokenizer:
    """The tokenizer of a run, for its pictures and its export."""
    if config.pretrained:
        return pretrained_tokenizer(config.pretrained).backend_tokenizer
    return wordpiece(tuple(to_texts(data.train["text"])), config.vocabulary_size)


def pretrained_tokenizer(name: str) -> AutoTokenizer:
    """The tokenizer that a pretrained model was trained with.

    Raises:
        UserError: when it cannot be had.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot get the tokenizer of {name}: {str(error).splitlines()[0]}",
            'turn the internet on, give the folder of a downloaded model, or train from scratch with pretrained = ""',
        ) from None


def _encode(tokenizer: Tokenizer, length: int, texts: list[str]) -> Tensor:
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def _encode_pretrained(tokenizer: AutoTokenizer, length: int, texts: list[str]) -> Tensor:
    return tokenizer(texts, truncation=True, padding="max_length", max_length=length, return_tensors="pt")["input_ids"]


def to_bytes(texts: Sequence[str]) -> Tensor:
    """Texts in UTF-8, (N, longest) uint8, 0 behind each end."""
    encoded = [text.encode() for text in texts]
    found = np.zeros((len(encoded), max(map(len, encoded), default=0)), np.uint8)
    for row, content in zip(found, encoded, strict=True):
        row[: len(content)] = np.frombuffer(content, np.uint8)
    return torch.from_numpy(found)


def to_texts(tensor: Tensor) -> list[str]:
    """What `to_bytes` was given."""
    return [bytes(row).rstrip(b"\0").decode() for row in tensor.cpu().numpy()]


def label_names(data: Data) -> list[str]:
    """Name of each label, in the order of its number."""
    names = dict(zip(data.train["labels"].tolist(), to_texts(data.train["label_text"]), strict=True))
    return [names[index] for index in sorted(names)]

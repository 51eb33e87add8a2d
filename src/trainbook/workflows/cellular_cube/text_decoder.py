"""Vectors to text by a network that is trained on the teacher's vectors only, and then reads the cube's."""

# B batch, D numbers of a vector, L tokens, V tokens of the vocabulary, H units

from collections.abc import Mapping, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

from trainbook.losses import widened

PAD, BEGIN, END = 0, 1, 2
MAX_VOCABULARY, LEAST_VOCABULARY = 8000, 512
SENTENCES_PER_TOKEN = 2  # of the vocabulary: few sentences cannot teach many tokens
MAX_TOKENS = 48
DROPOUT = 0.3


class Vocabulary:
    """Byte-level subwords, merged as often as the training sentences warrant.

    Args:
        sentences: of training; the same ones give the same vocabulary.

    Source: Sennrich, Haddow, Birch (2016), Neural Machine Translation of Rare Words with Subword Units.
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        self._tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=min(MAX_VOCABULARY, LEAST_VOCABULARY + len(sentences) // SENTENCES_PER_TOKEN),
            special_tokens=["<pad>", "<begin>", "<end>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        self._tokenizer.train_from_iterator(sentences, trainer)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """(B, L) int64: begin, subwords, end, padding; cut to `MAX_TOKENS`."""
        rows = [[BEGIN, *found.ids[: MAX_TOKENS - 2], END] for found in self._tokenizer.encode_batch(list(sentences))]
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)

    def decode(self, tokens: Tensor) -> list[str]:
        """Texts of (B, L) tokens, each up to its first end."""
        rows = tokens.tolist()
        kept = [row[: row.index(END)] if END in row else row for row in rows]
        return [self._tokenizer.decode([token for token in row if token > END]).strip() for row in kept]


class TextDecoder(nn.Module):
    """A recurrent network that writes a sentence for a vector.

    h_0 = tanh(U v), h_t = GRU(sqrt(H) E x_(t-1) + W v, h_(t-1)), p(x_t) = softmax(E h_t + b).

    The root of H, as in a transformer with tied embeddings, keeps the last token as loud as the vector beside it.

    Args:
        width: D.
        vocabulary: V.
        units: H.
    """

    def __init__(self, width: int, vocabulary: int, units: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, units, padding_idx=PAD)
        nn.init.normal_(self.tokens.weight, std=units**-0.5)
        self.start, self.guide = nn.Linear(width, units), nn.Linear(width, units, bias=False)
        self.recurrent = nn.GRU(units, units, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, vectors: Tensor, tokens: Tensor) -> Tensor:
        """Scores of the next token at each place, given those before it: (B, D), (B, L) -> (B, L, V)."""
        state = torch.tanh(self.start(vectors)).unsqueeze(0)
        output, _ = self._step(tokens, self.guide(vectors).unsqueeze(1), state)
        return self._scores(output)

    @torch.no_grad()
    def write(self, vectors: Tensor) -> Tensor:
        """The most probable next token, one after the other: (B, D) -> (B, L), L at most `MAX_TOKENS`."""
        state = torch.tanh(self.start(vectors)).unsqueeze(0)
        guide = self.guide(vectors).unsqueeze(1)
        token = torch.full((len(vectors), 1), BEGIN, device=vectors.device)
        is_done = torch.zeros_like(token, dtype=torch.bool)
        written = []
        while len(written) < MAX_TOKENS and not bool(is_done.all()):
            output, state = self._step(token, guide, state)
            token = self._scores(output).argmax(-1).masked_fill(is_done, END)
            is_done = is_done | (token == END)
            written.append(token)
        return torch.cat(written, 1)

    def freeze(self) -> None:
        """No more training, nor noise; gradients still pass through to the vectors."""
        self.requires_grad_(False).eval()
        self.recurrent.train()  # on a GPU it has no gradient otherwise; it computes the same

    def _step(self, tokens: Tensor, guide: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        read = self.tokens(tokens) * self.tokens.embedding_dim**0.5 + guide
        output, state = self.recurrent(self.dropout(read), state)
        return self.dropout(output), state

    def _scores(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.tokens.weight, self.bias)


def text_loss(decoder: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross entropy per token that is not padding, in nats.

    Args:
        decoder: a `TextDecoder`.
        batch: "embeddings", (B, D) teacher vectors in standard units; "tokens", (B, L) from `Vocabulary.encode`.
    """
    tokens = batch["tokens"]
    scores = decoder(batch["embeddings"], tokens[:, :-1])
    return functional.cross_entropy(widened(scores.flatten(0, 1)), tokens[:, 1:].flatten(), ignore_index=PAD)


def write_sentences(decoder: TextDecoder, vocabulary: Vocabulary, vectors: Tensor, batch_size: int = 256) -> list[str]:
    """The decoder's sentence for each (N, D) vector in standard units."""
    return [text for part in vectors.split(batch_size) for text in vocabulary.decode(decoder.write(part))]

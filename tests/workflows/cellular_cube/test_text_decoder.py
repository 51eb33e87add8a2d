"""The trained decoder: its vocabulary, its loss, and that it learns to write what a vector stands for."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainbook.workflows.cellular_cube.text_decoder import BEGIN, END, PAD, TextDecoder, Vocabulary, text_loss, write_sentences

SENTENCES = [
    f"{verb} the {thing} of a {place}." for verb in ("Find", "Draw") for thing in ("mean", "root") for place in ("tree", "sea")
]


def test_subwords_are_lossless_even_for_unseen_text():
    vocabulary = Vocabulary(SENTENCES)
    texts = [*SENTENCES, "Ünseen words: 1 + 1 = 2!"]
    tokens = vocabulary.encode(texts)
    assert vocabulary.decode(tokens) == texts
    assert (tokens[:, 0] == BEGIN).all()
    assert ((tokens == END).sum(1) == 1).all()
    assert int(tokens.max()) < len(vocabulary)


@pytest.mark.slow
def test_another_process_has_the_same_vocabulary():
    code = (
        "from tests.workflows.cellular_cube.test_text_decoder import SENTENCES, Vocabulary\n"
        "print(Vocabulary(SENTENCES * 3).encode(SENTENCES).tolist())"
    )
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(Vocabulary(SENTENCES * 3).encode(SENTENCES).tolist())


def test_the_loss_is_the_mean_surprise_per_token_without_padding():
    torch.manual_seed(0)
    decoder = TextDecoder(4, 20, 8).requires_grad_(False).eval()
    batch = {"embeddings": torch.randn(2, 4), "tokens": torch.tensor([[BEGIN, 5, 6, END], [BEGIN, 7, END, PAD]])}
    surprise, count = 0.0, 0
    for vector, row in zip(batch["embeddings"], batch["tokens"].tolist(), strict=True):
        for place in range(1, len(row)):
            if row[place] != PAD:
                scores = decoder(vector[None], torch.tensor([row[:place]]))[0, -1].double()
                surprise -= float(torch.log_softmax(scores, 0)[row[place]])
                count += 1
    assert float(text_loss(decoder, batch)) == pytest.approx(surprise / count, rel=1e-5)


def test_it_learns_to_write_what_it_was_shown_and_greedy_writing_follows_its_scores():
    torch.manual_seed(0)
    vocabulary = Vocabulary(SENTENCES)
    vectors = 8**0.5 * torch.eye(8)  # standard units
    batch = {"embeddings": vectors, "tokens": vocabulary.encode(SENTENCES)}
    decoder = TextDecoder(8, len(vocabulary), 32)
    optimizer = torch.optim.AdamW(decoder.parameters(), 0.02)
    assert float(text_loss(decoder, batch).detach()) == pytest.approx(math.log(len(vocabulary)), rel=0.2)
    for _ in range(120):
        optimizer.zero_grad()
        text_loss(decoder, batch).backward()
        optimizer.step()
    decoder.eval()
    assert write_sentences(decoder, vocabulary, vectors, batch_size=3) == SENTENCES
    written = decoder.write(vectors)
    scores = decoder(vectors, torch.cat([torch.full((8, 1), BEGIN), written[:, :-1]], 1))
    before_end = (written == END).cumsum(1) - (written == END).long() == 0
    assert torch.equal(scores.argmax(-1)[before_end], written[before_end])

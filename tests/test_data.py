"""Batch order: a function of (seed, step), each epoch a permutation."""

import pytest
import torch

from trainbook.data import batch_indices, content_sha256


@pytest.mark.parametrize(("num_examples", "batch_size"), [(12, 4), (13, 4), (7, 7)])
def test_an_epoch_shows_every_example_at_most_once(num_examples, batch_size):
    steps = num_examples // batch_size
    for epoch in range(3):
        seen = torch.cat([batch_indices(5, epoch * steps + i, num_examples, batch_size) for i in range(steps)])
        assert len(seen.unique()) == len(seen) == steps * batch_size
        assert seen.min() >= 0
        assert seen.max() < num_examples


def test_epochs_and_seeds_differ_but_repeat():
    first, second = batch_indices(0, 0, 100, 100), batch_indices(0, 1, 100, 100)
    assert not torch.equal(first, second)
    assert not torch.equal(first, batch_indices(1, 0, 100, 100))
    assert torch.equal(first, batch_indices(0, 0, 100, 100))


def test_no_example_is_favoured():
    # Over 3,000 epochs of 10 examples, each stands in each of the two batches of 3 about 900 times (sd 21).
    counts = torch.zeros(10)
    for step in range(2 * 3000):
        counts[batch_indices(7, step, 10, 3)] += 1
    assert ((counts - 1800).abs() < 5 * (3000 * 0.6 * 0.4) ** 0.5).all()


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match="3 examples do not fill one batch of 4"):
        batch_indices(0, 0, 3, 4)


def test_content_digest_sees_values_shapes_and_types():
    x = torch.arange(6.0)
    digests = {content_sha256([t]) for t in (x, x.view(2, 3), x.double(), x + 1)}
    assert len(digests) == 4
    assert content_sha256([x]) == content_sha256([x.clone()])

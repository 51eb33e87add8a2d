"""Batch order: a function of (seed, step), each epoch a permutation, whoever reads the batches."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from trainbook import distributed
from trainbook.data import Batches, batch_indices, content_sha256
from trainbook.seeding import seed_step


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


VALUES = torch.arange(26.0) ** 2  # no two alike


DRAWS = {"torch": lambda: torch.rand(()), "random": random.random, "numpy": np.random.rand}


class Squares(Dataset):
    """Entry i is VALUES[i], with a shift drawn from one of DRAWS when asked for."""

    def __init__(self, shifted=""):
        self.shifted = shifted

    def __len__(self):
        return len(VALUES)

    def __getitem__(self, index):
        shift = DRAWS[self.shifted]() if self.shifted else 0.0
        return {"value": VALUES[index] + shift, "pair": (index, -index)}


@pytest.mark.parametrize("first", [0, 3, 11])  # 26 examples: epochs of three batches of 8
def test_tensors_and_a_data_set_are_read_in_the_order_of_batch_indices(first):
    expected = [batch_indices(4, step, 26, 8) for step in range(first, first + 5)]
    tensors = Batches({"value": VALUES, "index": torch.arange(26)}, seed=4, batch_size=8)
    for step, indices in enumerate(expected, first):
        assert torch.equal(tensors(step)["value"], VALUES[indices])
        assert torch.equal(tensors(step)["index"], indices)
    for workers in (0, 2):
        batches = Batches(Squares(), seed=4, batch_size=8, workers=workers)
        for step, indices in enumerate(expected, first):
            batch = batches(step)
            assert torch.equal(batch["value"], VALUES[indices])
            assert torch.equal(torch.stack(batch["pair"]), torch.stack([indices, -indices]))
        assert torch.equal(batches(1)["value"], VALUES[batch_indices(4, 1, 26, 8)])  # back to any step


@pytest.mark.parametrize("library", DRAWS)
def test_random_augmentation_depends_on_the_step_alone(library):
    def shifts(first, workers):
        batches = Batches(Squares(shifted=library), seed=4, batch_size=8, workers=workers)
        found = []
        for step in range(first, 7):
            for seed in (torch.manual_seed, random.seed, np.random.seed):
                seed(step + 100 * workers)  # whatever the training process drew before
            found.append(batches(step)["value"] - VALUES[batch_indices(4, step, 26, 8)])
        return torch.cat(found)

    whole = shifts(0, workers=0)
    assert len(whole.unique()) == 56
    assert whole.min() >= 0
    for workers in (0, 1, 2):
        assert torch.equal(shifts(0, workers), whole)
        assert torch.equal(shifts(5, workers), whole[40:])


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_batches_leaves_the_random_numbers_of_the_training_alone(workers):
    batches = Batches(Squares(shifted="torch"), seed=4, batch_size=8, workers=workers)
    seed_step(4, 2)
    before = torch.get_rng_state()
    others = random.getstate(), np.random.get_state()[1].tolist()
    batches(2)
    batches(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others


@pytest.mark.parametrize("source", [{"value": VALUES}, Squares()], ids=["tensors", "data set"])
def test_batches_of_too_few_examples_are_refused(source, monkeypatch):
    assert Batches(source, 0, 26).per_epoch == 1
    with pytest.raises(ValueError, match="26 examples do not fill one batch of 27"):
        Batches(source, 0, 27)
    monkeypatch.setattr(distributed, "size", lambda: 4)
    assert Batches(source, 0, 26).batch_size == 26
    with pytest.raises(ValueError, match="26 examples do not fill one batch of 28"):
        Batches(source, 0, 7, "per_process")
    with pytest.raises(ValueError, match="a batch of 3 cannot be shared by 4 processes"):
        Batches(source, 0, 3)(0)


@pytest.mark.parametrize("source", [{"value": VALUES}, Squares()], ids=["tensors", "data set"])
@pytest.mark.parametrize(("scaling", "size"), [("kept", 8), ("per_process", 24)])
def test_the_shares_of_three_processes_make_up_the_global_batch(source, scaling, size, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    for step in (0, 4):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            batches = Batches(source, 4, 8, scaling)
            assert (batches.batch_size, batches.per_epoch) == (size, 26 // size)
            shares.append(batches(step)["value"])
        assert torch.equal(torch.cat(shares), VALUES[batch_indices(4, step, 26, size)])
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("source", [{"value": VALUES}, Squares(shifted="torch")], ids=["tensors", "data set"])
def test_each_stage_of_a_pipeline_sees_what_one_process_sees(source, monkeypatch):
    alone = Batches(source, 4, 8)(1)["value"]
    monkeypatch.setattr(distributed, "size", lambda: 3)
    monkeypatch.setattr(distributed, "_parallel", "pipeline")
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert torch.equal(Batches(source, 4, 8, "per_process")(1)["value"], alone)


def test_processes_augment_differently(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    shifts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        share = Batches(Squares(shifted="torch"), 4, 8)(0)["value"]
        shifts.append(share - VALUES[batch_indices(4, 0, 26, 8).view(2, 4)[rank]])
    assert not torch.isclose(*shifts).any()

"""Splits, labelled subsets and views against counts and against loops; files whose checksum is wrong are refused."""

import gzip
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST

from trainbook.errors import UserError
from trainbook.runtime import detect
from trainbook.workflows.distillation.config import Config
from trainbook.workflows.distillation.images import labelled, load_data
from trainbook.workflows.distillation.views import NUM_VIEWS, plain_view, view

SHARED_MNIST = Path(__file__).parents[4] / "shared/data/mnist"  # beside the project


@pytest.fixture(scope="module")
def digits():
    return load_data(Config(), detect())


def test_digits_are_split_evenly_and_the_same_every_time(digits):
    splits = [digits.train, digits.valid, digits.test]
    assert [len(split["labels"]) for split in splits] == [719, 179, 899]
    for split in splits:
        shares = torch.bincount(split["labels"]) / len(split["labels"])
        assert shares.min() > 0.08
        assert shares.max() < 0.12
    rows = {tuple(image.flatten().tolist()) for split in splits for image in split["images"]}
    assert len(rows) == 1797  # all digits are different: none is in two splits
    again = load_data(Config(seed=5), detect())
    assert torch.equal(again.test["images"], digits.test["images"])
    assert digits.synthetic is False


def test_labelled_images_are_the_first_of_each_class_and_as_even_as_can_be(digits):
    labels = digits.train["labels"]
    for number in (10, 37, 100):
        chosen = labelled(labels, number)
        counts = torch.bincount(labels[chosen], minlength=10)
        assert counts.sum() == number
        assert counts.max() - counts.min() <= 1
        for c in range(10):
            assert chosen[labels[chosen] == c].tolist() == (labels == c).nonzero()[: counts[c], 0].tolist()
    assert labelled(labels, 0).tolist() == list(range(719))
    with pytest.raises(UserError, match="719 training images"):
        labelled(labels, 720)


@pytest.mark.parametrize("augmentation", ["shifts", "shifts_and_flips"])
def test_a_view_is_a_shift_with_zeros_and_then_a_mirror(augmentation):
    images = torch.rand(2, 3, 5, 6)
    for number in range(NUM_VIEWS[augmentation]):
        expected = torch.zeros_like(images)
        down, right = number % 9 // 3 - 1, number % 9 % 3 - 1
        for row in range(5):
            for column in range(6):
                if 0 <= row + down < 5 and 0 <= column + right < 6:
                    expected[:, :, row, column] = images[:, :, row + down, column + right]
        expected = expected.flip(3) if number >= 9 else expected
        assert torch.equal(view(images, torch.tensor([number, number]), augmentation), expected), number
    plain = torch.full((2,), plain_view(augmentation))
    assert torch.equal(view(images, plain, augmentation), images)


def test_views_are_all_different_and_each_image_gets_its_own():
    images = torch.rand(18, 1, 6, 6)
    together = view(images, torch.arange(18), "shifts_and_flips")
    alone = [view(images[i : i + 1], torch.tensor([i]), "shifts_and_flips") for i in range(18)]
    assert torch.equal(together, torch.cat(alone))
    one = images[:1].expand(18, -1, -1, -1)
    assert len(view(one, torch.arange(18), "shifts_and_flips").unique(dim=0)) == 18


def write_idx(folder, images, labels, split):
    """The two files of a split as they are published; returns their names and MD5s."""
    contents = {
        f"{split}-images-idx3-ubyte.gz": (2051).to_bytes(4, "big")
        + b"".join(n.to_bytes(4, "big") for n in images.shape)
        + images.tobytes(),
        f"{split}-labels-idx1-ubyte.gz": (2049).to_bytes(4, "big") + len(labels).to_bytes(4, "big") + labels.tobytes(),
    }
    made = []
    for name, content in contents.items():
        (folder / name).write_bytes(gzip.compress(content))
        made.append((name, hashlib.md5((folder / name).read_bytes()).hexdigest()))
    return made


def test_official_files_are_read_and_altered_ones_refused(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    images = {split: generator.integers(0, 256, (n, 28, 28), np.uint8) for split, n in (("train", 240), ("t10k", 40))}
    labels = {split: np.arange(len(each), dtype=np.uint8) % 10 for split, each in images.items()}
    resources = [each for split in images for each in write_idx(tmp_path, images[split], labels[split], split)]
    monkeypatch.setattr(MNIST, "resources", resources)
    config = Config(dataset="mnist", data_folder=str(tmp_path))
    data = load_data(config, detect())
    assert [len(split["labels"]) for split in (data.train, data.valid, data.test)] == [220, 20, 40]
    assert torch.equal((data.test["images"][:, 0] * 255).round().byte(), torch.from_numpy(images["t10k"]))
    assert data.test["labels"].tolist() == labels["t10k"].tolist()
    found = torch.cat([data.train["images"], data.valid["images"]]).mul(255).round().byte().flatten(1)
    expected = torch.from_numpy(images["train"]).flatten(1)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))
    name = resources[0][0]
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"x")
    with pytest.raises(UserError, match="not the official file"):
        load_data(config, detect())
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match="lacks some of"):
        load_data(config, detect())


def test_without_files_and_network_it_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*arguments, **others):
        raise OSError("the network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for dataset in ("mnist", "cifar100"):
        with pytest.raises(UserError, match="turn the internet on"):
            load_data(Config(dataset=dataset), replace(detect(), data_folder=tmp_path))


@pytest.mark.skipif(not SHARED_MNIST.is_dir(), reason="MNIST's files are not in ../shared/data/mnist")
def test_the_published_mnist():
    data = load_data(Config(dataset="mnist", data_folder=str(SHARED_MNIST)), detect())
    assert [len(split["labels"]) for split in (data.train, data.valid, data.test)] == [55_000, 5_000, 10_000]
    assert data.test["labels"][:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]  # of the first test images, as everybody knows them
    assert float(data.train["images"].mean()) == pytest.approx(0.1307, abs=0.001)

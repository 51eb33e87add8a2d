"""Data of the timestep-specific DBN: splits, users' files, refusals."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tests.workflows.timestep_dbn.runs import local_runtime
from trainbook.errors import UserError
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.images import load_data


def test_digits_are_split_once_whatever_the_seed(tmp_path):
    data, other = (load_data(Config(seed=seed), local_runtime(tmp_path)) for seed in (0, 7))
    parts = [getattr(data, split)["images"] for split in ("train", "valid", "test")]
    for split, part in zip(("train", "valid", "test"), parts, strict=True):
        assert torch.equal(part, getattr(other, split)["images"])
    assert sum(map(len, parts)) == 1797
    # The three parts together are the data set, image by image, so no image is in two of them.
    together = sorted(image.numpy().tobytes() for part in parts for image in part * 16)
    assert together == sorted(image.astype(np.float32).tobytes() for image in load_digits().images)
    assert not data.synthetic
    assert {float(part.min()) for part in parts} == {0.0}
    assert {float(part.max()) for part in parts} == {1.0}


def test_max_train_images_limits_training_only(tmp_path):
    whole, limited = (load_data(Config(max_train_images=count), local_runtime(tmp_path)) for count in (0, 50))
    assert torch.equal(limited.train["images"], whole.train["images"][:50])
    assert torch.equal(limited.test["images"], whole.test["images"])
    assert limited.sha256 == whole.sha256
    with pytest.raises(UserError, match="do not fill one batch"):
        load_data(Config(max_train_images=20, batch_size=32), local_runtime(tmp_path))


@pytest.mark.parametrize("shape", [(40, 8, 16), (40, 16, 8, 3)])
def test_images_from_file_keep_their_values(tmp_path, shape):
    arrays = {name: np.random.default_rng(0).integers(0, 256, shape, np.uint8) for name in ("train", "test")}
    np.savez(tmp_path / "mine.npz", **arrays)
    data = load_data(Config(dataset="file", data_file=str(tmp_path / "mine.npz")), local_runtime(tmp_path))
    images = data.test["images"].mul(255).round().byte().movedim(1, -1).numpy().reshape(shape)
    assert np.array_equal(images, arrays["test"])
    both = torch.cat([data.valid["images"], data.train["images"]]).mul(255).round().byte().movedim(1, -1).numpy()
    assert np.array_equal(both.reshape(shape), arrays["train"])


GOOD = np.zeros((40, 8, 8), np.uint8)


@pytest.mark.parametrize(
    "arrays",
    [
        {"train": GOOD},
        {"train": GOOD.astype(np.float32), "test": GOOD},
        {"train": GOOD, "test": GOOD.astype(np.int64)},
        {"train": np.zeros((40, 8), np.uint8), "test": GOOD},
        {"train": np.zeros((40, 8, 12), np.uint8), "test": GOOD},
        {"train": np.zeros((40, 8, 8, 4), np.uint8), "test": GOOD},
        {"train": GOOD, "test": GOOD[:0]},
        {"train": GOOD, "test": np.zeros((40, 16, 16), np.uint8)},
        {"train": GOOD, "test": np.zeros((40, 8, 8, 3), np.uint8)},
    ],
    ids=["no test", "float", "int64", "flat", "12 wide", "4 channels", "empty", "two sizes", "grey and colour"],
)
def test_unsuitable_arrays_are_explained_with_the_path(tmp_path, arrays):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_data(Config(dataset="file", data_file=str(path)), local_runtime(tmp_path))


def write_torn_archive(path: Path) -> None:
    """A .npz that lost its end."""
    np.savez(path, train=GOOD, test=GOOD)
    path.write_bytes(path.read_bytes()[:2000])


def write_damaged_archive(path: Path) -> None:
    """A .npz with one wrong bit in an array."""
    np.savez(path, train=GOOD, test=GOOD)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def write_single_array(path: Path) -> None:
    """A .npy under the name of a .npz."""
    with path.open("wb") as file:
        np.save(file, GOOD)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_text("not an archive"),
        lambda path: path.write_bytes(b""),
        write_torn_archive,
        write_damaged_archive,
        write_single_array,
    ],
    ids=["missing", "folder", "text", "empty file", "torn archive", "damaged archive", "single array"],
)
def test_unreadable_files_are_explained_with_the_path(tmp_path, write):
    path = tmp_path / "mine.npz"
    write(path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_data(Config(dataset="file", data_file=str(path)), local_runtime(tmp_path))

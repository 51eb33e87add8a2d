"""CIFAR-10's airplanes: from a download, from what lies there already, never from files whose checksum is wrong."""

import hashlib
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from tests.workflows.timestep_dbn.runs import local_runtime
from trainbook.errors import UserError
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.images import load_data

CONFIG = Config(dataset="cifar10_airplane", batch_size=8, code_channels=(1, 1, 1))


@pytest.fixture
def original(tmp_path, monkeypatch):
    """A folder that holds CIFAR-10 as it is published, cut to 60 images; torchvision is told its checksums, and no network."""
    place, generator = tmp_path / "published", np.random.default_rng(0)
    batches = place / CIFAR10.base_folder
    batches.mkdir(parents=True)
    digests, images = {}, {"train": [], "test": []}

    def write(name, content):
        (batches / name).write_bytes(pickle.dumps(content))
        digests[name] = hashlib.md5((batches / name).read_bytes()).hexdigest()
        return [name, digests[name]]

    for split, names in (("train", ("data_batch_1", "data_batch_2")), ("test", ("test_batch",))):
        listed = []
        for name in names:
            pixels, labels = generator.integers(0, 256, (20, 3072), np.uint8), [index % 2 for index in range(20)]
            images[split].append(pixels[::2].reshape(-1, 3, 32, 32))  # class 0
            listed.append(write(name, {"data": pixels, "labels": labels}))
        monkeypatch.setattr(CIFAR10, f"{split}_list", listed)
    meta = write("batches.meta", {"label_names": ["airplane", "automobile"]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    with tarfile.open(place / CIFAR10.filename, "w:gz") as archive:
        archive.add(batches, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((place / CIFAR10.filename).read_bytes()).hexdigest())

    def no_network(*arguments, **others):
        raise OSError("the network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    return place, {split: np.concatenate(parts) for split, parts in images.items()}


def runtime_of(tmp_path, inputs=()):
    return replace(local_runtime(tmp_path / "data"), input_folders=tuple(inputs))


def assert_airplanes(data, images):
    found = {"train": torch.cat([data.valid["images"], data.train["images"]]), "test": data.test["images"]}
    for split, expected in images.items():
        assert np.array_equal(found[split].mul(255).round().byte().numpy(), expected)
    assert data.synthetic is False


@pytest.mark.parametrize("what", ["extracted", "packed", "both"])
@pytest.mark.parametrize("where", ["data folder", "inputs"])
def test_what_was_downloaded_before_is_used(where, what, original, tmp_path):
    place, images = original
    if what == "extracted":
        (place / CIFAR10.filename).unlink()
    elif what == "packed":
        for path in (place / CIFAR10.base_folder).iterdir():
            path.unlink()
        (place / CIFAR10.base_folder).rmdir()
    runtime = runtime_of(tmp_path, [place])
    if where == "data folder":
        place.rename(tmp_path / "data")
        runtime = runtime_of(tmp_path)
    before = sorted(path.name for path in place.rglob("*")) if where == "inputs" else []
    assert_airplanes(load_data(CONFIG, runtime), images)
    if where == "inputs":
        assert sorted(path.name for path in place.rglob("*")) == before  # it may be read-only


@pytest.mark.parametrize("where", ["data folder", "inputs"])
@pytest.mark.parametrize("what", ["batch", "archive"])
def test_files_with_another_checksum_are_not_used(what, where, original, tmp_path):
    place, _ = original
    damaged = place / CIFAR10.base_folder / "data_batch_2"
    if what == "archive":
        for path in (place / CIFAR10.base_folder).iterdir():
            path.unlink()
        (place / CIFAR10.base_folder).rmdir()
        damaged = place / CIFAR10.filename
    else:
        (place / CIFAR10.filename).unlink()
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    runtime = runtime_of(tmp_path, [place])
    if where == "data folder":
        place.rename(tmp_path / "data")
        runtime = runtime_of(tmp_path)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"cannot get CIFAR-10(?s:.*)TRAINBOOK_INPUTS") as told:
        load_data(CONFIG, runtime)
    if where == "inputs":
        assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
        assert ("network" in str(told.value)) is (what == "archive")  # nothing is downloaded into an input


def test_without_network_and_files_the_remedy_is_told(original, tmp_path):
    with pytest.raises(UserError, match=r"put cifar-10-python\.tar\.gz in that folder"):
        load_data(CONFIG, runtime_of(tmp_path))


def test_presets_of_cards_are_the_briefs_setting():
    full = Config.from_preset("full")
    assert (full.timesteps, full.batch_size, full.epochs_per_timestep) == (50, 32, 100)
    for preset in ("v100", "t4"):
        assert Config.from_preset(preset) == full.model_copy(update={"precision": "mixed"})
    cpu = Config.from_preset("cpu")
    assert {name for name, value in cpu if value != getattr(full, name)} == {
        "autoencoder_epochs", "autoencoder_width", "epochs_per_timestep", "baseline_epochs", "evaluation_images",
        "ais_temperatures",
    }  # fmt: skip

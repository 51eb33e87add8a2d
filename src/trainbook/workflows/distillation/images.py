"""Labelled images of a distillation run: embedded digits, or MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100."""

import gzip
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from trainbook.data import Data, content_sha256
from trainbook.errors import UserError
from trainbook.runtime import Runtime
from trainbook.workflows.distillation.config import Config

SPLIT_SEED = 20_261_127  # the split belongs to the data set, not to the run
DIGITS_VALID, DIGITS_TEST = 179, 899
VALID_SHARE = 1 / 12  # of the published training images: 5,000 of 60,000
IMAGE_HEADER_BYTES, LABEL_HEADER_BYTES = 16, 8  # of the idx format
SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}  # in torchvision
SOURCES = {
    "mnist": ("MNIST (LeCun, Cortes and Burges 1998)", "CC BY-SA 3.0"),
    "fashion_mnist": ("Fashion-MNIST (Xiao, Rasul and Vollgraf 2017)", "MIT"),
    "cifar10": ("CIFAR-10 (Krizhevsky 2009)", "research use, cite"),
    "cifar100": ("CIFAR-100 (Krizhevsky 2009)", "research use, cite"),
}


def load_data(config: Config, runtime: Runtime) -> Data:
    """Images in [0, 1], (N, C, H, W), and their labels, (N,) int64, on the runtime's device.

    Digits: 719 train, 179 valid, 899 test. The others: the published test images, and a twelfth of the training images as
    valid. Every class keeps its share in every split.

    Raises:
        UserError: when files are missing or altered, or cannot be downloaded.
    """
    if config.dataset == "digits":
        digits = load_digits()
        images, labels = digits.images.astype(np.float32)[:, None] / 16, digits.target.astype(np.int64)
        source = "scikit-learn load_digits: 1,797 handwritten digits, 8x8 (Alpaydin and Kaynak 1998, UCI)"
        licence, sha256 = "CC BY 4.0", content_sha256([torch.from_numpy(images), torch.from_numpy(labels)])
        train, test = _split(images, labels, DIGITS_TEST)
        train, valid = _split(*train, DIGITS_VALID)
    else:
        train, test = _published(config, runtime)
        sha256 = content_sha256(torch.from_numpy(array) for part in (train, test) for array in part)
        train, valid = _split(*train, round(len(train[0]) * VALID_SHARE))
        (source, licence) = SOURCES[config.dataset]
    train = tuple(array[: config.max_train_images or None] for array in train)
    splits = ({"images": _to_unit(images), "labels": torch.from_numpy(labels)} for images, labels in (train, valid, test))
    return Data(*splits, source=source, licence=licence, sha256=sha256, synthetic=False).to(runtime.device)


def _split(images: np.ndarray, labels: np.ndarray, size: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """All but `size` examples and those, both stratified."""
    parts = train_test_split(images, labels, test_size=size, stratify=labels, random_state=SPLIT_SEED)
    return (parts[0], parts[2]), (parts[1], parts[3])


def _to_unit(images: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    return tensor.float().div_(255) if tensor.dtype == torch.uint8 else tensor


def _published(config: Config, runtime: Runtime) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Training and test part as they were published, uint8 (N, C, H, W) and int64: from files, else downloaded."""
    from torchvision import datasets

    kind, folder = getattr(datasets, SETS[config.dataset]), runtime.data_folder
    if config.dataset in ("mnist", "fashion_mnist"):
        places = [Path(config.data_folder)] if config.data_folder else [folder / config.dataset, *runtime.input_folders]
        names = [name for name, _ in kind.resources]
        found = [place for place in places if all((place / name).is_file() for name in names)]
        if found:
            return _from_idx(found[0], dict(kind.resources))
        if config.data_folder:
            raise UserError(f"{config.data_folder} lacks some of: {', '.join(names)}", "give the folder of the official files")
    try:
        sets = [kind(str(folder), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot get {config.dataset} into {folder}: {error}",
            "turn the internet on, put the official files there, or use dataset = digits",
        ) from None
    return tuple((_channels_first(np.asarray(part.data)), np.asarray(part.targets, dtype=np.int64)) for part in sets)


def _channels_first(images: np.ndarray) -> np.ndarray:
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def _from_idx(folder: Path, digests: dict[str, str]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """The four official .gz files, each checked by the MD5 that torchvision has of it."""
    arrays: dict[str, np.ndarray] = {}
    for name, digest in digests.items():
        content = (folder / name).read_bytes()
        if hashlib.md5(content).hexdigest() != digest:
            raise UserError(f"{folder / name} is not the official file: its MD5 differs from {digest}", "download it again")
        is_images = "idx3" in name
        plain = np.frombuffer(gzip.decompress(content), np.uint8, offset=IMAGE_HEADER_BYTES if is_images else LABEL_HEADER_BYTES)
        arrays[name[:5] + ("images" if is_images else "labels")] = plain.copy()  # writable, as torch wants it
    parts: list[Any] = []
    for split in ("train", "t10k-"):
        labels = arrays[f"{split}labels"].astype(np.int64)
        side = round((len(arrays[f"{split}images"]) / len(labels)) ** 0.5)
        parts.append((arrays[f"{split}images"].reshape(-1, 1, side, side), labels))
    return tuple(parts)


def num_classes(data: Data) -> int:
    """K of a data set, whose training labels are 0 to K - 1."""
    return int(data.train["labels"].max()) + 1


def labelled(labels: Tensor, number: int) -> Tensor:
    """Indices of so many training images, the classes as even as can be and always the first of each; 0 takes all.

    Args:
        labels: (N,).
        number: at most N.

    Raises:
        UserError: when there are fewer images.
    """
    if number > len(labels):
        raise UserError(f"labels = {number}, but there are {len(labels)} training images", "ask for fewer labels")
    if not number:
        return torch.arange(len(labels), device=labels.device)
    same = labels[:, None] == torch.arange(int(labels.max()) + 1, device=labels.device)  # (N, K)
    rank = (same.cumsum(0) * same).sum(1)  # 1 for the first of its class, 2 for the second
    order = (rank * same.shape[1] + labels).argsort(stable=True)
    return order[:number].sort().values

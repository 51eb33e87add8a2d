"""Labelled image sets that workflows share: embedded digits, and MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100."""

# N images, C channels, H height, W width

import gzip
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from trainbook.data import Data, content_sha256
from trainbook.errors import UserError
from trainbook.runtime import Runtime

SPLIT_SEED = 20_261_127  # the split belongs to the data set, not to the run
IMAGE_HEADER_BYTES, LABEL_HEADER_BYTES = 16, 8  # of the idx format
SETS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}  # in torchvision
SOURCES = {
    "digits": ("scikit-learn load_digits: 1,797 handwritten digits, 8x8 (Alpaydin and Kaynak 1998, UCI)", "CC BY 4.0"),
    "mnist": ("MNIST (LeCun, Cortes and Burges 1998)", "CC BY-SA 3.0"),
    "fashion_mnist": ("Fashion-MNIST (Xiao, Rasul and Vollgraf 2017)", "MIT"),
    "cifar10": ("CIFAR-10 (Krizhevsky 2009)", "research use, cite"),
    "cifar100": ("CIFAR-100 (Krizhevsky 2009)", "research use, cite"),
}


class Examples(NamedTuple):
    """Images (N, C, H, W), float32 in [0, 1] or uint8, and their labels (N,), int64."""

    images: np.ndarray
    labels: np.ndarray


def load_images(
    dataset: str, data_folder: str, runtime: Runtime, num_test: int, valid_share: float, max_train_images: int = 0
) -> Data:
    """Images in [0, 1], (N, C, H, W), and labels, (N,) int64, on the runtime's device; classes keep their shares in splits.

    Args:
        dataset: a key of `SOURCES`.
        data_folder: for mnist and fashion_mnist, the folder with the four official .gz files, instead of a download; or "".
        runtime: says where downloads are kept, and the device.
        num_test: test images of the digits; the others have their published ones.
        valid_share: of what is left, so much is for validation.
        max_train_images: the first so many training images are kept; 0 keeps all.

    Raises:
        UserError: when files are missing or altered, or cannot be downloaded.
    """
    if dataset == "digits":
        digits = load_digits()
        everything = Examples(digits.images.astype(np.float32)[:, None] / 16, digits.target.astype(np.int64))
        sha256 = content_sha256(torch.from_numpy(array) for array in everything)
        train, test = split_examples(everything, num_test)
    else:
        train, test = published(dataset, data_folder, runtime)
        sha256 = content_sha256(torch.from_numpy(array) for part in (train, test) for array in part)
    train, valid = split_examples(train, round(len(train.labels) * valid_share))
    train = Examples(*(array[: max_train_images or None] for array in train))
    splits = ({"images": _to_unit(images), "labels": torch.from_numpy(labels)} for images, labels in (train, valid, test))
    source, licence = SOURCES[dataset]
    return Data(*splits, source=source, licence=licence, sha256=sha256, synthetic=False).to(runtime.device)


def split_examples(examples: Examples, size: int) -> tuple[Examples, Examples]:
    """All but `size` examples and those, both stratified."""
    parts = train_test_split(*examples, test_size=size, stratify=examples.labels, random_state=SPLIT_SEED)
    return Examples(parts[0], parts[2]), Examples(parts[1], parts[3])


def _to_unit(images: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    return tensor.float().div_(255) if tensor.dtype == torch.uint8 else tensor


def published(dataset: str, data_folder: str, runtime: Runtime) -> tuple[Examples, Examples]:
    """Training and test part as they were published, uint8: from files, else downloaded.

    Raises:
        UserError: as `load_images`.
    """
    from torchvision import datasets

    kind, folder = getattr(datasets, SETS[dataset]), runtime.data_folder
    if dataset in ("mnist", "fashion_mnist"):
        places = [Path(data_folder)] if data_folder else [folder / dataset, *runtime.input_folders]
        names = [name for name, _ in kind.resources]
        found = [place for place in places if all((place / name).is_file() for name in names)]
        if found:
            return _from_idx(found[0], dict(kind.resources))
        if data_folder:
            raise UserError(f"{data_folder} lacks some of: {', '.join(names)}", "give the folder of the official files")
    try:
        sets = [kind(str(folder), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot get {dataset} into {folder}: {error}",
            "turn the internet on, put the official files there, or use dataset = digits",
        ) from None
    return tuple(Examples(_channels_first(np.asarray(part.data)), np.asarray(part.targets, dtype=np.int64)) for part in sets)


def _channels_first(images: np.ndarray) -> np.ndarray:
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def _from_idx(folder: Path, digests: dict[str, str]) -> tuple[Examples, Examples]:
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
        parts.append(Examples(arrays[f"{split}images"].reshape(-1, 1, side, side), labels))
    return tuple(parts)

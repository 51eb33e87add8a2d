"""Images of a timestep-specific DBN run: embedded digits, CIFAR-10 airplanes, or the user's own file."""

import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from trainbook.data import Data, content_sha256
from trainbook.errors import UserError
from trainbook.runtime import Runtime
from trainbook.workflows.timestep_dbn.config import Config

VALID_SHARE, TEST_SHARE = 0.15, 0.2
MIN_IMAGES = 16  # of each split in a user's file, so that every part of the report has something to show
AIRPLANE = 0  # CIFAR-10's class index


def load_data(config: Config, runtime: Runtime) -> Data:
    """Images with values in [0, 1], (N, C, H, W), split into train, valid and test.

    Raises:
        UserError: when a file is missing, unreadable or unsuitable, or CIFAR-10 cannot be downloaded.
    """
    if config.dataset == "digits":
        return _digits(config).to(runtime.device)
    if config.dataset == "cifar10_airplane":
        train, test = _airplanes(runtime)
        source, licence = "CIFAR-10, class airplane (Krizhevsky 2009), by torchvision", "research use, cite"
    else:
        train, test = _from_file(Path(config.data_file))
        source, licence = f"file {Path(config.data_file).name}", "the user's"
    synthetic = None if config.dataset == "file" else False
    return _with_own_test(train, test, source, licence, synthetic, config).to(runtime.device)


def _digits(config: Config) -> Data:
    images = torch.from_numpy(load_digits().images).float().div(16).unsqueeze(1)  # (1797, 1, 8, 8), 17 grey levels
    # A fixed order, the same for every seed: the split belongs to the data set, not to the run.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(20_261_121))
    num_valid, num_test = round(len(images) * VALID_SHARE), round(len(images) * TEST_SHARE)
    test, valid, train = images[order].split([num_test, num_valid, len(images) - num_test - num_valid])
    return Data(
        train={"images": _limited(train, config)},
        valid={"images": valid},
        test={"images": test},
        source="scikit-learn load_digits: 1,797 handwritten digits, 8x8 (Alpaydin and Kaynak 1998, UCI)",
        licence="CC BY 4.0",
        sha256=content_sha256([images]),
        synthetic=False,
    )


def _with_own_test(
    train: np.ndarray, test: np.ndarray, source: str, licence: str, synthetic: bool | None, config: Config
) -> Data:
    train, test = (_as_images(array) for array in (train, test))
    num_valid = round(len(train) * VALID_SHARE)
    return Data(
        train={"images": _limited(train[num_valid:], config)},
        valid={"images": train[:num_valid]},
        test={"images": test},
        source=source,
        licence=licence,
        sha256=content_sha256([train, test]),
        synthetic=synthetic,
    )


def _limited(train: Tensor, config: Config) -> Tensor:
    train = train[: config.max_train_images or None]
    if len(train) < config.batch_size:
        raise UserError(f"{len(train)} training images do not fill one batch of {config.batch_size}", "lower batch_size")
    return train


def _as_images(array: np.ndarray) -> Tensor:
    images = torch.from_numpy(array).float().div(255)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _airplanes(runtime: Runtime) -> tuple[np.ndarray, np.ndarray]:
    """From what lies in the data folder or among the inputs, else downloaded; torchvision checks every file's MD5."""
    from torchvision.datasets import CIFAR10

    folder, archive = runtime.data_folder, CIFAR10.filename
    try:
        extracted = [place for place in runtime.input_folders if (place / CIFAR10.base_folder).is_dir()]
        packed = [place for place in runtime.input_folders if (place / archive).is_file()]
        if (folder / CIFAR10.base_folder).is_dir() or (folder / archive).is_file():
            extracted = packed = []
        if not extracted and packed:  # an input cannot be written to
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(packed[0] / archive, folder / archive)
        place = extracted[0] if extracted else folder
        sets = [CIFAR10(str(place), train=train, download=not extracted) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot get CIFAR-10 into {folder}: {error}",
            f"turn the internet on, put {archive} in that folder or in one of TRAINBOOK_INPUTS, or use dataset = file",
        ) from None
    return tuple(part.data[np.array(part.targets) == AIRPLANE] for part in sets)


def _from_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            train, test = arrays["train"], arrays["test"]
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read images from {path}: {error}", "give a .npz with uint8 arrays train and test") from None
    for name, array in (("train", train), ("test", test)):
        fits = array.ndim in (3, 4) and array.shape[3:] in ((), (3,)) and not any(size % 8 for size in array.shape[1:3])
        if array.dtype != np.uint8 or not fits or len(array) < MIN_IMAGES:
            raise UserError(
                f"{path}: {name} is {array.dtype} {array.shape}",
                f"give at least {MIN_IMAGES} images as uint8, (N, H, W) or (N, H, W, 3), with H and W multiples of 8",
            )
    if train.shape[1:] != test.shape[1:]:
        raise UserError(f"{path}: train images are {train.shape[1:]}, test images {test.shape[1:]}", "give both one size")
    return train, test

"""Labelled images of a distillation run: embedded digits, or MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100."""

import torch
from torch import Tensor

from trainbook.data import Data
from trainbook.errors import UserError
from trainbook.image_sets import load_images
from trainbook.runtime import Runtime
from trainbook.workflows.distillation.config import Config

DIGITS_TEST, DIGITS_VALID_SHARE = 899, 179 / 898
VALID_SHARE = 1 / 12  # of the published training images: 5,000 of 60,000


def load_data(config: Config, runtime: Runtime) -> Data:
    """Images in [0, 1], (N, C, H, W), and their labels, (N,) int64, on the runtime's device.

    Digits: 719 train, 179 valid, 899 test. The others: the published test images, and a twelfth of the training images as
    valid. Every class keeps its share in every split.

    Raises:
        UserError: when files are missing or altered, or cannot be downloaded.
    """
    valid_share = DIGITS_VALID_SHARE if config.dataset == "digits" else VALID_SHARE
    return load_images(config.dataset, config.data_folder, runtime, DIGITS_TEST, valid_share, config.max_train_images)


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

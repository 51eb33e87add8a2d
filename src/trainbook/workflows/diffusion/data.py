"""Labelled images of a diffusion run: scikit-learn's digits, or MNIST, Fashion-MNIST and CIFAR-10."""

from trainbook.data import Data
from trainbook.errors import UserError
from trainbook.image_sets import load_images
from trainbook.runtime import Runtime
from trainbook.workflows.diffusion.config import Config

NUM_CLASSES = 10  # of every set here
DIGITS_TEST = 540  # 30 %
VALID_SHARE = 0.1  # of the rest


def load_data(config: Config, runtime: Runtime) -> Data:
    """Images in [0, 1], (N, C, H, W), and their labels, (N,) int64, on the runtime's device.

    Raises:
        UserError: when files are missing or altered, or cannot be downloaded.
    """
    data = load_images(config.dataset, config.data_folder, runtime, DIGITS_TEST, VALID_SHARE, config.max_train_images)
    if len(data.train["labels"]) < config.batch_size:
        raise UserError(f"{len(data.train['labels'])} images do not fill one batch of {config.batch_size}", "lower batch_size")
    return data

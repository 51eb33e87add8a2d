"""Pictures of a run, split by picture: sample photos of scikit-image and scikit-learn, the user's own, or published sets."""

# C channels, S size of a crop

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import avg_pool2d

from trainbook.data import Data, content_sha256
from trainbook.errors import UserError
from trainbook.runtime import Runtime
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.downloads import SETS, fetch

# Both libraries' wheels contain these files. Colour ones stand first in each list.
PHOTOS = {
    "train": ("china.jpg", "flower.jpg", "motorcycle_left.png", "ihc.png", "gravel.png", "grass.png"),
    "valid": ("rocket.jpg", "brick.png"),
    "test": ("astronaut.png", "chelsea.png", "coffee.png", "camera.png", "coins.png", "moon.png"),
}
NUM_COLOUR = {"train": 4, "valid": 1, "test": 3}
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
SPLIT_SEED = 20_261_127  # of the crops' places and a folder's split, which belong to the data, not to the run
VALID_SHARE, TEST_SHARE = 0.15, 0.2
CIFAR_TEST = 60  # pictures of 32 x 32 pixels that are denoised at most

Pictures = list[Tensor]  # (C, H, W), values in [0, 1]


def load_data(config: Config, runtime: Runtime) -> Data:
    """Training and validation crops, (N, C, S, S); test pictures, (N, C, H, W), all of one size; values in [0, 1].

    Raises:
        UserError: when pictures are missing, unreadable, too few or too small, or cannot be downloaded.
    """
    pictures, source, licence, synthetic = _pictures(config, runtime)
    if config.test_folder:
        pictures["test"], more = _read_folder(Path(config.test_folder), config.colour), f"test: folder {config.test_folder}"
        source, synthetic = f"{source}; {more}", None
    elif config.test_pictures != "own":
        pictures["test"] = _read_folder(fetch(config.test_pictures, runtime.data_folder), config.colour)
        source = f"{source}; test: {config.test_pictures}, {SETS[config.test_pictures].number} grey pictures from cszn/DnCNN"
    for split, found in pictures.items():
        smallest = min(min(picture.shape[1:]) for picture in found)
        if smallest < config.crop_size:
            raise UserError(
                f"a {split} picture is only {smallest} pixels wide or high", f"leave it out, or lower crop_size to {smallest}"
            )
    size = min(config.test_size, *(min(picture.shape[1:]) for picture in pictures["test"]))
    width, generator = config.crop_size, torch.Generator().manual_seed(SPLIT_SEED)
    return Data(
        train={"crops": crops(_with_halves(pictures["train"], width), config.train_crops, width, generator)},
        valid={"crops": crops(pictures["valid"], config.valid_crops, width, generator)},
        test={"pictures": torch.stack([middle(picture, size) for picture in pictures["test"]])},
        source=source,
        licence=licence,
        sha256=content_sha256([picture for split in ("train", "valid", "test") for picture in pictures[split]]),
        synthetic=synthetic,
    ).to(runtime.device)


def _pictures(config: Config, runtime: Runtime) -> tuple[dict[str, Pictures], str, str, bool | None]:
    """Pictures by split, source, licence, whether synthetic."""
    if config.dataset == "photos":
        sets = {
            split: [read(_photo(name), config.colour) for name in (names[: NUM_COLOUR[split]] if config.colour else names)]
            for split, names in PHOTOS.items()
        }
        number = sum(map(len, sets.values()))
        source = f"{number} sample photos of scikit-image {skimage.__version__} and scikit-learn {sklearn.__version__}"
        return sets, source, "CC0, CC BY 2.0 and public domain, see both libraries", False
    if config.dataset == "cifar10":
        return _cifar10(config, runtime), "CIFAR-10 (Krizhevsky 2009), by torchvision", "research use, cite", False
    if config.dataset == "bsd400":
        folder, licence, synthetic = fetch("bsd400", runtime.data_folder), "research use, cite", False
        source = "400 grey crops of the Berkeley segmentation data set (Martin et al. 2001), from cszn/DnCNN"
    else:
        folder, licence, synthetic = Path(config.image_folder), "the user's", None
        source = f"folder {folder.name}"
    return split_by_picture(_read_folder(folder, config.colour)), source, licence, synthetic


def _photo(name: str) -> Path:
    place = Path(sklearn.datasets.__file__).parent / "images" / name
    return place if place.is_file() else Path(skimage.__file__).parent / "data" / name


def read(path: Path, colour: bool) -> Tensor:
    """A picture as (1 or 3, H, W); grey is 0.299 R + 0.587 G + 0.114 B.

    Raises:
        UserError: when it cannot be read.
    """
    try:
        with Image.open(path) as image:
            array = np.array(image.convert("RGB" if colour else "L"))
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {path}: {error}", "replace it, or take it out of the folder") from None
    image = torch.from_numpy(array).float().div(255)
    return image.permute(2, 0, 1).contiguous() if colour else image.unsqueeze(0)


def _read_folder(folder: Path, colour: bool) -> Pictures:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", "name a folder with pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no pictures", f"put files there that end in {', '.join(sorted(SUFFIXES))}")
    return [read(path, colour) for path in paths]


def split_by_picture(pictures: Pictures) -> dict[str, Pictures]:
    """Train, valid and test; no picture is in two of them.

    Raises:
        UserError: for fewer than three pictures.
    """
    if len(pictures) < 3:
        raise UserError(f"{len(pictures)} pictures cannot be split into train, valid and test", "give at least 3, better 20")
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    num_test, num_valid = max(1, round(TEST_SHARE * len(order))), max(1, round(VALID_SHARE * len(order)))
    parts = {
        "train": order[num_test + num_valid :],
        "valid": order[num_test : num_test + num_valid],
        "test": order[:num_test],
    }
    return {split: [pictures[index] for index in part] for split, part in parts.items()}


def _with_halves(pictures: Pictures, size: int) -> Pictures:
    """The pictures and, of the large ones, a copy at half the size: photos of today are smoother than those of old test sets."""
    return pictures + [avg_pool2d(picture, 2) for picture in pictures if min(picture.shape[1:]) >= 4 * size]


def crops(pictures: Sequence[Tensor], number: int, size: int, generator: torch.Generator) -> Tensor:
    """Square crops at random places, the same number of each picture up to one, (number, C, size, size)."""
    found = []
    for index in range(number):
        picture = pictures[index % len(pictures)]
        row, column = (int(torch.randint(length - size + 1, (), generator=generator)) for length in picture.shape[1:])
        found.append(picture[:, row : row + size, column : column + size])
    return torch.stack(found)


def middle(picture: Tensor, size: int) -> Tensor:
    """The middle square of a picture, (C, size, size)."""
    row, column = ((length - size) // 2 for length in picture.shape[1:])
    return picture[:, row : row + size, column : column + size]


def _cifar10(config: Config, runtime: Runtime) -> dict[str, Pictures]:
    """Downloaded by torchvision, which checks every file's MD5."""
    from torchvision.datasets import CIFAR10

    try:
        train, test = (
            torch.from_numpy(CIFAR10(str(runtime.data_folder), train=train, download=True).data) for train in (True, False)
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot get CIFAR-10 into {runtime.data_folder}: {error}",
            f"turn the internet on, or put {CIFAR10.filename} in that folder",
        ) from None

    def prepared(images: Tensor) -> Pictures:
        images = images.permute(0, 3, 1, 2).float().div(255)
        if not config.colour:
            images = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return list(images)

    number = min(config.train_crops, len(train) - config.valid_crops)
    return {
        "train": prepared(train[:number]),
        "valid": prepared(train[-config.valid_crops :]),
        "test": prepared(test[:CIFAR_TEST]),
    }

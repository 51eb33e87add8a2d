"""Pictures of a run and their boxes, split once: drawn ones by index, real ones by video or by picture."""

# N pictures, H, W their size in pixels, M boxes of the picture that has most

import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from trainbook.data import Data, content_sha256
from trainbook.errors import UserError
from trainbook.runtime import Runtime
from trainbook.workflows.license_plates.annotations import READERS, find_pictures
from trainbook.workflows.license_plates.config import Config
from trainbook.workflows.license_plates.drawing import draw_pictures

FIRST_INDEX = {"train": 0, "valid": 1_000_000, "test": 2_000_000}  # of the drawn pictures of each split
SPLIT_SEED = 20_261_127  # belongs to the data, not to the run
HELD_OUT_SHARE = 0.1  # of the pictures of a folder, at least, for valid and for test each
SOURCES = {
    "yolo": "folder {} in YOLO's form",
    "voc": "folder {} in Pascal VOC's form",
    "ccpd": "CCPD (Xu et al. 2018), folder {}",
}

Split = tuple[np.ndarray, Sequence[np.ndarray]]  # (N, H, W, 3) uint8; boxes of each, (n, 4)


def load_data(config: Config, runtime: Runtime) -> Data:
    """Pictures and boxes of every split; they stay on the CPU, batches move to the device.

    Returns:
        Per split `images` (N, 3, H, W) uint8; `boxes` (N, M, 4) float32, x0, y0, x1, y1 in pixels, zeros where a picture has
        fewer; `num_boxes` (N,).

    Raises:
        UserError: when pictures are missing, unreadable or too few, a box cannot be, or a split has no plate.
    """
    if config.dataset == "drawn":
        splits: dict[str, Split] = {
            split: draw_pictures(first, getattr(config, f"{split}_pictures"), config.image_width, config.image_height)
            for split, first in FIRST_INDEX.items()
        }
        source, licence, synthetic = "plates drawn by this workflow with Pillow", "as the kit", True
    else:
        splits = _read_splits(config)
        source, licence, synthetic = SOURCES[config.dataset].format(Path(config.picture_folder).name), "see its source", None
    most = max(len(found) for _, boxes in splits.values() for found in boxes)
    tensors = {split: _tensors(*content, most) for split, content in splits.items()}
    for split, content in tensors.items():
        if not content["num_boxes"].any():
            raise UserError(f"no {split} picture has a plate", "give more pictures, or put the labels where they belong")
    if len(tensors["train"]["images"]) < config.batch_size:
        raise UserError(f"{len(tensors['train']['images'])} training pictures do not fill a batch", "lower batch_size")
    everything = [tensor for content in tensors.values() for tensor in content.values()]
    return Data(**tensors, source=source, licence=licence, sha256=content_sha256(everything), synthetic=synthetic)


def _tensors(pictures: np.ndarray, boxes: Sequence[np.ndarray], most: int) -> dict[str, Tensor]:
    padded = np.zeros((len(pictures), most, 4), np.float32)
    for place, found in zip(padded, boxes, strict=True):
        place[: len(found)] = found
    return {
        "images": torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))),
        "boxes": torch.from_numpy(padded),
        "num_boxes": torch.tensor([len(found) for found in boxes]),
    }


def _read_splits(config: Config) -> dict[str, Split]:
    if not config.picture_folder:
        raise UserError(f"dataset = {config.dataset} needs picture_folder", "name it; the README says where sets are")
    paths = _drawn_from(find_pictures(Path(config.picture_folder), config.dataset), config.max_pictures)
    if config.test_folder:
        test = _drawn_from(find_pictures(Path(config.test_folder), config.dataset), config.max_pictures)
        parts = {**split_paths(paths, config.split_by, ("valid",)), "test": test}
    else:
        parts = split_paths(paths, config.split_by, ("test", "valid"))
    return {split: _read_all(config, found) for split, found in parts.items()}


def _drawn_from(paths: list[Path], most: int) -> list[Path]:
    return sorted(random.Random(SPLIT_SEED).sample(paths, most)) if len(paths) > most else paths


def video_of(path: Path) -> str:
    """What a picture's name says of the video it is from: the name without the number at its end."""
    return re.sub(r"[-_. ]*\d+$", "", path.stem)


def split_paths(paths: Sequence[Path], split_by: str, held_out: Sequence[str]) -> dict[str, list[Path]]:
    """Train and held-out pictures; with "video" no video is in two splits.

    The smallest videos, of equal ones a random one first, fill one held-out split after the other to a tenth of the pictures.

    Args:
        paths: of the pictures.
        split_by: "video" or "picture".
        held_out: names of the splits besides train.

    Raises:
        UserError: when there are not enough videos or pictures.
    """
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(video_of(path) if split_by == "video" else str(path), []).append(path)
    names = list(groups)
    random.Random(SPLIT_SEED).shuffle(names)
    names.sort(key=lambda name: len(groups[name]))  # stable
    parts: dict[str, list[Path]] = {}
    for split in held_out:
        parts[split] = []
        while len(parts[split]) < HELD_OUT_SHARE * len(paths) and names:
            parts[split] += groups[names.pop(0)]
    parts["train"] = [path for name in names for path in groups[name]]
    if not all(parts.values()):
        raise UserError(
            f"{len(paths)} pictures of {len(groups)} {split_by}s cannot be split into train and {' and '.join(held_out)}",
            "give more, or a test_folder"
            + ("; where pictures are independent although their names count up, set split_by = picture" * (split_by == "video")),
        )
    return parts


def _read_all(config: Config, paths: Sequence[Path]) -> Split:
    pictures = np.empty((len(paths), config.image_height, config.image_width, 3), np.uint8)
    boxes = []
    for place, path in zip(pictures, paths, strict=True):
        place[...], found = read_picture(path, config.dataset, config.image_width, config.image_height)
        boxes.append(found)
    return pictures, boxes


def read_picture(path: Path, dataset: str, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture scaled to fit, filled up with black at the right or below, and its boxes scaled likewise.

    Returns:
        (H, W, 3) uint8; (n, 4) float32.

    Raises:
        UserError: when it cannot be read, or its boxes cannot be.
    """
    try:
        with Image.open(path) as image:
            found = READERS[dataset](path, *image.size)
            scale = min(width / image.width, height / image.height)
            size = (min(width, max(1, round(image.width * scale))), min(height, max(1, round(image.height * scale))))
            ratio = np.array((size[0] / image.width, size[1] / image.height) * 2)
            pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))  # averages where it shrinks
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the picture {path}: {error}", "replace it, or take it out of the folder") from None
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[: size[1], : size[0]] = pixels
    return canvas, (np.array(found, np.float64).reshape(-1, 4) * ratio).astype(np.float32)

"""A pre-trained binary autoencoder: what its file says it is, and whether it codes the images of this run."""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from trainbook.errors import UserError
from trainbook.runtime import runs_folder
from trainbook.weights import describe_mismatch, find_weights, read_weights
from trainbook.workflows.timestep_dbn.autoencoder import BinaryAutoencoder, level_sizes
from trainbook.workflows.timestep_dbn.config import Config

logger = logging.getLogger("trainbook")

NAME = "autoencoder"
LEVELS = 3
CHECKED_IMAGES = 64


@dataclass(frozen=True)
class Architecture:
    """What a `BinaryAutoencoder` is built from, read off its tensors."""

    image_channels: int
    code_channels: tuple[int, ...]
    width: int


def read_architecture(source: str) -> Architecture:
    """The architecture of the autoencoder in a file, from the shapes of its tensors.

    Args:
        source: a run, its export folder, a .safetensors file or a torch checkpoint.

    Raises:
        UserError: when there is no such file, it is another model, or it declares other code channels than it has.
    """
    remedy = Config.MODULE_FIELDS[NAME][1]
    path = find_weights([NAME], source, runs_folder()).get(NAME)
    if path is None:
        raise UserError(
            f"autoencoder = {source!r} is no run and no file of weights here",
            "give the run or file; where it lies on another machine only, also give code_channels and autoencoder_width",
        )
    tensors, declared = read_weights(path, NAME)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    heads = [f"heads.{level}.weight" for level in range(LEVELS)]
    missing = [key for key in ("stem.weight", *heads) if len(shapes.get(key, ())) != 4]
    if missing:
        raise UserError(
            f"{path} is no binary autoencoder with {LEVELS} levels: it has no {', '.join(missing)}, but "
            f"{', '.join(sorted(shapes)[:3])} and {max(0, len(shapes) - 3)} more",
            remedy,
        )
    width, image_channels = shapes["stem.weight"][:2]
    found = Architecture(image_channels, tuple(shapes[head][0] for head in heads), width)
    for field, value in (("code_channels", found.code_channels), ("autoencoder_width", width)):
        says = declared.get(field, value)
        if (tuple(says) if isinstance(says, list) else says) != value:
            raise UserError(f"{path} declares {field} = {says}, but its tensors have {value}", remedy)
    with torch.device("meta"):
        built = BinaryAutoencoder(image_channels, found.code_channels, width) if width % 4 == 0 else torch.nn.Module()
    wanted = {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()}
    if mismatch := describe_mismatch(wanted, shapes):
        raise UserError(f"{path} is an autoencoder of another architecture: {mismatch}", remedy)
    return found


@torch.no_grad()
def check_codes(model: BinaryAutoencoder, config: Config, images: Tensor) -> None:
    """Code and decode a few of the run's images before anything is trained on the codes.

    Args:
        model: the pre-trained autoencoder, with its weights.
        config: of the run; its code_channels are what the chain is built for.
        images: (N, C, H, W), values in [0, 1].

    Raises:
        UserError: when the codes are no bits, or not as many as declared, or do not decode to an image.
    """
    images = images[:CHECKED_IMAGES]
    codes = model.encode(images)
    declared, found = level_sizes(images.shape[2:], config.code_channels), [code[0].numel() for code in codes]
    rebuilt = model.decode(codes)
    wrong = ""
    if found != declared:
        wrong = f"gives {found} bits per level, the chain is built for {declared}"
    elif any(not bool(((code == 0) | (code == 1)).all()) for code in codes):
        wrong = "gives codes that are not exactly 0 or 1"
    elif rebuilt.shape != images.shape or not bool(torch.isfinite(rebuilt).all()):
        wrong = f"decodes to {tuple(rebuilt.shape)}, not to finite images {tuple(images.shape)}"
    if wrong:
        raise UserError(f"autoencoder = {config.autoencoder!r} {wrong}", config.MODULE_FIELDS[NAME][1])
    error, of_mean = mse_loss(rebuilt, images), mse_loss(images.mean(0, keepdim=True).expand_as(images), images)
    logger.info(
        "pre-trained autoencoder: %d exact bits per image, PSNR %.1f dB on %d validation images",
        sum(found), -10 * math.log10(max(float(error), 1e-12)), len(images),
    )  # fmt: skip
    if error >= of_mean:
        logger.warning(
            "the pre-trained autoencoder rebuilds these images worse than their mean does: it was trained on other images; "
            "see 'Checkpoint' in the workflow's README"
        )

"""A finite set of views of an image, so that what a teacher says of each can be kept instead of computed again."""

# B images, C channels, H rows, W columns

import torch
from torch import Tensor
from torch.nn import functional

SHIFTS = 9  # itself and by one pixel in each of eight directions
IDENTITY = 4  # the shift that leaves an image where it is
NUM_VIEWS = {"none": 1, "shifts": SHIFTS, "shifts_and_flips": 2 * SHIFTS}


def view(images: Tensor, numbers: Tensor, augmentation: str) -> Tensor:
    """Each image in the view of its number; what moves in from outside is zero.

    Args:
        images: (B, C, H, W).
        numbers: (B,) int64, from 0 to `NUM_VIEWS[augmentation]` - 1.
        augmentation: a key of `NUM_VIEWS`.
    """
    if augmentation == "none":
        return images
    shift, flipped = numbers % SHIFTS, numbers >= SHIFTS
    num_channels, height, width = images.shape[1:]
    padded = functional.pad(images, [1] * 4)
    rows = (shift // 3)[:, None] + torch.arange(height, device=images.device)
    columns = (shift % 3)[:, None] + torch.arange(width, device=images.device)
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    pixels = (rows[:, :, None] * padded.shape[3] + columns[:, None]).flatten(1)[:, None]  # (B, 1, H W)
    return padded.flatten(2).gather(2, pixels.expand(-1, num_channels, -1)).view(images.shape)


def plain_view(augmentation: str) -> int:
    """Number of the view that is the image itself."""
    return 0 if augmentation == "none" else IDENTITY

"""Image augmentation where the images are: one draw per image from torch's global generator of that device.

The engine seeds that generator for each step, so a resumed run sees the same images. Nothing here loops over images or
makes the host wait for a GPU.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

# B images, C channels, H rows, W columns


def random_flip(images: Tensor, probability: float = 0.5) -> Tensor:
    """Mirror each image left to right with the given probability.

    Args:
        images: (B, C, H, W).
        probability: in [0, 1].
    """
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(flipped, images.flip(-1), images)


def random_crop(images: Tensor, padding: int, mode: str = "reflect") -> Tensor:
    """Pad every side, then cut a window of the old size from each image; all (2 padding + 1)^2 places are equally likely.

    Args:
        images: (B, C, H, W), floating.
        padding: pixels per side; with "reflect" less than H and W.
        mode: of `torch.nn.functional.pad`: "reflect", or "constant" for zeros.

    Source: He et al. (2016), Deep Residual Learning for Image Recognition, section 4.2 (zeros, padding 4 at 32 x 32);
    Zagoruyko and Komodakis (2016), Wide Residual Networks, section 3 (reflection).
    """
    num_images, num_channels, height, width = images.shape
    with torch.autocast(images.device.type, enabled=False):  # it would pad in float32
        padded = functional.pad(images, [padding] * 4, mode)
    top, left = torch.randint(2 * padding + 1, (2, num_images, 1, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)[:, None]
    columns = left + torch.arange(width, device=images.device)
    pixels = (rows * padded.shape[3] + columns).flatten(1)[:, None]  # (B, 1, H W)
    return padded.flatten(2).gather(2, pixels.expand(-1, num_channels, -1)).view(images.shape)


def random_affine(
    images: Tensor, degrees: float = 0.0, translation: float = 0.0, scale: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """Turn and resize each image about its centre, then shift it; bilinear between pixels, zeros from outside.

    The output at p, in pixels from the centre, is the input at R(-a) (p - t) / s. Each image draws a from [-degrees, degrees],
    s from `scale`, and t from [-translation, translation] times (W, H), all uniform.

    Args:
        images: (B, C, H, W), floating.
        degrees: largest angle, either way.
        translation: largest shift, as a share of width and height.
        scale: smallest and largest factor, positive; above 1 enlarges.
    """
    num_images, _, height, width = images.shape
    angle, factor, across, down = torch.rand(4, num_images, device=images.device)
    angle = (2 * angle - 1) * math.radians(degrees)
    factor = scale[0] + (scale[1] - scale[0]) * factor
    shift = (torch.stack((across, down), 1)[..., None] - 0.5) * 4 * translation  # the sampling grid is 2 wide and 2 high
    cosine, sine = angle.cos() / factor, angle.sin() / factor
    turn = torch.stack((cosine, sine * (height / width), -sine * (width / height), cosine), 1).view(-1, 2, 2)
    precise = torch.promote_types(images.dtype, torch.float32)
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 misplaces pixels
        matrix = torch.cat((turn, -turn @ shift), 2)  # (B, 2, 3)
        grid = functional.affine_grid(matrix.to(precise), list(images.shape), align_corners=False)
        return functional.grid_sample(images.to(precise), grid, align_corners=False).to(images.dtype)


def random_erasing(images: Tensor, share: float, probability: float = 0.5) -> Tensor:
    """Set a rectangle of an image to zero with the given probability, at a place drawn uniformly from those where it fits.

    It has the image's proportions: round(sqrt(share) H) by round(sqrt(share) W) pixels. On normalised images zero is the mean.

    Args:
        images: (B, C, H, W).
        share: of the image's area, in [0, 1]; on 32 x 32 the paper's 16 x 16 for CIFAR-10 is 0.25, its 8 x 8 for CIFAR-100
            is 0.0625.
        probability: in [0, 1].

    Source: DeVries and Taylor (2017), Improved Regularization of Convolutional Neural Networks with Cutout, section 3.2,
    the variant inside the image with probability 0.5.
    """
    num_images, _, height, width = images.shape
    tall, wide = round(math.sqrt(share) * height), round(math.sqrt(share) * width)
    top = torch.randint(height - tall + 1, (num_images, 1, 1, 1), device=images.device)
    left = torch.randint(width - wide + 1, (num_images, 1, 1, 1), device=images.device)
    rows, columns = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)  # (B, 1, H, W)
    chosen = torch.rand(num_images, 1, 1, 1, device=images.device) < probability
    return images.masked_fill(inside & chosen, 0)

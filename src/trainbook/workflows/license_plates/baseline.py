"""What one finds without learning: places full of upright edges, as classical plate finders look for them."""

import numpy as np
import torch
from scipy import ndimage
from skimage.filters import sobel_v, threshold_otsu
from skimage.measure import label, regionprops
from torch import Tensor

GREY = (0.299, 0.587, 0.114)
CLOSED = (0.02, 0.06)  # height and width of the window that joins strokes to a blob, as shares of the picture's width
WIDTHS = (0.08, 0.5)  # of a blob, as shares of the picture's width
RATIOS = (1.4, 8.0)  # width over height


def edge_blobs(image: Tensor) -> dict[str, Tensor]:
    """Boxes (n, 4) and scores (n,) of the blobs of upright edges that have a plate's proportions; knows no plate.

    Strength of upright edges, averaged over a window about as large as the gaps between characters, above Otsu's threshold;
    connected blobs within bounds of width and proportion. The score is the share of the box that the blob fills times the
    blob's mean edge strength over the strongest of the picture.

    Args:
        image: (3, H, W) uint8.
    """
    grey = np.tensordot(GREY, image.numpy().astype(np.float64) / 255, 1)
    window = [max(1, round(share * grey.shape[1])) for share in CLOSED]
    strength = ndimage.uniform_filter(np.abs(sobel_v(ndimage.gaussian_filter(grey, 0.7))), window)
    boxes, scores = [], []
    if strength.max() > 0:
        for blob in regionprops(label(strength > threshold_otsu(strength)), strength):
            y0, x0, y1, x1 = blob.bbox
            wide, tall = x1 - x0, y1 - y0
            if WIDTHS[0] <= wide / grey.shape[1] <= WIDTHS[1] and RATIOS[0] <= wide / tall <= RATIOS[1]:
                boxes.append((x0, y0, x1, y1))
                scores.append(blob.extent * blob.intensity_mean / strength.max())
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "scores": torch.tensor(scores, dtype=torch.float32)}

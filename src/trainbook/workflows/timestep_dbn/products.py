"""The products of a contrastive step: in the parameters' own precision, or with operands in 16 bits."""

# T timesteps, B batch, V visible units, H hidden units, G context units; z visible, h hidden, g context
# W weight, U context weight

import logging
import time
from functools import cache

import torch
from torch import Tensor

from trainbook.layers import product
from trainbook.workflows.timestep_dbn.elementwise import Elementwise
from trainbook.workflows.timestep_dbn.rbm import Block

logger = logging.getLogger("trainbook")


class Products:
    """Products with the weights of some RBMs, and those that change the weights.

    In 16 bits operands and results are rounded to 8 (bfloat16) or 11 (float16) binary digits; bits are exact, and sums inside a
    product are float32. Both phases see the same rounded W: the gradient is the one of the machine with rounded weights, and
    it moves W itself, which stays float32.

    Args:
        block: the largest block that it is for, for its shapes.
        dtype: of operands and results; that of the block's weights rounds nothing.
    """

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self._dtype, self._rounds = dtype, dtype != block.weight.dtype
        self._weight, self._context_weight = block.weight, block.context_weight
        if self._rounds:
            self._rounded = [torch.empty_like(each, dtype=dtype) for each in (block.weight, block.context_weight)]

    def load(self, block: Block) -> None:
        """Take the weights as they are now; rounded ones do not follow them."""
        self._weight, self._context_weight = block.weight, block.context_weight
        if self._rounds:
            self._weight, self._context_weight = (
                rounded[: len(each)].copy_(each)
                for rounded, each in zip(self._rounded, (block.weight, block.context_weight), strict=True)
            )

    def with_weight(self, visible: Tensor, out: Tensor) -> Tensor:
        """The product z W, (T, B, V) -> (T, B, H)."""
        return self._into(out, visible, self._weight)

    def with_transposed(self, hidden: Tensor, out: Tensor) -> Tensor:
        """The product h W', (T, B, H) -> (T, B, V)."""
        return self._into(out, hidden, self._weight.transpose(1, 2))

    def add_context(self, context: Tensor, out: Tensor) -> None:
        """Out <- out + g U, (T, B, G) -> (T, B, H)."""
        if self._rounds:
            out.add_(product(context.to(self._dtype), self._context_weight))
        else:
            product(context, self._context_weight, out=out, keep=1.0)

    def add_outer(self, a: Tensor, b: Tensor, target: Tensor, keep: float, scale: Tensor, kernels: Elementwise) -> None:
        """Target <- keep target + a'b; in 16 bits, which hold no small numbers well, keep target + scale a'(b / scale).

        Args:
            a: (T, N, K).
            b: (T, N, M).
            target: (T, K, M), float32; with keep = 0 what it holds is not looked at.
            keep: share of the target that stays.
            scale: about as large as the numbers in b, a scalar tensor.
            kernels: compiled or eager.
        """
        if not self._rounds:
            product(a.transpose(1, 2), b, out=target, keep=keep)
            return
        change = product(a.to(self._dtype).transpose(1, 2), (b / scale).to(self._dtype))
        if keep:
            kernels.add_change(target, change, scale.new_tensor(keep), scale)
        else:
            target.copy_(change).mul_(scale)

    def _into(self, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return out.copy_(product(a.to(self._dtype), b)) if self._rounds else product(a, b, out=out)


@cache
def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of that name; says once how products in 16 bits compare with float32, and warns where they are slower."""
    dtype = getattr(torch, precision)
    if dtype != torch.float32:
        ratio = _product_seconds(dtype, device) / _product_seconds(torch.float32, device)
        level, advice = (logging.WARNING, ": float32 is the better choice") if ratio >= 1 else (logging.INFO, "")
        logger.log(level, "products in %s take %.2f times as long here as in float32%s", precision, ratio, advice)
    return dtype


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The quickest of a few products of a chain's usual size."""
    bits, weight = (torch.ones(*size, dtype=dtype, device=device) for size in ((8, 64, 256), (8, 256, 256)))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        product(bits, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])

"""Operations that two or more workflows use."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trainbook.runtime import cpu_vendor

LEAST_WORK = 2**17  # multiplications of one a_t b_t from which oneDNN is faster; torch itself hands it nothing below 2^12


def product(a: Tensor, b: Tensor, out: Tensor | None = None, keep: float = 0.0) -> Tensor:
    """Batched matrix product a_t b_t, written or added to `out`: out_t <- keep out_t + a_t b_t.

    What one t gets does not depend on how many others are computed with it.

    Args:
        a: (T, N, K).
        b: (T, K, M).
        out: (T, N, M), a new tensor when not given.
        keep: share of `out` that stays; 0 overwrites it, NaN too.

    Returns:
        (T, N, M)
    """
    work = a.shape[1] * a.shape[2] * b.shape[2]
    if a.dtype == torch.float32 and not a.is_cuda and work >= LEAST_WORK and not torch.is_grad_enabled() and onednn_is_faster():
        with _through_onednn():
            return _product(a, b, out, keep)
    return _product(a, b, out, keep)


def _product(a: Tensor, b: Tensor, out: Tensor | None, keep: float) -> Tensor:
    return torch.bmm(a, b) if out is None else torch.baddbmm(out, a, b, beta=keep, out=out)  # beta = 0 ignores NaN


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN, which is inside every x86 build of torch, beats torch's MKL here and keeps float32.

    MKL leaves AVX-512 unused on AMD: 119 against 211 GFLOP/s for a 1024^3 product on one Zen 5 core. torch reaches oneDNN with
    float32 only where bfloat16 would be allowed too; oneDNN makes use of that on processors with tiles for it (AMX) and
    computes in float32 on others. A product that bfloat16 would round tells them apart.
    """
    if cpu_vendor() != "AuthenticAMD" or not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    fine = torch.full((2, 64, 64), 1 + 2.0**-14)  # sums of 64 are exact in float32
    with _through_onednn():
        return bool((torch.bmm(fine, torch.ones(2, 64, 64)) == 64 * (1 + 2.0**-14)).all())


@contextmanager
def _through_onednn() -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def blend_(target: Tensor, value: Tensor, keep: float) -> None:
    """Target <- keep target + value, in place; with keep = 0 whatever the target held is gone, NaN too."""
    if keep:
        target.mul_(keep).add_(value)
    else:
        target.copy_(value)

"""Operations that two or more workflows use."""

import torch
from torch import Tensor

from trainbook.runtime import cpu_vendor

# torch's MKL leaves AVX-512 unused on AMD; oneDNN, which is inside every x86 build of torch, uses it: 119 against 211 GFLOP/s
# for a 1024^3 float32 product on one Zen 5 core. The operator is not public, hence the fallback.
_ONEDNN_IS_FASTER = cpu_vendor() == "AuthenticAMD" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor, out: Tensor | None = None, keep: float = 0.0) -> Tensor:
    """Batched matrix product a_t b_t, written or added to `out`: out_t <- keep out_t + a_t b_t.

    Args:
        a: (T, N, K).
        b: (T, K, M).
        out: (T, N, M), a new tensor when not given.
        keep: share of `out` that stays; 0 overwrites it.

    Returns:
        (T, N, M)
    """
    if not _ONEDNN_IS_FASTER or a.dtype != torch.float32 or a.is_cuda or torch.is_grad_enabled():
        return torch.bmm(a, b) if out is None else torch.baddbmm(out, a, b, beta=keep, out=out)  # beta = 0 ignores NaN
    if out is None:
        out = a.new_empty(*a.shape[:2], b.shape[2])
    linear = torch.ops.mkldnn._linear_pointwise
    for left, right, result in zip(a.unbind(), b.unbind(), out.unbind(), strict=True):
        blend_(result, linear(left, right.t(), None, "none", [], ""), keep)  # the temporary stays in the cache
    return out


def blend_(target: Tensor, value: Tensor, keep: float) -> None:
    """Target <- keep target + value, in place; with keep = 0 whatever the target held is gone, NaN too."""
    if keep:
        target.mul_(keep).add_(value)
    else:
        target.copy_(value)

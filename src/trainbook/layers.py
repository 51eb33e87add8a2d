"""Operations that two or more workflows use."""

import torch
from torch import Tensor

from trainbook.runtime import cpu_vendor

# torch's MKL leaves AVX-512 unused on AMD; oneDNN, which is inside every x86 build of torch, uses it: 119 against 211 GFLOP/s
# for a 1024^3 float32 product on one Zen 5 core. The operator is not public, hence the fallback.
_ONEDNN_IS_FASTER = cpu_vendor() == "AuthenticAMD" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Batched matrix product a_t b_t.

    Args:
        a: (T, N, K).
        b: (T, K, M).
        out: (T, N, M), overwritten when given.

    Returns:
        (T, N, M)
    """
    if not _ONEDNN_IS_FASTER or a.dtype != torch.float32 or a.is_cuda or torch.is_grad_enabled():
        return torch.bmm(a, b, out=out)
    linear = torch.ops.mkldnn._linear_pointwise
    products = [linear(x, y.t(), None, "none", [], "") for x, y in zip(a.unbind(), b.unbind(), strict=True)]
    return torch.stack(products, out=out)

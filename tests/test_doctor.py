"""Which wheel runs on which card: the published tables, not this machine's."""

import pytest

from trainbook.doctor import kernels_missing

CUDA_12_8 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("card", "capability", "wheel", "works"),
    [
        ("V100", (7, 0), CUDA_12_8, False),
        ("P100", (6, 0), CUDA_12_8, False),
        ("V100", (7, 0), CUDA_12_6, True),
        ("P100", (6, 0), CUDA_12_6, True),
        ("T4", (7, 5), CUDA_12_8, True),
        ("L4 runs sm_86 kernels", (8, 9), CUDA_12_8, True),
        ("H200", (9, 0), ["sm_90a"], True),
        ("a later card by portable code", (13, 0), CUDA_12_8, True),
        ("a later card without it", (13, 0), CUDA_12_6, False),
    ],
)
def test_kernels_missing(card, capability, wheel, works):
    reason = kernels_missing(capability, wheel)
    assert (reason == "") is works
    assert works or f"{capability[0]}.{capability[1]}" in reason

"""Batched products against double precision; what one of them gets does not depend on its neighbours."""

import itertools

import pytest
import torch
from torch import Tensor

from trainbook import layers
from trainbook.layers import LEAST_WORK, onednn_is_faster, product

SHAPES = [(3, 5, 7), (32, 128, 64), (64, 256, 96), (33, 70, 100), (1, 300, 500)]  # N, K, M; below and above LEAST_WORK


def operands(shape: tuple[int, int, int], timesteps: int, transposed: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """a and b, each as it lies in memory or as the transpose of one."""
    n, k, m = shape
    a = torch.randn(timesteps, k, n).mT if transposed[0] else torch.randn(timesteps, n, k)
    b = torch.randn(timesteps, m, k).mT if transposed[1] else torch.randn(timesteps, k, m)
    return a, b


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


def test_shapes_lie_on_both_sides_of_the_least_work():
    assert {n * k * m >= LEAST_WORK for n, k, m in SHAPES} == {False, True}


@pytest.mark.parametrize("transposed", [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_product_matches_double_precision_and_keeps_a_share(shape, transposed):
    a, b = operands(shape, 4, transposed)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert ((product(a, b) - exact).abs() < 1e-6 * size).all()  # bfloat16 or TF32 would be off by 1e-3
    before = torch.randn(4, shape[0], shape[2])
    out = before.clone()
    assert product(a, b, out=out, keep=0.75) is out
    assert ((out - (0.75 * before.double() + exact)).abs() < 1e-6 * (size + before.abs())).all()
    part = torch.full((4, 2 * shape[0], shape[2]), torch.nan)
    product(a, b, out=part[:, shape[0] :])  # half of a larger tensor, with NaN in it
    assert torch.equal(part[:, shape[0] :], product(a, b))
    assert part[:, : shape[0]].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_each_product_is_the_same_bits_in_whatever_company(shape):
    a, b = operands(shape, 7, (False, False))
    together = product(a, b)
    for size in (1, 2, 3):
        parts = [product(a[t : t + size], b[t : t + size]) for t in range(0, 7, size)]
        assert torch.equal(torch.cat(parts), together)


@pytest.mark.skipif(not onednn_is_faster(), reason="only where products go through oneDNN: AMD processors without AMX")
def test_torchs_setting_is_as_before_also_after_an_error(monkeypatch):
    settings = torch.backends.mkldnn.matmul
    before, seen = settings.fp32_precision, []
    original = layers._product
    monkeypatch.setattr(layers, "_product", lambda *a: (seen.append(settings.fp32_precision), original(*a))[1])
    a, b = operands((64, 64, 64), 2, (False, False))
    with torch.no_grad():
        product(a, b)
        assert settings.fp32_precision == before
        with pytest.raises(RuntimeError):
            product(a, b[:, :32])
    assert settings.fp32_precision == before
    assert seen[0] == "bf16"


def test_product_has_a_gradient():
    a, b = operands((3, 4, 5), 2, (False, False))
    a.requires_grad_()
    product(a, b).sum().backward()
    torch.testing.assert_close(a.grad, b.sum(2).unsqueeze(1).expand_as(a))


def test_rounding_hardware_is_told_apart(monkeypatch):
    monkeypatch.setattr(layers, "cpu_vendor", lambda: "AuthenticAMD")
    original = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: original(a.bfloat16(), b.bfloat16()).float())  # as AMX would
    assert not onednn_is_faster.__wrapped__()

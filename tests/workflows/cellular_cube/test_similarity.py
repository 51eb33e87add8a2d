"""Measures of likeness against closed forms, scikit-learn and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import cosine_similarity

from trainbook.workflows.cellular_cube.similarity import (
    linear_cka,
    norm_summary,
    participation_ratio,
    reconstruction_quality,
    representational_similarity,
    similarity_table,
)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_quality_is_one_minus_r2_and_cosines_are_of_raw_and_centred_vectors():
    target, mean, scale = gaussian(50, 6), gaussian(6, seed=1) * 3, 0.2
    target = target - target.mean(0)
    output = target + 0.5 * gaussian(50, 6, seed=2)
    found = reconstruction_quality(output, target, mean, scale)
    raw_output, raw_target = output * scale + mean, target * scale + mean
    assert found["fvu"] == pytest.approx(1 - r2_score(raw_target, raw_output, multioutput="variance_weighted"), rel=1e-5)
    assert found["raw_mse"] == pytest.approx((raw_target - raw_output).square().mean().item(), rel=1e-5)
    assert found["cosine"] == pytest.approx(np.diag(cosine_similarity(raw_output, raw_target)).mean(), rel=1e-5)
    assert found["centred_cosine"] == pytest.approx(np.diag(cosine_similarity(output, target)).mean(), rel=1e-5)
    assert found["cosine"] > found["centred_cosine"]
    assert reconstruction_quality(torch.zeros_like(target), target, mean, scale)["fvu"] == 1


@pytest.mark.parametrize("shape", [(4000, 5), (5, 300)])
def test_participation_ratio_counts_equal_directions(shape):
    number, width = shape
    basis = torch.linalg.qr(gaussian(max(shape), min(shape))).Q  # orthonormal columns
    vectors = basis if number > width else basis.T
    centred = vectors.double() - vectors.double().mean(0)
    values = np.linalg.svd(centred.numpy(), compute_uv=False) ** 2
    assert participation_ratio(vectors) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-6)
    assert participation_ratio(gaussian(20_000, 5)) == pytest.approx(5, rel=0.01)
    assert participation_ratio(torch.ones(4, 3)) == 0


def test_collapse_raises_the_alarm():
    target = gaussian(200, 40)
    assert norm_summary(target, target)["collapse"] == 0
    one_direction = gaussian(200, 1) * gaussian(1, 40, seed=3)
    summary = norm_summary(one_direction, target)
    assert summary["collapse"] == 1
    assert summary["participation_ratio"] == pytest.approx(1, abs=1e-6)
    assert summary["norm"] == pytest.approx(one_direction.norm(dim=1).mean().item())


def test_representational_similarity_is_spearman_of_cosines():
    vectors, others = gaussian(15, 4), gaussian(15, 7, seed=1)
    pairs = np.triu_indices(15, 1)
    expected = stats.spearmanr(cosine_similarity(vectors)[pairs], cosine_similarity(others)[pairs]).statistic
    assert representational_similarity(vectors, others) == pytest.approx(expected, abs=1e-9)
    assert representational_similarity(torch.ones(5, 2), others[:5]) == 0


def test_linear_cka_is_one_under_rotation_shift_and_scale_and_matches_centred_kernels():
    vectors, others = gaussian(30, 6), gaussian(30, 9, seed=1)
    rotation = torch.linalg.qr(gaussian(6, 6, seed=2)).Q
    assert linear_cka(vectors, 3 * vectors @ rotation + 5) == pytest.approx(1, abs=1e-5)
    centring = np.eye(30) - 1 / 30
    k, m = (centring @ one.double().numpy() @ one.double().numpy().T @ centring for one in (vectors, others))
    expected = (k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum())
    assert linear_cka(vectors, others) == pytest.approx(expected, abs=1e-9)
    table = similarity_table(vectors, {"same": vectors, "other": others})
    assert table["same"]["cka"] > table["other"]["cka"]
    assert table["same"]["rsa"] == pytest.approx(1)

"""The read-out's coordinates and its closed form, each against scikit-learn; what it computes stays linear in the back face."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge

from trainbook.workflows.cellular_cube.readout import Readout, fit_surplus
from trainbook.workflows.cellular_cube.readout_fit import best_ridge, ridge_towards


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_surplus_is_what_scikit_learn_s_regression_leaves():
    code, more = normal(0, 200, 4) + 2, normal(1, 200, 6)
    rest = code @ normal(2, 4, 6) + 0.1 * more.square() - 3
    found = fit_surplus(code, rest)
    peer = LinearRegression().fit(code.numpy(), rest.numpy())
    np.testing.assert_allclose(found.slope, peer.coef_, atol=1e-3)
    left = rest.numpy() - peer.predict(code.numpy())
    np.testing.assert_allclose(found.of(code, rest), left / left.std(0), atol=2e-3)


def test_coordinates_change_and_the_map_does_not():
    """It is one linear map before and after; the new coordinates have deviation 1 and no correlation with the code."""
    readout, old, new = Readout(5, 2, 6, 7, True), normal(0, 300, 5, 6), normal(1, 300, 5, 6) * 3 + 1
    with torch.no_grad():
        for parameter in readout.parameters():
            parameter.copy_(normal(2, *parameter.shape))
        before = readout(new)
        for seen in (old, torch.cat([new[..., :2], new[..., :4] * 2 + 0.1 * old[..., :4]], -1)):
            readout.standardise(seen)
            torch.testing.assert_close(readout(new), before, rtol=1e-3, atol=2e-2)
            code, surplus = readout.coordinates(seen).split([10, 20], 1)
            torch.testing.assert_close(surplus.std(0, correction=0), torch.ones(20), atol=1e-3, rtol=0)
            on_code, on_rest = (part.numpy() for part in readout.plain())
            e, r = (part.numpy() for part in readout.parts(new))
            change = (e[1:] - e[0]) @ on_code.T + (r[1:] - r[0]) @ on_rest.T
            np.testing.assert_allclose(readout(new)[1:] - readout(new)[0], change, rtol=1e-3, atol=2e-2)
            assert float(np.abs(np.corrcoef(code.T, surplus.T)[:10, 10:]).max()) < 1e-2


def test_ridge_towards_nothing_is_scikit_learns_and_a_large_penalty_changes_nothing():
    X, Y = normal(0, 80, 6) * torch.tensor([1, 2, 3, 0.5, 1, 1]) + 1, normal(1, 80, 3)
    deviation = X.std(0, correction=0)
    for penalty, (weight, bias) in zip((0.3, 3.0), ridge_towards(X, Y, torch.zeros(3, 6), (0.3, 3.0)), strict=True):
        peer = Ridge(alpha=penalty * 80).fit((X / deviation).numpy(), Y.numpy())
        np.testing.assert_allclose(weight, peer.coef_ / deviation.numpy(), atol=1e-5)
        np.testing.assert_allclose(bias, peer.intercept_, atol=1e-5)
    start = normal(2, 3, 6)
    torch.testing.assert_close(ridge_towards(X, Y, start, (1e9,))[0][0], start, atol=1e-5, rtol=1e-5)


def test_the_best_ridge_is_the_one_that_the_validation_split_says():
    weight = normal(0, 3, 30)
    X, held = normal(1, 40, 30), normal(2, 400, 30)
    Y, held_Y = X @ weight.T + normal(3, 40, 3), held @ weight.T
    nothing = (torch.zeros(3, 30), torch.zeros(3))
    fit = best_ridge((X, Y), (held, held_Y), nothing, [])
    deviation, errors = X.std(0, correction=0), []
    for penalty in (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0):
        peer = Ridge(alpha=penalty * 40).fit(X / deviation, Y)
        errors.append((float(np.square(peer.predict(held / deviation) - held_Y.numpy()).sum() / held_Y.square().sum()), penalty))
    assert (fit.valid_fvu, fit.penalty) == pytest.approx(min(errors), abs=1e-5)
    near = best_ridge((X, Y), (held, held_Y), nothing, [weight])
    assert near.valid_fvu < fit.valid_fvu
    assert best_ridge((X, Y), (held, held_Y), (weight, torch.zeros(3)), []).penalty == 0

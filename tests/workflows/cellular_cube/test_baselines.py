"""The networks that the cube is compared with: sizes, starts, the same again, and that they learn what PCA cannot."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression

from trainbook.workflows.cellular_cube.baselines import (
    Autoencoder,
    Shape,
    fit_autoencoder,
    fit_decoder,
    plain_outputs,
    shape_of_equal_size,
)
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.principal import fit_principal
from trainbook.workflows.cellular_cube.random_features import random_feature_output

WIDTH, CODE = 12, 3


def curved(number, seed):
    """Vectors on a curved surface with three coordinates: PCA with three components misses much of it."""
    u = torch.rand(number, 3, generator=torch.Generator().manual_seed(seed)) * 4 - 2
    mix = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(7))
    return torch.cat([u, u.square(), u.roll(1, 1) * u], 1) @ mix


def standardised(*parts):
    mean = parts[0].mean(0)
    scale = (parts[0] - mean).square().mean().sqrt()
    return [(part - mean) / scale for part in parts]


@pytest.mark.parametrize("start", ["random", "pca", "frozen_pca"])
@pytest.mark.parametrize("num_parameters", [3000, 20_000])
def test_the_size_is_the_one_asked_for(start, num_parameters):
    (train,) = standardised(curved(50, 0))
    shape = shape_of_equal_size(num_parameters, WIDTH, CODE, start)
    model = Autoencoder(shape, fit_principal(train))
    assert model.num_parameters() == pytest.approx(num_parameters, rel=0.01)


@pytest.mark.parametrize("start", ["pca", "frozen_pca"])
def test_both_pca_starts_are_pca_exactly(start):
    (train,) = standardised(curved(200, 0))
    model = Autoencoder(Shape(WIDTH, CODE, 8, start), fit_principal(train))
    reference = PCA(CODE).fit(train.numpy())
    expected = torch.from_numpy(reference.inverse_transform(reference.transform(train.numpy())))
    with torch.no_grad():
        torch.testing.assert_close(model(train), expected.float(), atol=1e-4, rtol=1e-4)


def test_networks_learn_what_pca_cannot_and_the_same_seed_gives_the_same_network():
    train, valid, test = standardised(curved(2000, 0), curved(300, 1), curved(300, 2))
    config = Config.from_preset("smoke", {"side": 4, "baseline_epochs": 10})
    principal = fit_principal(train)
    error = {}
    before = torch.get_rng_state()
    for start in ("random", "frozen_pca"):
        models = [fit_autoencoder(Shape(WIDTH, CODE, 64, start), principal, train, valid, 0, 10) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
        with torch.no_grad():
            error[start] = float((models[0](test) - test).square().mean())
    assert torch.equal(torch.get_rng_state(), before)
    pca = float((principal.reconstructed(test, CODE) - test).square().mean())
    assert error["frozen_pca"] < 0.9 * pca
    assert error["random"] < pca
    outputs = plain_outputs(config, principal, 4000, train[:200], valid, test)
    assert outputs.keys() == {"mean", "pca", "autoencoder", "pca_residual"}
    assert not outputs["mean"].any()
    assert all(output.shape == test.shape for output in outputs.values())


@torch.no_grad()
def test_the_linear_end_of_an_autoencoder_is_fitted_in_closed_form():
    train, valid, test = standardised(curved(8000, 0), curved(300, 1), curved(300, 2))
    torch.manual_seed(0)
    model = Autoencoder(Shape(WIDTH, CODE, 40, "pca"), fit_principal(train))
    before, encoded = float((model(test) - test).square().mean()), model.encode(test)
    fit_decoder(model, train, valid)
    assert torch.equal(model.encode(test), encoded)
    hidden = [torch.cat([z, torch.nn.functional.gelu(model.decoder_in(z))], 1).numpy() for z in map(model.encode, (train, test))]
    least = LinearRegression().fit(hidden[0], train.numpy())  # no penalty is needed where there are so many sentences
    expected = float(np.square(least.predict(hidden[1]) - test.numpy()).mean())
    after = float((model(test) - test).square().mean())
    assert after == pytest.approx(expected, rel=0.03)
    assert after < 0.75 * before


def test_damage_sets_that_share_of_hidden_units_to_zero():
    (train,) = standardised(curved(50, 0))
    model = Autoencoder(Shape(WIDTH, CODE, 400), fit_principal(train)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    code = model.encode(train[:1]).expand(600, -1)
    outputs = model.decode(code, 0.3, generator)
    whole = model.decode(code[:1])
    bias = model.decoder_out.bias
    torch.testing.assert_close((outputs - bias).mean(0), 0.7 * (whole - bias)[0], atol=0.05, rtol=0.1)
    assert not torch.equal(outputs[0], outputs[1])


def test_random_features_decode_a_curved_surface_and_leave_a_flat_one_to_pca():
    train, valid, test = standardised(curved(1000, 0), curved(200, 1), curved(200, 2))
    principal = fit_principal(train)
    pca = float((principal.reconstructed(test, CODE) - test).square().mean())
    output = random_feature_output(principal, CODE, 200, train, valid, test, seed=0)
    assert float((output - test).square().mean()) < 0.8 * pca
    assert torch.equal(output, random_feature_output(principal, CODE, 200, train, valid, test, seed=0))
    flat, flat_valid, flat_test = (torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (1000, 200, 201))
    flat_principal = fit_principal(flat)
    output = random_feature_output(flat_principal, CODE, 60, flat, flat_valid, flat_test, seed=0)
    expected = (flat_principal.reconstructed(flat_test, CODE) - flat_test).square().mean()
    assert float((output - flat_test).square().mean()) == pytest.approx(float(expected), rel=0.02)  # nothing there to find

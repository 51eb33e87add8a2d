"""A size-free network in a larger cube: the steps are smaller by as much as they are more, and PCA stays PCA."""

import pytest
import torch
from sklearn.decomposition import PCA

from trainbook.runtime import detect
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.cube import Cube
from trainbook.workflows.cellular_cube.data import load_data
from trainbook.workflows.cellular_cube.evaluation import larger_side
from trainbook.workflows.cellular_cube.network import CellularCube
from trainbook.workflows.cellular_cube.principal import fit_principal


@pytest.mark.parametrize("side", [4, 6, 10])
def test_what_a_constant_rule_adds_from_front_to_back_does_not_depend_on_the_side(side, monkeypatch):
    config = Config.from_preset("smoke", {"hardware": "coordinates"})
    cube = Cube(config, side)
    weights = torch.full((1, side, side, side, 3), 1 / 3)
    monkeypatch.setattr(cube.rule, "forward", lambda x, hardware, geometry: (torch.ones_like(x), weights))
    resting = cube(torch.zeros(1, side, side, 1)).back[..., cube.moving :]
    torch.testing.assert_close(resting, torch.full_like(resting, float(config.side - 1)))


@torch.no_grad()
def test_untrained_it_is_pca_at_the_larger_side_too_and_a_fitted_read_out_says_more():
    config = Config.from_preset("smoke", {"hardware": "coordinates", "universal_width": 16})
    data = load_data(config, detect())
    train, test = data.train["embeddings"], data.test["embeddings"]
    torch.manual_seed(config.seed)
    network = CellularCube(config, fit_principal(train), data.mean, data.scale)
    metrics = larger_side(config, data, network)
    pca = PCA(16).fit(train.numpy())
    error = torch.from_numpy(pca.inverse_transform(pca.transform(test.numpy()))) - test
    assert metrics["at_side_6/fvu"] == pytest.approx(float(error.square().sum() / test.square().sum()), rel=1e-4)
    assert metrics["refitted_at_side_6/fvu"] == pytest.approx(metrics["untrained_at_side_6/fvu"], rel=1e-3)
    assert metrics["refitted_at_side_6/fvu"] < metrics["at_side_6/fvu"]

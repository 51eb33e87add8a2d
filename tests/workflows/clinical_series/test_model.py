"""What a token may see: the original built its causal mask and did not pass it, so that the forecast saw the future."""

import pytest
import torch

from trainbook.workflows.clinical_series.config import Config
from trainbook.workflows.clinical_series.data import targets
from trainbook.workflows.clinical_series.model import PatchTransformer, carried_forward
from trainbook.workflows.clinical_series.training import loss

CONFIG = Config(sequence_length=240, patch_minutes=20, prediction_horizon=4, width=16, num_heads=2, dropout=0.0)
T, S = CONFIG.num_tokens, CONFIG.patch_samples


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PatchTransformer(CONFIG, torch.tensor([80.0, 90.0, 95.0]), torch.tensor([10.0, 10.0, 1.0]), 2)


def inputs(seed=0, number=3):
    generator = torch.Generator().manual_seed(seed)
    values = 85 + 10 * torch.randn(number, T * S, 3, generator=generator)
    observed = torch.rand(values.shape, generator=generator) < 0.8
    return values, observed, torch.randn(number, 2, generator=generator)


def changed_after(token):
    values, observed, static = inputs()
    others = inputs(1)
    first = (token + 1) * S
    values, observed = values.clone(), observed.clone()
    values[:, first:], observed[:, first:] = others[0][:, first:], others[1][:, first:]
    return values, observed, static


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_future_changes_no_earlier_output_not_even_in_the_last_bit(model, training, gradient):
    model.train(training)
    with torch.set_grad_enabled(gradient):
        before = model(*inputs())
        for token in range(T - 1):
            after = model(*changed_after(token))
            for x, y in zip(before, after, strict=True):
                assert torch.equal(x[:, : token + 1], y[:, : token + 1])
                assert not torch.equal(x[:, token + 1 :], y[:, token + 1 :])


def test_without_its_mask_the_model_would_see_the_future(model):
    """The test above can fail: this is the original's defect."""
    model.eval()
    model.mask.zero_()
    before, after = model(*inputs()), model(*changed_after(4))
    assert all(not torch.equal(x[:, :5], y[:, :5]) for x, y in zip(before, after, strict=True))


def test_values_that_were_not_observed_do_not_matter(model):
    values, observed, static = inputs()
    other = torch.where(observed, values, -1e6)
    for x, y in zip(model.eval()(values, observed, static), model(other, observed, static), strict=True):
        assert torch.equal(x, y)


def test_checkpointed_layers_give_the_same_gradient(model):
    config = CONFIG.model_copy(update={"gradient_checkpointing": True})
    twin = PatchTransformer(config, model.mean, model.deviation, 2)
    twin.load_state_dict(model.state_dict())
    for module in (model, twin):
        forecast, risk = module.train()(*inputs())
        (forecast.square().sum() + risk.sum()).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_the_last_observed_mean_is_carried_forward():
    means = torch.tensor([[[5.0], [0.0], [7.0], [0.0], [0.0]], [[0.0], [0.0], [1.0], [2.0], [0.0]]])
    seen = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)[..., None]
    found = carried_forward(means, seen)[..., 0]
    assert found.tolist() == [[5, 5, 7, 7, 7], [0, 0, 1, 2, 2]]


def test_a_token_forecasts_the_patches_that_follow_it():
    number, total = 2, T + CONFIG.prediction_horizon
    means = torch.arange(number * total * 3.0).view(number, total, 3)
    seen = means % 5 != 0
    expected, is_there = targets(CONFIG, {"patch_means": means, "patch_observed": seen})
    assert expected.shape == (number, T, CONFIG.prediction_horizon, 3)
    for token in range(T):
        for step in range(CONFIG.prediction_horizon):
            assert torch.equal(expected[:, token, step], means[:, token + 1 + step])
            assert torch.equal(is_there[:, token, step], seen[:, token + 1 + step])


def test_the_loss_is_that_of_its_definition_patient_by_patient(model):
    generator = torch.Generator().manual_seed(5)
    total = T + CONFIG.prediction_horizon
    batch = {
        "patch_means": 85 + 10 * torch.randn(3, total, 3, generator=generator),
        "patch_observed": torch.rand(3, total, 3, generator=generator) < 0.5,
        "outcomes": torch.tensor([1.0, 0.0, -1.0]),
    }
    batch["patch_observed"][1] = False
    forecast, risk = torch.randn(3, T, 4, 3, generator=generator), torch.randn(3, T, generator=generator)
    value, parts = loss(CONFIG, model, (forecast, risk), batch)
    entropies, errors = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for n in range(3):
        squares = []
        for t in range(T):
            p = float(risk[n, t].double().sigmoid())
            if batch["outcomes"][n] >= 0:
                entropies[n] -= float(torch.tensor(p if batch["outcomes"][n] == 1 else 1 - p).log()) / T
            for h in range(4):
                for v in range(3):
                    if batch["patch_observed"][n, t + 1 + h, v]:
                        target = (batch["patch_means"][n, t + 1 + h, v] - model.mean[v]) / model.deviation[v]
                        squares.append(float((forecast[n, t, h, v] - target) ** 2))
        errors[n] = sum(squares) / max(1, len(squares))
    assert float(parts["cross_entropy"]) == pytest.approx(sum(entropies) / 3, rel=1e-5)
    assert float(parts["squared_error"]) == pytest.approx(sum(errors) / 3, rel=1e-5)
    assert float(value) == pytest.approx(sum(entropies) / 3 + 0.5 * sum(errors) / 3, rel=1e-5)

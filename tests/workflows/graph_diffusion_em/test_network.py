"""The unrolled network: it starts as the identity, its attention is the kernel, and its arms are of one size."""

import pytest
import torch

from trainbook.workflows.graph_diffusion_em.network import ARMS, Round, UnrolledDenoiser, loss


def woken(model):
    """The last layer away from zero, so that what stands before it matters."""
    with torch.no_grad():
        for parameter in model.last.parameters():
            parameter.normal_(0, 0.1)
    return model.double()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("arm", ARMS)
def test_an_untrained_network_changes_nothing(channels, arm):
    noisy = torch.randn(2, channels, 24, 28)
    assert torch.equal(UnrolledDenoiser(channels, 8, 16, 2, arm)(noisy, 0.1), noisy)


def test_its_loss_is_one_half_within_sampling_error():
    torch.manual_seed(0)
    clean, sigma = torch.rand(16, 1, 32, 32), 25 / 255
    noisy, other = (clean + sigma * torch.randn(clean.shape) for _ in range(2))
    model = UnrolledDenoiser(1, 8, 16, 2)
    error = 0.5 * (2 / clean.numel()) ** 0.5
    assert float(loss(model, noisy, clean, sigma, False).detach()) == pytest.approx(0.5, abs=4 * error)
    assert float(loss(model, noisy, other, sigma, True).detach()) == pytest.approx(0.5, abs=8 * error)


def test_noise2noise_has_the_supervised_losss_expectation():
    """For a fixed denoiser: the mean over second views is the loss against the clean picture."""
    torch.manual_seed(1)
    clean, sigma = torch.rand(2, 1, 32, 32), 0.1
    noisy, model = clean + sigma * torch.randn(clean.shape), woken(UnrolledDenoiser(1, 8, 16, 1)).float()
    with torch.no_grad():
        supervised = float(loss(model, noisy, clean, sigma, False))
        values = torch.stack([loss(model, noisy, clean + sigma * torch.randn(clean.shape), sigma, True) for _ in range(60)])
    assert float(values.mean()) == pytest.approx(supervised, abs=4 * float(values.std()) / 60**0.5)


def test_tied_attention_is_the_row_normalised_gaussian_kernel():
    torch.manual_seed(2)
    one = Round(6, 8, 2).double()
    z, c, squares = (torch.randn(2, 5, 6).double(), torch.randn(2, 5, 6).double(), torch.randint(0, 50, (5, 5)).double())
    squares = squares + squares.T
    found, e = one(z, c, squares, True)
    u = torch.cat([torch.asinh(c), e], -1)
    mixed = torch.zeros_like(z)
    rho = one.gate(e).softmax(-1)
    for h, weight in enumerate(one.keys.weight.view(2, 4, -1)):
        k = u @ weight.T
        distance = (k.unsqueeze(2) - k.unsqueeze(1)).square().sum(-1)
        kernel = torch.exp(-distance / 2 - torch.nn.functional.softplus(one.nearness[h]) * squares)
        affinity = kernel / kernel.sum(-1, keepdim=True)
        alpha = one.restart[h].sigmoid()
        mixed += rho[..., h, None] * ((1 - alpha) * (affinity @ c) + alpha * z)
    torch.testing.assert_close(found, mixed * 2 * one.shrink(e).sigmoid(), atol=1e-6, rtol=1e-6)


def test_gradients_in_double_precision_are_those_of_finite_differences():
    torch.manual_seed(3)
    model = woken(UnrolledDenoiser(1, 4, 4, 2))
    noisy = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: model(y, 0.5), (noisy,))
    parameters = dict(model.named_parameters())
    chosen = ["rounds.0.nearness", "rounds.1.restart", "rounds.0.gate.bias", "last.bias"]

    def by_parameters(*values):
        return torch.func.functional_call(model, dict(zip(chosen, values, strict=True)), (noisy.detach(), 0.5))

    assert torch.autograd.gradcheck(by_parameters, tuple(parameters[name].detach().clone().requires_grad_() for name in chosen))


def test_arms_have_the_same_size_but_for_a_few_parameters_per_head():
    sizes = {arm: sum(p.numel() for p in UnrolledDenoiser(1, 8, 32, 2, arm).parameters()) for arm in ARMS}
    assert len({size for arm, size in sizes.items() if arm != "one_head"}) == 1
    assert 0 < sizes["four_heads"] - sizes["one_head"] == 2 * 3 * (64 + 1 + 33)


def test_arms_start_as_they_are_named():
    def keys(arm):
        torch.manual_seed(4)
        return UnrolledDenoiser(1, 8, 16, 1, arm).rounds[0].keys.weight.detach().view(-1, 4, 80)

    named = keys("four_heads")
    assert (named[0].abs().sum(0) * named[1].abs().sum(0)).sum() == 0
    assert named[3].abs().sum() == 0  # spatial: position alone
    identical = keys("four_identical")
    assert torch.equal(identical[0], identical[3])
    assert not torch.equal(keys("four_random")[0], keys("four_random")[1])


def test_without_a_graph_patches_do_not_meet():
    torch.manual_seed(5)
    noisy = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    changed = noisy.clone()
    changed[..., 24:, 24::2] += 1  # pairs of columns that lie in the same patches: no patch's mean changes
    changed[..., 24:, 25::2] -= 1
    for arm, far_changes in (("no_graph", False), ("four_heads", True)):
        model = woken(UnrolledDenoiser(1, 8, 16, 2, arm))
        difference = (model(noisy, 0.5) - model(changed, 0.5))[..., :8, :8].abs().max()
        assert bool(difference > 1e-6) == far_changes, (arm, difference)


def test_tiles_of_a_picture_join_without_a_seam():
    noisy = torch.randn(1, 45, 70)
    model = UnrolledDenoiser(1, 8, 16, 1)
    torch.testing.assert_close(model.denoise(noisy, 0.1, 32), noisy)
    assert woken(model).float().denoise(noisy, 0.1, 32).shape == noisy.shape

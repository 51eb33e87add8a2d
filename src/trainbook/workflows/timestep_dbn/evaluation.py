"""Held-out metrics of a timestep-specific DBN, each beside the same metric of the baselines."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from trainbook.comparison import ABOVE, STANDARD_ERROR, interval
from trainbook.data import Data
from trainbook.state import TrainState
from trainbook.workflows.timestep_dbn.autoencoder import decode_all, encode_all, mean_over_bits
from trainbook.workflows.timestep_dbn.baselines import GRADIENT_BASELINES, RBM_BASELINES, rbm_reverse_step
from trainbook.workflows.timestep_dbn.chain import (
    TimestepDBN,
    diffuse,
    fields,
    posterior_entropy,
    prior_divergence,
)
from trainbook.workflows.timestep_dbn.chains import chains
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, binary_entropy, flip, flip_schedule
from trainbook.workflows.timestep_dbn.gradient_bias import negative_phase_bias
from trainbook.workflows.timestep_dbn.likelihood import Annealing, bracket, bracket_metrics, plain_bracket
from trainbook.workflows.timestep_dbn.rbm import ConditionalRBM, log_pseudo_likelihood
from trainbook.workflows.timestep_dbn.sample_metrics import sample_metrics

DEAD_BIT_ENTROPY = 0.05  # nats: a bit that is 1 (or 0) in fewer than about 1 % of the images
START_FLIP = 0.25  # bit errors are measured from the largest t with c_t below this
LEAST_SWEEPS = 10  # of a plain RBM's reverse step, however large the RBM
FLIP_RATES = (0.01, 0.05, 0.1)

Reverse = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def evaluate(config: Config, data: Data, state: TrainState) -> dict[str, float]:
    """Metrics on the test images, named "<who>/<metric>".

    nats_per_bit: upper bound on (the chains, the denoiser) or value of -ln p(code) / bits; lower is better; see `likelihoods`.
    end_bit_error: share of wrong bits after undoing the noise of step t (c_t just below 0.25), lower is better.
    What is measured on samples is in `sample_metrics`. "<baseline>/<metric>_above_chain" is the baseline's value less the
    chain's, with its 95 % interval.
    negative_phase_bias: relative error of the statistics that contrastive divergence takes for the model's.

    Raises:
        RunFailed: when some timestep was never trained.
    """
    schedule = flip_schedule(config.timesteps, config.schedule).to(data.test["images"].device)
    model = state.modules["autoencoder"]
    if config.stage == "autoencoder":
        return autoencoder_metrics(model, data)
    state.stateful["blocks"].check_all_trained()
    images = data.test["images"]
    test = encode_all(model, images[: config.evaluation_images])
    return {
        **autoencoder_metrics(model, data),
        **likelihoods(config, state, test, schedule),
        **end_bit_errors(reverse_errors(config, state, test, schedule)),
        **sample_metrics(
            samples_of_all(config, state, schedule),
            test=torch.cat(encode_all(model, images), 1),
            train=torch.cat(encode_all(model, data.train["images"]), 1),
            num_rows=config.num_samples,
        ),
        "chain/final_flip_probability": float(schedule.cumulative[-1]),
        "chain/negative_phase_bias": negative_phase_bias(config, state.modules["dbn"], test, schedule),
    }


def autoencoder_metrics(model: torch.nn.Module, data: Data) -> dict[str, float]:
    """Reconstruction of train and test images, use of the bits, and robustness to flipped bits."""
    images = data.test["images"]
    probabilities = [logit.sigmoid() for logit in model.encode_logits(images)]
    codes = encode_all(model, images)
    rebuilt = decode_all(model, codes, images.shape[2:])
    sampled = decode_all(model, [torch.bernoulli(p).flatten(1) for p in probabilities], images.shape[2:])
    train = data.train["images"]
    used = torch.cat([binary_entropy(code.mean(0)) for code in codes])
    metrics = {
        "autoencoder/psnr_test_db": psnr(images, rebuilt),
        "autoencoder/psnr_train_db": psnr(train, decode_all(model, encode_all(model, train), images.shape[2:])),
        "autoencoder/psnr_sampled_bits_db": psnr(images, sampled),
        "autoencoder/ssim_test": ssim(images, rebuilt),
        "mean_image/psnr_test_db": psnr(images, train.mean(0, keepdim=True).expand_as(images)),
        "autoencoder/dead_bit_share": float((used < DEAD_BIT_ENTROPY).float().mean()),
        "autoencoder/bit_usage_entropy_nats": float(used.mean()),
        "autoencoder/bit_confidence": float(mean_over_bits([(p - 0.5).abs() for p in probabilities])),
    }
    for rate in FLIP_RATES:
        damaged = [flip(code, torch.tensor(rate, device=code.device)) for code in codes]
        metrics[f"autoencoder/psnr_{rate:.0%}_flipped_db".replace("%", "pc")] = psnr(
            images, decode_all(model, damaged, images.shape[2:])
        )
    return metrics


def psnr(images: Tensor, rebuilt: Tensor) -> float:
    """Peak signal-to-noise ratio over all pixels, -10 log10 MSE with peak 1, in dB."""
    return -10 * math.log10(max(float((images - rebuilt).square().mean()), 1e-12))


def ssim(images: Tensor, rebuilt: Tensor) -> float:
    """Mean structural similarity, by scikit-image with a 7-pixel window."""
    pairs = zip(images.cpu().numpy(), rebuilt.cpu().numpy(), strict=True)
    return float(np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=0) for a, b in pairs]))


@torch.no_grad()
def likelihoods(config: Config, state: TrainState, test: list[Tensor], schedule: FlipSchedule) -> dict[str, float]:
    """-ln p of held-out codes per bit for every model, with standard errors over images.

    Where annealing is needed, `nats_per_bit` is its unflattering direction for our chains and its flattering one for the
    plain RBMs; `nats_per_bit_other_direction` is the other. The truth lies between the two. As many images are looked at as
    the chain's standard error needs.
    """
    annealing, models = Annealing.of(config), chains(state.modules, schedule)
    found = {"chain": bracket(models["chain"].factors, test, config.timesteps, annealing, "chain")}
    clean = [level[: found["chain"].high.shape[1]] for level in test]
    for name in list(models)[1:]:
        found[name] = bracket(models[name].factors, clean, config.timesteps, replace(annealing, all_images=True), name)
    bits, prior = torch.cat(clean, 1), prior_divergence(clean, schedule)
    plain = {name: plain_bracket(state.modules[name], bits, annealing) for name in RBM_BASELINES}
    values = {
        **{f"{name}/nats_per_bit": prior + sides.high.sum(0) for name, sides in found.items()},
        **{f"{name}/nats_per_bit": low for name, (low, _) in plain.items()},
        **{f"{name}/nats_per_bit": factorised_bound(state.modules[name], bits, schedule) for name in GRADIENT_BASELINES},
        "independent_bits/nats_per_bit": state.modules["independent_bits"].negative_log_likelihood(bits),
        **{f"{name}/nats_per_bit_other_direction": prior + sides.low.sum(0) for name, sides in found.items()},
        **{f"{name}/nats_per_bit_other_direction": high for name, (_, high) in plain.items()},
    }
    metrics = {}
    for name, value in values.items():
        metrics[name], error = per_bit(value, bits.shape[1])
        if not name.endswith("other_direction"):
            metrics[name + STANDARD_ERROR] = error
            if not name.startswith("chain"):  # image by image: what is hard for every model cancels
                difference = per_bit(value - values["chain/nats_per_bit"], bits.shape[1])
                metrics.update(interval(f"{name}{ABOVE}chain", *difference))
    metrics["chain/conditional_pseudo_likelihood"] = pseudo_likelihood(config, state, clean, schedule)
    for name, sides in found.items():
        metrics |= bracket_metrics(name, sides, bits.shape[1])
        metrics |= {f"{name}/sampling_sweeps@{t}": float(n) for t, n in enumerate(models[name].sampling_sweeps.tolist(), 1)}
    return metrics


def per_bit(values: Tensor, num_bits: int = 1) -> tuple[float, float]:
    """Mean over images and its standard error, each divided by the number of bits; (B,)."""
    return float(values.mean()) / num_bits, float(values.std()) / num_bits / math.sqrt(len(values))


def factorised_bound(model: torch.nn.Module, bits: Tensor, schedule: FlipSchedule) -> Tensor:
    """The bound of `likelihood` on -log p(z_0) for a model whose reverse step treats bits apart; (B, V) -> (B,), in nats.

    Only z_t is drawn; the mean over z_{t-1} is exact.
    """
    cross_entropies, noisy = model.negative_log_steps(bits, schedule)
    terms = cross_entropies - posterior_entropy([noisy], [bits], schedule, 0, schedule.timesteps)
    return terms.sum(0) + prior_divergence([bits], schedule)


def pseudo_likelihood(config: Config, state: TrainState, clean: list[Tensor], schedule: FlipSchedule) -> float:
    """Mean of ln p(z_i | z_{-i}, z_t, context) over bits, levels and timesteps, in nats per bit; higher is better."""
    dbn = state.modules["dbn"]
    previous, noisy = diffuse(clean, schedule, 0, config.timesteps)
    blocks = dbn.blocks(0, config.timesteps)
    contexts, field = dbn.contexts(blocks, previous, noisy), fields(noisy, schedule.coupling[1:])
    totals = [
        log_pseudo_likelihood(block, z, bias, f, 256).mean() * z.shape[2]
        for block, z, f, (_, bias) in zip(blocks, previous, field, contexts, strict=True)
    ]
    return float(sum(totals)) / sum(dbn.level_sizes)


def reverse_steps(config: Config, state: TrainState, schedule: FlipSchedule) -> dict[str, Reverse]:
    """For every chain and baseline a function that samples z_{t-1} given z_t, (B, V) -> (B, V)."""
    modules, sweeps = state.modules, state.modules["dbn"].sampling_sweeps.tolist()

    def of_rbm(name: str) -> Reverse:
        rbm = modules[name]
        return lambda noisy, t: rbm_reverse_step(
            rbm, noisy, t, schedule, equal_work(modules["dbn"], rbm, sweeps[t - 1], LEAST_SWEEPS)
        )

    def factorised(name: str) -> Reverse:
        return lambda noisy, t: modules[name].reverse_step(noisy, t, schedule)

    return {
        **{name: model.step for name, model in chains(modules, schedule).items()},
        **{name: of_rbm(name) for name in RBM_BASELINES if name in modules},
        **{name: factorised(name) for name in (*GRADIENT_BASELINES, "independent_bits") if name in modules},
    }


def equal_work(dbn: TimestepDBN, rbm: ConditionalRBM, sweeps: int, least: int) -> int:
    """Gibbs sweeps of a plain RBM that cost as much as so many of one timestep of the chain; not more, nor fewer than `least`.

    A sweep costs as many multiplications as there are weights: an RBM of the chain's size has those of all T timesteps.
    """
    share = sum(level.weight[0].numel() for level in dbn.levels) / rbm.weight.numel()
    return max(min(sweeps, least), min(sweeps, round(share * sweeps)))


def reverse_errors(config: Config, state: TrainState, test: list[Tensor], schedule: FlipSchedule) -> dict[str, Tensor]:
    """Share of each image's bits that differ from z_0 at t, t-1, ..., 0 along the reverse process from a noisy held-out code.

    The start t is the largest with c_t below 0.25, the noisy code the same for all; `no_op` leaves it as it is. (t + 1, B).
    """
    clean = torch.cat(test, 1)
    start = start_timestep(schedule)
    noisy = flip(clean, schedule.cumulative[start])
    errors = {}
    for who, step in {**reverse_steps(config, state, schedule), "no_op": lambda bits, t: bits}.items():
        bits = [noisy]
        for t in range(start, 0, -1):
            bits.append(step(bits[-1], t))
        errors[who] = (torch.stack(bits) - clean).abs().mean(-1)
    return errors


def bit_errors(config: Config, state: TrainState, test: list[Tensor], schedule: FlipSchedule) -> dict[str, list[float]]:
    """Means over images of `reverse_errors`."""
    return {who: errors.mean(1).tolist() for who, errors in reverse_errors(config, state, test, schedule).items()}


def end_bit_errors(errors: dict[str, Tensor]) -> dict[str, float]:
    """What is left wrong at the end, with its standard error, and how much more than the chain's, image by image."""
    metrics = {}
    for who, error in errors.items():
        name = f"{who}/end_bit_error"
        metrics[name], metrics[name + STANDARD_ERROR] = per_bit(error[-1])
        if who != "chain":
            metrics.update(interval(f"{name}{ABOVE}chain", *per_bit(error[-1] - errors["chain"][-1])))
    return metrics


def start_timestep(schedule: FlipSchedule) -> int:
    """The largest t >= 1 whose cumulative flip probability is below 0.25."""
    return max(1, int((schedule.cumulative < START_FLIP).sum()) - 1)


def sample_trajectory(step: Reverse, num_samples: int, num_bits: int, timesteps: int, device: torch.device) -> list[Tensor]:
    """z_T, z_{T-1}, ..., z_0 of an ancestral sample from fair coins; (T + 1) tensors (num_samples, num_bits)."""
    trajectory = [torch.bernoulli(torch.full((num_samples, num_bits), 0.5, device=device))]
    for t in range(timesteps, 0, -1):
        trajectory.append(step(trajectory[-1], t))
    return trajectory


@torch.no_grad()
def samples_of_all(config: Config, state: TrainState, schedule: FlipSchedule) -> dict[str, Tensor]:
    """Ancestral samples of the chain and of every baseline, (num_samples, V); the plain RBMs' by Gibbs sweeps of equal work."""
    num_samples, mean = config.num_samples, state.modules["independent_bits"].mean
    zeros = mean.new_zeros(1, 1, len(mean))
    samples = {}
    for who, step in reverse_steps(config, state, schedule).items():
        if who in RBM_BASELINES:
            block, start = state.modules[who].block(0, 1), torch.bernoulli(mean.expand(1, num_samples, -1))
            chain = state.modules["dbn"]
            sweeps = equal_work(chain, state.modules[who], int(chain.sampling_sweeps.sum()), int(chain.sampling_sweeps.max()))
            samples[who] = block.gibbs(start, block.context_bias(zeros[..., :0]), zeros, sweeps).squeeze(0)
        else:
            samples[who] = sample_trajectory(step, num_samples, len(mean), config.timesteps, mean.device)[-1]
    return samples

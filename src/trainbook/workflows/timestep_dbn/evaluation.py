"""Held-out metrics of a timestep-specific DBN, each beside the same metric of the baselines."""

import math
from collections.abc import Callable

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from trainbook.data import Data
from trainbook.state import TrainState
from trainbook.workflows.timestep_dbn.autoencoder import decode_all, encode_all, mean_over_bits
from trainbook.workflows.timestep_dbn.baselines import RBM_BASELINES, negative_log_likelihood
from trainbook.workflows.timestep_dbn.chain import (
    bound,
    diffuse,
    fields,
    posterior_entropy,
    prior_divergence,
    reverse_step,
)
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule, binary_entropy, flip, flip_schedule
from trainbook.workflows.timestep_dbn.gradient_bias import negative_phase_bias
from trainbook.workflows.timestep_dbn.rbm import log_pseudo_likelihood

DEAD_BIT_ENTROPY = 0.05  # nats: a bit that is 1 (or 0) in fewer than about 1 % of the images
START_FLIP = 0.25  # bit errors are measured from the largest t with c_t below this
REVERSE_SWEEPS = 10  # times sampling_sweeps: Gibbs sweeps that draw the model's sample for the reverse annealing
FLIP_RATES = (0.01, 0.05, 0.1)

Reverse = Callable[[Tensor, int], Tensor]


@torch.no_grad()
def evaluate(config: Config, data: Data, state: TrainState) -> dict[str, float]:
    """Metrics on the test images, named "<who>/<metric>".

    nats_per_bit: upper bound on (chain, logistic chain) or value of -ln p(code) / bits; lower is better; see `likelihoods`.
    end_bit_error: share of wrong bits after undoing the noise of step t (c_t just below 0.25), lower is better.
    sample_covariance_error: root mean square difference of bit covariances, samples against test codes; the
    row `training_data` is the floor that sampling noise alone gives.
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
        **{f"{who}/end_bit_error": errors[-1] for who, errors in bit_errors(config, state, test, schedule).items()},
        **sample_errors(config, state, encode_all(model, images), encode_all(model, data.train["images"]), schedule),
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

    Where annealing is needed, `nats_per_bit` is its unflattering direction for our chain and its flattering one for the
    plain RBMs; `nats_per_bit_other_direction` is the other. The truth lies between the two.
    `nats_per_bit_above_chain` is the mean over images of a baseline's code length minus the chain's.
    """
    bits = torch.cat(test, 1)
    dbn, logistic = state.modules["dbn"], state.modules["logistic_chain"]
    clean = list(bits.split(dbn.level_sizes, 1))
    negative_logs, noisy = logistic.negative_log_steps(bits, schedule)
    logistic_terms = negative_logs - posterior_entropy([noisy], [bits], schedule, 0, config.timesteps)
    temperatures, sweeps = config.ais_temperatures, REVERSE_SWEEPS * config.sampling_sweeps
    rbms = {name: state.modules[name] for name in RBM_BASELINES}
    with torch.random.fork_rng():
        flattering = bound(dbn, clean, schedule, temperatures).sum(0)
    values = {
        "chain/nats_per_bit": bound(dbn, clean, schedule, temperatures, sweeps).sum(0),
        **{f"{name}/nats_per_bit": negative_log_likelihood(rbm, bits, temperatures) for name, rbm in rbms.items()},
        "logistic_chain/nats_per_bit": logistic_terms.sum(0) + prior_divergence([bits], schedule),
        "independent_bits/nats_per_bit": state.modules["independent_bits"].negative_log_likelihood(bits),
        "chain/nats_per_bit_other_direction": flattering,
        **{
            f"{name}/nats_per_bit_other_direction": negative_log_likelihood(rbm, bits, temperatures, sweeps)
            for name, rbm in rbms.items()
        },
    }
    chain = values["chain/nats_per_bit"]
    excess = {
        f"{name}_above_chain": value - chain
        for name, value in values.items()
        if name.endswith("nats_per_bit") and not name.startswith("chain")
    }
    values.update(excess)  # image by image, so its standard error leaves out what is hard for every model
    metrics = {name: float(value.mean()) / bits.shape[1] for name, value in values.items()}
    spread = {
        f"{name}_standard_error": float(value.std()) / bits.shape[1] / math.sqrt(len(bits))
        for name, value in values.items()
        if not name.endswith("other_direction")
    }
    return {**metrics, **spread, "chain/conditional_pseudo_likelihood": pseudo_likelihood(config, state, clean, schedule)}


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
    """For the chain and the baselines with a reverse process: a function that samples z_{t-1} given z_t, (B, V) -> (B, V)."""
    dbn = state.modules["dbn"]

    def chain(noisy: Tensor, t: int) -> Tensor:
        return torch.cat(reverse_step(dbn, noisy.split(dbn.level_sizes, 1), t, schedule, config.sampling_sweeps), 1)

    return {
        "chain": chain,
        "logistic_chain": lambda noisy, t: state.modules["logistic_chain"].reverse_step(noisy, t, schedule),
        "independent_bits": lambda noisy, t: state.modules["independent_bits"].reverse_step(noisy, t, schedule),
    }


def bit_errors(config: Config, state: TrainState, test: list[Tensor], schedule: FlipSchedule) -> dict[str, list[float]]:
    """Share of bits that differ from z_0 at t, t-1, ..., 0 along the reverse process started from a noisy held-out code.

    The start t is the largest with c_t below 0.25; `no_op` leaves the noisy bits as they are.
    """
    clean = torch.cat(test, 1)
    start = start_timestep(schedule)
    noisy = flip(clean, schedule.cumulative[start])
    errors = {}
    for who, step in {**reverse_steps(config, state, schedule), "no_op": lambda bits, t: bits}.items():
        bits = noisy
        errors[who] = [float((bits - clean).abs().mean())]
        for t in range(start, 0, -1):
            bits = step(bits, t)
            errors[who].append(float((bits - clean).abs().mean()))
    return errors


def start_timestep(schedule: FlipSchedule) -> int:
    """The largest t >= 1 whose cumulative flip probability is below 0.25."""
    return max(1, int((schedule.cumulative < START_FLIP).sum()) - 1)


def sample_trajectory(step: Reverse, num_samples: int, num_bits: int, timesteps: int, device: torch.device) -> list[Tensor]:
    """z_T, z_{T-1}, ..., z_0 of an ancestral sample from fair coins; (T + 1) tensors (num_samples, num_bits)."""
    trajectory = [torch.bernoulli(torch.full((num_samples, num_bits), 0.5, device=device))]
    for t in range(timesteps, 0, -1):
        trajectory.append(step(trajectory[-1], t))
    return trajectory


def sample_errors(
    config: Config, state: TrainState, test: list[Tensor], train: list[Tensor], schedule: FlipSchedule
) -> dict[str, float]:
    """How far the means and covariances of sampled bits lie from those of the test codes."""
    reference, pool = torch.cat(test, 1), torch.cat(train, 1)
    num_samples = min(config.num_samples, len(pool))
    drawn = pool[torch.randperm(len(pool), device="cpu")[:num_samples].to(pool.device)]
    zeros = torch.zeros(1, 1, pool.shape[1], device=pool.device)
    start = torch.bernoulli(state.modules["independent_bits"].mean.expand(num_samples, -1)).unsqueeze(0)
    sweeps = config.sampling_sweeps * config.timesteps  # as many as the chain gets
    samples = {
        who: sample_trajectory(step, num_samples, pool.shape[1], config.timesteps, pool.device)[-1]
        for who, step in reverse_steps(config, state, schedule).items()
    }
    for name in RBM_BASELINES:
        block = state.modules[name].block(0, 1)
        samples[name] = block.gibbs(start, block.context_bias(zeros[..., :0]), zeros, sweeps).squeeze(0)
    samples["training_data"] = drawn
    metrics = {}
    for who, bits in samples.items():
        metrics[f"{who}/sample_mean_error"] = float((bits.mean(0) - reference.mean(0)).square().mean().sqrt())
        metrics[f"{who}/sample_covariance_error"] = float((bits.T.cov() - reference.T.cov()).square().mean().sqrt())
    return metrics

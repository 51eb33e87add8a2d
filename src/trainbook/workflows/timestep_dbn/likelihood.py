"""Code lengths of held-out images under chains of Boltzmann machines, from both sides of their partition functions.

-log p(z_0) <= KL(q(z_T | z_0) || U) + sum_t E[-log p_t(z_{t-1} | z_t) - H(q(z_{t-1} | z_t, z_0))], with one transition drawn
per timestep and image, and -log p_t = F - field.z + log Z(z_t) with log Z annealed.

- high: annealed from the data point to the base. On average an upper bound on the code length under the chain whose Gibbs
  sweeps are replaced by the annealed sampler of as many temperatures: it promises nothing that cannot be drawn.
- low: annealed from the base to the model. On average too short, by what annealing missed.

How many temperatures each step gets is chosen on a few images so that the two meet to a tolerance; see `choose_temperatures`.

Source: Sohl-Dickstein et al. (2015), section 2.3, for the bound; `annealing` for its partition functions.
"""

# T timesteps, B images, F factors of a reverse step (levels), P particles, K temperatures

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from trainbook.workflows.timestep_dbn.annealing import (
    log_partition,
    mean_log_weight,
    mean_log_weight_variance,
    reverse_log_partition,
)
from trainbook.workflows.timestep_dbn.chain import TimestepDBN, diffuse, fields, posterior_entropy
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.diffusion import FlipSchedule
from trainbook.workflows.timestep_dbn.rbm import Block, ConditionalRBM

logger = logging.getLogger("trainbook")

CPU_ROWS, GPU_ROWS = 1024, 65536  # (timestep, image, particle) triples annealed at once: bounds memory; on a CPU, fits the cache
CHUNK = 64  # images between two looks at the standard error
TRIAL_IMAGES, FIRST_TEMPERATURES, MAX_TRIALS = 16, 8, 6
PLAIN_IMAGES = 64  # that anneal the one log Z of an RBM without condition
ELEMENTWISE = 128  # a unit's random bit and exponentials cost about as much as so many multiply-adds
PROGRESS_SECONDS = 2.0


@dataclass(frozen=True)
class Annealing:
    """How far annealing goes.

    Attributes:
        tolerance: wanted width between low and high, and wanted standard error over images, in nats per bit.
        max_temperatures: per reverse step.
        particles: independent weights per estimate, at least 2.
    """

    tolerance: float
    max_temperatures: int
    particles: int

    @classmethod
    def of(cls, config: Config) -> "Annealing":
        """As the config says."""
        return cls(config.likelihood_tolerance, config.ais_temperatures, config.ais_particles)


@dataclass(frozen=True)
class Factor:
    """An RBM per reverse step and the states whose probability is asked for: -log p = rest + F(z) - field.z + log Z.

    Attributes:
        block: the RBMs, (T, ...).
        context_bias: (T, B, H).
        field: (T, B, V).
        state: z, (T, B, V).
        rest: (T, B), in nats.
    """

    block: Block
    context_bias: Tensor
    field: Tensor
    state: Tensor
    rest: Tensor

    def at(self, rows: Tensor) -> "Factor":
        """The same for some of the timesteps."""
        if len(rows) == len(self.state):
            return self
        block = self.block
        parts = (block.weight, block.visible_bias, block.hidden_bias, block.context_weight)
        return Factor(
            Block(*(part[rows] for part in parts)),
            *(tensor[rows] for tensor in (self.context_bias, self.field, self.state, self.rest)),
        )

    @property
    def cost(self) -> float:
        """Of one Gibbs sweep, in multiply-adds."""
        _, visible, hidden = self.block.weight.shape
        return visible * hidden + ELEMENTWISE * (visible + hidden)


Factors = Callable[[Sequence[Tensor], int, int], list[Factor]]
"""From z_0 per level, [(B, V_l)], and start and stop of timestep indices: the factors of one drawn transition each."""


@dataclass(frozen=True)
class Bracket:
    """Terms of -log p(z_0) from both sides, in nats.

    Attributes:
        low, high: (T, B).
        variance: (T, B), of either side through annealing alone, by its particles.
        temperatures: (T, F), what each step was given.
    """

    low: Tensor
    high: Tensor
    variance: Tensor
    temperatures: Tensor


def chain_factors(dbn: TimestepDBN, schedule: FlipSchedule) -> Factors:
    """The levels of a chain; the entropy of q(z_{t-1} | z_t, z_0) is taken off the finest."""

    def factors(clean: Sequence[Tensor], start: int, stop: int) -> list[Factor]:
        previous, noisy = diffuse(clean, schedule, start, stop)
        blocks, field = dbn.blocks(start, stop), fields(noisy, schedule.coupling[start + 1 : stop + 1])
        contexts = dbn.contexts(blocks, previous, noisy)
        entropy = posterior_entropy(noisy, clean, schedule, start, stop)
        rests = [-entropy, *(torch.zeros_like(entropy) for _ in blocks[1:])]
        return [
            Factor(block, bias, f, z, rest)
            for block, (_, bias), f, z, rest in zip(blocks, contexts, field, previous, rests, strict=True)
        ]

    return factors


@torch.no_grad()
def bracket(factors: Factors, clean: Sequence[Tensor], timesteps: int, annealing: Annealing, what: str) -> Bracket:
    """Both sides of the code length of each image, for as many images as the standard error needs.

    Args:
        factors: the model.
        clean: z_0 per level, [(B, V_l)].
        timesteps: T.
        annealing: how far to go.
        what: the model's name, for the progress that is shown.
    """
    num_images, num_bits = len(clean[0]), sum(bits.shape[1] for bits in clean)
    temperatures, seconds = choose_temperatures(factors, clean, timesteps, annealing)
    logger.info(
        "code length of %s: at most %d images, %d to %d temperatures, at most about %.0f s",
        what, num_images, int(temperatures.min()), int(temperatures.max()), seconds * num_images,
    )  # fmt: skip
    parts: list[tuple[Tensor, ...]] = []
    chunks = list(zip(*(bits.split(CHUNK) for bits in clean), strict=True))
    with tqdm(total=len(chunks) * timesteps, desc=f"code length of {what}", unit="step", mininterval=PROGRESS_SECONDS) as bar:
        for chunk in chunks:
            parts.append(_both_sides(factors, chunk, temperatures, annealing.particles, bar))
            lengths = torch.cat([high.sum((0, 1)) for _, high, _ in parts])
            if float(lengths.std()) <= annealing.tolerance * num_bits * math.sqrt(len(lengths)):
                break
    return Bracket(*(torch.cat(part, 2).sum(1) for part in zip(*parts, strict=True)), temperatures)


@torch.no_grad()
def choose_temperatures(factors: Factors, clean: Sequence[Tensor], timesteps: int, annealing: Annealing) -> tuple[Tensor, float]:
    """Temperatures per timestep and factor so that the expected width over all of them is the tolerance, at least cost.

    The width that K temperatures leave falls as D / K: half the variance of a log weight, by P, on each side. D is measured
    on a few images, from the weights' variance and from the two sides themselves, whichever is larger, and K follows from
    `allocate`. That is repeated until it holds or the cap is reached. The images are measured anew afterwards: what was
    looked at here enters no result.

    Args:
        factors: the model.
        clean: z_0 per level, [(B, V_l)].
        timesteps: T.
        annealing: how far to go.

    Returns:
        (T, F) on the CPU, and the seconds that one image will take.
    """
    images = [bits[:TRIAL_IMAGES] for bits in clean]
    width = annealing.tolerance * sum(bits.shape[1] for bits in clean)
    costs = torch.tensor([factor.cost for factor in factors(images, 0, 1)], dtype=torch.float64)
    temperatures = torch.full((timesteps, len(costs)), min(FIRST_TEMPERATURES, annealing.max_temperatures))
    for _ in range(MAX_TRIALS):
        began = time.perf_counter()
        low, high, variance = (side.double().cpu() for side in _both_sides(factors, images, temperatures, annealing.particles))
        pace = (time.perf_counter() - began) / float((temperatures * costs).sum())
        gap = high - low
        left = torch.maximum(variance.mean(2), gap.mean(2) - 2 * gap.std(2) / math.sqrt(gap.shape[2]))  # (T, F)
        wanted = allocate(left.clamp(min=0) * temperatures, costs, width).clamp(min=1)
        steps = 2 ** (wanted.log2() * 2).ceil().div(2)  # in steps of sqrt 2: few values, so that many timesteps share one
        raised = torch.maximum(temperatures, steps.ceil().long()).clamp(max=annealing.max_temperatures)
        enough = float(left.sum()) <= width or torch.equal(raised, temperatures)
        if enough:
            break
        temperatures = raised
    return temperatures, pace * float((temperatures * costs).sum()) / len(images[0])


def allocate(falling: Tensor, costs: Tensor, width: float) -> Tensor:
    """K with the least sum c K under sum D / K = width, which is K = sqrt(D / c) sum sqrt(D c) / width (Lagrange).

    Args:
        falling: D, (T, F).
        costs: c, (F,).
        width: in the unit of D / K.

    Returns:
        (T, F)
    """
    return (falling / costs).sqrt() * (falling * costs).sqrt().sum() / width


def _both_sides(
    factors: Factors, clean: Sequence[Tensor], temperatures: Tensor, particles: int, bar: tqdm | None = None
) -> tuple[Tensor, ...]:
    """Low, high and variance of every timestep, factor and image; (T, F, B) each."""
    rows = CPU_ROWS if clean[0].device.type == "cpu" else GPU_ROWS
    size, tiles = max(1, rows // (len(clean[0]) * particles)), []
    for start in range(0, len(temperatures), size):
        stop = min(start + size, len(temperatures))
        sides = [
            _anneal_factor(factor, temperatures[start:stop, index], particles)
            for index, factor in enumerate(factors(clean, start, stop))
        ]
        tiles.append(torch.stack(sides, 2))  # (3, n, F, B)
        if bar is not None:
            bar.update(stop - start)
    return torch.cat(tiles, 1).unbind()


def _anneal_factor(factor: Factor, temperatures: Tensor, particles: int) -> Tensor:
    """Low, high and variance, (3, n, B), for n timesteps of which each has its own number of temperatures, (n,)."""
    result = factor.rest.new_empty(3, *factor.rest.shape)
    for number in temperatures.unique().tolist():
        rows = (temperatures == number).nonzero().squeeze(1).to(result.device)
        part = factor.at(rows)
        block, bias, field = part.block, part.context_bias, part.field
        forward = log_partition(block, bias, field, number, particles)  # (P, n, B)
        reverse = -reverse_log_partition(block, bias, field, number, part.state, particles)
        energy = part.rest + block.free_energy(part.state, bias) - (field * part.state).sum(-1)
        variance = (mean_log_weight_variance(forward) + mean_log_weight_variance(reverse)) / 2
        result[:, rows] = torch.stack([energy + mean_log_weight(forward), energy - mean_log_weight(reverse), variance])
    return result


@torch.no_grad()
def plain_bracket(rbm: ConditionalRBM, bits: Tensor, annealing: Annealing) -> tuple[Tensor, Tensor]:
    """-log p(z) = F(z) + log Z under an RBM without condition, low and high; (B, V) -> (B,) each, in nats.

    All images share one log Z: low takes the mean of all weights of some images, high the mean of those images' bounds.

    Args:
        rbm: of one timestep.
        bits: (B, V).
        annealing: how far to go.
    """
    block = rbm.block(0, 1)

    def factors(clean: Sequence[Tensor], start: int, stop: int) -> list[Factor]:
        state = clean[0].unsqueeze(0)
        bias = block.context_bias(state[..., :0])
        return [Factor(block, bias, torch.zeros_like(state), state, state.new_zeros(state.shape[:2]))]

    some = bits[:PLAIN_IMAGES]
    temperatures, _ = choose_temperatures(factors, [some], 1, annealing)
    (factor,), number = factors([some], 0, 1), int(temperatures)
    forward = log_partition(block, factor.context_bias, factor.field, number, annealing.particles)
    reverse = reverse_log_partition(block, factor.context_bias, factor.field, number, factor.state, annealing.particles)
    energy = block.free_energy(bits.unsqueeze(0), factor.context_bias).squeeze(0)
    return energy + mean_log_weight(forward.flatten()), energy - mean_log_weight(-reverse).mean()


def bracket_metrics(who: str, found: Bracket, num_bits: int) -> dict[str, float]:
    """What is said of a bracket besides the code lengths themselves, under "<who>/...", all in nats per bit but counts.

    bracket: mean of high - low, with its standard error; annealing_standard_error: of the mean code length, through annealing
    alone, with images and transitions as they are; step_nats_per_bit@t: the terms of the bound, high and the other side.
    """
    width = (found.high - found.low).sum(0) / num_bits
    num_images = len(width)
    metrics = {
        f"{who}/bracket_nats_per_bit": float(width.mean()),
        f"{who}/bracket_nats_per_bit_standard_error": float(width.std()) / math.sqrt(num_images),
        f"{who}/annealing_standard_error": math.sqrt(float(found.variance.sum())) / num_images / num_bits,
        f"{who}/annealing_temperatures_mean": float(found.temperatures.double().mean()),
        f"{who}/annealing_temperatures_most": float(found.temperatures.max()),
        f"{who}/likelihood_images": float(num_images),
    }
    for name, side in (("", found.high), ("_other_direction", found.low)):
        for t, value in enumerate((side.mean(1) / num_bits).tolist(), 1):
            metrics[f"{who}/step_nats_per_bit{name}@{t}"] = value
    return metrics

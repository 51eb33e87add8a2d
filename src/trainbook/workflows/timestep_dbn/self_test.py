"""Does this device compute what the equations say? Checks against sums over all states of tiny RBMs, before a run trains."""

# T timesteps, V visible units, H hidden units, G context units; S = 2^V states; P parameters of one RBM
# W weight, a visible bias, b hidden bias, U context weight, z visible, h hidden, g context, as in `rbm`

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trainbook.errors import RunFailed
from trainbook.seeding import seed_step
from trainbook.workflows.timestep_dbn.annealing import log_partition
from trainbook.workflows.timestep_dbn.chain import diffuse, fields
from trainbook.workflows.timestep_dbn.contrastive import Phases, Update, contrastive_step, contrastive_update, num_draws
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule, transition_thresholds
from trainbook.workflows.timestep_dbn.elementwise import Elementwise
from trainbook.workflows.timestep_dbn.random_bits import RandomKeys, threshold, unit_index
from trainbook.workflows.timestep_dbn.rbm import Block

logger = logging.getLogger("trainbook")

T, V, H, G = 2, 4, 3, 2
COUPLINGS = (0.7, 1.6)  # Gamma_t
SAMPLES, SWEEPS, TEMPERATURES, STEPS = 4096, 24, 64, 5
DOUBLE = torch.float64
# What a value may deviate: by the rounding of float32, or what was drawn by so many standard errors.
ROUNDING, STANDARD_ERRORS = 1e-4, 6.0


def check_computation(device: torch.device | str) -> dict[str, float]:
    """Compare what training is made of with sums over all states, on the run's own device, in about a second.

    Draws from a stream of its own, so that the run's random numbers stay as they are.

    Returns:
        Name of each check to its largest deviation: absolute, or in standard errors where the name says so.

    Raises:
        RunFailed: naming the checks that failed, with what was found and what is allowed.
    """
    device, began = torch.device(device), time.monotonic()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        seed_step(0, 0)
        tiny = _tiny(device)
        found = _check_model(tiny) | _check_gradients(tiny) | _check_diffusion(device)
    allowed = {name: STANDARD_ERRORS if name.endswith("standard errors") else ROUNDING for name in found}
    bad = [
        f"{name}: {value:.3g} where {allowed[name]:g} is allowed" for name, value in found.items() if not value <= allowed[name]
    ]
    if bad:
        raise RunFailed(
            f"the self-test failed on {device}, so nothing was trained. Deviations: {'; '.join(bad)}. "
            "Run `trainbook doctor`; see 'Wrong results' in the workflow's README"
        )
    logger.info("self-test: %d checks against enumeration passed in %.1f s", len(found), time.monotonic() - began)
    return found


@dataclass(frozen=True)
class _Tiny:
    """T random RBMs on a device, each with one context and one field, and what enumeration in float64 says of them.

    Attributes:
        block, context, field: (T, ...), (T, 1, G), (T, 1, V).
        states, hidden_states: (T, S, V) and (T, 2^H, H), on the device.
        log_joint: -E(z, h) + field.z, (T, S, 2^H).
    """

    block: Block
    context: Tensor
    field: Tensor
    states: Tensor
    hidden_states: Tensor
    log_joint: Tensor

    @property
    def context_bias(self) -> Tensor:
        """(T, 1, H)."""
        return self.block.context_bias(self.context)

    @property
    def probability(self) -> Tensor:
        """P(z | z_t, g), (T, S)."""
        return self.log_joint.logsumexp(2).softmax(1)

    @property
    def statistics(self) -> Tensor:
        """-dF/dW, -dF/da, -dF/db, -dF/dU at every z, that is z E[h], z, E[h], g E[h]; (T, S, P)."""
        z, g = _states(V).expand(T, -1, -1), _double(self.context)
        h = self.log_joint.softmax(2) @ _states(H)
        products = [torch.einsum("tsv,tsh->tsvh", z, h), z, h, torch.einsum("tg,tsh->tsgh", g[:, 0], h)]
        return torch.cat([part.flatten(2) for part in products], 2)


def _tiny(device: torch.device) -> _Tiny:
    block = Block(*(0.8 * torch.randn(shape, device=device) for shape in ((T, V, H), (T, V), (T, H), (T, G, H))))
    context, noisy = torch.randn(T, 1, G, device=device), torch.randint(2, (T, 1, V), device=device).float()
    field = fields([noisy], torch.tensor(COUPLINGS, device=device))[0]
    z, h = _states(V), _states(H)
    W, a, b, U = map(_double, (block.weight, block.visible_bias, block.hidden_bias, block.context_weight))
    of_visible = (a + torch.tensor(COUPLINGS, dtype=DOUBLE).unsqueeze(1) * (2 * _double(noisy)[:, 0] - 1)) @ z.T  # (T, S)
    log_joint = of_visible.unsqueeze(2) + (b.unsqueeze(1) + z @ W + _double(context) @ U) @ h.T
    states, hidden_states = (bits.to(device, torch.float32).expand(T, -1, -1) for bits in (z, h))
    return _Tiny(block, context, field, states, hidden_states, log_joint)


def _check_model(tiny: _Tiny) -> dict[str, float]:
    """Partition functions and conditionals."""
    block, z, bias, joint = tiny.block, tiny.states, tiny.context_bias, tiny.log_joint
    log_z = joint.logsumexp((1, 2))
    summed = ((z * tiny.field).sum(-1) - block.free_energy(z, bias)).logsumexp(1)
    annealed = _double(log_partition(block, bias, tiny.field, TEMPERATURES, SAMPLES // 8))[..., 0]  # (particles, T)
    weights = (annealed - log_z).exp()  # their mean is 1
    return {
        "log Z from free energies": _largest(_double(summed) - log_z),
        "annealed Z, in standard errors": _largest((weights.mean(0) - 1) / weights.std(0) * len(weights) ** 0.5),
        "P(h | z)": _largest(_double(block.hidden_logit(z, bias).sigmoid()) - joint.softmax(2) @ _states(H)),
        "P(z | h, z_t)": _largest(
            _double(block.visible_logit(tiny.hidden_states, tiny.field).sigmoid()) - joint.softmax(1).mT @ _states(V)
        ),
    }


def _check_gradients(tiny: _Tiny) -> dict[str, float]:
    """The gradient of the free energy; then the sampler and the contrastive gradient, which needs it to reach the model."""
    block, p, statistics, num_states = tiny.block, tiny.probability.unsqueeze(2), tiny.statistics, 2**V
    targets = [torch.zeros_like(x) for x in (block.weight, block.visible_bias, block.hidden_bias, block.context_weight)]
    update = Update.sgd(targets, 1.0, 0.0)

    def taken() -> Tensor:
        """What the update added, (T, P); the targets are zero again."""
        flat = _double(torch.cat([target.flatten(1) for target in targets], 1))
        for target in targets:
            target.zero_()
        return flat

    def phases(batch: int) -> Phases:
        """Of the tiny RBMs, with their one condition in every row."""
        made = Phases(block, batch)
        made.context.copy_(tiny.context.expand_as(made.context))
        made.signs.copy_(tiny.field.sign().expand_as(made.signs))
        made.load(block)
        return made

    kernels = Elementwise(False, T * 2 * SAMPLES * max(V, H), tiny.field.device)
    half = phases(num_states // 2)
    half.visible.copy_(tiny.states)
    contrastive_update(block, half, update, kernels)
    exact = statistics[:, : num_states // 2].mean(1) - statistics[:, num_states // 2 :].mean(1)
    found = {"gradient of the free energy": _largest(taken() - exact)}

    whole = phases(SAMPLES)
    whole.data.copy_(tiny.states.repeat(1, SAMPLES // num_states, 1))
    chains = torch.randint(2, (T, SAMPLES, V), device=tiny.field.device).float()
    coupling = torch.tensor(COUPLINGS, device=tiny.field.device).view(-1, 1, 1)
    keys = RandomKeys(_any_seed(), 0, num_draws(SWEEPS), T, tiny.field.device)(0)
    contrastive_step(block, whole, chains, coupling, "pcd", SWEEPS, update, keys, kernels)
    mean = (p * statistics).sum(1)
    variance = (p * statistics.square()).sum(1) - mean.square()
    error = (variance / SAMPLES).sqrt() + ROUNDING / STANDARD_ERRORS
    found["contrastive gradient, in standard errors"] = _largest((taken() - (statistics.mean(1) - mean)) / error)
    drawn = block.gibbs(chains, whole.bias, tiny.field.expand(-1, SAMPLES, -1), SWEEPS)
    p = tiny.probability
    for name, samples in {"negative phase": chains, "Gibbs samples": drawn}.items():
        index = (_double(samples) @ 2.0 ** torch.arange(V - 1, -1, -1, dtype=DOUBLE)).long()
        share = torch.stack([row.bincount(minlength=num_states) for row in index]) / SAMPLES
        found[f"{name}, in standard errors"] = _largest((share - p) / (p * (1 - p) / SAMPLES).sqrt())
    return found


def _check_diffusion(device: torch.device) -> dict[str, float]:
    """Exact coupling for a random q(z_{t-1}), closed form of the flips, and flips that are drawn."""
    schedule, z = flip_schedule(STEPS, "cosine"), _states(V)
    here = schedule.to(device)
    log_q = torch.randn(len(z), dtype=DOUBLE)
    differ = (z.unsqueeze(0) != z.unsqueeze(1)).sum(2)  # bits, (z_t, z_{t-1})
    coupling = cumulative = 0.0
    for t in range(1, STEPS + 1):
        beta = float(schedule.beta[t])
        bayes = (log_q.exp() * beta**differ * (1 - beta) ** (V - differ)).log().softmax(1)
        field = _double(fields([z.to(device, torch.float32).unsqueeze(0)], here.coupling[t : t + 1])[0])[0]  # (z_t, V)
        coupling = max(coupling, _largest((log_q + field @ z.T).softmax(1) - bayes))
        steps = [
            torch.tensor([[1 - float(b), float(b)], [float(b), 1 - float(b)]], dtype=DOUBLE) for b in schedule.beta[1 : t + 1]
        ]
        several = torch.linalg.multi_dot([torch.eye(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE), *steps])
        cumulative = max(cumulative, abs(float(several[0, 1]) - float(here.cumulative[t])))
    clean = torch.randint(2, (SAMPLES, V), device=device).float()
    expected = torch.stack([schedule.cumulative[:-1], schedule.beta[1:]])
    error = (expected * (1 - expected) / (SAMPLES * V)).sqrt() + 1e-12  # nothing is flipped before the first step

    def deviation(previous: Tensor, noisy: Tensor) -> float:
        flipped = torch.stack([(previous != clean).double().mean((1, 2)), (noisy != previous).double().mean((1, 2))])
        return _largest((flipped.cpu() - expected) / error)

    previous, signs = clean.new_empty(2, STEPS, SAMPLES, V)
    key, index = RandomKeys(_any_seed(), 0, 1, STEPS, device)(0)[0], unit_index(SAMPLES, V, device)
    cuts = threshold(transition_thresholds(schedule)).to(device)
    Elementwise(False, previous.numel(), device).draw_transition(clean, cuts, index, key, previous, signs)
    return {
        "exact coupling": coupling,
        "closed form of the flips": cumulative,
        "drawn flips, in standard errors": deviation(*(bits[0] for bits in diffuse([clean], here, 0, STEPS))),
        "transitions in training, in standard errors": deviation(previous, (signs + 1) / 2),
    }


def _any_seed() -> int:
    return int(torch.randint(2**31, ()))


def _states(num_bits: int) -> Tensor:
    """Every state of so many bits, in the order of binary numbers, (2^n, n)."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=DOUBLE)] * num_bits)


def _double(tensor: Tensor) -> Tensor:
    return tensor.cpu().double()


def _largest(deviation: Tensor) -> float:
    return float(deviation.abs().max())

"""RBM updates per second against scikit-learn's BernoulliRBM: `python -m tests.benchmarks.timestep_dbn`.

Needed: a ratio of at least 4 with SGD. Ours is torch in float32; `partial_fit` works in float64 whatever it
is given, so its own update is also timed on float32 arrays. "Compiled" is the same step with fused elementwise kernels.
"""

# T timesteps, B batch, V visible units, H hidden units

from collections.abc import Callable

from tests.benchmarks import pairing

# isort: split
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import BernoulliRBM
from torch import Tensor

from trainbook.layers import product
from trainbook.workflows.timestep_dbn.blocks import CPU_TILE
from trainbook.workflows.timestep_dbn.chain import diffuse
from trainbook.workflows.timestep_dbn.chain_step import largest
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.contrastive import Phases, contrastive_step, num_draws
from trainbook.workflows.timestep_dbn.diffusion import flip_schedule
from trainbook.workflows.timestep_dbn.elementwise import Elementwise
from trainbook.workflows.timestep_dbn.optimizers import rbm_adam, rbm_update, rbm_views
from trainbook.workflows.timestep_dbn.random_bits import RandomKeys
from trainbook.workflows.timestep_dbn.rbm import Block, ConditionalRBM, log_pseudo_likelihood

T, B, V, H = 50, 32, 256, 256
ROUNDS = 11
STEPS = 3  # per round; one step updates all T RBMs
NEEDED = 4.0
QUALITY_RBMS, QUALITY_UPDATES, QUALITY_RATE = 4, 3000, 0.05
QUALITY_TOLERANCE = 0.01  # nats per bit, between the means of the RBMs


class Ours:
    """One level without context, stepped as `chain_step.ChainStep` does."""

    def __init__(self, rbm: ConditionalRBM, config: Config, compiled: bool = False) -> None:
        timesteps, batch = rbm.chains.shape[:2]
        self.view = rbm_views(rbm, 0, timesteps)
        self.config = config
        self.optimizer = rbm_adam(config, [self.view]) if config.optimizer == "adam" else None
        self.block, self.chain = Block(*self.view), rbm.chains
        self.phases = Phases(rbm.block(0, min(CPU_TILE, timesteps)), batch)
        self.kernels = Elementwise(compiled, largest([self.phases]), "cpu")
        self.keys, self.steps = RandomKeys(0, 0, num_draws(1), timesteps, torch.device("cpu")), 0

    def step(self, data: Tensor, noisy: Tensor, coupling: Tensor) -> None:
        """One persistent contrastive divergence update of every RBM."""
        keys = self.keys(self.steps)
        with torch.no_grad():
            for tile in (slice(first, first + CPU_TILE) for first in range(0, len(self.chain), CPU_TILE)):
                block, chain = Block(*(tensor[tile] for tensor in self.view)), self.chain[tile]
                phases = self.phases.take(len(chain))
                phases.data.copy_(data[tile])
                torch.mul(noisy[tile], 2, out=phases.signs).sub_(1)
                phases.set_bias(block)
                update = rbm_update(self.config, self.view, self.config.learning_rate).at(tile)
                contrastive_step(
                    block, phases, chain, coupling[tile].view(-1, 1, 1), "pcd", 1, update, keys[:, tile], self.kernels
                )
        self.steps += 1
        if self.optimizer is not None:
            self.optimizer.step()

    def finite(self) -> bool:
        """Whether every parameter is."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.view)


def repeat(step: Callable[[], object]) -> Callable[[], None]:
    """A round of `STEPS` steps."""

    def work() -> None:
        for _ in range(STEPS):
            step()

    return work


def compare_speed() -> list[pairing.Comparison]:
    """Time both optimizers against both peers, and print how far the GEMMs alone would go."""
    torch.manual_seed(0)
    schedule = flip_schedule(T, "cosine").to("cpu")
    clean = [torch.bernoulli(torch.full((B, V), 0.5))]
    (data,), (noisy,) = diffuse(clean, schedule, 0, T)
    coupling = schedule.coupling[1:]
    batches = data.numpy()

    peers = [BernoulliRBM(n_components=H, batch_size=B, learning_rate=0.01, random_state=t) for t in range(T)]
    single = [BernoulliRBM(n_components=H, batch_size=B, learning_rate=0.01, random_state=t) for t in range(T)]
    for model, batch in zip(single, batches, strict=True):
        model.partial_fit(batch)
        for name in ("components_", "intercept_hidden_", "intercept_visible_", "h_samples_"):
            setattr(model, name, getattr(model, name).astype(np.float32))

    def partial_fit() -> None:
        for model, batch in zip(peers, batches, strict=True):
            model.partial_fit(batch)

    def partial_fit_single() -> None:
        for model, batch in zip(single, batches, strict=True):
            model._fit(batch, model.random_state_)

    def make(optimizer: str, compiled: bool = False) -> Ours:
        return Ours(ConditionalRBM(T, V, H, 0, B), Config(optimizer=optimizer, learning_rate=0.01, gibbs_sweeps=1), compiled)

    sgd, adam, fused = make("sgd"), make("adam"), make("sgd", compiled=True)
    fused.step(data, noisy, coupling)  # compiles

    def compare(ours: Ours, theirs: Callable[[], None], optimizer: str, peer: str) -> pairing.Comparison:
        return pairing.alternate(
            repeat(lambda: ours.step(data, noisy, coupling)),
            repeat(theirs),
            ROUNDS,
            benchmark=f"timestep_dbn {optimizer}",
            peer=peer,
            unit="RBM updates per second",
            units=STEPS * T,
        )

    comparisons = [
        compare(sgd, partial_fit, "SGD", "BernoulliRBM.partial_fit"),
        compare(fused, partial_fit, "SGD compiled", "BernoulliRBM.partial_fit"),
        compare(adam, partial_fit, "AdamW", "BernoulliRBM.partial_fit"),
        compare(sgd, partial_fit_single, "SGD", "BernoulliRBM._fit in float32"),
        compare(fused, partial_fit_single, "SGD compiled", "BernoulliRBM._fit in float32"),
    ]
    assert single[0].components_.dtype == np.float32
    models = [*peers, *single]
    finite = sgd.finite() and adam.finite() and all(np.isfinite(model.components_).all() for model in models)
    print(f"parameters of both sides after the timed steps: {'all finite' if finite else 'NOT FINITE'}")
    assert finite

    def with_noise() -> None:
        (previous,), (noised,) = diffuse(clean, schedule, 0, T)
        sgd.step(previous, noised, coupling)

    works = {
        "SGD step": lambda: sgd.step(data, noisy, coupling),
        "SGD compiled step": lambda: fused.step(data, noisy, coupling),
        "with its forward noise": with_noise,
        "GEMMs alone": gemm_step(data),
        "partial_fit": partial_fit,
    }
    rounds = [{name: pairing.cpu_seconds(repeat(work)) / STEPS for name, work in works.items()} for _ in range(ROUNDS)]
    seconds = {name: float(np.median([row[name] for row in rounds])) for name in works}
    for name, value in seconds.items():
        print(f"{name:>22}: {1e3 * value:6.2f} ms a step, {T / value:6.0f} RBM updates per second")
    bound = seconds["GEMMs alone"]
    eager, compiled = (bound / seconds[name] for name in ("SGD step", "SGD compiled step"))
    print(
        f"the steps run at {eager:.0%} and {compiled:.0%} of the rate of their products alone, which are "
        f"{2 * 6 * T * B * V * H / bound / 1e9:.0f} GFLOP/s and {seconds['partial_fit'] / bound:.1f} times partial_fit"
    )
    print(f"GFLOP/s at 1024^3: {gemm_peaks()}")
    return comparisons


def gemm_peaks(size: int = 1024) -> str:
    """What each side's BLAS makes of this core; some do not use AVX-512 on every processor that has it."""
    single = torch.rand(size, size)
    array, double = single.numpy(), single.double().numpy()
    products = {
        "torch float32": lambda: single @ single,
        "numpy float32": lambda: array @ array,
        "numpy float64": lambda: double @ double,
    }
    rates = {name: 2 * size**3 / min(pairing.cpu_seconds(work) for _ in range(5)) / 1e9 for name, work in products.items()}
    return ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())


def gemm_step(data: Tensor) -> Callable[[], None]:
    """The matrix products of one step at k = 1: v -> h, h -> v, both v -> h as one, both outer products as one."""
    weight, hidden = torch.zeros(T, V, H), torch.ones(T, B, H)
    both, both_hidden, visible = torch.cat([data, data], 1), torch.ones(T, 2 * B, H), torch.empty(T, B, V)
    out, both_out, gradient = torch.empty(T, B, H), torch.empty(T, 2 * B, H), torch.empty(T, V, H)

    @torch.no_grad()
    def work() -> None:
        product(data, weight, out=out)
        product(hidden, weight.transpose(1, 2), out=visible)
        product(both, weight, out=both_out)
        product(both.transpose(1, 2), both_hidden, out=gradient)

    return work


def compare_quality() -> None:
    """Train both on the same real bits from the same weights with the same batches, and compare pseudo-likelihoods."""
    rbms, (images, held_out) = QUALITY_RBMS, digit_bits()
    torch.manual_seed(0)
    rbm = ConditionalRBM(rbms, images.shape[1], H, 0, B)
    adam = ConditionalRBM(rbms, images.shape[1], H, 0, B)
    peers = [BernoulliRBM(n_components=H, batch_size=B, learning_rate=QUALITY_RATE, random_state=i) for i in range(rbms)]
    for peer, weight in zip(peers, rbm.weight.detach(), strict=True):
        peer.components_ = np.asfortranarray(weight.T.double().numpy())
    plain = Ours(rbm, Config(optimizer="sgd", learning_rate=QUALITY_RATE, weight_decay=0))
    other = Ours(adam, Config(optimizer="adam", weight_decay=0))
    no_field = torch.zeros(rbms)
    before = pseudo_likelihood(plain.block, held_out).mean()
    for _ in range(QUALITY_UPDATES):
        batch = images[torch.randint(len(images), (rbms, B))]  # (rbms, B, 64)
        plain.step(batch, batch, no_field)
        other.step(batch, batch, no_field)
        for peer, rows in zip(peers, batch.numpy(), strict=True):
            peer.partial_fit(rows)
    loaded = Block(
        torch.stack([torch.tensor(peer.components_.T, dtype=torch.float32) for peer in peers]),
        torch.stack([torch.tensor(peer.intercept_visible_, dtype=torch.float32) for peer in peers]),
        torch.stack([torch.tensor(peer.intercept_hidden_, dtype=torch.float32) for peer in peers]),
        torch.zeros(rbms, 0, H),
    )
    print(
        f"\nquality: {rbms} RBMs, {len(images)} binarised digits, V={images.shape[1]} H={H} B={B}, PCD-1, "
        f"{QUALITY_UPDATES} updates each, SGD at {QUALITY_RATE}; exact pseudo-likelihood of {len(held_out)} held-out digits"
    )
    blocks = {"ours, SGD": plain.block, "scikit-learn, SGD": loaded, "ours, AdamW at 0.002": other.block}
    found = {name: pseudo_likelihood(block, held_out) for name, block in blocks.items()}
    print(f"{'before training':>22}: {before:.4f} nats per bit")
    for name, values in found.items():
        each = ", ".join(f"{value:.4f}" for value in values.tolist())
        print(f"{name:>22}: {values.mean():.4f} nats per bit ({each})")
    difference = float(found["ours, SGD"].mean() - found["scikit-learn, SGD"].mean())
    equal = abs(difference) <= QUALITY_TOLERANCE
    print(f"ours minus scikit-learn: {difference:+.4f}, {'within' if equal else 'NOT WITHIN'} +-{QUALITY_TOLERANCE}")
    assert equal


def digit_bits() -> tuple[Tensor, Tensor]:
    """Training and held-out digits as bits, (N, 64) each."""
    bits = torch.tensor(load_digits().data > 7, dtype=torch.float32)
    return bits[:1500], bits[1500:]


@torch.no_grad()
def pseudo_likelihood(block: Block, visible: Tensor) -> Tensor:
    """Exact mean log pseudo-likelihood per RBM without a field, in nats per bit."""
    rbms = len(block.weight)
    visible = visible.expand(rbms, -1, -1)
    bias = block.context_bias(torch.zeros(rbms, visible.shape[1], 0))
    return log_pseudo_likelihood(block, visible, bias, torch.zeros_like(visible))


def main() -> None:
    """Compare quality, then speed."""
    compare_quality()
    print()
    print(f"speed: T={T} V=H={H} B={B}, PCD-1, torch {torch.__version__} eager float32, one thread, CPU time")
    comparisons = compare_speed()
    print(f"needed with SGD against partial_fit: {NEEDED}; {'reached' if comparisons[0].ratio >= NEEDED else 'MISSED'}")
    pairing.report(comparisons)


if __name__ == "__main__":
    main()

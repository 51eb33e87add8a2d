"""RBM updates per second against scikit-learn's BernoulliRBM and rbms: `python -m tests.benchmarks.timestep_dbn`.

Ours is torch in float32, or with bfloat16 products where it says so; `partial_fit` works in float64 whatever it is given, so
its own update is also timed on float32 arrays. "Compiled" is the same step with fused elementwise kernels. The
peer rbms is in the `benchmarks` extra.
"""

# T timesteps, B batch, V visible units, H hidden units

import copy
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
NEEDED = {  # what the project promises; what a processor's BLAS makes of its products alone bounds all of them
    ("timestep_dbn SGD", "BernoulliRBM.partial_fit"): 5.0,
    ("timestep_dbn SGD compiled", "BernoulliRBM.partial_fit"): 8.0,
    ("timestep_dbn SGD compiled", "BernoulliRBM._fit in float32"): 5.0,
    ("timestep_dbn SGD compiled", "rbms PCD-1"): 5.0,
}
NEEDED_SHARE = 0.65  # of the rate of the products alone
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
        self.phases = Phases(rbm.block(0, min(CPU_TILE, timesteps)), batch, getattr(torch, config.rbm_precision))
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
                phases.load(block)
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


class Peer:
    """One persistent contrastive divergence update of each of T Bernoulli RBMs of the package rbms, one after the other."""

    def __init__(self, data: Tensor) -> None:
        from rbms.bernoulli_bernoulli.classes import BBRBM
        from rbms.training.pcd import fit_batch_pcd

        self._fit, self._batches = fit_batch_pcd, [(batch, torch.ones(len(batch))) for batch in data]
        self._models = [BBRBM(0.01 * torch.randn(V, H), torch.zeros(V), torch.zeros(H)) for _ in data]
        self._chains = [model.init_chains(B) for model in self._models]
        self._optimizers = []
        for model in self._models:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            self._optimizers.append(torch.optim.SGD(model.parameters(), lr=0.01, maximize=True))

    def step(self) -> None:
        """Centred gradients, as the package has them by default."""
        with torch.no_grad():
            for i, (model, optimizer, batch) in enumerate(zip(self._models, self._optimizers, self._batches, strict=True)):
                self._chains[i], _ = self._fit(batch, self._chains[i], model, gibbs_steps=1, beta=1.0)
                optimizer.step()

    def finite(self) -> bool:
        """Whether every parameter is."""
        return all(bool(torch.isfinite(tensor).all()) for model in self._models for tensor in model.parameters())


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

    def make(optimizer: str, compiled: bool = False, precision: str = "float32") -> Ours:
        config = Config(optimizer=optimizer, learning_rate=0.01, gibbs_sweeps=1, rbm_precision=precision)
        return Ours(ConditionalRBM(T, V, H, 0, B), config, compiled)

    sgd, adam, fused = make("sgd"), make("adam"), make("sgd", compiled=True)
    narrow = make("sgd", compiled=True, precision="bfloat16")
    for each in (fused, narrow):
        each.step(data, noisy, coupling)  # compiles

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
        compare(narrow, partial_fit, "SGD compiled, bfloat16", "BernoulliRBM.partial_fit"),
        compare(narrow, partial_fit_single, "SGD compiled, bfloat16", "BernoulliRBM._fit in float32"),
    ]
    try:
        peer = Peer(data)
    except ImportError:
        print("rbms is not installed: `pip install rbms==0.5.0` adds its row")
    else:
        comparisons.append(compare(fused, peer.step, "SGD compiled", "rbms PCD-1"))
        assert peer.finite()
    assert single[0].components_.dtype == np.float32
    theirs = all(np.isfinite(model.components_).all() for model in (*peers, *single))
    finite = theirs and all(each.finite() for each in (sgd, adam, fused, narrow))
    print(f"parameters of both sides after the timed steps: {'all finite' if finite else 'NOT FINITE'}")
    assert finite

    def with_noise() -> None:
        (previous,), (noised,) = diffuse(clean, schedule, 0, T)
        sgd.step(previous, noised, coupling)

    works = {
        "SGD step": lambda: sgd.step(data, noisy, coupling),
        "SGD compiled step": lambda: fused.step(data, noisy, coupling),
        "SGD compiled, bfloat16": lambda: narrow.step(data, noisy, coupling),
        "with its forward noise": with_noise,
        "products alone": product_step(data, torch.float32),
        "in bfloat16": product_step(data, torch.bfloat16),
        "partial_fit": partial_fit,
    }
    rounds = [{name: pairing.cpu_seconds(repeat(work)) / STEPS for name, work in works.items()} for _ in range(ROUNDS)]
    seconds = {name: float(np.median([row[name] for row in rounds])) for name in works}
    for name, value in seconds.items():
        print(f"{name:>22}: {1e3 * value:6.2f} ms a step, {T / value:6.0f} RBM updates per second")
    for bound, steps in {"products alone": ("SGD step", "SGD compiled step"), "in bfloat16": ("SGD compiled, bfloat16",)}.items():
        rate = 2 * 5 * T * B * V * H / seconds[bound] / 1e9
        shares = ", ".join(f"{name} {seconds[bound] / seconds[name]:.0%}" for name in steps)
        print(
            f"{bound}: {rate:.0f} GFLOP/s, {seconds['partial_fit'] / seconds[bound]:.1f} times partial_fit: "
            f"no step can be faster; of that rate have {shares} (needed {NEEDED_SHARE:.0%})"
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


def product_step(data: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """The matrix products of a step at k = 1, 5 T B V H multiplications: h -> v, both v -> h as one, both outer products as one.

    The persistent chains are hidden units where there is no context, so that no v -> h goes before.
    """
    weight, hidden = torch.zeros(T, V, H, dtype=dtype), torch.ones(T, B, H, dtype=dtype)
    both, both_hidden = torch.cat([data, data], 1).to(dtype), torch.ones(T, 2 * B, H, dtype=dtype)
    visible, both_out, gradient = (torch.empty(T, *size, dtype=dtype) for size in ((B, V), (2 * B, H), (V, H)))

    @torch.no_grad()
    def work() -> None:
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
    narrow = copy.deepcopy(rbm)
    peers = [BernoulliRBM(n_components=H, batch_size=B, learning_rate=QUALITY_RATE, random_state=i) for i in range(rbms)]
    for peer, weight in zip(peers, rbm.weight.detach(), strict=True):
        peer.components_ = np.asfortranarray(weight.T.double().numpy())
    plain = Ours(rbm, Config(optimizer="sgd", learning_rate=QUALITY_RATE, weight_decay=0))
    other = Ours(adam, Config(optimizer="adam", weight_decay=0))
    rounded = Ours(narrow, Config(optimizer="sgd", learning_rate=QUALITY_RATE, weight_decay=0, rbm_precision="bfloat16"))
    no_field = torch.zeros(rbms)
    before = pseudo_likelihood(plain.block, held_out).mean()
    for _ in range(QUALITY_UPDATES):
        batch = images[torch.randint(len(images), (rbms, B))]  # (rbms, B, 64)
        plain.step(batch, batch, no_field)
        other.step(batch, batch, no_field)
        rounded.step(batch, batch, no_field)
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
    blocks = {
        "ours, SGD": plain.block,
        "ours, SGD, bfloat16": rounded.block,
        "scikit-learn, SGD": loaded,
        "ours, AdamW": other.block,
    }
    found = {name: pseudo_likelihood(block, held_out) for name, block in blocks.items()}
    print(f"{'before training':>22}: {before:.4f} nats per bit")
    for name, values in found.items():
        each = ", ".join(f"{value:.4f}" for value in values.tolist())
        print(f"{name:>22}: {values.mean():.4f} nats per bit ({each})")
    for name in ("ours, SGD", "ours, SGD, bfloat16"):
        difference = float(found[name].mean() - found["scikit-learn, SGD"].mean())
        equal = abs(difference) <= QUALITY_TOLERANCE
        print(f"{name} minus scikit-learn: {difference:+.4f}, {'within' if equal else 'NOT WITHIN'} +-{QUALITY_TOLERANCE}")
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
    print(f"speed: T={T} V=H={H} B={B}, PCD-1, torch {torch.__version__}, one thread, CPU time")
    comparisons = compare_speed()
    pairing.report(comparisons)
    for each in comparisons:
        needed = NEEDED.get((each.benchmark, each.peer))
        if needed:
            print(f"{each.benchmark} / {each.peer}: needed {needed}, {'reached' if each.ratio >= needed else 'MISSED'}")


if __name__ == "__main__":
    main()

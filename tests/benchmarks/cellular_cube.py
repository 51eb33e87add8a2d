"""Speed and memory of the cellular cube beside its peers: `python -m tests.benchmarks.cellular_cube [part ...]`.

Needs the extra `benchmarks` (cax). Needed: forward and backward 5 times faster than cax for the same convolutional cellular
automaton at 8^3 and 37^3, 2 times faster than torch's depthwise conv3d; sums over the wide bands at 37^3 100 times faster than
a gather; activation memory at 37^3 with checkpointing within 20 % of the formula. One part alone: name it. Part `large` is 37^3,
where cax compiles for minutes. Part `sleep` is a cube with sleep_threshold against one that is awake; nothing is needed of it.
On a CPU; on a GPU nothing is promised.
"""

# B batch, T steps, L side, C channels, H hidden units, N = L^3 cells

import sys
from collections.abc import Callable

from tests.benchmarks import pairing

# isort: split
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainbook.runtime import detect
from trainbook.seeding import seed_step
from trainbook.workflows.cellular_cube.bands import Bands
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.cube import Cube
from trainbook.workflows.cellular_cube.data import load_data
from trainbook.workflows.cellular_cube.network import CellularCube
from trainbook.workflows.cellular_cube.perception import perceive
from trainbook.workflows.cellular_cube.principal import fit_principal
from trainbook.workflows.cellular_cube.training import build, train

CHANNELS, HIDDEN = 16, 64
SMALL, LARGE = (8, 8, 8), (37, 1, 4)  # side, batch, steps
ROUNDS = 3
ASLEEP = ((8, 32), (16, 8), (24, 2))  # side, batch
THRESHOLDS = (0.05, 0.1, 0.2)
SLAB = 64  # cells of 37^3 whose neighbours are gathered; the rest is extrapolated


class Automaton(nn.Module):
    """x + W2 relu(W1 f + b1) + b2, f = [x, half differences, mean of 27], zeros beyond the border; f in one of two ways."""

    def __init__(self, side: int, way: str) -> None:
        super().__init__()
        self.way = way
        self.inward, self.outward = nn.Linear(5 * CHANNELS, HIDDEN), nn.Linear(HIDDEN, CHANNELS)
        self.register_buffer("num_near", torch.full((side, side, side, 1), 27.0))
        self.register_buffer("kernels", stencils().repeat(CHANNELS, 1, 1, 1)[:, None])

    def perceive(self, x: Tensor) -> Tensor:
        if self.way == "ours":
            return perceive(x, self.num_near, one_sided=False)
        y = functional.conv3d(x.movedim(-1, 1), self.kernels, padding=1, groups=CHANNELS)
        return y.unflatten(1, (CHANNELS, 5)).transpose(1, 2).flatten(1, 2).movedim(1, -1)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = x + self.outward(torch.relu(self.inward(self.perceive(x))))
        return x


def stencils() -> Tensor:
    """(5, 3, 3, 3): the cell, half differences along z, y and x, the mean of 27."""
    kernels = torch.zeros(5, 3, 3, 3)
    kernels[0, 1, 1, 1] = 1
    for axis in range(3):
        for place, sign in ((0, -0.5), (2, 0.5)):
            index = [1, 1, 1]
            index[axis] = place
            kernels[(axis + 1, *index)] = sign
    kernels[4] = 1 / 27
    return kernels


def trained_once(model: Automaton, x: Tensor, steps: int) -> Callable[[], Tensor]:
    """Forward and backward of the mean square."""

    def work() -> Tensor:
        model.zero_grad()
        loss = model(x, steps).square().mean()
        loss.backward()
        return loss.detach()

    return work


def compare_automata(size: tuple[int, int, int], with_cax: bool = True) -> list[pairing.Comparison]:
    """The same function, forward and backward, by us, by torch's depthwise conv3d and by cax."""
    side, batch, steps = size
    torch.manual_seed(0)
    ours, conv = Automaton(side, "ours"), Automaton(side, "conv3d")
    conv.load_state_dict(ours.state_dict())
    x = torch.randn(batch, side, side, side, CHANNELS)
    torch.testing.assert_close(ours(x, 2), conv(x, 2), atol=1e-4, rtol=1e-4)
    options = {"benchmark": f"automaton {side}^3 forward and backward", "unit": "cell steps", "units": batch * steps * side**3}
    found = [
        pairing.alternate(
            trained_once(ours, x, steps), trained_once(conv, x, steps), ROUNDS, peer="torch depthwise conv3d", **options
        )
    ]
    if with_cax:
        theirs, forward = cax_automaton(ours, x, steps)
        np.testing.assert_allclose(np.asarray(forward(2)), ours(x, 2).detach().numpy(), atol=1e-3)
        found.append(pairing.alternate(trained_once(ours, x, steps), theirs, ROUNDS, peer="cax", **options))
    return found


def cax_automaton(ours: Automaton, x: Tensor, steps: int) -> tuple[Callable[[], object], Callable[[int], object]]:
    """The jitted gradient of cax's automaton with our weights, and its state after some steps."""
    import os

    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import jax
    import jax.numpy as jnp
    from cax.core.perceive import ConvPerceive
    from cax.core.update import ResidualUpdate
    from flax import nnx

    rngs = nnx.Rngs(0)
    perceive = ConvPerceive(CHANNELS, 5 * CHANNELS, kernel_size=(3, 3, 3), feature_group_count=CHANNELS, rngs=rngs)
    update = ResidualUpdate(3, CHANNELS, 5 * CHANNELS, (HIDDEN,), rngs=rngs)
    kernels = stencils().permute(1, 2, 3, 0).repeat(1, 1, 1, CHANNELS)[:, :, :, None]  # their groups: 5 outputs per channel
    order = torch.arange(5 * CHANNELS).view(CHANNELS, 5).T.flatten()  # ours: 5 blocks of channels
    perceive.conv.kernel.value = jnp.asarray(kernels.numpy())
    inward = torch.empty_like(ours.inward.weight)
    inward[:, order] = ours.inward.weight.detach()
    for layer, weight, bias in zip(
        update.layers, (inward, ours.outward.weight), (ours.inward.bias, ours.outward.bias), strict=True
    ):
        layer.kernel.value = jnp.asarray(weight.detach().T.numpy()).reshape(layer.kernel.value.shape)
        layer.bias.value = jnp.asarray(bias.detach().numpy())
    graph, weights = nnx.split((perceive, update))
    state = jnp.asarray(x.numpy())

    def run(weights: object, state: object, steps: int) -> object:
        perceive, update = nnx.merge(graph, weights)
        for _ in range(steps):
            state = update(state, perceive(state))
        return state

    gradient = jax.jit(jax.value_and_grad(lambda weights, state: jnp.mean(run(weights, state, steps) ** 2), allow_int=True))
    return lambda: jax.block_until_ready(gradient(weights, state)), lambda number: run(weights, state, number)


def compare_bands() -> list[pairing.Comparison]:
    """Sums over all neighbours within 7 cells at 37^3: ours for all cells, a gather of each neighbour for a slab of them."""
    side, reach = 37, 7
    bands = Bands(side, reach, "cubic")
    x = torch.randn(1, side, side, side, CHANNELS)
    axis = torch.arange(-reach, reach + 1)
    offsets = torch.cartesian_prod(axis, axis, axis)
    cells = torch.cartesian_prod(*[torch.arange(side)] * 3)[side**3 // 2 :][:SLAB]
    places = cells[:, None] + offsets
    inside = ((places >= 0) & (places < side)).all(-1)
    rows = (places.clamp(0, side - 1) * torch.tensor([side**2, side, 1])).sum(-1)
    flat = x.view(-1, CHANNELS)

    def gather() -> Tensor:
        return (flat[rows] * inside[..., None]).sum(1) - flat[side**3 // 2 :][:SLAB]

    def ours() -> Tensor:
        return bands.sums(x, ("all",))[0]

    torch.testing.assert_close(ours().view(-1, CHANNELS)[side**3 // 2 :][:SLAB], gather(), atol=1e-2, rtol=1e-3)
    found = pairing.alternate(ours, gather, ROUNDS, benchmark="wide bands 37^3", peer="gather", unit="cells", units=side**3)
    return [
        pairing.Comparison(
            found.benchmark,
            f"gather, {SLAB} cells extrapolated",
            found.unit,
            found.units,
            found.ours,
            [seconds * side**3 / SLAB for seconds in found.theirs],
        )
    ]


def activation_memory() -> None:
    """Numbers kept for the backward pass with a checkpoint per step, against B N T C for states and one step's activations."""
    for side, batch, steps in ((8, 8, 7), (37, 1, 36)):
        config = Config(side=side, num_steps=steps, mixed_numbers=0, gradient_checkpointing=True, checkpoint_steps=1)
        cube = Cube(config).train()
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        code = torch.randn(batch, side, side, 1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            cube(code)
        formula = batch * side**3 * steps * config.channels * 4
        ratio = sum(kept.values()) / formula
        verdict = "within 20 %" if abs(ratio - 1) <= 0.2 else "NOT WITHIN 20 %"
        megabytes = sum(kept.values()) / 1e6
        print(f"kept at {side}^3, {steps} steps: {megabytes:.1f} MB, 4 B N T C gives {formula / 1e6:.1f} MB; {verdict}")


@torch.no_grad()
def compare_sleep() -> list[pairing.Comparison]:
    """Passes over held-out sentences without and with sleep: after an epoch of the laptop preset at 8^3, and larger, by its rule.

    The error is the back face's, as a share of its root mean square.
    """
    config = Config.from_preset("laptop", {"num_epochs": 1, "decoder_epochs": 0, "validate_every": 0})
    data = load_data(config, detect())
    seed_step(config.seed, 0)
    state = build(config, data, detect())
    with torch.enable_grad():
        for _ in train(config, data, state):
            seed_step(config.seed, state.step)
    small, found = state.modules["cube"].eval(), []
    for side, batch in ASLEEP:
        network = small
        if side != config.side:
            larger = config.model_copy(update={"side": side})
            network = CellularCube(larger, fit_principal(data.train["embeddings"]), data.mean, data.scale).eval()
            network.cube.rule.load_state_dict(small.cube.rule.state_dict())
        cube, front = network.cube, network.front(network.transformer(data.test["embeddings"][:batch])[0])
        whole = cube(front).back

        def run(threshold: float, cube: Cube = cube, front: Tensor = front) -> Tensor:
            cube.sleep_threshold = threshold
            return cube(front)

        for threshold in THRESHOLDS:
            asleep = run(threshold)
            error = float((asleep.back - whole).norm() / whole.norm())
            name = f"sleep {side}^3, threshold {threshold}: {asleep.active_share:.0%} awake, error {error:.4f}"
            options = {"benchmark": name, "peer": "all awake", "unit": "sentences", "units": batch}
            ours, theirs = (lambda run=run, value=value: run(value) for value in (threshold, 0.0))
            found.append(pairing.alternate(ours, theirs, ROUNDS, **options))
    return found


PARTS: dict[str, Callable[[], list[pairing.Comparison]]] = {
    "small": lambda: compare_automata(SMALL),
    "conv_large": lambda: compare_automata(LARGE, with_cax=False),
    "bands": compare_bands,
    "large": lambda: compare_automata(LARGE),
    "sleep": compare_sleep,
}


def main() -> None:
    """Every part that is named, or all but `sleep` and `conv_large`, which is in `large`; then the memory."""
    chosen = sys.argv[1:] or ["small", "bands", "large", "memory"]
    print(f"torch {torch.__version__}, one thread, CPU time, alternating")
    comparisons = [comparison for name, part in PARTS.items() if name in chosen for comparison in part()]
    if comparisons:
        pairing.report(comparisons)
    if "memory" in chosen:
        activation_memory()


if __name__ == "__main__":
    main()

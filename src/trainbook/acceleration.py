"""Ways to run one module: as written, channels last, compiled. One is kept only when it was measured to be faster and agrees."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from trainbook.tables import Table

logger = logging.getLogger("trainbook")

AS_WRITTEN = "as written"
VARIANTS = (AS_WRITTEN, "channels_last", "compiled", "compiled, channels_last")
# A gradient may differ from the one as written by so much of its norm. Sums in another order cost 1e-6 in float32, but one ReLU
# of a small network that rounds to the other side of 0 cost 5e-4; in half precision a fused operation rounds once where
# separate ones round each time. TF32 has float16's 10 bits of mantissa.
TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
ROUND_SECONDS = 0.02  # one reading lasts at least so long: below that a GPU is timed waiting for the host
# A run that goes on in another process must compute the same bits: torch's own random numbers as in eager mode (without it a
# compiled dropout draws another mask), and no kernel chosen by a stopwatch while compiling.
COMPILE_OPTIONS = {"fallback_random": True, "deterministic": True}


@dataclass(frozen=True)
class Variant:
    """One way to run a module, as measured.

    Attributes:
        name: one of `VARIANTS`.
        seconds: per step, forward and backward: first quartile, median, third quartile; None when it was not timed.
        speed: how many times as fast as "as written": the median over rounds of the ratio within a round.
        difference: largest relative distance from "as written" among loss, gradient and buffers; None when it did not run.
        preparation_seconds: of its first step, compilation included.
        why_not: why it was not chosen; "" for the chosen one.
    """

    name: str
    seconds: tuple[float, float, float] | None
    speed: float | None
    difference: float | None
    preparation_seconds: float | None
    why_not: str


def fastest_variant(
    module: nn.Module,
    run: Callable[[nn.Module], Tensor],
    precision: str = "float32",
    rounds: int = 10,
    least_gain: float = 0.05,
) -> tuple[str, list[Variant]]:
    """Time each way to run a module on a real batch; the fastest that agrees with it as written, and what was measured.

    A variant agrees when for loss, gradient and buffers x, each as one vector, |x - x_eager| <= tolerance |x_eager|, from the
    same weights and random numbers. Those that agree are timed in turn, in alternating order, and compared round by round, so
    that a machine that slows down slows all alike. The fastest is chosen when it is 1 + least_gain times as fast as written.

    Weights, buffers, gradients, memory format, training mode and torch's random generators are afterwards as before; what
    else `run` and the module change is theirs to restore. Meanwhile there is room for a copy of the weights and of two gradients.
    What other modules have compiled is compiled again at their next call. Across processes measure in one and send the name:
    each would decide by its own clock.

    Args:
        module: what is trained; not replaced or moved.
        run: (module or what stands for it) -> loss of one batch, a scalar. Under the autocast of training, and in float16
            times the loss scale.
        precision: float32, bfloat16 or float16; sets the tolerance, see `TOLERANCES`.
        rounds: readings per variant, each at least one step and 20 ms.
        least_gain: how much faster a variant must be.

    Raises:
        ValueError: when the module has nothing to train, for an unknown precision, or without rounds.
        Exception: whatever `run` raises with the module as written. A variant that fails is reported, not raised.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the module requires a gradient: there is no step to time")
    if precision not in TOLERANCES or rounds < 1:
        raise ValueError(f"precision {precision!r} must be one of {', '.join(TOLERANCES)}, and rounds ({rounds}) at least 1")
    device, tolerance = parameters[0].device, TOLERANCES[precision]
    if precision == "float32" and _uses_tf32(module, device):
        tolerance = TOLERANCES["float16"]
    names = [name for name in VARIANTS if "channels_last" not in name or _reformattable(module)]
    torch.compiler.reset()  # torch keeps 8 compiled versions of a forward, all nn.Sequential together, and then stops in silence
    called: dict[str, nn.Module] = {}

    def step(name: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = run(called[name])
        return loss, torch.autograd.grad(loss, parameters, materialize_grads=True)  # leaves every .grad alone

    def seconds_per_step(name: str, number: int) -> float:
        _wait(device)
        began = time.perf_counter()
        for _ in range(number):
            step(name)
        _wait(device)
        return (time.perf_counter() - began) / number

    with _kept(module, device) as put_back:

        def begin(name: str) -> None:
            put_back()
            if "channels_last" in name:
                _to_channels_last(module)

        def observe(name: str) -> list[list[Tensor]]:
            begin(name)
            loss, gradients = step(name)
            return [_copies([loss]), _copies(gradients), _copies(module.buffers())]

        expected: list[list[Tensor]] = []
        preparation, difference, problem = {}, {}, {}
        for name in names:
            try:
                called[name] = _compiled(module, name) if "compiled" in name else module
                begin(name)
                preparation[name] = seconds_per_step(name, 1)
                observed = observe(name)
            except Exception as error:
                if name == AS_WRITTEN:
                    raise
                preparation.pop(name, None)
                problem[name] = f"not available: {_first_line(error)}"
                continue
            expected = expected or observed
            difference[name] = _difference(observed, expected)
            if name != AS_WRITTEN and not difference[name] <= tolerance:  # NaN too
                problem[name] = f"loss, gradient or buffers differ by {difference[name]:.1e}; {tolerance:.0e} is allowed"

        del expected, observed  # as large as two gradients

        timed = [name for name in names if name not in problem]
        begin(AS_WRITTEN)
        number = max(1, round(ROUND_SECONDS / seconds_per_step(AS_WRITTEN, 1)))
        readings = np.empty((len(timed), rounds))
        for index in range(rounds):
            for row in range(len(timed)) if index % 2 == 0 else reversed(range(len(timed))):
                begin(timed[row])
                readings[row, index] = seconds_per_step(timed[row], number)

    speed = dict(zip(timed, np.median(readings[0] / readings, axis=1).tolist(), strict=True))
    seconds = dict(zip(timed, map(tuple, np.quantile(readings, [0.25, 0.5, 0.75], axis=1).T.tolist()), strict=True))
    fast_enough = [name for name in timed if speed[name] >= 1 + least_gain]
    chosen = max(fast_enough, key=speed.get, default=AS_WRITTEN)

    def why_not(name: str) -> str:
        if name in problem or name == chosen:
            return problem.get(name, "")
        if name == AS_WRITTEN or name in fast_enough:
            return f"{chosen} is faster"
        return f"{speed[name]:.2f} times as fast as written; at least {1 + least_gain:.2f} is asked"

    measured = (seconds, speed, difference, preparation)
    return chosen, [Variant(name, *(values.get(name) for values in measured), why_not(name)) for name in names]


def apply_variant(module: nn.Module, name: str, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """What to call in place of the module from now on; nothing is measured.

    It shares the module's weights, buffers and training mode, and the module keeps its names: checkpoints do not change.
    Evaluation can go on with the module itself. Channels last reorders the 4-D weights in place; inputs need nothing, a
    convolution follows the format of its weight. Each input shape is compiled for itself (torch stops at 8): kernels do not
    depend on the shapes seen before, so not on where a run was resumed. Where torch cannot compile at all a warning says why,
    and the module runs uncompiled.

    Args:
        module: what `fastest_variant` measured.
        name: one of `VARIANTS`.
        optimizer: of the module, when it may have state already (momentum, a checkpoint): the state gets the format of the
            weights. Without it a fused optimizer pairs weights with the momentum of other weights, and says nothing.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in VARIANTS:
        raise ValueError(f"{name!r} is no way to run a module; there are {', '.join(map(repr, VARIANTS))}")
    if "channels_last" in name:
        _to_channels_last(module)
    if optimizer is not None:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                    state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    if "compiled" not in name:
        return module
    if problem := compilation_problem(next(module.parameters()).device):
        logger.warning("%s: the module runs uncompiled; torch.compile is not available: %s", name, problem)
        return module
    return _compiled(module, name)


def compilation_problem(device: torch.device) -> str:
    """Why torch cannot compile for a device, found by compiling one addition; "" when it can. Takes seconds the first time."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:
        return _first_line(error)
    return ""


def allow_tf32(enabled: bool) -> None:
    """Let float32 matrix products and convolutions on a GPU round their inputs to TF32, a mantissa of 10 bits in place of 23.

    Several times the throughput on tensor cores (compute capability 8.0 and up); by default torch allows it for convolutions
    and not for matrix products. A CPU with TF32 units follows the setting of products too, others ignore it.

    Set by torch's older switches. The newer `fp32_precision` makes every read of the older ones raise, and torch.compile of
    torch 2.10 still reads them (pytorch issue 166387); the older ones set the newer ones too.
    """
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled


def variant_table(variants: list[Variant]) -> Table:
    """What `fastest_variant` measured, for people."""
    rows = []
    for variant in variants:
        low, median, high = (f"{1e3 * value:.3g}" for value in variant.seconds) if variant.seconds else ("", "", "")
        rows.append(
            [
                variant.name,
                f"{median} ({low} to {high})" if median else "",
                "" if variant.speed is None else f"{variant.speed:.2f}",
                "" if variant.difference is None else f"{variant.difference:.1e}",
                "" if variant.preparation_seconds is None else f"{variant.preparation_seconds:.1f}",
                variant.why_not or "kept",
            ]
        )
    return Table(["variant", "ms per step (quartiles)", "times as fast", "difference", "first step, s", "kept, or why not"], rows)


def _compiled(module: nn.Module, name: str) -> nn.Module:
    # What was compiled before is looked up by its options first, and then (seen with torch 2.10) weights whose format changed
    # in place pass for the old ones. So the two formats differ in an option: its default, spelled out.
    formats = {"layout_optimization": True} if "channels_last" in name else {}
    return torch.compile(module, dynamic=False, options=COMPILE_OPTIONS | formats)


def _reformattable(module: nn.Module) -> list[nn.Parameter]:
    """The 4-D weights (of 2-D convolutions) whose elements channels last would reorder."""
    return [p for p in module.parameters() if p.ndim == 4 and not p.is_contiguous(memory_format=torch.channels_last)]


def _to_channels_last(module: nn.Module) -> None:
    for parameter in _reformattable(module):
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def _kept(module: nn.Module, device: torch.device) -> Iterator[Callable[[], None]]:
    """Yield a function that puts back what a step may change, to the very storages; it is called at the end too."""
    weights = [(p, p.data, p.detach().clone()) for p in module.parameters()]
    buffers = [(m, k, b, b.clone()) for m in module.modules() for k, b in m._buffers.items() if b is not None]
    modes = [(part, part.training) for part in module.modules()]
    generator = torch.get_rng_state()
    device_generator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @torch.no_grad()
    def put_back() -> None:
        for parameter, data, value in weights:
            parameter.data = data
            data.copy_(value)
        for part, name, buffer, value in buffers:
            part._buffers[name] = buffer
            buffer.copy_(value)
        for part, mode in modes:
            part.training = mode
        torch.set_rng_state(generator)
        if device_generator is not None:
            torch.cuda.set_rng_state(device_generator, device)

    try:
        yield put_back
    finally:
        put_back()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True) for x in tensors]


def _difference(observed: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """Largest over groups of |a - b| / |b|, each group as one vector; NaN when one of them is."""
    shares = [0.0]
    for group, reference in zip(observed, expected, strict=True):
        distance = get_total_norm([a - b for a, b in zip(group, reference, strict=True)])
        if distance != 0:
            shares.append(float(distance / get_total_norm(reference)))
    return float(np.max(shares))


def _uses_tf32(module: nn.Module, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    convolves = any(p.ndim > 2 for p in module.parameters())
    return torch.backends.cuda.matmul.fp32_precision == "tf32" or (
        convolves and torch.backends.cudnn.conv.fp32_precision == "tf32"
    )


def _first_line(error: Exception) -> str:
    """What torch.compile's many lines of an error begin with."""
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {next((line for line in lines if line and not line.endswith('raised:')), '')}"

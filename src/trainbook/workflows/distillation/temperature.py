"""Laws of the distillation temperature: fixed, on a schedule, from the validation accuracy, or learned."""

# T temperature, u its unbounded coordinate: T = low + (high - low) sigmoid(u), eta learning rate of the student

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

LAWS = ("constant", "cosine", "plateau", "adversarial", "hyper")
PLATEAU_FACTOR = 1.1
SLOW_GAIN, FAST_GAIN = 0.1, 0.5  # percentage points of validation accuracy per epoch
RISE_EPOCHS = 10  # over which the adversary gains strength
ADVERSARY_RATE, HYPER_RATE = 0.1, 0.05
PROBE = 0.01  # length of the step along v that the mixed derivative is measured with


class TemperatureLaw(Protocol):
    """What every law offers.

    Attributes:
        wants: the signal that `update` takes: "" for none, "valid_accuracy" in percent once per epoch, "loss_gradient"
            dL/dT of a training step, or "hypergradient" as `hypergradient` measures it every few steps.
    """

    wants: str

    def at(self, step: int) -> float:
        """T of a training step, counted from 0."""

    def update(self, step: int, signal: float) -> None:
        """Take in what was measured at a step."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors that a resumed run needs."""

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""


def make_law(law: str, temperature: float, low: float, high: float, total_steps: int, steps_per_epoch: int) -> TemperatureLaw:
    """The law of a name in `LAWS`.

    Args:
        law: its name.
        temperature: of "constant", and where the learned laws start.
        low, high: bounds of all others; 0 < low < high.
        total_steps, steps_per_epoch: of the training.

    Raises:
        ValueError: for bounds that are none, a start that is not between them, or an unknown law.
    """
    if law != "constant" and not 0 < low < high:
        raise ValueError(f"a temperature between {low} and {high} is impossible: 0 < low < high is needed")
    if law in ("plateau", "adversarial", "hyper") and not low < temperature < high:
        raise ValueError(f"the temperature starts at {temperature}, which is not between {low} and {high}")
    match law:
        case "constant":
            return Constant(temperature)
        case "cosine":
            return Cosine(low, high, total_steps)
        case "plateau":
            return Plateau(temperature, low, high)
        case "adversarial":
            return Adversarial(temperature, low, high, steps_per_epoch)
        case "hyper":
            return Hyper(temperature, low, high)
    raise ValueError(f"{law!r} is none of {', '.join(LAWS)}")


class Constant:
    """T stays."""

    wants = ""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def at(self, step: int) -> float:
        """T of a step."""
        return self.temperature

    def update(self, step: int, signal: float) -> None:
        """Nothing: it takes no signal."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"temperature": self.temperature}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.temperature = saved["temperature"]


class Cosine(Constant):
    """T = low + (high - low) (1 + cos(pi step / total_steps)) / 2: soft first, sharp in the end."""

    def __init__(self, low: float, high: float, total_steps: int) -> None:
        super().__init__(high)
        self.low, self.high, self.total_steps = low, high, total_steps

    def at(self, step: int) -> float:
        """T of a step."""
        share = min(step / max(1, self.total_steps), 1.0)
        return self.low + (self.high - self.low) * (1 + math.cos(math.pi * share)) / 2


class Plateau(Constant):
    """T x 1.1 after an epoch that gained under 0.1 points of validation accuracy, T / 1.1 after one above 0.5.

    The gain is that of the current accuracy over the epoch before; the first epoch has none and changes nothing.
    """

    wants = "valid_accuracy"

    def __init__(self, temperature: float, low: float, high: float) -> None:
        super().__init__(temperature)
        self.low, self.high = low, high
        self.before: float | None = None

    def update(self, step: int, signal: float) -> None:
        """Take in the signal that the law wants."""
        gain = None if self.before is None else signal - self.before
        self.before = signal
        if gain is not None and not SLOW_GAIN <= gain <= FAST_GAIN:
            factor = PLATEAU_FACTOR if gain < SLOW_GAIN else 1 / PLATEAU_FACTOR
            self.temperature = min(max(self.temperature * factor, self.low), self.high)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"temperature": self.temperature, "before": self.before}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.temperature, self.before = saved["temperature"], saved["before"]


class Adversarial:
    """T is learned against the student: u climbs the distillation loss, ever faster over the first epochs.

    u <- u + rate lambda dL/dT dT/du, lambda = (1 - cos(pi min(epoch, 10) / 10)) / 2: what a gradient reversal layer in
    front of T does under plain gradient descent.

    Source: Li et al. (2023), Curriculum Temperature for Knowledge Distillation, equations 4 to 6, its global version.
    """

    wants = "loss_gradient"

    def __init__(self, temperature: float, low: float, high: float, steps_per_epoch: int) -> None:
        self.low, self.high, self.steps_per_epoch = low, high, steps_per_epoch
        share = (temperature - low) / (high - low)
        self.coordinate = math.log(share / (1 - share))

    def at(self, step: int) -> float:
        """T of a step."""
        return self.low + (self.high - self.low) * self._share()

    def _share(self) -> float:
        return 1 / (1 + math.exp(-self.coordinate))

    def slope(self) -> float:
        """dT/du."""
        return (self.high - self.low) * self._share() * (1 - self._share())

    def strength(self, step: int) -> float:
        """Lambda, from 0 to 1."""
        return (1 - math.cos(math.pi * min(step / self.steps_per_epoch / RISE_EPOCHS, 1.0))) / 2

    def update(self, step: int, signal: float) -> None:
        """Take in the signal that the law wants."""
        self._move(ADVERSARY_RATE * self.strength(step) * signal * self.slope())

    def _move(self, change: float) -> None:
        # Beyond +-8 the sigmoid is flat and T would never come back.
        self.coordinate = min(max(self.coordinate + change, -8.0), 8.0)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"coordinate": self.coordinate}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.coordinate = saved["coordinate"]


class Hyper(Adversarial):
    """T is learned for the student: u descends the validation loss that the next training step would lead to.

    u <- u - rate m / sqrt(v), Adam's averages m and v of dL_val/dT dT/du, since its size is that of the learning rate.
    """

    wants = "hypergradient"

    def __init__(self, temperature: float, low: float, high: float) -> None:
        super().__init__(temperature, low, high, steps_per_epoch=1)
        self.mean, self.square, self.updates = 0.0, 0.0, 0

    def update(self, step: int, signal: float) -> None:
        """Take in the signal that the law wants."""
        gradient = signal * self.slope()
        self.updates += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.updates), self.square / (1 - 0.999**self.updates)
        self._move(-HYPER_RATE * mean / (math.sqrt(square) + 1e-30))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {name: getattr(self, name) for name in ("coordinate", "mean", "square", "updates")}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        for name, value in saved.items():
            setattr(self, name, value)


Network = Callable[[Tensor], object]


def hypergradient(
    student: nn.Module,
    training_loss: Callable[[Network, Tensor], Tensor],
    validation_loss: Callable[[Network], Tensor],
    temperature: float,
    learning_rate: float,
) -> float:
    """dL_val(theta') / dT, where theta' = theta - eta grad L_tr(theta, T) is the student after one plain gradient step.

    With v = grad L_val(theta'): -eta v . d/dT grad L_tr, and the product is measured as
    [dL_tr/dT(theta + e v) - dL_tr/dT(theta - e v)] / (2 e), e = 0.01 / |v|. The student stays as it is, its running
    statistics too.

    Args:
        student: in the mode it trains in.
        training_loss: (network, T) -> loss of a training batch; it calls the network it is given.
        validation_loss: network -> loss of a validation batch.
        temperature: T.
        learning_rate: eta.

    Source: Liu et al. (2019), DARTS, equation 8, with T in the place of the architecture.
    """
    parameters = {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}

    def network(values: dict[str, Tensor]) -> Network:
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        return lambda *inputs: functional_call(student, {**values, **buffers}, inputs)

    def gradient(loss: Callable[[Network], Tensor], at: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
        found = torch.autograd.grad(loss(network(leaves)), list(leaves.values()), allow_unused=True)
        return {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(leaves.items(), found, strict=True)}

    def shifted(direction: dict[str, Tensor], length: float) -> dict[str, Tensor]:
        return {name: value + length * direction[name] for name, value in parameters.items()}

    example = next(iter(parameters.values()))
    with torch.enable_grad():
        fixed = torch.tensor(temperature, device=example.device, dtype=example.dtype)
        descent = gradient(lambda net: training_loss(net, fixed), parameters)
        direction = gradient(validation_loss, shifted(descent, -learning_rate))
        norm = float(torch.stack([value.double().square().sum() for value in direction.values()]).sum().sqrt())
        if norm == 0:
            return 0.0
        sides = []
        for length in (PROBE / norm, -PROBE / norm):
            leaf = fixed.clone().requires_grad_()
            (slope,) = torch.autograd.grad(training_loss(network(shifted(direction, length)), leaf), leaf)
            sides.append(float(slope))
    return -learning_rate * (sides[0] - sides[1]) / (2 * PROBE / norm)

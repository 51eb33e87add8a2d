"""One training step by gradient: groups, schedules, accumulation, precision, clipping and averaging, thin over torch."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from trainbook.optimization import OptimizationConfig

NORMS = (nn.LayerNorm, nn.RMSNorm)  # those whose weights can have two dimensions; of other norms they have one
FUSED = ("cpu", "cuda")  # one kernel per group instead of some ten per parameter
ONE_CYCLE_RISE, ONE_CYCLE_START = 0.3, 1 / 25  # OneCycleLR's pct_start and 1 / div_factor


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in at most two optimizer groups: with weight decay, and without.

    Without are parameters of at most one dimension, those of norm layers, and those called `bias` or `..._bias`.
    Embeddings decay. A shared parameter appears once; one that does not require a gradient not at all.
    """
    spared = {id(p) for part in module.modules() if isinstance(part, NORMS) for p in part.parameters(recurse=False)}
    decayed, undecayed = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            last = name.rpartition(".")[2]
            is_spared = parameter.ndim < 2 or id(parameter) in spared or last == "bias" or last.endswith("_bias")
            (undecayed if is_spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(module: nn.Module, config: OptimizationConfig) -> torch.optim.Optimizer:
    """The configured optimizer over `parameter_groups`. AdamW's decay is decoupled, SGD's is added to the gradient."""
    groups = parameter_groups(module, config.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in FUSED for p in parameters) or None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=fused)
    if config.momentum:
        # Fused SGD allocates its buffers without filling them, and a scaler that skips the first step leaves them so:
        # the second step would add uninitialised memory. From zeros, 0 m + g is the same first update.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    return optimizer


def learning_rate(config: OptimizationConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step: a function of the step alone, so that a resumed run continues exactly.

    With W warm-up steps, n = max(1, total_steps - W) steps after them, a = learning_rate, f = final share:

        rate(s) = r(0) (s + 1) / (W + 1)    for s < W
        rate(s) = r(s - W)                  from W on, where r(k) is
            constant    a
            cosine      a (f + (1 - f) (1 + cos(pi min(k / n, 1))) / 2)
            linear      a (1 + (f - 1) min(k / n, 1))
            step        a step_factor^floor(k / step_size)
            one_cycle   c(a/25, a, k / m) for k <= m, else c(a, a f, (k - m) / (n - 1 - m)), m = 0.3 n - 1

    where c(x, y, p) = y + (x - y) (1 + cos(pi p)) / 2. They are torch's CosineAnnealingLR(T_max=n),
    LinearLR(1, f, n), StepLR and OneCycleLR(total_steps=n, pct_start=0.3, div_factor=25); momentum is not cycled.

    Args:
        config: of the run.
        step: counted from 0.
        total_steps: of the whole run, warm-up included.
    """
    warmup = config.warmup_steps
    k, n = max(0, step - warmup), max(1, total_steps - warmup)
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_share
    match config.schedule:
        case "constant":
            rate = peak
        case "cosine":
            rate = _cosine(peak, final, min(k / n, 1.0))
        case "linear":
            rate = peak + (final - peak) * min(k / n, 1.0)
        case "step":
            rate = peak * config.step_factor ** (k // config.step_size)
        case "one_cycle":
            top = ONE_CYCLE_RISE * n - 1
            if k <= top:
                rate = _cosine(peak * ONE_CYCLE_START, peak, k / top if top else 1.0)
            else:
                rate = _cosine(peak, final, min((k - top) / (n - 1 - top), 1.0))
    return rate * (step + 1) / (warmup + 1) if step < warmup else rate


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def averaged_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without gradients: the start of an exponential moving average of the weights."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def split_batch(batch: Any, number: int) -> list[Any]:
    """Cut a batch (tensor, or dict, tuple or list of tensors) into at most `number` micro-batches of nearly equal size."""
    if isinstance(batch, Tensor):
        return list(batch.tensor_split(min(number, len(batch)))) if number > 1 else [batch]
    if isinstance(batch, Mapping):
        parts = [split_batch(tensor, number) for tensor in batch.values()]
        return [dict(zip(batch, part, strict=True)) for part in zip(*parts, strict=True)]
    return list(zip(*(split_batch(tensor, number) for tensor in batch), strict=True))


def batch_size(batch: Any) -> int:
    """Examples in a batch: the length of its first tensor."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch)


class Stepper:
    """Takes training steps: what stands between a batch's loss and the next weights.

    Keep the optimizer's state and this object's (scaler and average) in a checkpoint; nothing else carries over.

    Args:
        module: what is trained; not replaced or moved afterwards.
        optimizer: over the module's parameters, from `make_optimizer`.
        config: schedule, clipping, precision, decay of the average.
        total_steps: of the whole run, for the schedule.
        ema: from `averaged_copy(module)`, exactly when `config.ema_decay` is positive. After each step that was not
            skipped e <- d e + (1 - d) w for parameters; buffers (batch statistics) are copied.

    Raises:
        ValueError: when `ema` and the config disagree, or `total_steps` is not positive.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: OptimizationConfig,
        total_steps: int,
        ema: nn.Module | None = None,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}; a schedule needs at least one step")
        if (ema is not None) != (config.ema_decay > 0):
            raise ValueError(f"ema_decay is {config.ema_decay} but ema is {'given' if ema is not None else 'missing'}")
        self.module, self.optimizer, self.config, self.total_steps, self.ema = module, optimizer, config, total_steps, ema
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self._parameters[0].device.type
        dtype = None if config.precision == "float32" else getattr(torch, config.precision)
        self._autocast = torch.autocast(device, dtype) if dtype else nullcontext()
        self.scaler = torch.amp.GradScaler(device) if config.precision == "float16" else None
        if ema is not None:
            self._average = get_ema_multi_avg_fn(config.ema_decay)
            self._weights, self._averages = list(module.parameters()), list(ema.parameters())
            self._buffers, self._averaged_buffers = list(module.buffers()), list(ema.buffers())

    def step(
        self,
        step_index: int,
        micro_batches: Iterable[Any],
        loss_function: Callable[[Any], Tensor],
        sizes: Sequence[int] | None = None,
    ) -> dict[str, Tensor | float]:
        """One update of the weights by the gradient of the mean loss over all micro-batches.

        With n_i examples in micro-batch i, L = sum_i (n_i / sum_j n_j) L_i: the loss and gradient of the large batch, for
        a loss that is a mean over examples. (Batch normalisation sees micro-batches: there the two differ.) A float16
        step whose gradient overflows changes neither weights nor average; the scaler then halves its scale. Nothing
        here makes the host wait for a GPU.

        Args:
            step_index: counted from 0; sets the learning rate.
            micro_batches: such as `split_batch(batch, config.accumulation)`; read one by one when `sizes` is given.
            loss_function: (micro-batch) -> mean loss over it, run under autocast.
            sizes: examples per micro-batch; by default the length of each one's first tensor.

        Returns:
            loss (float32 or wider) and gradient_norm (before clipping), tensors on the device; learning_rate, a float.
            With float16 also loss_scale of this step and skipped, 1 for a step that overflowed: its gradient_norm is
            reported as 0, because an overflow the scaler handles is no fault of the run.
        """
        if isinstance(micro_batches, Tensor | Mapping):
            raise TypeError("micro_batches is one batch; pass [batch] or split_batch(batch, number)")
        if sizes is None:
            micro_batches = list(micro_batches)
            sizes = [batch_size(batch) for batch in micro_batches]
        total = sum(sizes)
        if not total:
            raise ValueError("a step needs at least one example")
        rate = learning_rate(self.config, step_index, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        self.optimizer.zero_grad()
        loss: Tensor | None = None
        for batch, size in zip(micro_batches, sizes, strict=True):
            with self._autocast:
                part = loss_function(batch)
            part = part.float() if part.dtype.itemsize < 4 else part
            part = part if size == total else part * (size / total)
            (part if self.scaler is None else self.scaler.scale(part)).backward()
            loss = part.detach() if loss is None else loss + part.detach()

        if self.scaler is not None:
            scale = self.scaler.scale(torch.ones_like(loss))
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.config.clip_norm:
            clip_grads_with_norm_(self._parameters, self.config.clip_norm, norm)
        if self.config.clip_value:
            clip_grad_value_(self._parameters, self.config.clip_value)
        if self.scaler is None:
            self.optimizer.step()
            self._update_average(None)
            return {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
        skipped = ~norm.isfinite()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._update_average(skipped)
        report = {"loss": loss, "gradient_norm": norm.masked_fill(skipped, 0.0), "learning_rate": rate}
        return {**report, "loss_scale": scale, "skipped": skipped.float()}

    @torch.no_grad()
    def _update_average(self, skipped: Tensor | None) -> None:
        if self.ema is None:
            return
        if skipped is None:
            self._average(self._averages, self._weights, None)
        else:  # the weight 0 of a skipped step as a tensor, so that the host need not know
            weight = (1 - self.config.ema_decay) * (~skipped).float()
            torch._foreach_lerp_(self._averages, self._weights, [weight] * len(self._weights))
        if self._buffers:
            torch._foreach_copy_(self._averaged_buffers, self._buffers)

    def state_dict(self) -> dict[str, Any]:
        """Scaler and average as tensors and numbers, so that `torch.load(weights_only=True)` reads them back."""
        parts = {"scaler": self.scaler, "ema": self.ema}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a stepper with the same precision and average."""
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])


def cross_entropy(logits: Tensor, labels: Tensor, config: OptimizationConfig) -> Tensor:
    """Mean cross entropy in float32 with smoothed labels, in nats.

    L = -sum_c q_c log softmax(logits)_c with q = (1 - e) onehot(label) + e / C, e = label_smoothing.

    Args:
        logits: (B, C) of any float type.
        labels: (B,) int64.
        config: its `label_smoothing`.
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return functional.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)


def checkpointed(blocks: Iterable[nn.Module], inputs: Any, enabled: bool = True) -> Any:
    """Run blocks one after another; when enabled keep only what enters each, and compute the rest again for the gradient.

    Dropout repeats its draws, so gradients are equal. Batch normalisation would count a batch twice in its running
    statistics: leave such blocks out.
    """
    for block in blocks:
        inputs = checkpoint(block, inputs, use_reentrant=False) if enabled else block(inputs)
    return inputs


def check_gradients(function: Callable[..., Any], inputs: Mapping[str, Tensor]) -> None:
    """Compare the gradient of a function with finite differences in float64, one input at a time.

    Args:
        function: called with `inputs` by name; deterministic. For a module's weights wrap `torch.func.functional_call`.
        inputs: small tensors; each floating one is checked, away from kinks.

    Raises:
        ValueError: naming the first input whose gradient is wrong.
    """
    values = {name: x.detach().double() if x.is_floating_point() else x for name, x in inputs.items()}
    for name, value in values.items():
        if not value.is_floating_point():
            continue
        try:
            torch.autograd.gradcheck(lambda x, name=name: function(**{**values, name: x}), value.clone().requires_grad_())
        except GradcheckError as error:
            raise ValueError(f"the gradient with respect to {name!r} is not that of finite differences: {error}") from error

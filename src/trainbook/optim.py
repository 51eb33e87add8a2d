"""One training step by gradient: groups, schedules, accumulation, precision, clipping and averaging, thin over torch."""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from trainbook import distributed
from trainbook.acceleration import allow_tf32, apply_variant, fastest_variant, variant_table
from trainbook.errors import RunFailed, UserError, is_out_of_memory
from trainbook.optimization import OptimizationConfig
from trainbook.pipeline import Pipeline, divide
from trainbook.runtime import mixed_dtype

logger = logging.getLogger("trainbook")

LossFunction = Callable[[nn.Module, Any], Tensor | tuple[Tensor, dict[str, Tensor]]]

NORMS = (nn.LayerNorm, nn.RMSNorm)  # those whose weights can have two dimensions; of other norms they have one
FUSED = ("cpu", "cuda")  # one kernel per group instead of some ten per parameter
ACCELERATIONS = {"off": "as written", "channels_last": "channels_last", "compiled": "compiled"}
STEPS_BETWEEN_COPIES = 100  # of the weights, for a return to them after a spike
RATE_FACTOR_OF_A_SPIKE = 0.5
SPIKES_THAT_END_A_RUN = 20
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

    It makes the optimizer and, when `config.ema_decay` is positive, `ema`: a copy of the module that follows it by
    e <- d e + (1 - d) w in parameters after each step that was not skipped; buffers (batch statistics) are copied.
    Keep `state_dict()` in a checkpoint (`TrainState.stateful`) beside the module; nothing else carries over.

    Where several processes train (`distributed`), each calls this with its share of the batch. In a pipeline that is all of
    it: each process keeps some blocks of the module, an nn.Sequential, and the micro-batches pass through all of them. It
    computes what one process computes, but that random numbers drawn by dropout or by the loss are other ones, and that
    batch normalisation sees `accumulation` micro-batches, at least one per process.

    Args:
        module: what is trained; not replaced or moved afterwards.
        config: optimizer, schedule, clipping, precision, average, rule for spikes.
        total_steps: of the whole run, for the schedule.

    Raises:
        ValueError: when `total_steps` is not positive.
        UserError: when the weights are to be divided among processes and the module or a choice does not allow it.
    """

    def __init__(self, module: nn.Module, config: OptimizationConfig, total_steps: int) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}; a schedule needs at least one step")
        self.module, self.config, self.total_steps = module, config, total_steps
        self.optimizer = make_optimizer(module, config)
        self.ema = averaged_copy(module) if config.ema_decay else None
        if distributed.is_divided():
            choice = f"with --parallel {distributed.parallel()} choose"
            if config.on_spike == "roll_back" and config.spike_deviations:
                raise UserError("on_spike = roll_back keeps whole copies of the weights", f"{choice} skip or lower_rate")
            if config.acceleration != "off":
                raise UserError(f"acceleration = {config.acceleration} needs the whole model", f"{choice} off")
        if distributed.parallel() == "slices":
            distributed.shard(module, self.optimizer)
            if self.ema is not None:
                distributed.shard(self.ema)
        self._pipeline: Pipeline | None = None
        if distributed.parallel() == "pipeline":
            self._pipeline = divide(module, config.accumulation, self.optimizer)
            if self.ema is not None:
                divide(self.ema, config.accumulation)
        self.steps_done, self.accumulation, self.rate_factor = 0, config.accumulation, 1.0
        self.variant = "" if config.acceleration == "measured" else ACCELERATIONS[config.acceleration]
        self._losses, self._spikes_in_a_row, self._kept = LossStatistics(), 0, {}
        self._model: nn.Module | None = None
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        device = self._parameters[0].device if self._pipeline is None else self._pipeline.device
        self._precision = precision = mixed_dtype(str(device)) if config.precision == "mixed" else config.precision
        dtype = None if precision == "float32" else getattr(torch, precision)
        self._autocast = torch.autocast(device.type, dtype) if dtype else nullcontext()
        self.scaler = torch.amp.GradScaler(device.type) if precision == "float16" else None
        idle = self.scaler is not None and not any(p.requires_grad for p in _present(self._parameters))
        if distributed.largest_of([idle])[0]:  # a scaler without gradients does not know when to lower its scale
            raise UserError("a stage of the pipeline has nothing to train in float16", "choose another precision or --parallel")
        if device.type == "cuda":
            allow_tf32(config.tf32)
        if self.ema is not None:
            self._average = get_ema_multi_avg_fn(config.ema_decay)
            self._weights, self._averages = _present(module.parameters()), _present(self.ema.parameters())
            self._buffers, self._averaged_buffers = _present(module.buffers()), _present(self.ema.buffers())

    def step(self, batch: Any, loss_function: LossFunction, global_size: int = 0) -> dict[str, Tensor | float]:
        """One update of the weights by the gradient of the batch's mean loss.

        The batch is cut into `accumulation` micro-batches. With n_i examples in micro-batch i, the loss is
        L = sum_i (n_i / sum_j n_j) L_i: the loss and gradient of the large batch, for a loss that is a mean over examples.
        (Batch normalisation sees micro-batches: there the two differ.) Where memory runs out, their number is doubled and
        the step taken again. A float16 step whose gradient overflows changes neither weights nor average; the scaler then
        halves its scale. Without `spike_deviations` nothing here makes the host wait for a GPU.

        Args:
            batch: tensor, or dict, tuple or list of tensors; the first axis counts examples. This process's share.
            loss_function: (module, batch) -> mean loss over the batch, or that and a dict of further means to report; it
                calls the module it is given, and runs under autocast.
            global_size: examples of all processes' shares; by default as many in each as here.

        Returns:
            loss (float32 or wider) and gradient_norm (before clipping), tensors on the device; learning_rate, a float; the
            further means. With float16 also loss_scale of this step and skipped, 1 for a step that overflowed: its
            gradient_norm is reported as 0, because an overflow the scaler handles is no fault of the run. With
            spike_deviations also spike, 1 for a step that was left out; what was not finite is then not reported.

        Raises:
            RunFailed: when 20 steps in a row are spikes.
            UserError: in a pipeline, when the batch does not make equal micro-batches or the loss does more with the module
                than to call it once with one tensor.
        """
        global_size = global_size or batch_size(batch) * distributed.replicas()
        if not global_size:
            raise ValueError("a step needs at least one example")
        if self._model is None:
            self._prepare(batch, loss_function)
        if self.ema is not None and self.steps_done == 0:
            self.ema.load_state_dict(self.module.state_dict())  # the module may have been given weights since
        rate = self.rate_factor * learning_rate(self.config, self.steps_done, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self._keeps_copies and self.steps_done % STEPS_BETWEEN_COPIES == 0:
            self._kept = copy.deepcopy(self._undoable())

        buffers = self._buffers_now() if self.config.spike_deviations else []
        means = self._gradient(batch, loss_function, global_size)
        if self.scaler is not None:
            scale = self.scaler.scale(torch.ones_like(means["loss"]))
            self._tell_overflow()
            self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()
        if self.config.clip_norm:
            clip_grads_with_norm_(self._parameters, self.config.clip_norm, norm)
        if self.config.clip_value:
            clip_grad_value_(self._parameters, self.config.clip_value)
        report = {**means, "gradient_norm": norm, "learning_rate": rate}
        self.steps_done += 1
        if self.config.spike_deviations:
            report["spike"] = float(self._is_spike(float(means["loss"]), float(norm)))
        if report.get("spike"):
            self._put_back(buffers)
            self._answer_spike()
            report = {name: value for name, value in report.items() if bool(torch.as_tensor(value).isfinite().all())}
        elif self.scaler is None:
            self.optimizer.step()
            self._update_average(None)
        else:
            skipped = ~norm.isfinite()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._update_average(skipped)
            report.update(gradient_norm=norm.masked_fill(skipped, 0.0), loss_scale=scale, skipped=skipped.float())
        return report

    def _gradient_norm(self) -> Tensor:
        """Of the whole model."""
        if self._pipeline is not None:
            return self._pipeline.gradient_norm()
        return distributed.whole(get_total_norm([p.grad for p in self._parameters if p.grad is not None]))

    def _tell_overflow(self) -> None:
        """Let an overflow in one stage's gradient be one in all: their scalers skip the same steps."""
        if self._pipeline is not None:
            zero = self._pipeline.gradient_norm() * 0  # or NaN
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad += zero

    def _prepare(self, batch: Any, loss_function: LossFunction) -> None:
        """Choose the form in which the module runs, and let several processes find out together how much memory suffices."""

        def loss_of(module: nn.Module) -> Tensor:
            with self._autocast:
                loss, _ = _loss_and_means(loss_function(module, split_batch(batch, self.accumulation)[0]))
            return loss if self.scaler is None else self.scaler.scale(loss.float())

        if self._pipeline is not None:
            self._model = self.module
            return
        if not self.variant:
            self._rehearse(self.module, batch, loss_function)
            chosen = b""
            if distributed.rank() == 0:
                name, variants = fastest_variant(self.module, loss_of, self._precision)
                logger.info("the model runs %s:\n%s", name, variant_table(variants))
                chosen = name.encode()
            self.variant = distributed.bytes_from_first(chosen).decode()
        running = apply_variant(self.module, self.variant, self.optimizer)
        self._model = running if distributed.parallel() == "slices" else distributed.replicate(running)
        if distributed.size() > 1 and distributed.parallel() == "copies":
            self._rehearse(running, batch, loss_function)

    def _rehearse(self, module: nn.Module, batch: Any, loss_function: LossFunction) -> None:
        """Halve the micro-batches of all processes until the memory of each suffices; a step later they could not agree.

        Changes nothing else: no gradient, no buffer, no random number is left of it.
        """
        while True:
            buffers = self._buffers_now()
            devices = [p.device for p in self._parameters[:1] if p.device.type == "cuda"]
            failed = False
            with torch.random.fork_rng(devices):
                try:
                    with self._autocast:
                        loss, _ = _loss_and_means(loss_function(module, split_batch(batch, self.accumulation)[0]))
                    loss.backward()
                    if distributed.size() > 1:
                        self._check_all_used()
                except RuntimeError as error:
                    if not is_out_of_memory(error) or self.accumulation >= batch_size(batch):
                        raise
                    failed = True
            self.optimizer.zero_grad()
            self._put_back(buffers)
            if not distributed.largest_of([failed])[0]:
                return
            self._use_less_memory()

    def _check_all_used(self) -> None:
        """Copies average their gradients while they come: one that never comes would be waited for."""
        unused = [name for name, p in self.module.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise UserError(
                f"the loss does not depend on {', '.join(unused[:5])}",
                "freeze what is not trained with requires_grad_(False), or train in one process",
            )

    def _buffers_now(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.module.buffers()]

    def _put_back(self, buffers: list[Tensor]) -> None:
        """Undo what a forward pass whose step is not taken did to the batch statistics."""
        for buffer, earlier in zip(self.module.buffers(), buffers, strict=True):
            buffer.copy_(earlier)

    def _use_less_memory(self) -> None:
        self.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.accumulation *= 2
        logger.warning(
            "out of memory at step %d: batches are cut into %d micro-batches from here on; the effective batch stays as it is",
            self.steps_done,
            self.accumulation,
        )

    def _gradient(self, batch: Any, loss_function: LossFunction, global_size: int) -> dict[str, Tensor]:
        """Leave the gradient of the global batch's mean loss in the parameters; returns the loss and the further means."""
        if self._pipeline is not None:
            self.optimizer.zero_grad()
            return self._through_stages(self._pipeline, batch, loss_function)
        buffers = self._buffers_now()
        while True:
            self.optimizer.zero_grad()
            number = self.accumulation
            if distributed.parallel() == "slices":  # they gather weights together: as many micro-batches in each
                number = min(number, max(1, global_size // distributed.replicas()))
            try:
                return self._accumulate(split_batch(batch, number), loss_function, global_size)
            except RuntimeError as error:
                together = distributed.size() > 1  # the others already wait for this process's gradient
                if together or not is_out_of_memory(error) or self.accumulation >= batch_size(batch):
                    raise
            self._put_back(buffers)  # outside the handler: the traceback holds what filled the memory
            self._use_less_memory()

    def _through_stages(self, pipeline: Pipeline, batch: Any, loss_function: LossFunction) -> dict[str, Tensor]:
        number, examples = max(self.accumulation, pipeline.num_stages), batch_size(batch)
        if examples % number:
            raise UserError(
                f"a batch of {examples} does not make {number} equal micro-batches for a pipeline",
                f"choose a batch_size that is a multiple of {number}, or another accumulation",
            )

        def means_of(module: nn.Module, micro_batch: Any) -> dict[str, Tensor]:
            loss, others = _loss_and_means(loss_function(module, micro_batch))
            return _named(_widened(loss), others)

        scale = (lambda loss: loss) if self.scaler is None else self.scaler.scale
        with self._autocast:  # once: a torch.autocast that is entered twice stays on
            return pipeline.step_on_parts(split_batch(batch, number), means_of, scale)

    def _accumulate(self, micro_batches: list[Any], loss_function: LossFunction, global_size: int) -> dict[str, Tensor]:
        processes = distributed.size()
        means: dict[str, Tensor] = {}
        for index, micro_batch in enumerate(micro_batches):
            weight = batch_size(micro_batch) * processes / global_size  # replicas average their gradients: hence the factor
            with self._synchronised(index == len(micro_batches) - 1):
                with self._autocast:
                    loss, others = _loss_and_means(loss_function(self._model, micro_batch))
                loss = _widened(loss)
                loss = loss if weight == 1 else loss * weight
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            for name, value in _named(loss.detach(), others).items():
                share = value if name == "loss" else _widened(value.detach()) * weight  # the loss has its weight already
                means[name] = share + means[name] if name in means else share
        if processes > 1:
            total = distributed.add_up(torch.stack([value.to(means["loss"].dtype) for value in means.values()])) / processes
            means = dict(zip(means, total.unbind(), strict=True))
        return means

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients travel between processes in the backward pass of a step's last micro-batch only."""
        if distributed.parallel() == "slices":
            self.module.set_requires_gradient_sync(last)
            yield
        elif last or distributed.size() == 1:
            yield
        else:
            with self._model.no_sync():
                yield

    @property
    def _keeps_copies(self) -> bool:
        return self.config.spike_deviations > 0 and self.config.on_spike == "roll_back"

    def _undoable(self) -> dict[str, Any]:
        """What a return to earlier weights brings back."""
        parts = {"module": self.module, "optimizer": self.optimizer, "ema": self.ema, "losses": self._losses}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def _is_spike(self, loss: float, norm: float) -> bool:
        if self.scaler is not None and math.isfinite(loss) and not math.isfinite(norm):
            return False  # an overflow: the scaler's to handle
        if math.isfinite(norm) and not self._losses.is_spike(loss, self.config.spike_deviations):
            self._losses.add(loss)
            self._spikes_in_a_row = 0
            return False
        return True

    def _answer_spike(self) -> None:
        self._spikes_in_a_row += 1
        if self._spikes_in_a_row >= SPIKES_THAT_END_A_RUN:
            raise RunFailed(f"{self._spikes_in_a_row} steps in a row were loss spikes. Lower the learning rate and start again.")
        if self.scaler is not None:
            self.scaler.update()
        if self.config.on_spike != "skip":
            self.rate_factor *= RATE_FACTOR_OF_A_SPIKE
        if self._keeps_copies:
            kept = copy.deepcopy(self._kept)
            self.module.load_state_dict(kept["module"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self._losses.load_state_dict(kept["losses"])
            if self.ema is not None:
                self.ema.load_state_dict(kept["ema"])

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
        """Tensors and numbers only, so that `torch.load(weights_only=True)` reads them back."""
        parts = {"optimizer": self.optimizer, "scaler": self.scaler, "ema": self.ema}
        numbers = {name: getattr(self, name) for name in ("steps_done", "accumulation", "rate_factor", "variant")}
        spikes = {"losses": self._losses.state_dict(), "spikes_in_a_row": self._spikes_in_a_row, "kept": self._kept}
        return {name: part.state_dict() for name, part in parts.items() if part is not None} | numbers | spikes

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a stepper of the same config, saved by any number of processes."""
        optimizer = saved["optimizer"]
        if distributed.parallel() == "slices":
            states = optimizer["state"].items()
            cut = {index: distributed.sliced_like(state, self._parameters[index]) for index, state in states}
            optimizer = {**optimizer, "state": cut}
        if distributed.parallel() == "pipeline":
            own = {index: state for index, state in optimizer["state"].items() if not self._parameters[index].is_meta}
            optimizer = {**optimizer, "state": own}
        self.optimizer.load_state_dict(optimizer)
        if self.scaler is not None and "scaler" in saved:  # a run may move to a card that needs one
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(distributed.sliced_like(saved["ema"], self.ema.state_dict()))
        for name in ("steps_done", "accumulation", "rate_factor", "variant"):
            setattr(self, name, saved[name])
        self._losses.load_state_dict(saved["losses"])
        self._spikes_in_a_row, self._kept = saved["spikes_in_a_row"], saved["kept"]


class LossStatistics:
    """Running mean and deviation of the losses so far, each loss weighing 0.98 of the one after it.

    Of their logarithms, as long as all are positive: late in training the losses of batches have a long tail, and on their
    own scale an ordinary run has false alarms by the dozen.
    """

    DECAY, LEAST = 0.98, 50  # fewer losses than LEAST say too little to call one a spike
    FLOOR = 1e-3  # least deviation, as a share of the loss: a rounding is no spike

    def __init__(self) -> None:
        self.number, self.mean, self.variance, self.logarithmic = 0, 0.0, 0.0, True

    def is_spike(self, loss: float, deviations: float) -> bool:
        """Whether a loss is not finite, or stands so many deviations above the mean."""
        if not math.isfinite(loss):
            return True
        if self.number < self.LEAST or (self.logarithmic and loss <= 0):
            return False
        value, floor = (math.log(loss), self.FLOOR) if self.logarithmic else (loss, self.FLOOR * abs(self.mean))
        return value > self.mean + deviations * max(math.sqrt(self.variance), floor)

    def add(self, loss: float) -> None:
        """Take in one loss; the first that is not positive begins anew, without logarithms."""
        if self.logarithmic and loss <= 0:
            self.number, self.mean, self.variance, self.logarithmic = 0, 0.0, 0.0, False
        self.number += 1
        weight = max(1 - self.DECAY, 1 / self.number)  # a plain mean at first
        difference = (math.log(loss) if self.logarithmic else loss) - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)

    def state_dict(self) -> dict[str, float]:
        """Everything, as numbers."""
        return dict(vars(self))

    def load_state_dict(self, saved: dict[str, float]) -> None:
        """Continue from `state_dict()`."""
        vars(self).update(saved)


def _loss_and_means(returned: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return returned if isinstance(returned, tuple) else (returned, {})


def _named(loss: Tensor, others: dict[str, Tensor]) -> dict[str, Tensor]:
    if "loss" in others:
        raise ValueError("a further mean cannot be called loss: that is the loss itself")
    return {"loss": loss, **others}


def _present(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Without those that another process of a pipeline has."""
    return [tensor for tensor in tensors if not tensor.is_meta]


def _widened(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def cross_entropy(logits: Tensor, labels: Tensor, config: OptimizationConfig) -> Tensor:
    """Mean cross entropy in float32 with smoothed labels, in nats.

    L = -sum_c q_c log softmax(logits)_c with q = (1 - e) onehot(label) + e / C, e = label_smoothing.

    Args:
        logits: (B, C) of any float type.
        labels: (B,) int64.
        config: its `label_smoothing`.
    """
    return functional.cross_entropy(_widened(logits), labels, label_smoothing=config.label_smoothing)


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

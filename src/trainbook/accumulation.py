"""The gradient of a batch's mean loss from micro-batches: in a precision, in as many parts as fit, over all processes."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from trainbook import distributed
from trainbook.acceleration import allow_tf32, apply_variant, fastest_variant, variant_table
from trainbook.buffers import keep_buffers
from trainbook.errors import UserError, is_out_of_memory
from trainbook.losses import widened
from trainbook.optimization import OptimizationConfig
from trainbook.pipeline import Pipeline
from trainbook.runtime import mixed_dtype

logger = logging.getLogger("trainbook")

LossFunction = Callable[[nn.Module, Any], Tensor | tuple[Tensor, dict[str, Tensor]]]

ACCELERATIONS = {"off": "as written", "channels_last": "channels_last", "compiled": "compiled"}


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


class Accumulator:
    """Leaves the gradient of a batch's mean loss in a module's parameters, times the scale where there is a `scaler`.

    Args:
        module: what is trained.
        optimizer: of the parameters that get a gradient.
        config: its `accumulation`, `precision`, `tf32` and `acceleration`.
        pipeline: of the module, where it is cut into one.

    Raises:
        UserError: when a stage of the pipeline has nothing to train and its scaler could not know what the others do.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: OptimizationConfig, pipeline: Pipeline | None = None
    ) -> None:
        self.accumulation = config.accumulation
        self.variant = "" if config.acceleration == "measured" else ACCELERATIONS[config.acceleration]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._module, self._optimizer, self._pipeline = module, optimizer, pipeline
        self._model: nn.Module | None = None
        device = self.parameters[0].device if pipeline is None else pipeline.device
        self._precision = precision = mixed_dtype(str(device)) if config.precision == "mixed" else config.precision
        dtype = None if precision == "float32" else getattr(torch, precision)
        self._autocast = torch.autocast(device.type, dtype) if dtype else nullcontext()
        self.scaler = torch.amp.GradScaler(device.type) if precision == "float16" else None
        idle = self.scaler is not None and not any(p.requires_grad for p in distributed.present(self.parameters))
        if distributed.largest_of([idle])[0]:  # a scaler without gradients does not know when to lower its scale
            raise UserError("a stage of the pipeline has nothing to train in float16", "choose another precision or --parallel")
        if device.type == "cuda":
            allow_tf32(config.tf32)

    def prepare(self, batch: Any, loss_function: LossFunction, step: int) -> None:
        """Before the first step: choose the form in which the module runs, and how much memory suffices for all processes."""
        if self._model is not None:
            return
        if self._pipeline is not None:
            self._model = self._module
            return
        if not self.variant:
            self._rehearse(self._module, batch, loss_function, step)
            self.variant = self._fastest_variant(batch, loss_function)
        running = apply_variant(self._module, self.variant, self._optimizer)
        self._model = running if distributed.parallel() == "slices" else distributed.replicate(running)
        if distributed.size() > 1 and distributed.parallel() == "copies":
            self._rehearse(running, batch, loss_function, step)

    def _fastest_variant(self, batch: Any, loss_function: LossFunction) -> str:
        """As the first process measures it."""

        def loss_of(module: nn.Module) -> Tensor:
            loss = self._first_loss(module, batch, loss_function)
            return loss if self.scaler is None else self.scaler.scale(loss.float())

        chosen = b""
        if distributed.rank() == 0:
            name, variants = fastest_variant(self._module, loss_of, self._precision)
            logger.info("the model runs %s:\n%s", name, variant_table(variants))
            chosen = name.encode()
        return distributed.bytes_from_first(chosen).decode()

    def _first_loss(self, module: nn.Module, batch: Any, loss_function: LossFunction) -> Tensor:
        with self._autocast:
            loss, _ = _loss_and_means(loss_function(module, split_batch(batch, self.accumulation)[0]))
        return loss

    def _rehearse(self, module: nn.Module, batch: Any, loss_function: LossFunction, step: int) -> None:
        """Halve the micro-batches of all processes until the memory of each suffices; a step later they could not agree.

        Changes nothing else: no gradient, no buffer, no random number is left of it.
        """
        while True:
            put_back = keep_buffers(self._module)
            devices = [p.device for p in self.parameters[:1] if p.device.type == "cuda"]
            failed = False
            with torch.random.fork_rng(devices):
                try:
                    self._first_loss(module, batch, loss_function).backward()
                    if distributed.size() > 1:
                        self._check_all_used()
                except RuntimeError as error:
                    if not self._could_use_less(error, batch):
                        raise
                    failed = True
            self._optimizer.zero_grad()
            put_back()
            if not distributed.largest_of([failed])[0]:
                return
            self._use_less_memory(step)

    def _check_all_used(self) -> None:
        """Copies average their gradients while they come: one that never comes would be waited for."""
        unused = [name for name, p in self._module.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise UserError(
                f"the loss does not depend on {', '.join(unused[:5])}",
                "freeze what is not trained with requires_grad_(False), or train in one process",
            )

    def _could_use_less(self, error: RuntimeError, batch: Any) -> bool:
        return is_out_of_memory(error) and self.accumulation < batch_size(batch)

    def _use_less_memory(self, step: int) -> None:
        self._optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.accumulation *= 2
        logger.warning(
            "out of memory at step %d: batches are cut into %d micro-batches from here on; the effective batch stays as it is",
            step,
            self.accumulation,
        )

    def backward(self, batch: Any, loss_function: LossFunction, global_size: int, step: int) -> dict[str, Tensor]:
        """Compute the gradient of the global batch's mean loss; `prepare` comes first.

        Args:
            batch: this process's share.
            loss_function: (module, batch) -> mean loss, or that and a dict of further means.
            global_size: examples of all shares.
            step: for the words of a warning.

        Returns:
            The loss and the further means over the global batch.
        """
        self._optimizer.zero_grad()
        if self._pipeline is not None:
            return self._through_stages(self._pipeline, batch, loss_function)
        put_back = keep_buffers(self._module)
        while True:
            number = self.accumulation
            if distributed.parallel() == "slices":  # they gather weights together: as many micro-batches in each
                number = min(number, max(1, global_size // distributed.replicas()))
            try:
                return self._accumulate(split_batch(batch, number), loss_function, global_size)
            except RuntimeError as error:
                # Other processes already wait for this one's gradient.
                if distributed.size() > 1 or not self._could_use_less(error, batch):
                    raise
            put_back()  # outside the handler: the traceback holds what filled the memory
            self._use_less_memory(step)

    def _through_stages(self, pipeline: Pipeline, batch: Any, loss_function: LossFunction) -> dict[str, Tensor]:
        number, examples = max(self.accumulation, pipeline.num_stages), batch_size(batch)
        if examples % number:
            raise UserError(
                f"a batch of {examples} does not make {number} equal micro-batches for a pipeline",
                f"choose a batch_size that is a multiple of {number}, or another accumulation",
            )

        def means_of(module: nn.Module, micro_batch: Any) -> dict[str, Tensor]:
            loss, others = _loss_and_means(loss_function(module, micro_batch))
            return _named(widened(loss), others)

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
                loss = widened(loss)
                loss = loss if weight == 1 else loss * weight
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            for name, value in _named(loss.detach(), others).items():
                share = value if name == "loss" else widened(value.detach()) * weight  # the loss has its weight already
                means[name] = share + means[name] if name in means else share
        if processes > 1:
            total = distributed.add_up(torch.stack([value.to(means["loss"].dtype) for value in means.values()])) / processes
            means = dict(zip(means, total.unbind(), strict=True))
        return means

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients travel between processes in the backward pass of a step's last micro-batch only."""
        if distributed.parallel() == "slices":
            self._module.set_requires_gradient_sync(last)
            yield
        elif last or distributed.size() == 1:
            yield
        else:
            with self._model.no_sync():
                yield

    def unscale(self) -> None:
        """Divide the gradient by the scale; one that overflowed becomes one that is not finite, in all processes."""
        if self._pipeline is not None:  # an overflow in one stage is one in all: their scalers skip the same steps
            zero = self._pipeline.gradient_norm() * 0  # or NaN
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad += zero
        self.scaler.unscale_(self._optimizer)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the gradient of the whole model."""
        if self._pipeline is not None:
            return self._pipeline.gradient_norm()
        return distributed.whole(get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def state_dict(self) -> dict[str, Any]:
        """What has been found out about memory and speed."""
        return {"accumulation": self.accumulation, "variant": self.variant}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.accumulation, self.variant = saved["accumulation"], saved["variant"]


def _loss_and_means(returned: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return returned if isinstance(returned, tuple) else (returned, {})


def _named(loss: Tensor, others: dict[str, Tensor]) -> dict[str, Tensor]:
    if "loss" in others:
        raise ValueError("a further mean cannot be called loss: that is the loss itself")
    return {"loss": loss, **others}

"""Pipeline parallelism: each process holds one stage of a sequence of blocks, and micro-batches flow through all stages.

The only user of torch.distributed.pipelining, which torch still calls alpha.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from trainbook import distributed
from trainbook.errors import UserError
from trainbook.seeding import seed_step

if TYPE_CHECKING:
    from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

MeansOfPart = Callable[[Any, Any], dict[str, Tensor]]

SCHEDULES = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}  # name to torch's class
OTHERWISE = "train it with --parallel copies or slices"


def distribute_layers(costs: Sequence[float], num_stages: int) -> list[range]:
    """Cut a sequence of layers into contiguous stages such that the heaviest stage is as light as can be.

    Over cuts 0 = s_0 < s_1 < ... < s_K = n it minimises max_k sum_{s_(k-1) <= i < s_k} c_i, exactly, in O(K n^2).

    Args:
        costs: c, one per layer in any unit, none negative.
        num_stages: K.

    Returns:
        The layers of each stage, at least one.

    Raises:
        ValueError: when there are more stages than layers, or a cost is negative or NaN.

    Source: Skiena (2008), The Algorithm Design Manual, section 8.5, the linear partition problem.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot fill {num_stages} stages: each needs at least one")
    if not all(cost >= 0 for cost in costs):
        raise ValueError(f"costs must not be negative, got {list(costs)}")
    total = [0, *accumulate(costs)]

    @cache
    def best(stop: int, stages: int) -> tuple[float, int]:
        """Cost of the heaviest of `stages` stages over the first `stop` layers, and where the last of them starts."""
        if stages == 1:
            return total[stop], 0
        return min((max(best(cut, stages - 1)[0], total[stop] - total[cut]), cut) for cut in range(stages - 1, stop))

    found, stop = [], len(costs)
    for stages in range(num_stages, 0, -1):
        start = best(stop, stages)[1]
        found.append(range(start, stop))
        stop = start
    return found[::-1]


class Pipeline:
    """The stage that this process holds of a sequence of blocks: stage k in the process of rank k.

    Every process makes the same calls with the same arguments, the whole batch too, in the same order. One that fails
    leaves the others waiting for it: start them with torchrun, which then ends all.

    Randomness is each process's own: seed the generator in each before a step, with its rank, so that dropout differs
    between stages and repeats after a resume. Nothing else here draws from it. Batch normalisation sees micro-batches.
    The first block of a stage must not overwrite its input.

    Args:
        blocks: the whole sequence, with equal weights in every process; each block takes a float tensor, example first
            (the very first may take integers), and gives one whose shape follows from that of its input. The blocks of
            the other stages lose their tensors: they are moved to the meta device.
        loss_function: (outputs, targets) -> mean loss, in which every example weighs the same.
        num_micro_batches: into how many equal parts a batch is cut, at least one per stage. The share of time that a
            stage idles is (K - 1) / (K - 1 + num_micro_batches) for K stages.
        schedule: "gpipe" runs all parts forward, then all backward. "1f1b" alternates as soon as it can, so that a stage
            keeps the activations of at most K parts.
        device: of this process. Under NCCL, one GPU per process.
        costs: per block, for `distribute_layers`; by default the number of parameters, at least 1.

    Attributes:
        layers: which blocks each stage has.
        stage: this one's, under the names they have in the whole sequence. Its parameters are what the optimizer gets.

    Raises:
        TypeError: when `blocks` is no plain sequence.
        ValueError: when blocks, stages and micro-batches do not fit, or two stages share a parameter.

    Source: Huang et al. (2019), GPipe; Narayanan et al. (2019), PipeDream (1F1B).
    """

    def __init__(
        self,
        blocks: nn.Sequential,
        loss_function: Callable[[Tensor, Tensor], Tensor],
        num_micro_batches: int,
        schedule: str = "1f1b",
        device: str | torch.device = "cpu",
        costs: Sequence[float] | None = None,
    ) -> None:
        if not isinstance(blocks, nn.Sequential) or type(blocks).forward is not nn.Sequential.forward:
            raise TypeError(f"blocks must be an nn.Sequential with its own forward, got {type(blocks).__name__}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}; there are {', '.join(SCHEDULES)}")
        self.rank, self.num_stages = dist.get_rank(), dist.get_world_size()
        if num_micro_batches < self.num_stages:
            raise ValueError(
                f"{num_micro_batches} micro-batches are fewer than the {self.num_stages} stages: use at least as many"
            )
        if costs is None:
            costs = [max(1, sum(p.numel() for p in block.parameters())) for block in blocks]
        if len(costs) != len(blocks):
            raise ValueError(f"{len(costs)} costs for {len(blocks)} blocks")
        self.layers = distribute_layers(costs, self.num_stages)
        blocks = nn.Sequential(OrderedDict(blocks._modules))  # a subclass may not be cut; named_children skips repeated ones
        stages = [blocks[layers.start : layers.stop] for layers in self.layers]
        owned = [{id(p) for p in stage.parameters()} for stage in stages]
        if sum(map(len, owned)) > len(set().union(*owned)):
            raise ValueError(f"two of the stages {self.layers} share a parameter: choose costs that keep its blocks together")
        for rank, stage in enumerate(stages):
            stage.to(device if rank == self.rank else "meta")

        self.loss_function, self.num_micro_batches, self.device = loss_function, num_micro_batches, torch.device(device)
        self.stage, self._stages = stages[self.rank], stages
        self._is_first, self._is_last = self.rank == 0, self.rank == self.num_stages - 1
        self._names_of_means: list[str] = []
        self._known_borders: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._schedule_class, self._schedule, self._scheduled = SCHEDULES[schedule], None, None

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Add the gradient of the mean loss over a batch to `.grad` of this stage's parameters, as `backward` does.

        L = (1 / M) sum_m L_m over M micro-batches of one size. May run under `torch.autocast`; between stages travels the
        type that a tensor has without it.

        Args:
            inputs: (B, ...), the same in every process.
            targets: (B, ...), where the loss function wants them.

        Returns:
            L in every process, float32 or wider.

        Raises:
            ValueError: when B is not a multiple of M.
            TypeError: when what passes between two stages is no float tensor.
        """
        borders, losses = self._run(inputs, targets)
        dtype = torch.promote_types(borders[-1].dtype, torch.float32)
        loss = torch.stack(losses).sum().detach().to(dtype) if self._is_last else torch.empty((), dtype=dtype, device=self.device)
        dist.broadcast(loss, self.num_stages - 1)
        return loss

    def _run(self, inputs: Tensor, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """One batch forward and backward; what enters and leaves the stages, and on the last of them each L_m / M."""
        if not len(inputs) or len(inputs) % self.num_micro_batches:
            raise ValueError(
                f"{len(inputs)} examples do not make {self.num_micro_batches} equal micro-batches: drop the rest of the batch, "
                f"or choose a batch size that is a multiple of {self.num_micro_batches}"
            )
        borders = self._borders(inputs[: len(inputs) // self.num_micro_batches])
        kind = inputs.shape, inputs.dtype, self.num_micro_batches
        if self._scheduled != kind:  # receive buffers have the shapes of one kind of batch
            self._schedule, self._scheduled = self._new_schedule(borders), kind
        losses: list[Tensor] = []
        self._schedule.step(
            *([inputs.to(self.device).contiguous()] if self._is_first else []),
            target=targets if self._is_last else None,
            losses=losses,
            return_outputs=False,
        )
        return borders, losses

    def step_on_parts(self, parts: Sequence[Any], means_of: MeansOfPart, scale: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Like `step`, for a loss that calls the module itself and knows nothing of stages.

        A loss function is run for a part twice: everywhere until it calls the module, to learn the module's input, and on
        the last stage with the outputs of the pipeline in the module's place. Both times it draws the same random numbers.

        Args:
            parts: micro-batches, in every process the same.
            means_of: (module, part) -> the mean loss over the part's examples as "loss", and further means.
            scale: of the loss that the gradient is of.

        Returns:
            The means over all parts in every process, float64.

        Raises:
            UserError: when the loss asks more of the module than to be called once with one tensor.
        """
        with random_numbers_of_a_stage(self.device) as seed:

            def of_part(module: _StandIn, index: int) -> dict[str, Tensor]:
                with _random_numbers(seed, 1 + index, self.device), _inside_a_loss():
                    return means_of(module, parts[index])

            inputs = [_input_of(of_part, index) for index in range(len(parts))]
            if len({(part.shape, part.dtype) for part in inputs}) > 1:
                raise UserError(
                    f"micro-batches enter the model with different shapes: {', '.join(str(tuple(i.shape)) for i in inputs)}",
                    "choose batch_size as a multiple of the number of micro-batches, or another --parallel",
                )
            found: list[dict[str, Tensor]] = []

            def loss_function(outputs: Tensor, index: Tensor) -> Tensor:
                means = of_part(_StandIn(outputs), int(index))
                found.append({name: mean.detach() for name, mean in means.items()})
                return scale(means["loss"])

            self.loss_function, self.num_micro_batches = loss_function, len(parts)
            self._run(torch.cat(inputs), torch.arange(len(parts)))
        return self._means_everywhere(found)

    def _means_everywhere(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if not self._names_of_means:
            told = [list(found[0]) if self._is_last else []]
            dist.broadcast_object_list(told, self.num_stages - 1)
            (self._names_of_means,) = told
        names = self._names_of_means
        if any(list(part) != names for part in found):
            raise ValueError(f"the loss reports {', '.join(found[-1])}, but earlier it reported {', '.join(names)}")
        means = torch.empty(len(names), dtype=torch.float64, device=self.device)
        if self._is_last:
            torch.stack([torch.stack([part[name].to(means) for part in found]).mean() for name in names], out=means)
        dist.broadcast(means, self.num_stages - 1)
        return dict(zip(names, means.unbind(), strict=True))

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of the whole sequence without gradients, in every process; any number of examples from one up.

        Args:
            inputs: (B, ...), the same in every process.

        Returns:
            (B, ...)
        """
        outputs = []
        for part in inputs.tensor_split(min(self.num_micro_batches, len(inputs))):
            borders = self._borders(part)
            crossing = part.to(self.device) if self._is_first else torch.empty_like(borders[self.rank], device=self.device)
            if not self._is_first:
                dist.recv(crossing, self.rank - 1)
            crossing = _Sendable(self.stage, borders[self.rank + 1].dtype)(crossing)
            if not self._is_last:
                dist.send(crossing, self.rank + 1)
            outputs.append(crossing if self._is_last else torch.empty_like(borders[-1], device=self.device))
        for output in outputs:
            dist.broadcast(output, self.num_stages - 1)
        return torch.cat(outputs)

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of the gradient over all stages, float64, in every process: what `clip_grads_with_norm_` needs."""
        norm = get_total_norm([p.grad for p in self.stage.parameters() if p.grad is not None]).double().to(self.device)
        norms = [torch.empty_like(norm) for _ in range(self.num_stages)]
        dist.all_gather(norms, norm)
        return get_total_norm(norms)

    def _borders(self, part: Tensor) -> list[Tensor]:
        """What enters each stage and what leaves the last, for one micro-batch: tensors without storage.

        torch would find the shapes by running the stages when it first meets them, which in 2.10 draws random
        numbers and moves batch statistics, so that a resumed run would differ from one that was not cut.
        """
        key = part.shape, part.dtype
        if key not in self._known_borders:
            borders = [torch.empty(part.shape, dtype=part.dtype, device="meta")]
            with torch.no_grad():
                for rank, stage in enumerate(self._stages):
                    tensors = {name: t.to("meta") for name, t in chain(stage.named_parameters(), stage.named_buffers())}
                    output = functional_call(stage, tensors, (borders[-1],))
                    if not isinstance(output, Tensor) or not output.is_floating_point():
                        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
                        raise TypeError(f"stage {rank} (blocks {self.layers[rank]}) gives {kind}; it has to be one float tensor")
                    borders.append(torch.empty(output.shape, dtype=output.dtype, device="meta"))
            self._known_borders[key] = borders
        return self._known_borders[key]

    def _new_schedule(self, borders: list[Tensor]) -> "ScheduleGPipe | Schedule1F1B":
        from torch.distributed import pipelining  # a second or more, in every process, and few ever need it

        # Asking for the gradient at every border keeps a stage independent of what others have frozen.
        entering = borders[self.rank].detach().requires_grad_(not self._is_first)
        leaving = borders[self.rank + 1].detach().requires_grad_()
        sendable = _Sendable(self.stage, leaving.dtype)
        stage = pipelining.PipelineStage(
            sendable, self.rank, self.num_stages, self.device, input_args=entering, output_args=leaving
        )

        def share(outputs: Tensor, targets: Tensor) -> Tensor:
            return self.loss_function(outputs, targets) / self.num_micro_batches

        # Not scale_grads: it divides all of .grad, what earlier steps added too.
        schedule = getattr(pipelining, self._schedule_class)
        return schedule(stage, self.num_micro_batches, loss_fn=share, scale_grads=False)


def divide(module: nn.Module, num_micro_batches: int, optimizer: torch.optim.Optimizer | None = None) -> Pipeline:
    """Let every process keep one stage of a sequence of blocks, in place; the optimizer follows.

    The tensors of the other stages are on the meta device from then on, in the module and in its `state_dict()`. Calling
    the module runs all stages, without gradients, in every process alike.

    Raises:
        UserError: when the module is no such sequence.
    """
    before = list(module.parameters())
    device = next((p.device for p in before if not p.is_meta), torch.device("cpu"))
    try:
        pipeline = Pipeline(module, None, max(num_micro_batches, distributed.size()), device=device)
    except (TypeError, ValueError) as error:
        raise UserError(f"this model cannot be cut into a pipeline: {error}", OTHERWISE) from None
    if optimizer is not None:
        distributed.follow(optimizer, before, module)

    def forward(inputs: Tensor) -> Tensor:
        if _losses_running:
            raise UserError("the loss calls a model that is cut into a pipeline, and not the one it is given", OTHERWISE)
        with random_numbers_of_a_stage(device):
            return pipeline.forward(inputs)

    module.forward = forward
    return pipeline


@contextmanager
def random_numbers_of_a_stage(device: torch.device) -> Iterator[int]:
    """Other random numbers in every process, from a seed that all have; afterwards all go on as if none had been drawn."""
    seed = int(torch.randint(2**62, ()))
    with _random_numbers(seed, 0, device, distributed.rank()):
        yield seed


@contextmanager
def _random_numbers(seed: int, step: int, device: torch.device, rank: int = 0) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed_step(seed, step, rank)
        yield


_losses_running: list[None] = []


@contextmanager
def _inside_a_loss() -> Iterator[None]:
    _losses_running.append(None)
    try:
        yield
    finally:
        _losses_running.pop()


class _CalledWith(BaseException):
    """Carries a module's input out of the loss function that calls it; nothing between may take it for an error."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


class _StandIn:
    """What a loss function gets in the place of a module: gives known outputs, or breaks off with what it is called with."""

    def __init__(self, outputs: Tensor | None = None) -> None:
        self._outputs, self._calls = outputs, 0

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        if named or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise UserError("the loss calls the model with other than one tensor, which a pipeline cannot pass on", OTHERWISE)
        if inputs[0].requires_grad:
            raise UserError("the loss wants a gradient for the model's input, which a pipeline does not give", OTHERWISE)
        self._calls += 1
        if self._calls > 1:
            raise UserError("the loss calls the model twice; through a pipeline a batch passes once", OTHERWISE)
        if self._outputs is None:
            raise _CalledWith(inputs[0])
        return self._outputs

    def __getattr__(self, name: str) -> Any:
        raise UserError(f"the loss uses the model's {name!r}; in a pipeline it can only call the model", OTHERWISE)


def _input_of(of_part: Callable[[Any, int], Any], index: int) -> Tensor:
    try:
        of_part(_StandIn(), index)
    except _CalledWith as called:
        return called.inputs
    raise UserError("the loss does not call the model it is given", OTHERWISE)


class _Sendable(nn.Module):
    """A stage whose output is contiguous and of the type that the next stage expects, under autocast too."""

    def __init__(self, stage: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        self.stage, self.dtype = stage, dtype

    def forward(self, inputs: Tensor) -> Tensor:
        return self.stage(inputs).to(self.dtype).contiguous()

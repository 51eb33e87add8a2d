"""Several processes that train one model: this one's share of a batch, and what all of them agree on.

Everything here also works in a single process, where it changes nothing.
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from trainbook.errors import UserError

TIMEOUT = timedelta(minutes=10)  # a process that waits longer for the others gives up


def size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This process's place among them, from 0; the first writes the run folder."""
    return distributed.get_rank() if distributed.is_initialized() else 0


_parallel = "copies"


def parallel() -> str:
    """What each process keeps of the weights: copies, slices of every parameter, or a stage of a pipeline."""
    return _parallel if size() > 1 else "copies"


def is_divided() -> bool:
    """Whether no process has all of the weights."""
    return parallel() != "copies"


@contextmanager
def joined(kind: str = "copies", device: str = "cpu") -> Iterator[None]:
    """Be one of the processes that torchrun started, as its environment says; leaves the group at the end.

    Tensors on a CPU travel through gloo, those on a GPU through NCCL.

    Args:
        kind: what each keeps of the weights, see `parallel`.
        device: this process's own.
    """
    global _parallel
    _parallel = kind
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def replicas() -> int:
    """How many shares a batch is cut into: one per process, or one that passes through all stages of a pipeline."""
    return 1 if parallel() == "pipeline" else size()


def replica() -> int:
    """Which share of a batch, and of the random numbers that go with it, is this process's."""
    return 0 if parallel() == "pipeline" else rank()


def share(indices: Tensor) -> Tensor:
    """This process's part of the global batch's indices: contiguous, nearly equal, the same cut at any time.

    Raises:
        ValueError: when there are fewer examples than shares.
    """
    if len(indices) < replicas():
        raise ValueError(f"a batch of {len(indices)} cannot be shared by {replicas()} processes")
    return indices.tensor_split(replicas())[replica()] if replicas() > 1 else indices


def add_up(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def largest_of(values: list[float]) -> list[float]:
    """For each number the largest that any process has."""
    if size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor.tolist()


def from_first(values: Tensor) -> Tensor:
    """The first process's values in every process, in place; (N,) on the CPU."""
    if size() > 1:
        distributed.broadcast(values, 0)
    return values


def bytes_from_first(content: bytes | None) -> bytes | None:
    """The first process's bytes, or None where it has none; what the others pass does not matter."""
    if size() == 1:
        return content
    length = from_first(torch.tensor([-1 if content is None else len(content)]))
    if length.item() < 0:
        return None
    buffer = torch.empty(int(length), dtype=torch.uint8)
    if rank() == 0:
        buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8)) if content else None
    return from_first(buffer).numpy().tobytes()


def replicate(module: nn.Module) -> nn.Module:
    """The module for a training loss: every process has the whole of it, gradients are averaged during the backward pass."""
    if size() == 1:
        return module
    device = next(module.parameters()).device
    return DistributedDataParallel(
        module, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def shard(module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Let every process keep a slice of each parameter (FSDP2), in place; the optimizer follows.

    A child that has parameters is gathered and freed on its own, so that a step needs the weights of one child at a time.
    """
    from torch.distributed.fsdp import fully_shard  # takes a second to import, and few runs need it

    before, children = list(module.parameters()), [child for child in _children(module) if any(True for _ in child.parameters())]
    owners = Counter(id(p) for child in children for p in {id(p): p for p in child.parameters()}.values())
    if any(number > 1 for number in owners.values()):
        raise UserError("two parts of the model share a weight, which cannot be cut for both", "choose --parallel copies")
    for child in children:
        fully_shard(child)
    # By default the root stays gathered after a forward pass: an average that is only measured would be measured as it was.
    fully_shard(module, reshard_after_forward=True)
    if optimizer is not None:
        follow(optimizer, before, module)


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """The children, and in place of a list or dict of modules, which has no forward pass, those in it."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _children(child)
        else:
            yield child


def follow(optimizer: torch.optim.Optimizer, before: list[Tensor], module: nn.Module) -> None:
    """Let an optimizer go on with what has become of a module's parameters; those that another process has lose their state."""
    now = dict(zip(map(id, before), module.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [now[id(parameter)] for parameter in group["params"]]
    for parameter in before:
        state, own = optimizer.state.pop(parameter, None), now[id(parameter)]
        if state is not None and not own.is_meta:
            optimizer.state[own] = sliced_like(state, own)


def whole(values: Any) -> Any:
    """Nested dicts (and lists) with what is divided among the processes put together again; all processes must call it.

    Every slice of a tensor; or the tensors that other stages of a pipeline have, which are on the meta device here or not in
    their dict at all: these the first process gets, the others get nothing.
    """
    if parallel() == "pipeline":
        return _gathered(values)
    if parallel() != "slices":
        return values
    if hasattr(values, "full_tensor"):
        return values.full_tensor()
    if isinstance(values, dict):
        return {key: whole(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(whole(value) for value in values)
    return values


def _gathered(values: dict[str, Any]) -> dict[str, Any]:
    own = _without_meta(values)
    if rank() > 0:
        buffer = io.BytesIO()
        torch.save(own, buffer)
        content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        distributed.send(torch.tensor([len(content)]), 0)
        distributed.send(content, 0)
        return {}
    for other in range(1, size()):
        length = torch.empty(1, dtype=torch.int64)
        distributed.recv(length, other)
        content = torch.empty(int(length), dtype=torch.uint8)
        distributed.recv(content, other)
        own = _united(own, torch.load(io.BytesIO(content.numpy()), map_location="cpu", weights_only=True))
    return own


def _without_meta(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: _without_meta(value) for key, value in values.items() if not (isinstance(value, Tensor) and value.is_meta)}


def _united(ours: Any, theirs: Any) -> Any:
    """Two nested dicts as one; where both have a value it is ours."""
    if not isinstance(ours, dict):
        return ours
    common = {key: _united(ours[key], theirs[key]) for key in ours.keys() & theirs.keys()}
    return ours | theirs | common


def present(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that no other process of a pipeline has instead of this one."""
    return [tensor for tensor in tensors if not tensor.is_meta]


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    if tensor.is_meta:
        return torch.empty(0)
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sliced_like(values: dict[str, Any], pattern: Tensor | dict[str, Any]) -> dict[str, Any]:
    """This process's part of whole tensors: slices, or tensors without content for those that another process has.

    Args:
        values: name to whole tensor, or to anything else, which stays as it is.
        pattern: a divided tensor that those of its shape are cut like, or a dict of such by the same names.
    """
    if parallel() == "pipeline":
        patterns = pattern if isinstance(pattern, dict) else dict.fromkeys(values, pattern)
        absent = {name for name, like in patterns.items() if isinstance(like, Tensor) and like.is_meta}
        return {n: v.to("meta") if n in absent and isinstance(v, Tensor) else v for n, v in values.items()}
    if parallel() != "slices":
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    result = {}
    for name, value in values.items():
        like = pattern.get(name) if isinstance(pattern, dict) else pattern
        if isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape:
            value = distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        result[name] = value
    return result

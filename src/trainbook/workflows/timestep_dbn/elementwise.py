"""What a contrastive step does element by element: one fused kernel each where torch compiles, the same bits where not.

Only additions, products, one division, comparisons and whole numbers: IEEE arithmetic rounds those alike in eager and in
compiled code (which does not contract them), for every shape and number of threads. An exponential of torch's does not: the
last elements of a tensor take another route than the vectorised ones.
"""

# T timesteps, B batch, V visible units, H hidden units, N any units; z visible, h hidden, s logistic function

import logging
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from trainbook.acceleration import COMPILE_OPTIONS, compilation_problem
from trainbook.workflows.timestep_dbn.random_bits import random_integers, random_uniforms

logger = logging.getLogger("trainbook")

Scratch = tuple[Tensor, Tensor] | None
# Round as eager mode does on a GPU too: no product and sum in one instruction, no approximate quotient, no denormals lost.
EXACT_OPTIONS = ("emulate_precision_casts", "eager_numerics.division_rounding", "eager_numerics.disable_ftz")

# 2^f = sum_k c_k f^k on [-1/2, 1/2], highest power first; c_0 = 1 and the others minimise the largest relative error, 1.1e-7
EXP2 = (0.0013264727, 0.009671513, 0.055507336, 0.24022242, 0.693147, 1.0)
ROUNDER = 1.5 * 2**23  # x + ROUNDER has no digits behind the point, and round(x) in its lowest bits


def logistic_(x: Tensor, scratch: Scratch = None) -> Tensor:
    """s(x) = 1 / (1 + exp(-x)) in place, within 5e-7; in double precision torch's own."""
    if x.dtype != torch.float32:
        return x.sigmoid_()
    y, z = _pair(x, scratch)
    x.mul_(-1.4426950408889634).clamp_(-126.0, 126.0)  # exp(-x) = 2^x from here on, and 2^x = 2^round(x) 2^f
    torch.add(x, ROUNDER, out=y)
    torch.sub(y, ROUNDER, out=z)
    x.sub_(z)  # f
    torch.mul(x, EXP2[0], out=z).add_(EXP2[1])
    for coefficient in EXP2[2:]:
        z.mul_(x).add_(coefficient)
    exponent = y.view(torch.int32).bitwise_left_shift_(23)
    z.view(torch.int32).add_(exponent)
    return x.copy_(z.add_(1.0).reciprocal_())


def draw_transition(
    clean: Tensor, thresholds: Tensor, index: Tensor, key: Tensor, previous: Tensor, signs: Tensor, scratch: Scratch = None
) -> None:
    """Draw z_{t-1} and z_t given z_0 from one random number x a bit: where it lies tells whether each differs.

    z_{t-1} differs from z_0 where the first threshold <= x < the third, z_t where the second <= x.

    Args:
        clean: z_0, (B, V).
        thresholds: (T, 3, 1), from `diffusion.transition_thresholds`, for whole numbers.
        index: (1, B, V).
        key: (T, 2, 1).
        previous: z_{t-1} is written here, (T, B, V).
        signs: 2 z_t - 1 is written here, (T, B, V).
        scratch: in eager mode two flat tensors for what lies between.
    """
    x, y = (part.view(torch.int32) for part in _pair(previous, scratch))
    random_integers(index, key, x, y)
    torch.ge(x, thresholds[:, 1:2], out=y)
    signs.copy_(y).sub_(clean).abs_().mul_(2.0).sub_(1.0)
    torch.ge(x, thresholds[:, 0:1], out=y)
    previous.copy_(y).sub_(clean).abs_()
    torch.ge(x, thresholds[:, 2:3], out=y)
    previous.sub_(y).abs_()


def draw_visible(
    logit: Tensor,
    bias: Tensor,
    coupling: Tensor | None,
    signs: Tensor | None,
    index: Tensor,
    key: Tensor,
    scratch: Scratch = None,
) -> None:
    """Draw z ~ P(z | h, z_t), bits with the log odds hW' + a + Gamma_t (2 z_t - 1).

    Args:
        logit: hW', (T, B, V); the bits are written over it.
        bias: a, (T, 1, V).
        coupling: Gamma_t, (T, 1, 1); None without a condition.
        signs: 2 z_t - 1, (T, B, V); None without a condition.
        index: (1, B, V).
        key: (T, 2, 1).
        scratch: as in `draw_transition`.
    """
    if signs is not None:
        total = _pair(logit, scratch)[0]
        logit.add_(torch.mul(signs, coupling, out=total).add_(bias))
    else:
        logit.add_(bias)
    _draw(logistic_(logit, scratch), index, key, logit, scratch)


def draw_hidden(logit: Tensor, bias: Tensor, index: Tensor, key: Tensor, scratch: Scratch = None) -> None:
    """Draw h ~ P(h | z, g), bits with the log odds zW + b + gU; they are written over `logit` = zW, (T, B, H)."""
    _draw(logistic_(logit.add_(bias), scratch), index, key, logit, scratch)


def weigh_phases(
    logit: Tensor,
    bias: Tensor,
    scale: Tensor,
    message: Tensor | None,
    chains: Tensor | None,
    index: Tensor | None,
    key: Tensor | None,
    scratch: Scratch = None,
) -> None:
    """Hidden probabilities of both phases with the sign and scale they go into the update with: [h+; h-] -> scale [h+; -h-].

    Args:
        logit: [z+; z-] W, (T, 2B, H), overwritten.
        bias: b + gU, (T, B, H) or (T, 1, H).
        scale: a scalar tensor, so that another value is not another program.
        message: h+ is written here too, (T, B, H), unless None.
        chains: bits drawn from h- are written here, (T, B, H), unless None.
        index: (1, B, H), for the chains.
        key: (T, 2, 1), for the chains.
        scratch: as in `draw_transition`.
    """
    T, rows, H = logit.shape
    logit.view(T, 2, rows // 2, H).add_(bias.unsqueeze(1))
    logistic_(logit, scratch)
    data, model = logit[:, : rows // 2], logit[:, rows // 2 :]
    if message is not None:
        message.copy_(data)
    if chains is not None:
        _draw(model, index, key, chains, scratch)
    data.mul_(scale)
    model.mul_(-scale)


def draw_bits(probability: Tensor, index: Tensor, key: Tensor, scratch: Scratch = None) -> None:
    """Draw bits that are 1 with the given probability, (T, B, N); they are written over it."""
    _draw(probability, index, key, probability, scratch)


def add_change(target: Tensor, change: Tensor, keep: Tensor, scale: Tensor, scratch: Scratch = None) -> None:
    """Target <- keep target + scale change, where the change is in 16 bits; (T, N, M) each, `keep` and `scale` scalar tensors."""
    target.mul_(keep).add_(change.float().mul_(scale))


class Elementwise:
    """The functions above, compiled or with the memory they need in eager mode.

    Args:
        compiled: ask for fused kernels; where torch cannot compile, a line in the log says why and eager mode is used.
        size: elements of the largest tensor they are called with.
        device: of the tensors.
    """

    def __init__(self, compiled: bool, size: int, device: torch.device | str) -> None:
        if compiled and (problem := compilation_problem(torch.device(device))):
            logger.info("the chain's kernels run uncompiled, slower and with the same bits; torch.compile says: %s", problem)
            compiled = False
        self.compiled = compiled
        scratch = None if compiled else (torch.empty(size, device=device), torch.empty(size, device=device))
        prepare = _compiled if compiled else partial(partial, scratch=scratch)
        self.draw_transition: Callable[..., None] = prepare(draw_transition)
        self.draw_visible: Callable[..., None] = prepare(draw_visible)
        self.draw_hidden: Callable[..., None] = prepare(draw_hidden)
        self.draw_bits: Callable[..., None] = prepare(draw_bits)
        self.weigh_phases: Callable[..., None] = prepare(weigh_phases)
        self.add_change: Callable[..., None] = prepare(add_change)


def _draw(probability: Tensor, index: Tensor, key: Tensor, out: Tensor, scratch: Scratch) -> None:
    uniforms = random_uniforms(index, key, *_pair(probability, scratch))
    out.copy_(torch.sub(probability, uniforms, out=uniforms).ceil_())  # above -1; a comparison stores bool, which compiles badly


def _pair(like: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Two tensors of the shape of another, contiguous."""
    if scratch is None:
        return like.new_empty(like.shape), like.new_empty(like.shape)
    first, second = (part[: like.numel()].view(like.shape) for part in scratch)
    return first, second


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """One program for any number of timesteps."""
    known = torch._inductor.list_options()
    options = COMPILE_OPTIONS | {name: True for name in EXACT_OPTIONS if name in known}
    program = torch.compile(function, dynamic=False, fullgraph=True, options=options)

    def call(*arguments: Tensor | None) -> None:
        for tensor in arguments:
            if tensor is not None and tensor.ndim == 3 and len(tensor) > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        program(*arguments)

    return call

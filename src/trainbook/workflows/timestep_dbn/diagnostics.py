"""What goes wrong in training a Boltzmann machine, measured every epoch, and what to do about it."""

# n timesteps of a block, R rows, V visible units, H hidden units

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainbook.workflows.timestep_dbn.rbm import Block

ALWAYS = 0.01  # a unit or bit that is on in less than this share of the rows, or off, never says anything
DECIDED = 10.0  # nats: odds of 22,000 to 1 that a visible unit gets from bias and weights, without its noisy bit
MAX_SATURATED, MAX_DEAD, MIN_MOBILITY = 0.5, 0.2, 0.05
LEVELS = ("fine", "middle", "coarse")

# Kind: the metric, whether it is bad above or below the threshold, what that means and what to do.
RULES = {
    "saturated hidden units": (
        "hidden_saturation", ">", MAX_SATURATED,
        "more than half of the hidden units are always on or always off: lower learning_rate or raise weight_decay",
    ),
    "saturated visible units": (
        "visible_saturation", ">", MAX_SATURATED,
        "bias and weights alone decide more than half of the bits: lower learning_rate or raise weight_decay",
    ),
    "stalled chain": (
        "chain_mobility", "<", MIN_MOBILITY,
        "a Gibbs sweep hardly changes a bit, so the negative phase says nothing: lower learning_rate, raise weight_decay "
        "or gibbs_sweeps",
    ),
}  # fmt: skip


@torch.no_grad()
def health(block: Block, visible: Tensor, context_bias: Tensor, field: Tensor, beta: Tensor) -> dict[str, Tensor]:
    """How alive the units and the Gibbs chain of one level are.

    hidden_saturation: share of hidden units whose mean P(h_j = 1 | z, g) is below 1 % or above 99 %.
    visible_saturation: share of visible units whose mean |a + E[h] W'| without the field is above 10 nats.
    chain_mobility: share of bits that one Gibbs sweep changes, over 2 beta (1 - beta), what two independent draws of
    z_{t-1} given z_t differ by when the bits are fair coins.

    Args:
        block: the RBMs.
        visible: z_{t-1}, (n, R, V).
        context_bias: (n, R, H).
        field: (n, R, V).
        beta: beta_t, (n,).

    Returns:
        Name to (n,).
    """
    hidden = block.hidden_logit(visible, context_bias).sigmoid()
    logit = block.visible_logit(hidden, torch.zeros_like(field))
    start = block.gibbs(visible, context_bias, field, 1)
    moved = (block.gibbs(start.clone(), context_bias, field, 1) - start).abs().mean((1, 2))
    return {
        "hidden_saturation": _never_changes(hidden.mean(1)).mean(1),
        "visible_saturation": (logit.abs().mean(1) > DECIDED).float().mean(1),
        "chain_mobility": moved / (2 * beta * (1 - beta)),
    }


def dead_bits(codes: Sequence[Tensor]) -> Tensor:
    """Share of bits of each level that are 1 (or 0) in fewer than 1 % of the images; [(N, V_l)] -> (levels,)."""
    return torch.stack([_never_changes(code.mean(0)).mean() for code in codes])


def hints(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What to do about an epoch's metrics: kind of trouble to a sentence with the timesteps and levels; {} when all is well.

    Args:
        metrics: with `first_timestep`, tables `<name>_by_timestep_and_level` (n, levels) of `health`, `dead_bits_by_level`
            (levels,), all as tensors or nested lists; what is not there is not looked at.
    """
    found: dict[str, str] = {}
    tables = {
        name.removesuffix("_by_timestep_and_level"): _rows(metrics[name]) for name in metrics if name.endswith("_and_level")
    }
    broken = [name for name, rows in tables.items() if not all(math.isfinite(value) for row in rows for value in row)]
    if broken:
        found["NaN"] = f"{', '.join(broken)} became NaN or infinite: lower learning_rate, and go on from an earlier checkpoint"
    for kind, (name, comparison, threshold, text) in RULES.items():
        bad = [
            (metrics.get("first_timestep", 1) + t, level)
            for t, row in enumerate(tables.get(name, []))
            for level, value in enumerate(row)
            if (value > threshold if comparison == ">" else value < threshold)
        ]
        if bad:
            found[kind] = f"{_places(bad)}: {text}"
    dead = [LEVELS[i] for i, share in enumerate(_rows([metrics.get("dead_bits_by_level", [])])[0]) if share > MAX_DEAD]
    if dead:
        found["dead bits"] = (
            f"{' and '.join(dead)} level: more than a fifth of the bits are the same in nearly all images: raise balance_weight, "
            "or train the autoencoder longer"
        )
    return {kind: f"{text}; see '{kind}' in the workflow's README" for kind, text in found.items()}


def _never_changes(mean: Tensor) -> Tensor:
    return ((mean < ALWAYS) | (mean > 1 - ALWAYS)).float()


def _rows(table: Any) -> list[list[float]]:
    return [row.tolist() if isinstance(row, Tensor) else list(row) for row in table]


def _places(bad: list[tuple[int, int]]) -> str:
    timesteps, levels = sorted({t for t, _ in bad}), sorted({level for _, level in bad})
    shown = ", ".join(map(str, timesteps[:6])) + (f" and {len(timesteps) - 6} more" if len(timesteps) > 6 else "")
    return f"timesteps {shown}, {' and '.join(LEVELS[level] for level in levels)} level"

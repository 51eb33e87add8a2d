"""Sleeping blocks: the sparse pass against a dense one that is masked block by block, and what is left out."""

import itertools

import pytest
import torch

from tests.workflows.cellular_cube.test_cube import codes, make

SIDE, BLOCK = 12, 4


def masked_pass(cube, code, threshold):
    """The definition, by loops: the rule answers everywhere, and a sleeping block takes its last answer instead."""
    config, side = cube.config, cube.side
    x = torch.zeros(len(code), side, side, side, config.channels)
    x[:, 0, :, :, : code.shape[-1]] = code
    answers, seen, awake_cells, moving = torch.zeros_like(x), None, 0, config.moving_channels
    places = list(itertools.product(range(-(-side // BLOCK)), repeat=3))
    for _ in range(cube.num_steps):
        moved = x.clone()
        moved[:, 1:, :, :, :moving] = x[:, :-1, :, :, :moving]
        moved[:, 0, :, :, :moving] = 0
        if config.write == "clamp":
            moved[:, 0, :, :, : code.shape[-1]] = code
        else:
            moved[:, -1, :, :, :moving] += x[:, -1, :, :, :moving]
        x = moved * cube.geometries[0].alive
        new = cube.rule(x, cube.hardware(side), cube.geometries[0])[0]
        busy = {}
        for sentence, place in itertools.product(range(len(code)), places):
            block = (sentence, *(slice(BLOCK * p, BLOCK * p + BLOCK) for p in place))
            busy[sentence, place] = seen is None or float((x[block] - seen[block]).abs().mean()) >= threshold
        seen = x.clone() if seen is None else seen
        for sentence, place in busy:
            near = [p for p in places if max(abs(a - b) for a, b in zip(p, place, strict=True)) <= 1]
            if any(busy[sentence, p] for p in near):
                block = (sentence, *(slice(BLOCK * p, BLOCK * p + BLOCK) for p in place))
                answers[block], seen[block] = new[block], x[block]
                awake_cells += x[block][..., 0].numel()
        change = answers
        for level in range(1, config.levels):
            size = 2**level
            parts = x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).unflatten(1, (-1, size)).mean((2, 4, 6))
            coarse = cube.rule(parts, cube.level_hardware()[level], cube.geometries[level])[0]
            for axis in (1, 2, 3):
                coarse = coarse.repeat_interleave(size, axis)
            change = change + cube.rule.level_gains[level - 1] * coarse
        x = (x + min(7 / cube.num_steps, 1) * change) * cube.geometries[0].alive
    return x[:, -1], awake_cells / (cube.num_steps * x[..., 0].numel())


OPTIONS = [
    ({}, 0.15), ({}, 0.4), ({"side": 9}, 0.3), ({"wall_hole": 5}, 0.2), ({"levels": 2}, 0.25), ({"band_pooling": 2}, 0.3),
    ({"band_shape": "euclidean", "expert_norm": "rms"}, 0.3), ({"write": "clamp", "num_steps": 14}, 0.3),
    ({"expert_norm": "batch", "expert_columns": "grow", "domains": "two", "fine_tune_epochs": 1}, 0.3),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "threshold"), OPTIONS, ids=str)
@torch.no_grad()
def test_the_sparse_pass_is_the_masked_dense_one(changes, threshold):
    changes = {"side": SIDE, **changes}
    cube, code = (
        make(**changes, sleep_threshold=threshold),
        codes(2, changes["side"]) * torch.tensor([0.3, 3.0])[:, None, None, None],
    )
    cube.rule.grow()
    for part in (cube.rule.level_gains, *(column.local.outward.bias for column in cube.rule.columns)):
        part.normal_(std=0.05)
    found = cube(code)
    back, share = masked_pass(cube, code, threshold)
    torch.testing.assert_close(found.back, back, atol=2e-5, rtol=1e-4)
    assert found.active_share == pytest.approx(share)
    assert 0.2 < share < 0.95
    torch.testing.assert_close(cube(code[1:]).back, found.back[1:], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_experts_and_gate_are_asked_about_awake_cells_only():
    cube, code = make(side=SIDE, sleep_threshold=0.4), codes(2, SIDE)
    column, asked = cube.rule.columns[0], {}
    parts = {"local": column.local.inward, "functional": column.functional.recurrent_state, "gate": column.gate.outward}
    for name, part in (parts | {"distant": column.distant.context}).items():
        part.register_forward_hook(
            lambda _, given, out, name=name: asked.update({name: asked.get(name, 0) + out[..., 0].numel()})
        )
    share = cube(code).active_share
    assert share < 0.9
    assert {name: number / (2 * SIDE**3 * cube.num_steps) for name, number in asked.items()} == pytest.approx(
        dict.fromkeys(asked, share)
    )
    assert len(asked) == 4


@torch.no_grad()
def test_a_threshold_of_zero_is_the_plain_pass_and_training_knows_no_sleep():
    plain, code = make(side=SIDE), codes(2, SIDE)
    back = plain(code).back
    assert plain(code).active_share == 1
    for threshold in (0.0, 1e-12):  # the second keeps the accounts, and finds nobody asleep
        torch.testing.assert_close(make(side=SIDE, sleep_threshold=threshold)(code).back, back, atol=0, rtol=0)
    torch.testing.assert_close(make(side=SIDE, sleep_threshold=1.0).train()(code).back, back, atol=0, rtol=0)
    assert not torch.equal(make(side=SIDE, sleep_threshold=1.0)(code).back, back)


def test_gradients_pass_through_sleeping_cells():
    """As they do in a check by finite differences, where a small step wakes nobody."""
    cube, code = make(side=SIDE, sleep_threshold=0.4).double(), codes(1, SIDE).double()
    direction = torch.randn(code.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(cube(code.requires_grad_()).back.square().sum(), code)
    with torch.no_grad():
        up, down = (float(cube(code + sign * 1e-6 * direction).back.square().sum()) for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx((up - down) / 2e-6, rel=1e-5)

"""The cube: light cone, transport, checkpointing, levels, wall, order of the batch."""

import pytest
import torch

from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.cube import Cube

SMALL = {
    "side": 5, "channels": 6, "mixed_numbers": 2, "hidden_width": 6, "attention_rank": 2, "value_width": 2,
    "hardware_numbers": 3, "radius": 0.6,
}  # fmt: skip


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return Cube(Config(**{**SMALL, **changes})).eval()


def codes(number=3, side=5, width=3):
    return torch.randn(number, side, side, width, generator=torch.Generator().manual_seed(0))


def test_untouched_numbers_arrive_as_they_were_written():
    cube, code = make(), codes()
    for parameter in cube.rule.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(cube(code).back[..., :3], code, atol=0, rtol=0)
    cube.num_steps = 3
    assert not bool(cube(code).back.any())


@pytest.mark.parametrize(("steps", "reaches"), [(1, False), (2, True)])
def test_the_light_cone_is_the_reach_times_the_steps(steps, reaches):
    """Without transport a step carries no farther than the bands reach: 3 of the 4 layers between front and back."""
    cube = make()
    cube._transported = lambda x: x
    cube.num_steps = steps
    code = codes().requires_grad_()
    (gradient,) = torch.autograd.grad(cube(code).back.square().sum(), code)
    assert bool(gradient.any()) == reaches


def test_the_batch_is_a_set():
    cube, code = make(), codes(4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(cube(code[order]).back, cube(code).back[order])
    torch.testing.assert_close(cube(code[:1]).back, cube(code).back[:1])


@pytest.mark.parametrize("segment", [0, 1, 3])
def test_checkpointing_gives_the_same_gradients(segment):
    gradients = []
    for on in (False, True):
        cube = make(gradient_checkpointing=on, checkpoint_steps=segment, cell_dropout=0.2, damage_share=0.1).train()
        torch.manual_seed(7)
        out = cube(codes())
        (out.back.square().mean() + out.entropy + out.magnitude).backward()
        gradients.append({name: p.grad for name, p in cube.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_checkpointing_keeps_fewer_numbers():
    kept = {}
    for on in (False, True):
        cube = make(gradient_checkpointing=on, num_steps=9).train()
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = cube(codes(8)).back.sum()
        kept[on] = sum(sizes.values())
        out.backward()
    assert kept[True] < 0.5 * kept[False]


def test_levels_start_at_nothing_and_then_matter():
    plain, two = make(side=8), make(side=8, levels=2)
    code = codes(2, 8)
    two.load_state_dict(plain.state_dict() | {"rule.level_gains": torch.zeros(1, 6)})
    torch.testing.assert_close(two(code).back, plain(code).back, atol=0, rtol=0)
    two.rule.level_gains.data.fill_(0.5)
    assert not torch.allclose(two(code).back, plain(code).back, atol=1e-3)


def test_nothing_passes_a_wall_but_through_its_hole():
    wall = make(wall_hole=1)
    code = codes().requires_grad_()
    (gradient,) = torch.autograd.grad(wall(code).back.square().sum(), code)
    assert bool(gradient.any())
    wall.geometries[0].alive[2] = 0
    (gradient,) = torch.autograd.grad(wall(code).back.square().sum(), code)
    assert not bool(gradient.any())
    assert int(make(wall_hole=7).geometries[0].alive[2].sum()) == 7


def test_every_parameter_of_experts_and_gate_has_a_gradient():
    cube = make()
    cube(codes()).back.square().mean().backward()
    unused = [name for name, p in cube.rule.named_parameters() if p.numel() and (p.grad is None or not bool(p.grad.any()))]
    assert unused == []


def test_one_rule_runs_at_every_size():
    rule = make(hardware="coordinates").state_dict()
    for side in (4, 6, 9):
        cube = make(hardware="coordinates", side=side)
        cube.load_state_dict(rule)
        assert cube(codes(1, side)).back.shape == (1, side, side, 6)


def test_clamped_writing_lasts_and_restarts_are_possible():
    cube = make(write="clamp", num_steps=11)
    code = codes()
    for parameter in cube.rule.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(cube(code).back[..., :3], code, atol=0, rtol=0)


def test_a_watcher_may_change_the_state():
    cube, code = make(), codes()
    seen = []
    silent = cube(code, lambda step, x, weights: seen.append((step, weights is None)))
    assert seen == [(step, step == 0) for step in range(5)]
    torch.testing.assert_close(silent.back, cube(code).back)
    cut = cube(code, lambda step, x, weights: torch.zeros_like(x) if step == 4 else None)
    assert not bool(cut.back.any())


def test_an_answer_after_any_number_of_steps_and_from_where_a_pass_ended():
    """In training only: the code, which no expert touches here, is the answer at every time from L - 1 on."""
    code = codes()
    seen = set()
    for changes in ({"any_time": True, "num_steps": 7, "write": "clamp"}, {"pool_share": 1.0}):
        cube = make(**changes).train()
        for parameter in cube.rule.parameters():
            parameter.data.zero_()
        for seed in range(12):
            torch.manual_seed(seed)
            steps = []
            back = cube(code, lambda step, x, weights, steps=steps: steps.append(step)).back
            torch.testing.assert_close(back[..., :3], code, atol=0, rtol=0)
            seen.add((tuple(changes), steps[-1]))
    assert seen == {(("any_time", "num_steps", "write"), steps) for steps in (4, 5, 6, 7)} | {(("pool_share",), 4)}


def test_damage_costs_something_only_in_training():
    cube, code = make(damage_share=0.5), codes()
    torch.testing.assert_close(cube(code).back, make()(code).back)
    torch.manual_seed(0)
    assert not torch.allclose(cube.train()(code).back, cube.eval()(code).back)

"""Reptile's step by hand, turns of two domains, and a run that is cut within a turn."""

import io

import pytest
import torch
from torch import nn

from tests.workflows.cellular_cube.test_training import REPTILE, data, make  # noqa: F401
from trainbook.data import Batches
from trainbook.seeding import seed_step
from trainbook.workflows.cellular_cube.reptile import Alternating, Reptile
from trainbook.workflows.cellular_cube.training import train

RATE, SHARE, TURN = 0.3, 0.25, 3


class Toy(nn.Module):
    """A router and another weight, both drawn to the domain's target."""

    def __init__(self):
        super().__init__()
        self.routers_in, self.other = nn.Linear(1, 1, bias=False), nn.Parameter(torch.tensor(2.0))

    def forward(self, target):
        return 0.5 * ((self.routers_in.weight - target).square() + (self.other - target).square()).sum()


def test_the_step_is_the_formula_worked_out_by_hand():
    """k steps of gradient descent on (w - c)^2 / 2 end at w' = c + (1 - rate)^k (w - c); the router goes to w + eps (w' - w)."""
    toy, targets = Toy(), (5.0, -1.0)
    reptile = Reptile(toy, TURN, SHARE)
    with torch.no_grad():
        toy.routers_in.weight.fill_(2.0)  # an earlier phase moved it
    reptile.begin(toy)
    batches = Alternating(*(Batches({"target": torch.full((4,), target)}, 0, 1) for target in targets), TURN)
    optimizer = torch.optim.SGD(toy.parameters(), RATE)
    router = other = 2.0
    for step in range(5 * TURN):
        optimizer.zero_grad()
        toy(batches(step)["target"]).backward()
        optimizer.step()
        for _ in range(2):  # the second call finds the turn settled
            reptile.settle(toy, step + 1)
        if step % TURN == TURN - 1:
            target, shrink = targets[step // TURN % 2], (1 - RATE) ** TURN
            router += SHARE * (target + shrink * (router - target) - router)
            other = target + shrink * (other - target)
            assert toy.routers_in.weight.item() == pytest.approx(router, abs=1e-6)
            assert toy.other.item() == pytest.approx(other, abs=1e-6)


def test_turns_take_every_sentence_of_each_domain_once_an_epoch():
    domains = [Batches({"x": torch.arange(12) + 100 * which}, 0, 2) for which in (0, 1)]
    batches = Alternating(*domains, 4)
    seen = [batches(step)["x"] for step in range(16)]
    assert [int(x[0]) // 100 for x in seen] == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    for which, steps in ((0, [0, 1, 2, 3, 8, 9]), (1, [4, 5, 6, 7, 12, 13])):
        assert sorted(torch.cat([seen[step] for step in steps]).tolist()) == list(range(100 * which, 100 * which + 12))


def test_a_run_cut_within_a_turn_goes_on_bit_for_bit(data):  # noqa: F811
    def advance(config, state, last):
        for _ in train(config, data, state):
            seed_step(config.seed, state.step)
            if state.step == last:
                return

    choices = {**REPTILE, "reptile_steps": 3, "num_epochs": 3, "readout": "gradient", "validate_every": 2}
    config, whole = make(data, **choices)
    advance(config, whole, 0)
    main = whole.stateful["main"].total_steps
    assert main >= 8
    assert int(whole.modules["reptile"].num_turns) == main // 3
    config, cut = make(data, **choices)
    for last in (2, 3, 4, 7):
        advance(config, cut, last)
        saved = io.BytesIO()
        torch.save(cut.state_dict(), saved)
        config, cut = make(data, **choices)
        cut.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
        seed_step(config.seed, last)
    advance(config, cut, 0)
    assert cut.step == whole.step
    for name, module in whole.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, cut.modules[name].state_dict()[key]), (name, key)


def test_without_turns_there_is_nothing_of_them(data):  # noqa: F811
    states = [make(data, **{**REPTILE, "reptile_steps": steps})[1] for steps in (0, 3)]
    assert states[1].modules.keys() - states[0].modules.keys() == {"reptile"}
    assert states[0].total_steps == states[1].total_steps

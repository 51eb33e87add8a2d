"""The plan against sums done by hand, and against a workflow whose steps take as long as they say."""

import time
from types import SimpleNamespace

import pytest
import torch

from trainbook import plan, records
from trainbook.__main__ import main
from trainbook.config import BaseConfig
from trainbook.errors import UserError
from trainbook.files import write_json
from trainbook.plan import Measurement, Prices, Rates
from trainbook.records import Record, RunFolder
from trainbook.runtime import detect
from trainbook.state import TrainState

PRICES = """
date = 2026-11-20
currency = "EUR"
launch_microseconds = 10

[accelerators.Small]
known_as = ["Small Card"]
memory_gigabytes = 16
float32_tflops = 10
tensor_tflops = 40
gigabytes_per_second = 500

[accelerators.Large]
known_as = ["Large Card", "Large"]
memory_gigabytes = 80
float32_tflops = 20
tensor_tflops = 400
gigabytes_per_second = 2000

[[offers]]
platform = "free"
accelerator = "Small"
price_per_hour = 0
session_hours = 11
setup_minutes = 5
weekly_hours = 30
source = "nothing"

[[offers]]
platform = "paid"
accelerator = "Large"
price_per_hour = 2
session_hours = 6
setup_minutes = 30
weekly_hours = 0
source = "a list"
"""


@pytest.fixture
def prices(tmp_path):
    (tmp_path / "prices.toml").write_text(PRICES)
    return Prices.read(tmp_path / "prices.toml")


def measured(**changes):
    values = {
        "hours": 32.0,
        "total_steps": 1000,
        "device_name": "NVIDIA Small Card",
        "rates": None,
        "precision": "float32",
        "how": "By hand.",
    }
    return Measurement(**values | changes)


def test_by_hand_on_the_card_that_was_measured_and_on_another(prices):
    """32 h: 11 + 11 + 10 makes 3 sessions. On the other 32 x 500/2000 = 8 h to 32 x 10/20 = 16 h, in 2 to 3 sessions of 6 h,
    at 2 an hour with half an hour more each: 2 x (8 + 1) = 18 to 2 x (16 + 1.5) = 35."""
    here, there = plan.estimate(measured(), prices)
    assert (here.measured, here.hours, here.sessions, here.cost) == (True, (32, 32), (3, 3), (0, 0))
    assert (there.measured, there.hours, there.sessions, there.cost) == (False, (8, 16), (2, 3), (18, 35))
    # In 16 bits the cards differ by 10 and by 4: 3.2 h to 8 h.
    assert plan.estimate(measured(precision="bfloat16"), prices)[1].hours == pytest.approx((3.2, 8))
    # 2.88 x 10^9 operations of 10 microseconds are 8 h: no card does it in 3.2.
    assert plan.estimate(measured(precision="bfloat16", operations=2.88e9), prices)[1].hours == pytest.approx((8, 8))
    assert plan.estimate(measured(operations=2.88e12), prices)[0].hours == (32, 32)


def test_from_a_device_that_is_not_in_the_table_by_its_own_rates(prices):
    """A device of 1 TFLOPS and 10 GB/s: a tenth of the small card's products, a fiftieth of its memory."""
    small, large = plan.estimate(measured(device_name="x86_64", rates=Rates(1, 10)), prices)
    assert not small.measured
    assert small.hours == pytest.approx((32 / 50, 32 / 10))
    assert large.hours == pytest.approx((32 / 200, 32 / 20))
    assert plan.estimate(measured(device_name="x86_64"), prices) == []


def test_the_table_says_what_was_not_measured_and_what_a_week_gives(prices):
    text = str(plan.table(measured(), prices, price_here=0.5))
    here, free, paid = text.splitlines()[2:]
    assert here.split()[-1] == free.split()[-1] == "measured"
    assert "16.00" in here  # 32 h at 0.5
    assert "3, over 2 weeks" in free
    assert "8.0 h to 16.0 h" in paid
    assert "18.00 to 35.00" in paid
    assert paid.endswith("not measured on this device")
    notes = "\n".join(plan.assumptions(measured(), prices))
    for said in ("By hand.", "not measured on this device", "One card is counted", "2026-11-20", "a list"):
        assert said in notes


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", ""),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("x86_64", ""),
    ],
)
def test_a_driver_name_is_one_card_of_the_kit_table(name, kind):
    assert Prices.read().named(name) == kind


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('accelerator = "Large"', 'accelerator = "Larger"', "Larger, of which no rates are given"),
        ("price_per_hour = 2", "price_per_hour = -2", "offers.1.price_per_hour"),
        ("weekly_hours = 30", "weekly_hours = 30\nextra = 1", "offers.0.extra"),
        ('currency = "EUR"', "currency = EUR", "cannot be read"),
    ],
)
def test_a_table_with_a_mistake_is_refused_by_its_place(old, new, said, tmp_path):
    (tmp_path / "prices.toml").write_text(PRICES.replace(old, new, 1))
    with pytest.raises(UserError, match=said):
        Prices.read(tmp_path / "prices.toml")


class Timed(BaseConfig):
    """Sixty steps of 2 ms, then sixty of 10 ms, three operations each."""

    PRESETS = {"smoke": {}, "laptop": {}, "full": {}}  # noqa: RUF012


def timed_workflow(step_seconds=(0.002, 0.010), steps=60):
    def train(config, data, state):
        time.sleep(0.05)  # once, to set up
        while state.step < state.total_steps:
            second = state.step >= steps
            state.stage = "two" if second else "one"
            time.sleep(step_seconds[second])
            torch.ones(3).mul(2).add(1).view(3, 1)
            state.step += 1
            yield Record({})

    return SimpleNamespace(
        load_data=lambda config, runtime: None,
        build=lambda config, data, runtime: TrainState({}, total_steps=2 * steps),
        train=train,
    )


def test_stages_of_other_cost_are_found_and_added_up(monkeypatch):
    """60 x 2 ms + 60 x 10 ms = 0.72 s; sleeping takes a little longer than it says, never shorter."""
    monkeypatch.setattr(plan, "measure_rates", lambda device: Rates(1, 1))
    found = plan.measure(timed_workflow(), Timed(), detect(), seconds=0.6)
    assert [part.stage for part in found.parts] == ["one"] * 3 + ["two"] * 3
    assert [part.step for part in found.parts] == [10, 30, 50, 70, 90, 110]
    assert 0.72 <= found.hours * 3600 < 1.5
    assert {part.operations for part in found.parts} == {3}  # a view is none
    assert found.operations == 360
    assert "stages one, two" in found.how


def test_a_run_that_is_slower_than_the_time_given_is_not_measured_to_its_end(monkeypatch):
    monkeypatch.setattr(plan, "measure_rates", lambda device: Rates(1, 1))
    found = plan.measure(timed_workflow((0.05, 0.05)), Timed(), detect(), seconds=0.01)
    assert len(found.parts) < 6
    assert f"{len(found.parts)} of 6 places" in found.how
    assert 6 <= found.hours * 3600 < 12


def test_a_workflow_with_long_steps_is_timed_in_shorter_ones(monkeypatch):
    """The same 1.2 s of work in 24 steps of 50 ms instead of 4 of 300 ms."""

    class Cut(BaseConfig):
        """Steps of so many pieces of 50 ms."""

        PRESETS = {"smoke": {}, "laptop": {}, "full": {}}  # noqa: RUF012
        TIMED_WITH = {"pieces": 1}  # noqa: RUF012
        pieces: int = 6

    def train(config, data, state):
        while state.step < state.total_steps:
            time.sleep(0.05 * config.pieces)
            state.step += 1
            yield Record({})

    workflow = SimpleNamespace(
        load_data=lambda config, runtime: None,
        build=lambda config, data, runtime: TrainState({}, total_steps=24 // config.pieces),
        train=train,
    )
    monkeypatch.setattr(plan, "measure_rates", lambda device: Rates(1, 1))
    found = plan.measure(workflow, Cut(), detect(), seconds=0.3)
    assert found.total_steps == 24
    assert 1.2 <= found.hours * 3600 < 1.8


def test_measured_rates_are_possible():
    rates = plan.measure_rates("cpu")
    assert 1e-4 < rates.tflops < 50
    assert 0.1 < rates.gigabytes_per_second < 5000


def segment(first, last, seconds, name="NVIDIA Small Card"):
    return {"first_step": first, "last_step": last, "seconds": seconds, "device_name": name}


def write_run(path, segments, total=1000):
    folder = RunFolder(path)
    identity = {"workflow": "timestep_dbn", "preset": "smoke", "authentic": False, "config": {"precision": "bfloat16"}}
    folder.create(identity)
    write_json(folder.run_json, {"run_id": path.name, "status": "stopped", "segments": segments, "total_steps": total})
    return folder


def test_a_run_is_read_on_the_device_of_its_last_session(tmp_path):
    """400 steps in 36 s on the last device: 1000 take 90 s. What another device did does not count."""
    cut_off = {**segment(700, None, 0.0), "last_step": None}
    parts = [segment(0, 100, 999.0, "x86_64"), segment(100, 300, 16.0), segment(300, 500, 20.0), cut_off]
    found = plan.read_run(write_run(tmp_path / "runs" / "one", parts))
    assert found.hours == pytest.approx(90 / 3600)
    assert (found.device_name, found.precision) == ("NVIDIA Small Card", "bfloat16")
    assert "the others are assumed" in found.how
    with pytest.raises(UserError, match="no session"):
        plan.read_run(write_run(tmp_path / "runs" / "two", [cut_off]))


def test_the_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.toml").write_text(PRICES)
    write_run(tmp_path / "runs" / "one", [segment(0, 1000, 3600 * 32.0)])
    assert main(["plan", "timestep_dbn", "--run", "one", "--prices", "mine.toml"]) == 0
    shown = capsys.readouterr().out
    assert "3, over 2 weeks" in shown
    assert "mine.toml" in shown
    assert main(["plan", "timestep_dbn", "--run", "one", "--preset", "full"]) == records.BAD_INPUT
    assert main(["plan", "timestep_dbn", "--timesteps", "0"]) == records.BAD_INPUT
    assert main(["plan", "timestep_dbn", "--preset", "smoke", "--seconds", "0.3"]) == 0
    shown = capsys.readouterr().out
    assert "autoencoder" in shown
    assert "baselines" in shown
    assert shown.count("not measured on this device") >= len(Prices.read().offers)
    assert not list((tmp_path / "runs").glob("timestep_dbn-*"))

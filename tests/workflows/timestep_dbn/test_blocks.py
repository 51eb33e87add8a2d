"""Blocks of timesteps: what one takes in memory, how many fit, what happens when memory runs out, and that none is left out."""

import io
import logging
import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.driving import CHILDREN, assert_identical
from tests.workflows.timestep_dbn.runs import bits_data, bits_state, digits_run, drive, local_runtime, tensors
from trainbook import monitor, runtime
from trainbook.__main__ import main
from trainbook.errors import RunFailed, UserError
from trainbook.records import RunFolder
from trainbook.run import prepare
from trainbook.seeding import seed_step
from trainbook.state import TrainState
from trainbook.workflows.timestep_dbn import training
from trainbook.workflows.timestep_dbn.blocks import USED_SHARE, Blocks, block_allocations, largest_block
from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.chain_step import ChainStep
from trainbook.workflows.timestep_dbn.config import Config

SIZES = [128, 64, 32]
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def measured_peak(config: Config, data, state: TrainState, steps: int) -> int:
    """Most bytes that torch's allocator held at once in so many steps, above what it held before."""
    records = training.train(config, data, state)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(steps):
            seed_step(0, state.step)
            next(records)
    changes = [(e.start_ns(), e.nbytes()) for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"optimizer": "sgd"},
        {"noisy_context": False},
        {"context": "bits", "negative_phase": "cd"},
        {"batch_size": 128},
        {"timesteps": 30},
        {"block_size": 4},
    ],
    ids=lambda choices: " ".join(map(str, choices.values())) or "default",
)
def test_what_a_block_takes_is_within_a_quarter_of_what_was_measured(choices):
    config = Config(
        **{"timesteps": 12, "epochs_per_timestep": 1, "hidden_units": (96, 64, 48), "autoencoder_epochs": 1, **choices}
    )
    bits = torch.randint(0, 2, (160, sum(SIZES))).float()
    data, state = bits_data(bits, bits[:80], bits), bits_state(config, SIZES, 160)
    state.optimizers = {
        name: torch.optim.AdamW([torch.zeros(1)]) for name in state.optimizers
    }  # their gradients lie there before
    steps = 160 // config.batch_size * (2 if config.block_size else 1)  # the second block takes the place of the first
    measured = measured_peak(config, data, state, steps)
    estimated = sum(block_allocations(config, state.modules["dbn"], config.block_timesteps, 0, on_cpu=True).values())
    assert 0.75 < measured / estimated < 1.25


def chain_of(config: Config) -> TimestepDBN:
    return TimestepDBN(config, SIZES)


def test_the_largest_block_that_fits_is_chosen():
    config = Config(timesteps=20, hidden_units=(32, 16, 8))
    dbn = chain_of(config)
    for timesteps in (1, 2, 7, 19, 20):
        needed = sum(block_allocations(config, dbn, timesteps, 100, on_cpu=True).values()) / USED_SHARE
        assert largest_block(config, dbn, 100, True, int(needed) + 1) == timesteps
        assert largest_block(config, dbn, 100, True, int(0.999 * needed)) == max(1, timesteps - 1)
    assert largest_block(config, dbn, 100, True, 10**15) == 20


def test_a_gpu_steps_the_whole_block_at_once():
    config = Config(timesteps=50)
    gpu, cpu = (block_allocations(config, chain_of(config), 50, 100, on_cpu)["what a step works in"] for on_cpu in (False, True))
    assert gpu == 5 * cpu


@pytest.mark.parametrize(
    ("choices", "bounds"),
    [({}, [0, 1, 2, 3, 4, 5]), ({"block_size": 3}, [0, 3, 5]), ({"order": "sequential"}, [0, 1, 2, 3, 4, 5])],
)
def test_a_block_size_that_is_given_stays_and_otherwise_memory_decides(choices, bounds, caplog):
    config = Config(timesteps=5, hidden_units=(32, 16, 8), **choices)
    blocks = Blocks(config, chain_of(config), 100, on_cpu=True, free_bytes=1000)
    assert blocks.bounds == bounds
    with caplog.at_level(logging.INFO):
        blocks.announce()
    assert f"{len(bounds) - 1} block(s)" in caplog.text
    assert "what a step works in" in caplog.text  # the table
    assert "see 'GPU memory' in the workflow's README" in caplog.text


def test_enough_memory_makes_one_block_and_no_fuss(caplog):
    config = Config(timesteps=5, hidden_units=(32, 16, 8))
    blocks = Blocks(config, chain_of(config), 100, on_cpu=True, free_bytes=10**12)
    with caplog.at_level(logging.INFO):
        blocks.announce()
    assert blocks.bounds == [0, 5]
    assert "1 block(s) of at most 5 of 5 timesteps" in caplog.text
    assert "what a step works in" not in caplog.text


@pytest.mark.parametrize(
    ("bounds", "start", "expected"),
    [
        ([0, 8], 0, [0, 4, 8]),
        ([0, 7], 0, [0, 4, 7]),
        ([0, 3, 6, 8], 3, [0, 3, 5, 7, 8]),
        ([0, 2, 4], 2, [0, 2, 3, 4]),
        ([0, 50], 0, [0, 25, 50]),
    ],
)
def test_halving_keeps_what_is_done_and_cuts_what_is_to_come(bounds, start, expected):
    config = Config(timesteps=bounds[-1], hidden_units=(4, 4, 4))
    blocks = Blocks(config, chain_of(config), 100, True, 10**12)
    blocks.bounds = bounds
    blocks.halve(start)
    assert blocks.bounds == expected


def test_one_timestep_that_does_not_fit_ends_the_run_with_a_remedy():
    config = Config(timesteps=2, order="sequential", hidden_units=(4, 4, 4))
    with pytest.raises(RunFailed, match=r"timestep 2 alone; lower batch_size(.*)'GPU memory'"):
        Blocks(config, chain_of(config), 100, True, 10**12).halve(1)


PLACES = {  # where memory runs out, and which argument is the first timestep
    "step": (ChainStep, "__call__", 3),
    "metrics": (training, "_epoch_metrics", 4),
    "gradients": (training, "rbm_views", 1),
}


def limited(monkeypatch, timesteps: int, calls: list[int], place: str) -> None:
    """Let memory suffice for so many timesteps at once, and note what was tried."""
    owner, name, first = PLACES[place]
    original = getattr(owner, name)

    def fails(*arguments, **others):
        result = original(*arguments, **others)
        start, stop = arguments[first : first + 2]
        if stop - start > timesteps:
            calls.append(stop - start)
            raise OUT_OF_MEMORY
        return result

    monkeypatch.setattr(owner, name, fails)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("place", PLACES)
def test_when_memory_runs_out_the_block_is_halved_and_every_timestep_is_trained(place, optimizer, tmp_path, monkeypatch, caplog):
    config, data, state = digits_run(tmp_path, timesteps=7, optimizer=optimizer, learning_rate=1e-3)
    calls: list[int] = []
    limited(monkeypatch, 2, calls, place)
    drive(config, data, state)
    assert calls == [7, 4]
    assert state.stateful["blocks"].bounds == [0, 2, 4, 6, 7]
    assert state.step == state.total_steps == 4 + 4 * 4 + 4
    assert bool((state.stateful["blocks"].moved > 0).all())
    assert caplog.text.count("out of memory: the timesteps from 1 on are trained in blocks of") == 2


def test_a_block_that_is_halved_in_its_first_step_trains_as_if_it_had_been_that_small(tmp_path, monkeypatch):
    config, data, small = digits_run(tmp_path, timesteps=4, block_size=2)
    drive(config, data, small)
    config, data, state = digits_run(tmp_path, timesteps=4)
    original = ChainStep.__call__

    def fails(*arguments):
        if arguments[4] - arguments[3] == 4:
            torch.rand(7)  # what was drawn before it failed is not drawn again
            raise OUT_OF_MEMORY
        original(*arguments)

    monkeypatch.setattr(ChainStep, "__call__", fails)
    drive(config, data, state)
    assert_identical(tensors(state), tensors(small))


def test_a_halved_block_goes_on_from_where_it_is(tmp_path, monkeypatch):
    """Adam's moments, weights and chains of its first half stay; with sgd and pcd the failed try may have moved chains."""
    choices = {"timesteps": 4, "epochs_per_timestep": 2, "negative_phase": "cd"}
    config, data, small = digits_run(tmp_path, **choices, block_size=2)
    drive(config, data, small)
    config, data, state = digits_run(tmp_path, **choices)
    drive(config, data, state, 4 + 3)
    saved = tensors(state)
    original = ChainStep.__call__
    monkeypatch.setattr(
        ChainStep, "__call__", lambda *a: (_ for _ in ()).throw(OUT_OF_MEMORY) if a[4] - a[3] == 4 else original(*a)
    )
    drive(config, data, state, 4 + 4)
    optimizer = state.optimizers["dbn"]
    assert {float(moments["step"]) for moments in optimizer.state.values()} == {4.0}  # not begun anew
    assert {len(value) for moments in optimizer.state.values() for value in moments.values() if value.ndim} == {2}
    for name, tensor in tensors(state).items():
        if name.startswith("dbn.levels"):
            moved = [not torch.equal(a, b) for a, b in zip(tensor, saved[name], strict=True)]
            assert moved in ([True, True, False, False], [False] * 4), name  # chains stand still with cd
    drive(config, data, state)
    assert (state.stateful["blocks"].bounds, state.total_steps) == ([0, 2, 4], small.total_steps)


def really_short(folder: Path) -> None:
    """In a process of its own: trains where the address space ends before a block of all timesteps fits."""
    config, data, state = digits_run(folder, timesteps=32, hidden_units=(512, 512, 512), batch_size=2, max_train_images=4)
    drive(config, data, state, 2)  # the autoencoder's stage loads what libraries it needs
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    allocations = block_allocations(config, state.modules["dbn"], 32, 0, on_cpu=True)
    resource.setrlimit(resource.RLIMIT_AS, (used + sum(allocations.values()) // 2, resource.RLIM_INFINITY))
    records = training.train(config, data, state)
    while state.step < training._plan(config, data, state).chain_end:
        seed_step(0, state.step)
        next(records)
    bounds = state.stateful["blocks"].bounds
    assert 2 < len(bounds) < 10, bounds
    assert bool((state.stateful["blocks"].moved > 0).all())


def test_a_process_that_really_runs_out_of_memory_trains_smaller_blocks(tmp_path):
    child = CHILDREN.Process(target=really_short, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0


def test_other_errors_are_not_taken_for_lack_of_memory(tmp_path, monkeypatch):
    config, data, state = digits_run(tmp_path)
    monkeypatch.setattr(ChainStep, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("illegal access")))
    with pytest.raises(RuntimeError, match="illegal access"):
        drive(config, data, state)


def test_blocks_travel_in_the_checkpoint_and_a_larger_machine_keeps_them(tmp_path):
    small = replace(local_runtime(tmp_path), memory_limit=600_000)
    choices = {"timesteps": 6, "learning_rate": 1e-3}
    config, data, state = digits_run(tmp_path, **choices)
    torch.manual_seed(config.seed)
    state = training.build(config, data, small)
    bounds = state.stateful["blocks"].bounds
    assert 2 < len(bounds) < 7
    buffer = io.BytesIO()
    drive(config, data, state, 4 + 6)  # inside the second block
    torch.save(state.state_dict(), buffer)
    drive(config, data, state)
    buffer.seek(0)
    _, _, resumed = digits_run(tmp_path, **choices)
    assert resumed.stateful["blocks"].bounds == [0, 6]
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    drive(config, data, resumed)
    assert resumed.stateful["blocks"].bounds == bounds
    assert_identical(tensors(resumed), tensors(state))


def test_a_memory_limit_on_the_command_line_cuts_the_blocks(monkeypatch):
    small = {"hidden_units": (16, 16, 8), "epochs_per_timestep": 1, "autoencoder_epochs": 1, "baseline_epochs": 1, "timesteps": 4}
    monkeypatch.setenv(runtime.MEMORY_LIMIT, "2MB")
    run = prepare("timestep_dbn", "smoke", small, "mine")
    for step in (run.load_data, run.build, lambda: run.train(progress=False)):
        step()
    run.leave()
    assert len(run.state.stateful["blocks"].bounds) > 2
    log = (RunFolder(run.folder.path).logs / "run.log").read_text()
    assert re.search(r"chain: \d block\(s\) of at most \d of 4 timesteps; one needs .* of 2\.0 MB free", log)
    assert "moments of the optimizer" in log


@pytest.mark.parametrize(("text", "size"), [("500MB", 5 * 10**8), ("12GB", 12 * 10**9), ("1.5 GB", 15 * 10**8), ("800B", 800)])
def test_sizes(text, size, monkeypatch):
    monkeypatch.setenv(runtime.MEMORY_LIMIT, text)
    assert runtime.detect().memory_limit == size
    assert monitor.free_memory_bytes("cpu", size) == min(size, monitor.free_memory_bytes("cpu"))


@pytest.mark.parametrize("text", ["much", "12", "-1GB", "12GiB"])
def test_what_is_no_size(text, capsys):
    with pytest.raises(UserError, match="is not a size in memory"):
        runtime.parse_bytes(text)
    assert main(["run", "timestep_dbn", f"--memory-limit={text}"]) == 2
    assert "500MB or 12GB" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- no success without updates


def test_timesteps_that_the_plan_forgot_are_named(tmp_path, monkeypatch):
    config, data, state = digits_run(tmp_path, timesteps=4)
    state.stateful["blocks"].bounds = [0, 2, 4]
    original = training.Plan.of
    monkeypatch.setattr(
        training.Plan, "of", lambda *arguments: replace(original(*arguments), blocks=[(0, 2), (0, 2)])
    )  # the second block trains the first again
    drive(config, data, state)
    with pytest.raises(RunFailed, match=re.escape("timesteps [3, 4] made no update in the whole run")):
        state.stateful["blocks"].check_all_trained()


def test_a_level_that_never_moved_refuses_the_evaluation():
    small = {"stage": "all", "epochs_per_timestep": 1, "autoencoder_epochs": 1, "baseline_epochs": 1}
    run = prepare("timestep_dbn", "smoke", small, "mine")
    for step in (run.load_data, run.build, lambda: run.train(progress=False)):
        step()
    run.state.stateful["blocks"].moved[1, 2] = 0.0
    with pytest.raises(RunFailed, match=re.escape("timesteps [2] made no update in the whole run")):
        run.evaluate()
    assert run.folder.summary()["status"] == "failed"


def test_the_baselines_train_without_the_memory_of_the_chain(tmp_path):
    config, data, state = digits_run(tmp_path)
    drive(config, data, state, 4 + 4)
    assert state.optimizers["dbn"].state
    drive(config, data, state, 4 + 4 + 1)
    assert not state.optimizers["dbn"].state
    assert all(p.grad is None for group in state.optimizers["dbn"].param_groups for p in group["params"])


def test_movements_are_counted_over_epochs_and_sessions(tmp_path):
    config, data, state = digits_run(tmp_path, epochs_per_timestep=2, learning_rate=1e-3)
    moved: list[Tensor] = []
    for stop in (4 + 4, 4 + 8):
        drive(config, data, state, stop)
        moved.append(state.stateful["blocks"].moved.clone())
        state.load_state_dict(state.state_dict())
    assert bool((moved[0] > 0).all())
    assert bool((moved[0] < moved[1]).all())

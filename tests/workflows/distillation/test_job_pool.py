"""The pool of jobs: serial and parallel agree bit for bit, and what goes wrong with one job stays with it."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tests.workflows.distillation import pool_jobs
from trainbook.workflows.distillation.job_pool import Failure, Job, JobPool, one_thread


def shared():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return {"images": images, "labels": torch.tensor(digits.target), "train.ones": torch.ones(4)}


@pytest.fixture(scope="module")
def pool():
    with JobPool("parallel", [None, None], shared()) as pool:
        yield pool


def jobs_of(function, *specs, seconds=None):
    seconds = seconds or [0.0] * len(specs)
    return [Job(f"job {i}", function, spec, estimate) for i, (spec, estimate) in enumerate(zip(specs, seconds, strict=True))]


def train_in_chunks(pool):
    """Three networks, two chunks each, the second from the state that the first left."""
    states = [None] * 3
    for chunk in range(2):
        states = pool.run(
            jobs_of(pool_jobs.train, *({"seed": i, "state": state, "first": 5 * chunk} for i, state in enumerate(states)))
        )
    return states


def tensors_in(values):
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors_in(value)


def test_serial_and_parallel_agree_bit_for_bit(pool):
    with JobPool("serial", [None], shared()) as serial:
        ours = train_in_chunks(serial)
    theirs = train_in_chunks(pool)
    pairs = list(zip(tensors_in(ours), tensors_in(theirs), strict=True))
    assert len(pairs) > 30
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [state["loss"] for state in ours] == [state["loss"] for state in theirs]
    assert len({state["loss"] for state in ours}) == 3


def test_results_come_in_the_order_of_the_jobs_and_long_jobs_start_first(pool):
    ends = pool.run(jobs_of(pool_jobs.sleep, 0.0, 0.1, 0.3, 0.0, seconds=[0.0, 1.0, 3.0, 0.0]))
    assert ends[2] > ends[1]
    assert ends[1] < ends[0] < ends[3]  # the second process took all the others, longest first


def test_two_workers_take_little_more_than_half_the_time(pool):
    pool.run(jobs_of(pool_jobs.nothing, 0, 1))  # both have started
    lengths = [0.1, 0.15, 0.25, 0.3, 0.1, 0.2, 0.4, 0.1]
    started = time.perf_counter()
    pool.run(jobs_of(pool_jobs.sleep, *lengths, seconds=lengths))
    assert sum(lengths) / (time.perf_counter() - started) >= 1.7


def test_workers_stay_and_work_with_one_thread(pool):
    first = pool.run(jobs_of(pool_jobs.describe, *range(6)))
    second = pool.run(jobs_of(pool_jobs.describe, *range(6)))
    assert {seen["process"] for seen in second} <= {seen["process"] for seen in first}
    assert {seen["threads"] for seen in first} == {1}


def test_serial_jobs_leave_threads_and_random_numbers_as_they_were():
    torch.set_num_threads(2)
    try:
        torch.manual_seed(0)
        expected = torch.rand(2)
        torch.manual_seed(0)
        with JobPool("serial", [None], shared()) as pool:
            (seen,) = pool.run(jobs_of(pool_jobs.describe, 1))
        assert seen["threads"] == 1
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.rand(2), expected)
    finally:
        torch.set_num_threads(1)
    with one_thread():
        assert torch.get_num_threads() == 1


@pytest.fixture(params=["serial", "parallel"])
def either(request, pool):
    return pool if request.param == "parallel" else JobPool("serial", [None], shared())


def test_a_job_that_raises_is_named_and_the_others_finish(either, caplog):
    jobs = [*jobs_of(pool_jobs.nothing, 10, 11), Job("teacher 3", pool_jobs.fail, "that")]
    *done, failure = either.run(jobs)
    assert done == [10, 11]
    assert isinstance(failure, Failure)
    assert failure.name == "teacher 3"
    assert "RuntimeError: no way to do that (pool_jobs.py, line" in failure.why
    assert "teacher 3" in caplog.text


def test_a_killed_worker_loses_its_own_job_only(pool, tmp_path, caplog):
    jobs = [
        Job("killer", pool_jobs.die, None),
        Job("unlucky", pool_jobs.die_once, str(tmp_path / "died")),
        *jobs_of(pool_jobs.sleep, *[0.05] * 6),
    ]
    killer, unlucky, *others = pool.run(jobs)
    assert isinstance(killer, Failure)
    assert killer.name == "killer"
    assert "died twice" in killer.why
    assert unlucky == "done"
    assert not any(isinstance(result, Failure) for result in others)
    assert "job unlucky: its process died" in caplog.text
    assert pool.run(jobs_of(pool_jobs.nothing, 1, 2, 3)) == [1, 2, 3]  # with new workers


def test_a_job_that_writes_to_shared_arrays_changes_no_file(pool):
    pool.run(jobs_of(pool_jobs.scribble, *["train.ones"] * 4))
    assert float(np.load(pool._files()["train.ones"]).sum()) == 4


def test_functions_that_no_process_can_import_are_refused(pool):
    with pytest.raises(ValueError, match=r"job 0: .*cannot be imported"):
        pool.run(jobs_of(lambda spec, shared: spec, 1))


def test_each_gpu_slot_sees_its_own_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with JobPool("parallel", [1], {}) as pool:
        (seen,) = pool.run([Job("one", pool_jobs.describe, None)])
    assert seen["gpus"] == "7"


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """A notebook's kernel that is killed leaves no process behind."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal\n"
        "from tests.workflows.distillation import pool_jobs\n"
        "from trainbook.workflows.distillation.job_pool import Job, JobPool\n"
        "if __name__ == '__main__':\n"
        "    pool = JobPool('parallel', [None], {})\n"
        "    print(pool.run([Job('a', pool_jobs.describe, None)])[0]['process'], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    paths = [path for path in sys.path if path]
    code = f"import sys, runpy; sys.path[:0] = {paths!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    worker = int(parent.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_alive(worker):
        time.sleep(0.05)
    assert not is_alive(worker)


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:  # noqa: PTH123  (a process, not a file)
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

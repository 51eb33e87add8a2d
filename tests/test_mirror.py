"""The copy of a run in a second folder: whole, never ahead of its records, never in the way of training."""

import json
import logging
import logging.handlers
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.driving import Drive, assert_same_run, checkpoints
from trainbook import mirror as mirror_module
from trainbook import runtime
from trainbook.checkpoints import METADATA_FILE, STATE_FILE, numbered, read_checkpoint, write_checkpoint
from trainbook.errors import UserError
from trainbook.files import write_json
from trainbook.handover import copy_run, whole_checkpoint
from trainbook.mirror import Mirror
from trainbook.records import RunFolder

CONFIG = {"workflow": "timestep_dbn", "preset": "smoke", "authentic": False, "config": {}, "config_sha256": "c"}


class Growing:
    """A run folder that grows as training would let it: records first, then the checkpoint that counts them."""

    def __init__(self, path):
        self.folder = RunFolder(path)
        self.folder.create(CONFIG)
        self.step = 0
        self.say("running")

    def say(self, status):
        write_json(self.folder.run_json, {**CONFIG, "run_id": "one", "status": status, "step": self.step})

    def train(self, steps=10):
        self.step += steps
        with self.folder.metrics.open("ab") as metrics:
            metrics.write(f'{{"step": {self.step}}}\n'.encode())
        metadata = {"step": self.step, "records_bytes": self.folder.metrics.stat().st_size}
        content = {STATE_FILE: random.Random(self.step).randbytes(20_000), METADATA_FILE: json.dumps(metadata).encode()}
        write_checkpoint(self.folder.checkpoints, self.step, content, keep=2)


@pytest.fixture
def growing(tmp_path):
    (tmp_path / "share").mkdir()
    return Growing(tmp_path / "runs" / "one")


@pytest.fixture
def warnings():
    logger = logging.getLogger("trainbook")
    seen = logging.handlers.BufferingHandler(10_000)
    logger.addHandler(seen)
    yield lambda: [record.getMessage() for record in seen.buffer if record.levelno == logging.WARNING]
    logger.removeHandler(seen)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_copy_holds_what_the_run_folder_holds(growing, tmp_path):
    growing.train()
    growing.folder.figures.mkdir()
    (growing.folder.figures / "loss.png").write_bytes(b"picture")
    (growing.folder.path / "lock").write_text("1")
    (growing.folder.checkpoints / ".0000000020.partial").mkdir()
    mirror = Mirror(growing.folder, tmp_path / "share")
    assert mirror.close()
    expected = contents(growing.folder.path)
    del expected["lock"]
    assert contents(tmp_path / "share" / "one") == expected
    growing.train()
    growing.train()
    growing.say("complete")
    assert mirror.close()
    copied = contents(tmp_path / "share" / "one")
    assert [path.name for path in numbered(mirror.target.checkpoints)] == ["0000000030", "0000000010"]
    assert copied["metrics.jsonl"] == growing.folder.metrics.read_bytes()
    assert json.loads(copied["run.json"])["status"] == "complete"


def test_at_every_moment_a_run_can_go_on_from_the_copy_at_a_step_that_never_falls(growing, tmp_path):
    """A reader beside the writer: what it finds is whole, at most one interval old, and its records reach it."""
    mirror = Mirror(growing.folder, tmp_path / "share", poll_seconds=0.001)
    mirror.start()
    found, ending = [], threading.Event()

    def read():
        while not ending.is_set():
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            try:
                found.append(copy_run(mirror.target, copy) or 0)
            except FileNotFoundError:  # dropped while it was copied: a reader tries again
                continue

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(60):
        growing.train()
        time.sleep(0.01)
    assert mirror.close()
    ending.set()
    reader.join()
    assert found == sorted(found)
    assert len(set(found)) > 5
    assert whole_checkpoint(mirror.target) == growing.step == 600
    assert len(numbered(mirror.target.checkpoints)) == 2


def test_a_checkpoint_cut_off_while_it_was_copied_is_made_anew(growing, tmp_path):
    growing.train()
    target = RunFolder(tmp_path / "share" / "one")
    torn = target.checkpoints / f".{growing.step:010d}.partial"
    torn.mkdir(parents=True)
    (torn / STATE_FILE).write_bytes(b"half")
    (target.path / ".metrics.jsonl.partial").write_bytes(b"half")
    assert Mirror(growing.folder, tmp_path / "share").close()
    assert whole_checkpoint(target) == 10
    assert not list(target.path.rglob(".*"))


def test_what_is_torn_there_is_replaced(growing, tmp_path):
    growing.train()
    assert Mirror(growing.folder, tmp_path / "share").close()
    target = RunFolder(tmp_path / "share" / "one")
    state = numbered(target.checkpoints)[0] / STATE_FILE
    state.write_bytes(state.read_bytes()[:-1])
    assert Mirror(growing.folder, tmp_path / "share").close()
    assert whole_checkpoint(target) == 10


def test_a_copy_that_got_further_is_not_overwritten_by_less(growing, tmp_path, warnings):
    for _ in range(3):
        growing.train()
    assert Mirror(growing.folder, tmp_path / "share").close()
    before = contents(tmp_path / "share")
    shutil.rmtree(growing.folder.path)
    behind = Growing(growing.folder.path)
    behind.train()
    mirror = Mirror(behind.folder, tmp_path / "share")
    assert not mirror.close()
    assert contents(tmp_path / "share") == before
    assert ["at step 30, here it is at 10" in text for text in warnings()] == [True]
    for _ in range(3):
        behind.train()
    assert mirror.close()
    assert whole_checkpoint(mirror.target) == 40


def test_a_run_of_another_config_under_that_name_is_left_alone(growing, tmp_path, warnings):
    growing.train()
    RunFolder(tmp_path / "share" / "one").create(CONFIG | {"preset": "full"})
    before = contents(tmp_path / "share")
    assert not Mirror(growing.folder, tmp_path / "share").close()
    assert contents(tmp_path / "share") == before
    assert "preset = full" in warnings()[0]


def test_a_folder_that_is_not_there_is_not_made_and_warned_of_once_and_used_when_it_comes_back(growing, tmp_path, warnings):
    growing.train()
    mirror = Mirror(growing.folder, tmp_path / "gone", poll_seconds=0.01, retry_seconds=0.01)
    mirror.start()
    time.sleep(0.2)
    assert not (tmp_path / "gone").exists()
    assert len(warnings()) == 1
    assert "not copied" in warnings()[0]
    assert str(tmp_path / "gone") in warnings()[0]
    (tmp_path / "gone").mkdir()
    assert mirror.close()
    assert whole_checkpoint(mirror.target) == 10


def test_a_disk_that_gives_back_other_bytes_is_found_out(growing, tmp_path, warnings, monkeypatch):
    growing.train()
    honest = mirror_module.file_sha256
    monkeypatch.setattr(mirror_module, "file_sha256", lambda path: "0" if path.name == STATE_FILE else honest(path))
    mirror = Mirror(growing.folder, tmp_path / "share")
    assert not mirror.close()
    assert whole_checkpoint(mirror.target) is None
    assert "is not what is read from it" in warnings()[0]


def test_a_checkpoint_damaged_here_is_not_passed_on(growing, tmp_path, warnings):
    growing.train()
    (numbered(growing.folder.checkpoints)[0] / STATE_FILE).write_bytes(b"damaged")
    mirror = Mirror(growing.folder, tmp_path / "share")
    assert not mirror.close()
    assert numbered(mirror.target.checkpoints) == []
    assert "does not fit its checksums" in warnings()[0]


def test_a_folder_that_hangs_holds_up_nobody_beyond_the_patience(growing, tmp_path, warnings, monkeypatch):
    growing.train()
    hang = threading.Event()
    monkeypatch.setattr(mirror_module, "_copy_file", lambda source, target: hang.wait() and "")
    mirror = Mirror(growing.folder, tmp_path / "share")
    began = time.monotonic()
    mirror.start()
    growing.train()
    assert not mirror.close(patience_seconds=0.2)
    assert time.monotonic() - began < 5
    assert "has not answered" in warnings()[0]
    hang.set()


def test_what_is_dropped_is_emptied_first(growing, tmp_path, monkeypatch):
    """Drive's bin keeps what is deleted, at its size."""
    growing.train()
    mirror = Mirror(growing.folder, tmp_path / "share")
    assert mirror.close()
    sizes = []
    real = shutil.rmtree

    def spy(path, **options):
        if (tmp_path / "share") in Path(path).parents:
            sizes.extend(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
        real(path, **options)

    monkeypatch.setattr(mirror_module.shutil, "rmtree", spy)
    for _ in range(3):
        growing.train()
        assert mirror.close()
    assert len(sizes) >= 6
    assert set(sizes) == {0}


def test_the_runs_folder_itself_cannot_be_the_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv(runtime.MIRROR, str(tmp_path / "runs"))
    with pytest.raises(UserError, match="runs folder itself"):
        runtime.detect()


def test_killed_then_continued_from_the_mirror_on_an_empty_disk_is_bit_identical(tmp_path, monkeypatch):
    whole = Drive(tmp_path / "elsewhere", "one", checkpoint_seconds=3600)
    assert whole() == 0
    (tmp_path / "share").mkdir()
    mirrored = {"mirror": str(tmp_path / "share")}
    for number, step in enumerate((90, 200)):
        assert Drive(tmp_path / f"machine{number}", "one", signal_step=step, pause=0.02, **mirrored)() == -signal.SIGKILL
        reached = whole_checkpoint(RunFolder(tmp_path / "share" / "one"))
        assert reached is not None
        assert reached <= step
    last = Drive(tmp_path / "machine2", "one", **mirrored)
    assert last() == 0
    assert last.folder.summary()["segments"][-1]["first_step"] > 90
    assert_same_run(last.folder, whole.folder)
    assert whole_checkpoint(RunFolder(tmp_path / "share" / "one")) == 256


def test_a_full_mirror_is_warned_of_and_the_run_ends_as_it_would_have(tmp_path):
    """A file system of 200 kB, really full."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace here")
    (tmp_path / "share").mkdir()
    code = (
        "from pathlib import Path; from tests.driving import Drive\n"
        f"drive = Drive(Path({str(tmp_path / 'runs')!r}), 'one', mirror={str(tmp_path / 'share')!r})\n"
        "if __name__ == '__main__':\n"
        "    assert drive() == 0\n"
    )
    (tmp_path / "drive.py").write_text(code)
    script = f'mount -t tmpfs -o size=60k tmpfs {tmp_path / "share"} && exec "$@"'
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, str(tmp_path / "drive.py")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder = RunFolder(tmp_path / "runs" / "one")
    assert "No space left on device" in folder.log.read_text()
    assert "Training goes on" in done.stderr
    whole = Drive(tmp_path / "elsewhere", "one", checkpoint_seconds=3600)
    assert whole() == 0
    assert_same_run(folder, whole.folder)
    for checkpoint in checkpoints(folder):
        read_checkpoint(checkpoint)

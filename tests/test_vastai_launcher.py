"""Vast: the real client against a Vast on loopback, whose boxes are real sshds; and any box by ssh. Every fault is survived."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.driving import assert_same_run
from tests.stubs import loopback_box
from tests.stubs.fake_vast import FakeVast, offer
from tests.stubs.loopback_box import LoopbackBox
from trainbook.handover import whole_checkpoint
from trainbook.records import RunFolder

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "vastai" / "launch.py"
ACCOUNT_KEY = "account-key-that-nobody-may-see-0123456789"
# Some seconds of training with a checkpoint twice a second: long enough to be cut off in the middle.
LONG = ["--baseline-epochs", "150", "--epochs-per-timestep", "60", "--checkpoint-every", "0.3s"]
POLICY = """
[offers]
query = ["reliability>0.98", "direct_port_count>=1", "num_gpus=1", "compute_cap>=700"]
image = "vastai/pytorch:@vastai-automatic-tag"
disk_gb = 40
interruptible = false
bid_factor = 1.25
[patience]
start = "20s"
ssh = "15s"
boxes = 4
[follow]
poll = "0.3s"
pull_every = "0.5s"
[watchdog]
no_progress = "{no_progress}"
saving = "20s"
unpulled = "{unpulled}"
"""

needs_boxes = pytest.mark.skipif(bool(loopback_box.why_not()), reason=loopback_box.why_not())


@pytest.fixture(scope="session")
def client(request):
    """The real client, in an environment of its own."""
    folder = Path(request.config.cache.mkdir("vastai-client"))
    program = folder / "bin" / "vastai"
    if not program.exists():
        uv = [sys.executable, "-m", "uv"]
        made = subprocess.run([*uv, "venv", "--quiet", "--clear", folder], capture_output=True, text=True)
        if made.returncode == 0:
            install = [*uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python", "vastai==1.9.1"]
            made = subprocess.run(install, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"the client vastai cannot be installed: {made.stderr.strip().splitlines()[-1]}")
    return program


class Desk:
    """A person's machine: a home with an ssh key, a folder for runs, and the launcher."""

    def __init__(self, folder):
        self.folder, self.home, self.runs = folder, folder / "desk", folder / "runs"
        self.home.mkdir()
        self.public_key = loopback_box.make_key(self.home / "id")
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
            "LANG": "C.UTF-8",
        }
        self.policy()

    def policy(self, no_progress="60s", unpulled="20s"):
        (self.folder / "offers.toml").write_text(POLICY.format(no_progress=no_progress, unpulled=unpulled))

    def command(self, *arguments):
        own = ["--policy", self.folder / "offers.toml", "--identity", self.home / "id", "--out", self.runs]
        return [str(part) for part in (sys.executable, LAUNCH, *arguments, *(() if arguments[0] == "reap" else own))]

    def start(self, *arguments):
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            stdout=(self.folder / "launch.out").open("ab"),
            stderr=subprocess.STDOUT,
        )

    def launch(self, *arguments, timeout=150):
        """Exit code and everything that was printed."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        print(done.stdout)
        return done.returncode, done.stdout

    def run(self, run_id):
        return RunFolder(self.runs / run_id)

    def ledger(self):
        path = self.home / ".local" / "state" / "trainbook" / "vastai.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


@pytest.fixture
def vast(desk, client):
    """A Vast with three machines on offer, which the launcher at the desk talks to; nothing may stay rented or be told."""
    if loopback_box.why_not():
        pytest.skip(loopback_box.why_not())
    server = FakeVast(desk.folder, [offer(1, 0.30), offer(2, 0.35), offer(3, 0.40)], ACCOUNT_KEY, [desk.public_key])
    desk.environment |= {"VAST_URL": server.url, "VAST_API_KEY": ACCOUNT_KEY}
    desk.client = ["--client", str(client)]
    watcher = ProcessList()
    yield server
    watcher.stop()
    server.close()
    assert ACCOUNT_KEY not in watcher.seen
    told = [path for path in desk.folder.rglob("*") if path.is_file() and ACCOUNT_KEY.encode() in path.read_bytes()]
    assert not told


class ProcessList(threading.Thread):
    """Everything that `ps` could show while a test runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.going = "", True
        self.start()

    def run(self):
        lines = set()
        while self.going:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    lines.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                except OSError:
                    continue
            time.sleep(0.05)
        self.seen = "\n".join(lines)

    def stop(self):
        self.going = False
        self.join()


def rent(desk, *arguments):
    return ["timestep_dbn", "--preset", "smoke", "--max-price", "0.50", "--budget", "3", *desk.client, *arguments]


def until(condition, seconds=60):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come to that"
        time.sleep(0.05)


def local_run(desk, run_id, *arguments):
    """The same run without any launcher, never interrupted."""
    command = [sys.executable, "-m", "trainbook", "run", "timestep_dbn", "--preset", "smoke", "--run-id", run_id, *arguments]
    environment = desk.environment | {"TRAINBOOK_RUNS": str(desk.folder / "local"), "MPLBACKEND": "agg"}
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=desk.folder)
    return RunFolder(desk.folder / "local" / run_id)


# Rented boxes, with the real client


@pytest.mark.platforms
def test_a_run_is_rented_run_pulled_verified_and_the_rental_ended(desk, vast):
    code, said = desk.launch(*rent(desk, "--run-id", "mine"))
    assert code == 0
    assert desk.run("mine").summary()["status"] == "complete"
    assert desk.run("mine").summary()["segments"][-1]["platform"] == "vastai"
    assert "renting offer 1 on demand" in said
    assert "every file has the checksum it has there" in said
    assert not vast.rentals
    assert vast.history == [(7001, "rented"), (7001, "destroyed by the account")]
    assert [entry["event"] for entry in desk.ledger()] == ["renting", "rented", "ended"]
    created = next(body for method, path, body in vast.requests if path == "/api/v0/asks/1/")
    assert len(created["onstart"]) < 4000
    assert created["env"] == {}

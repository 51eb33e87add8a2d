"""Vast: the real client against a Vast on loopback, whose boxes are real sshds; and any box by ssh. Every fault is survived."""

import json
import os
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
# Half a minute of training with some checkpoints a second: long enough to be cut off in the middle on a busy machine, too.
LONG = ["--baseline-epochs", "400", "--epochs-per-timestep", "60", "--checkpoint-every", "0.3s"]
POLICY = """
[offers]
query = ["reliability>0.98", "direct_port_count>=1", "num_gpus=1", "compute_cap>=700"]
image = "vastai/pytorch:@vastai-automatic-tag"
disk_gb = 40
interruptible = false
bid_factor = 1.25
[patience]
start = "{start}"
ssh = "15s"
boxes = 4
shortest = "5s"
[follow]
poll = "0.3s"
pull_every = "0.5s"
[watchdog]
no_progress = "{no_progress}"
saving = "{saving}"
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
        self.output = folder / "launch.out"
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

    def policy(self, **changes):
        """Write a policy that is patient for seconds, not minutes."""
        values = {"no_progress": "60s", "unpulled": "20s", "saving": "20s", "start": "20s"} | changes
        (self.folder / "offers.toml").write_text(POLICY.format(**values))

    def command(self, *arguments):
        own = ["--policy", self.folder / "offers.toml", "--identity", self.home / "id", "--out", self.runs]
        return [str(part) for part in (sys.executable, LAUNCH, *(() if arguments[0] == "reap" else own), *arguments)]

    def start(self, *arguments):
        with self.output.open("ab") as file:
            return subprocess.Popen(
                self.command(*arguments), cwd=self.folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT
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
            time.sleep(0.1)
        self.seen = "\n".join(lines)

    def stop(self):
        self.going = False
        self.join()


def rent(desk, *arguments):
    return ["timestep_dbn", "--preset", "smoke", "--max-price", "0.50", "--budget", "3", *desk.client, *arguments]


def until(condition, seconds=60, launcher=None):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come to that"
        assert launcher is None or launcher.poll() is None, "the launcher ended before that"
        time.sleep(0.05)


def local_run(desk, run_id, *arguments):
    """The same run without any launcher."""
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


@pytest.mark.platforms
def test_outbid_in_the_middle_it_goes_on_elsewhere_and_ends_as_if_nothing_had_been(desk, vast):
    launcher = desk.start(*rent(desk, "--run-id", "mine", "--interruptible", *LONG))
    until(desk.run("mine").run_json.exists, launcher=launcher)  # pulled once, whole: the chain of segments is in there
    until(lambda: (whole_checkpoint(desk.run("mine")) or 0) > 20, launcher=launcher)
    vast.outbid(7001)
    assert launcher.wait(180) == 0, desk.output.read_text()
    said = desk.output.read_text()
    assert "renting offer 1 interruptible" in said
    assert "Vast has stopped it, or somebody bid more" in said
    assert "to go on from step" in said
    assert [event for _, event in vast.history] == [
        "rented",
        "outbid",
        "destroyed by the account",
        "rented",
        "destroyed by the account",
    ]
    bids = [body["price"] for method, path, body in vast.requests if "/asks/" in path]
    assert bids == pytest.approx([0.15 * 1.25, 0.175 * 1.25], abs=1e-4)
    assert len(desk.run("mine").summary()["segments"]) == 2
    assert_same_run(desk.run("mine"), local_run(desk, "mine", *LONG[:4]))


@pytest.mark.platforms
@pytest.mark.parametrize("fault", ["taken", "exited", "offline", "loading", "unreachable"])
def test_an_offer_that_is_taken_or_whose_box_dies_is_followed_by_the_next(desk, vast, fault):
    vast.faults[1] = fault
    desk.policy(start="20s" if fault in ("taken", "exited", "offline") else "5s")
    code, said = desk.launch(*rent(desk, "--run-id", "mine"))
    assert code == 0
    assert "renting offer 2" in said
    assert not vast.rentals
    expected = [] if fault == "taken" else [(7001, "rented"), (7001, "destroyed by the account")]
    assert vast.history == [*expected, (7002, "rented"), (7002, "destroyed by the account")]


@pytest.mark.platforms
def test_a_rental_whose_answer_was_lost_is_found_by_its_label(desk, vast):
    vast.faults[1] = "lost answer"
    code, _ = desk.launch(*rent(desk, "--run-id", "mine"))
    assert code == 0
    assert vast.history == [(7001, "rented"), (7001, "destroyed by the account")]


@pytest.mark.platforms
def test_broken_connections_and_a_broken_transfer_are_made_again(desk, vast):
    """ssh fails with 255 at any moment; rsync dies in the middle of a file, there and back."""
    launcher = desk.start(*rent(desk, "--run-id", "mine", *LONG))
    until(lambda: 7001 in vast.boxes and vast.boxes[7001].server is not None)
    box = vast.boxes[7001]
    box.fail("255", 2)
    until(lambda: desk.run("mine").config.exists())
    box.fail("255", 2)
    box.fail("rsync", 1, 3000)
    until(lambda: not list(box.folder.glob("fault-*")))
    box.fail("rsync", 2, 20_000)
    assert launcher.wait(180) == 0, desk.output.read_text()
    assert not list(box.folder.glob("fault-*"))
    assert desk.run("mine").summary()["status"] == "complete"
    assert not vast.rentals


@pytest.mark.platforms
def test_the_watchdog_ends_a_run_at_its_deadline_and_it_can_go_on(desk, vast):
    """The budget pays for some seconds of training; what it has bought is here, and nothing more is rented for it."""
    desk.policy(unpulled="10s", start="20s", saving="10s")
    seconds = 10 + 10 + 60 + 20 + 8  # unpulled, saving, the margin of two clocks, to start, and what is left to train
    budget = ["--budget", str(0.30 * seconds / 3600)]
    huge = ["--baseline-epochs", "100000", "--checkpoint-every", "1s"]
    code, said = desk.launch(*rent(desk, "--run-id", "mine", *huge), *budget, timeout=300)
    assert code == 3
    assert "the watchdog ended it: deadline" in said
    assert "resume  the same command with --run-id mine" in said
    assert not vast.rentals
    assert whole_checkpoint(desk.run("mine")) > 0
    assert desk.run("mine").summary()["status"] == "stopped"
    code, said = desk.launch(*rent(desk, "--run-id", "mine", *huge), *budget)
    assert code == 2
    assert "are left" in said
    assert len([event for _, event in vast.history if event == "rented"]) == 1


@pytest.mark.platforms
def test_a_launcher_killed_while_a_box_is_rented_leaves_what_the_next_one_goes_on_with(desk, vast):
    """The next one with this run id follows the same box; it does not rent another."""
    launcher = desk.start(*rent(desk, "--run-id", "mine", *LONG))
    until(lambda: (whole_checkpoint(desk.run("mine")) or 0) > 20, launcher=launcher)
    code, said = desk.launch("reap", *desk.client)
    assert (code, list(vast.rentals)) == (0, [7001]), "reap must leave the box of a living launcher alone"
    assert "its launcher is alive" in said
    launcher.kill()
    launcher.wait()
    assert list(vast.rentals) == [7001]
    code, said = desk.launch(*rent(desk, "--run-id", "mine", *LONG))
    assert code == 0
    assert "is still there: going on with it" in said
    assert "is at work on mine already" in said
    assert vast.history == [(7001, "rented"), (7001, "destroyed by the account")]


@pytest.mark.platforms
def test_reap_ends_what_a_killed_launcher_left(desk, vast):
    launcher = desk.start(*rent(desk, "--run-id", "mine", *LONG))
    until(lambda: 7001 in vast.rentals)
    launcher.kill()
    launcher.wait()
    vast.rentals[8001] = {**vast.rentals[7001], "id": 8001, "label": "trainbook-of-another-machine"}
    vast.rentals[8002] = {**vast.rentals[7001], "id": 8002, "label": "somebody-else"}
    code, said = desk.launch("reap", *desk.client)
    assert code == 0
    assert "not rented from this machine, left alone" in said
    assert sorted(vast.rentals) == [8001, 8002]
    assert desk.ledger()[-1]["event"] == "ended"
    vast.boxes[8001] = vast.boxes[8002] = LoopbackBox(desk.folder / "spare", desk.public_key)
    assert desk.launch("reap", "--all", *desk.client)[0] == 0
    assert sorted(vast.rentals) == [8002]


@pytest.mark.platforms
@pytest.mark.parametrize("may_destroy", [True, False])
def test_a_box_whose_launcher_never_comes_back_gives_itself_back(desk, vast, may_destroy):
    """Killed before it pushed anything: the start script ends the rental; where its key may not, it stops the box."""
    vast.box_may_destroy = may_destroy
    vast.faults[1] = "unreachable"
    launcher = desk.start(*rent(desk, "--run-id", "mine"))
    until(lambda: 7001 in vast.rentals)
    launcher.kill()
    launcher.wait()
    onstart = vast.rentals[7001]["onstart"].replace("TRAINBOOK_WAIT_SECONDS=40", "TRAINBOOK_WAIT_SECONDS=2")
    vast.boxes[7001].boot(onstart)
    until(lambda: len(vast.history) == 2)
    assert vast.history[1] == (7001, "destroyed by the box" if may_destroy else "stopped")
    assert not vast.boxes[7001].processes()


@pytest.mark.platforms
def test_a_finished_run_that_nobody_pulls_stops_its_box_and_is_pulled_later(desk, vast):
    desk.policy(unpulled="3s")
    code, said = desk.launch(*rent(desk, "--run-id", "mine", "--no-wait"))
    assert code == 0
    assert "goes on without this launcher" in said
    until(lambda: (7001, "stopped") in vast.history, 90)
    code, said = desk.launch(*rent(desk, "--run-id", "mine"))
    assert code == 0
    assert desk.run("mine").summary()["status"] == "complete"
    assert [event for _, event in vast.history] == ["rented", "stopped", "running", "destroyed by the account"]


@pytest.mark.platforms
def test_ctrl_c_saves_pulls_and_ends_the_rental(desk, vast):
    launcher = desk.start(*rent(desk, "--run-id", "mine", *LONG))
    until(lambda: (whole_checkpoint(desk.run("mine")) or 0) > 5, launcher=launcher)
    vast.refuse_destroy = 4
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(90) == 3, desk.output.read_text()
    assert not vast.rentals
    assert desk.run("mine").summary()["status"] == "stopped"


@pytest.mark.platforms
def test_every_mistake_is_said_before_anything_is_spent(desk, vast):
    mistakes = {
        ("--timesteps", "0"): "timesteps",
        ("--max-price", "0.10"): "no offer of any GPU under $0.1/h",
        ("--budget", "0.01"): "are left",
        ("--time-budget", "20h"): "and 20.00 h are asked for",
        ("--accelerator", "cpu"): "Vast rents GPUs",
        ("--accelerator", "H100"): "no offer of H100",
        ("--client", "no-such-client"): "there is no client",
        ("--policy", "no-such-file"): "no-such-file",
    }
    for arguments, complaint in mistakes.items():
        code, said = desk.launch(*rent(desk), *(part for part in arguments))
        assert (code, complaint in said) == (2, True), said
        assert "Traceback" not in said
    vast.public_keys[:] = ["ssh-ed25519 AAAAotherkey somebody"]
    assert "Vast knows none of the ssh keys here" in desk.launch(*rent(desk))[1]
    desk.environment["VAST_API_KEY"] = "wrong"
    assert "Vast does not let us in" in desk.launch(*rent(desk))[1]
    assert not vast.history
    assert not desk.ledger()


@pytest.mark.platforms
def test_a_dry_run_shows_the_choice_and_rents_nothing(desk, vast):
    vast.offers.append(offer(4, 0.10, reliability=0.5))
    vast.offers.append(offer(5, 0.12, gpu_name="GTX 970", compute_cap=520))
    code, said = desk.launch(*rent(desk, "--dry-run", "--time-budget", "2h"))
    assert code == 0
    assert "would rent offer 1 on demand: at most 2.00 h of --time-budget" in said
    assert not vast.history

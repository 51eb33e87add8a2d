"""Any box by ssh, the watchdog on it, and what is decided about money: everything that needs no account and no client."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.driving import SMALL_DBN, Drive, assert_same_run
from tests.stubs.loopback_box import LoopbackBox
from tests.test_vastai_launcher import LONG, Desk, needs_boxes, until
from trainbook import launching
from trainbook.errors import UserError
from trainbook.files import file_sha256, write_json
from trainbook.handover import whole_checkpoint
from trainbook.records import RunFolder
from trainbook.spec import RunSpec

VASTAI = Path(__file__).resolve().parents[1] / "vastai"


@pytest.fixture
def market(monkeypatch):
    monkeypatch.syspath_prepend(VASTAI)
    import market

    return market


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


@pytest.fixture
def box(desk):
    made = LoopbackBox(desk.folder / "box", desk.public_key)
    made.boot()
    (desk.home / "known_hosts").write_text(made.host_key())
    yield made
    made.halt()


def by_ssh(desk, box, *arguments):
    known = ["--known-hosts", desk.home / "known_hosts", "--ssh", "root@127.0.0.1", "--ssh-port", box.port]
    return ["timestep_dbn", "--preset", "smoke", *known, *arguments]


# A box of one's own


@needs_boxes
def test_a_run_on_a_box_by_ssh_is_the_run_it_would_be_here_and_goes_on_from_what_lies_here(desk, box, tmp_path):
    """Killed here after some steps, it is pushed, finished there and pulled, over broken connections."""
    whole, cut = Drive(tmp_path / "whole", "mine"), Drive(desk.runs, "mine", signal_step=60)
    assert whole() == 0
    assert cut() == -signal.SIGKILL
    box.fail("255", 2)
    small = [str(part) for name, value in SMALL_DBN.items() for part in (f"--{name.replace('_', '-')}", value)]
    code, said = desk.launch(*by_ssh(desk, box, "--run-id", "mine", *small))
    assert code == 0
    assert "to go on from step" in said
    assert_same_run(desk.run("mine"), whole.folder)
    assert desk.launch(*by_ssh(desk, box, "--run-id", "mine", *small))[1].lstrip().startswith("complete")
    assert not [name for name in box.processes() if "watchdog" in Path(f"/proc/{name}/cmdline").read_text()]


@needs_boxes
def test_an_unknown_host_and_a_refused_key_are_said_at_once(desk, box):
    (desk.home / "known_hosts").write_text("")
    code, said = desk.launch(*by_ssh(desk, box))
    assert (code, "Host key verification failed" in said, "log in once by hand" in said) == (2, True, True)
    (desk.home / "known_hosts").write_text(box.host_key())
    (box.folder / "authorized_keys").write_text("")
    code, said = desk.launch(*by_ssh(desk, box))
    assert (code, "takes none of your keys" in said) == (2, True)
    assert not (box.home / "trainbook").exists()


@needs_boxes
@pytest.mark.platforms
def test_a_launcher_killed_leaves_the_box_at_work_and_the_next_one_follows(desk, box):
    launcher = desk.start(*by_ssh(desk, box, "--run-id", "mine", *LONG))
    until(lambda: (whole_checkpoint(desk.run("mine")) or 0) > 5, launcher=launcher)
    launcher.kill()
    launcher.wait()
    code, said = desk.launch(*by_ssh(desk, box, "--run-id", "mine", *LONG))
    assert code == 0
    assert "is at work on mine already" in said


# The watchdog


@pytest.fixture
def watched(tmp_path):
    """A run's folder on a box; the job is a script of the test."""

    def watch(job, **settings):
        folder = tmp_path / "trainbook" / "mine"
        folder.mkdir(parents=True)
        values = {"deadline": 60, "no_progress": 60, "saving": 5, "unpulled": 1} | settings
        write_json(
            folder / "box.json",
            {"run_id": "mine", "price_per_hour": 0.5, **{f"{name}_seconds": value for name, value in values.items()}},
        )
        (folder / "onstart.sh").write_text(job)
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CONTAINER_API_KEY": "boxkey"}
        command = [sys.executable, VASTAI / "watchdog.py", "watch"]
        subprocess.run(command, cwd=folder, env=environment, check=True, timeout=30)
        return json.loads((folder / "ended.json").read_text()), folder

    return watch


def test_the_watchdog_reports_how_the_job_ended_and_tells_it_the_price_but_no_key(watched):
    ended, folder = watched("echo price $TRAINBOOK_PRICE_PER_HOUR key $CONTAINER_API_KEY.; exit 3")
    assert ended == {"exit_code": 3, "reason": ""}
    assert "price 0.5 key ." in (folder / "job.log").read_text()


@pytest.mark.parametrize(
    ("job", "settings", "reason", "code"),
    [
        ("trap 'echo saved; exit 3' TERM; while true; do echo on; sleep 0.1; done", {"deadline": 1}, "deadline", 3),
        ("trap '' TERM; while true; do echo on; sleep 0.1; done", {"deadline": 1, "saving": 1}, "deadline", -9),
        ("exec sleep 100", {"no_progress": 1}, "no progress for", -15),
    ],
    ids=["saves at the deadline", "killed when it does not save", "hangs"],
)
def test_the_watchdog_ends_a_job(watched, job, settings, reason, code):
    ended, _ = watched(job, **settings)
    assert ended["reason"].startswith(reason)
    assert ended["exit_code"] == code


def test_progress_in_the_run_folder_counts(watched):
    """Quiet on the console, but it writes records."""
    job = "mkdir -p runs/mine; for i in 1 2 3 4 5 6 7 8; do sleep 0.4; echo $i >> runs/mine/metrics.jsonl; done"
    ended, _ = watched(job, no_progress=1.5)
    assert ended == {"exit_code": 0, "reason": ""}


def test_a_box_that_starts_again_keeps_its_deadline(watched, tmp_path):
    folder = tmp_path / "trainbook" / "mine"
    folder.mkdir(parents=True)
    (folder / "started").write_text(str(time.time() - 100))
    folder.rename(tmp_path / "kept")
    watched_before = tmp_path / "kept" / "started"
    ended, folder = watched("exit 0")
    assert ended["exit_code"] == 0
    (folder / "ended.json").unlink()
    watched_before.replace(folder / "started")
    subprocess.run([sys.executable, VASTAI / "watchdog.py", "watch"], cwd=folder, check=True, env={"PATH": os.environ["PATH"]})
    assert json.loads((folder / "ended.json").read_text()) == {"exit_code": None, "reason": "the deadline had passed"}


def test_the_key_of_the_box_is_found_where_ssh_sessions_do_not_inherit_it(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(VASTAI)
    import watchdog

    (tmp_path / "environ").write_bytes(b"CONTAINER_ID=7\0CONTAINER_API_KEY=boxkey=\0PATH=/bin\0")
    monkeypatch.setattr(watchdog, "INIT_ENVIRONMENT", tmp_path / "environ")
    monkeypatch.delenv("CONTAINER_ID", raising=False)
    assert watchdog._environment()["CONTAINER_API_KEY"] == "boxkey="


def test_the_start_script_fits_vast_and_bash(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(VASTAI)
    spec = "RunSpec(workflow='timestep_dbn', run_id='x' * 200)"
    code = f"import launch; from trainbook.spec import RunSpec; print(launch.onstart({spec}, 1200))"
    done = subprocess.run([sys.executable, "-c", code], cwd=VASTAI, capture_output=True, text=True, check=True)
    assert len(done.stdout) < 4000
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


# Money


def test_prices_and_bids(market):
    policy = market.Policy.read(VASTAI / "offers.toml")
    row = {"id": 1, "dph_total": 0.40, "min_bid": 0.20, "storage_cost": 0.10, "machine_id": 1}
    assert market._priced(row, policy, False, 0.50).price == 0.40
    disk = 0.10 * 40 / 730  # dollars a GB and month, 40 GB
    bid = market._priced(row, policy, True, 0.50)
    assert bid.bid == pytest.approx(0.25)
    assert bid.price == pytest.approx(0.25 + disk)
    capped = market._priced(row, policy, True, 0.22)
    assert capped.bid >= 0.20
    assert 0.2199 <= capped.price <= 0.22
    assert market._priced(row, policy, True, 0.20) is None


def test_the_ledger_counts_from_before_a_rental_was_made_until_it_is_known_to_be_gone(market, tmp_path, monkeypatch):
    ledger, clock = market.Ledger(tmp_path), iter(())
    monkeypatch.setattr(market.time, "time", lambda: next(clock))

    def at(seconds, event, label="a", **details):
        nonlocal clock
        clock = iter([seconds])
        ledger.write(event, label, **details)

    at(0, "renting", price_per_hour=0.5)
    at(10, "rented")
    at(3600, "ended")  # 0.50
    at(4000, "renting", price_per_hour=9.0)
    at(4100, "not rented")  # 0
    at(4000, "renting", "b", price_per_hour=7.0)
    at(5000, "renting", price_per_hour=0.4)
    clock = iter([5000 + 1800])  # 0.20 so far
    assert ledger.spent("a") == pytest.approx(0.70)
    assert ledger.open_price("a") == 0.4
    at(5000 + 3600, "ended")
    assert ledger.spent("a") == pytest.approx(0.90)
    assert ledger.open_price("a") is None
    with ledger.path.open("a") as file:
        file.write('{"label": "a", "ev')  # killed in the middle of a line
    assert ledger.spent("a") == pytest.approx(0.90)


def test_one_launcher_per_run(market, tmp_path):
    ledger = market.Ledger(tmp_path)
    with ledger.claim("a"):
        assert ledger.claimed("a")
        assert not ledger.claimed("b")
        with pytest.raises(UserError, match="another launcher"), market.Ledger(tmp_path).claim("a"):
            pass
    assert not ledger.claimed("a")


def test_a_policy_that_is_wrong_says_where(market, tmp_path):
    (tmp_path / "offers.toml").write_text((VASTAI / "offers.toml").read_text().replace("bid_factor", "bid_facter"))
    with pytest.raises(UserError, match="bid_facter"):
        market.Policy.read(tmp_path / "offers.toml")


# What all launchers share


def a_run(folder, **changes):
    run = RunFolder(folder)
    run.path.mkdir(parents=True)
    (run.path / "export").write_text("weights")
    files = {"export": file_sha256(run.path / "export")}
    write_json(run.run_json, {"run_id": folder.name, "status": "complete", "why": "done", "files": files, **changes})
    return run


def test_the_verdict_is_run_jsons(tmp_path):
    assert launching.judge(a_run(tmp_path / "good").path, "good").code == 0
    assert launching.judge(a_run(tmp_path / "failed", status="failed").path, "failed").code == 1
    assert launching.judge(a_run(tmp_path / "stopped", status="stopped").path, "stopped").code == 3
    assert launching.judge(a_run(tmp_path / "cut", status="running").path, "cut").code == 3
    assert launching.judge(tmp_path / "good", "another").code == 1
    assert launching.judge(tmp_path / "nothing", "nothing").code == 1
    (tmp_path / "good" / "export").write_text("weight5")
    assert "export" in launching.judge(tmp_path / "good", "good").text
    assert launching.judge(tmp_path / "good", "good").code == 1


def test_a_command_line_and_a_spec_say_the_same_run_and_options_win(tmp_path):
    import argparse

    def spec(*arguments):
        parser = argparse.ArgumentParser()
        launching.add_run_options(parser, list(arguments), also={"max_price_per_hour": "--max-price"})
        return launching.spec_of(parser.parse_args(arguments))

    named = spec("timestep_dbn", "--preset", "smoke", "--timesteps", "3", "--max-price", "0.5", "--run-id", "mine", "--authentic")
    expected = {"preset": "smoke", "overrides": {"timesteps": 3}, "max_price_per_hour": 0.5, "run_id": "mine", "authentic": True}
    assert named == RunSpec(workflow="timestep_dbn", **expected)
    named.write(tmp_path / "run.toml")
    assert spec("--spec", str(tmp_path / "run.toml")) == named
    changed = spec("--spec", str(tmp_path / "run.toml"), "--seed", "7", "--timesteps", "4")
    assert changed.overrides == {"timesteps": 4, "seed": 7}
    assert spec("timestep_dbn").run_id
    for wrong in ([], ["timestep_dbn", "--spec", str(tmp_path / "run.toml")]):
        with pytest.raises(UserError, match="run what"):
            spec(*wrong)


def test_no_secret_stays_in_a_text():
    assert "sesame" not in launching.without("key sesame is wrong: sesame", ["sesame", ""])


def test_the_launcher_answers_without_torch():
    code = "import sys; sys.argv[0] = 'launch.py'; import launch\nassert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=VASTAI, check=True)


# Engines


@pytest.mark.parametrize("price", [[], ["--max-price", "0.5"]])
def test_the_engines_files_are_rendered_from_the_spec(tmp_path, price):
    import yaml

    command = [sys.executable, VASTAI / "launch.py", "engines", "timestep_dbn", "--run-id", "Mine_1", "--accelerator", "RTX_4090"]
    command += ["--nodes", "2", "--time-budget", "90m", "--out", tmp_path / "out", *price]
    subprocess.run(command, check=True, capture_output=True)
    sky, dstack = (yaml.safe_load((tmp_path / "out" / name).read_text()) for name in ("task.sky.yaml", "task.dstack.yml"))
    assert (sky["name"], sky["num_nodes"], sky["resources"]["accelerators"]) == ("mine-1", 2, "RTX4090:1")
    assert sky["resources"].get("max_hourly_cost") == dstack.get("max_price") == (0.5 if price else None)
    assert (dstack["type"], dstack["nodes"], dstack["max_duration"]) == ("task", 2, "3h")
    assert "trainbook run --spec run.toml" in sky["run"]
    assert RunSpec.read(tmp_path / "out" / "run.toml").run_id == "Mine_1"
    for script in (sky["setup"], sky["run"], "\n".join(dstack["commands"])):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


SKY_PORT = 46580
CATALOG = {
    "vast/vms.csv": "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,HostingType\n"
    "1x-Tesla_T4-16-65536,T4,1.0,16,64,\"{'Gpus': [{'Name': 'T4', 'Count': 1.0, 'MemoryInfo': {'SizeInMiB': 16384}}],"
    " 'TotalGpuMemoryInMiB': 16384}\",0.20,0.10,SE,1\n",
    "common/accelerators.csv": "AcceleratorName,Clouds\nT4,['Vast']\n",
    "common/metadata.csv": "AcceleratorName,GPU,MemoryGB\nT4,T4,16\n",
}


@pytest.mark.platforms
def test_skypilots_dry_run_accepts_the_task(tmp_path, request):
    """With a catalog of one machine, its server on loopback, and nothing rented."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", SKY_PORT)) == 0:
            pytest.skip(f"a SkyPilot server of somebody's is on port {SKY_PORT}")
    if shutil.which("rsync") is None:
        pytest.skip("not installed: rsync, which SkyPilot asks for (apt-get install rsync)")
    clients = Path(request.config.cache.mkdir("skypilot-client"))
    sky = clients / "bin" / "sky"
    if not sky.exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--quiet", "--clear", clients], check=True)
        install = [*uv, "pip", "install", "--quiet", "--python", clients / "bin" / "python", "skypilot[vast]==0.14.1"]
        made = subprocess.run(install, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"SkyPilot cannot be installed: {made.stderr.strip().splitlines()[-1]}")
    home = tmp_path / "home"
    for name, text in CATALOG.items():
        path = home / ".sky" / "catalogs" / "v8" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (home / ".config" / "vastai").mkdir(parents=True)
    (home / ".config" / "vastai" / "vast_api_key").write_text("none")
    command = [sys.executable, VASTAI / "launch.py", "engines", "timestep_dbn", "--max-price", "0.5", "--out", tmp_path / "out"]
    subprocess.run(command, check=True, capture_output=True)
    environment = {"HOME": str(home), "PATH": f"{sky.parent}:{os.environ['PATH']}", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    environment["VAST_URL"] = "http://127.0.0.1:9"
    try:
        done = subprocess.run(
            [sky, "launch", "--dryrun", "-y", "--infra", "vast", "task.sky.yaml"],
            cwd=tmp_path / "out",
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Dryrun finished" in done.stdout + done.stderr
        assert "Tesla_T4" in done.stdout + done.stderr
    finally:
        subprocess.run([sky, "api", "stop"], env=environment, capture_output=True, timeout=120)

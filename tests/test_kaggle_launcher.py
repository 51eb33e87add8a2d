"""The Kaggle launcher: mistakes are found before anything is spent; the real client, against a Kaggle on this machine."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest

from tests import platform_images
from tests.driving import SMALL_DBN, Drive, assert_same_run
from tests.stubs.fake_kaggle import FakeKaggle
from trainbook import bundles
from trainbook.errors import UserError
from trainbook.records import RunFolder
from trainbook.spec import RunSpec

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "kaggle" / "launch.py"
CLIENT = ["kaggle>=2.2.4,<3", "six"]  # the client forgets to declare six

loader = importlib.util.spec_from_file_location("kaggle_launcher", LAUNCHER)
kaggle_launcher = sys.modules[loader.name] = importlib.util.module_from_spec(loader)
loader.loader.exec_module(kaggle_launcher)

SPEC = RunSpec(workflow="timestep_dbn", preset="smoke", run_id="mine")
# Trains longer than a session takes to begin training, so that a time budget can end in the middle.
OVERRIDES = SMALL_DBN | {"autoencoder_epochs": 200, "epochs_per_timestep": 120, "baseline_epochs": 150}


def as_options(overrides):
    return [text for name, value in overrides.items() for text in (f"--{name.replace('_', '-')}", str(value))]


# Before anything is spent


@pytest.fixture
def no_client(tmp_path, monkeypatch):
    """A copy of the launcher's folder without a client, and no `kaggle` on the path."""
    copy = shutil.copytree(ROOT / "kaggle", tmp_path / "kaggle", ignore=shutil.ignore_patterns(".venv", "__pycache__"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(kaggle_launcher, "HERE", copy)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "run what?"),
        (["timestep_dbn", "--timesteps", "0"], "timesteps = '0'"),
        (["timestep_dbn", "--preset", "huge"], "huge"),
        (["timestep_dbn", "--run-id", "../out"], "cannot name a run folder"),
        (["timestep_dbn", "--time-budget", "soon"], "is not a duration"),
        (["timestep_dbn", "--accelerator", "H100"], "choose T4"),
        (["timestep_dbn", "--spec", "run.toml"], "run.toml cannot be read"),
        (["--spec", "missing.toml"], "missing.toml cannot be read"),
        (["timestep_dbn"], "the Kaggle client is not installed"),
    ],
)
def test_a_mistake_is_said_before_the_client_is_asked_for(arguments, said, no_client, capsys):
    assert kaggle_launcher.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_client_that_lacks_six_is_said_with_the_command_that_mends_it(no_client, capsys):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", no_client / "kaggle" / ".venv"], check=True)
    assert kaggle_launcher.main(["timestep_dbn"]) == 2
    error = capsys.readouterr().err
    assert "lacks: kaggle six" in error
    assert "pip install kaggle six" in error


def test_the_folder_for_a_push_by_hand(tmp_path):
    options = ["timestep_dbn", "--preset", "smoke", "--run-id", "mine", "--write", str(tmp_path / "folder")]
    assert kaggle_launcher.main(options) == 0
    written = json.loads((tmp_path / "folder" / "kernel-metadata.json").read_text())
    assert written["machine_shape"] == "NvidiaTeslaT4"
    assert (written["is_private"], written["enable_internet"], written["enable_gpu"]) == (True, False, True)
    assert written["id"] == f"OWNER/{written['title']}"
    assert (tmp_path / "folder" / written["code_file"]).read_bytes() == bundles.build_notebook("kaggle", SPEC)
    assert kaggle_launcher.main([*options, "--accelerator", "cpu", "--internet", "--attach", "a/b"]) == 0
    written = json.loads((tmp_path / "folder" / "kernel-metadata.json").read_text())
    assert (written["machine_shape"], written["enable_gpu"], written["enable_internet"]) == ("None", False, True)
    assert written["dataset_sources"] == ["a/b"]


def test_a_run_toml_is_launched_with_options_before_it(tmp_path):
    SPEC.model_copy(update={"overrides": {"timesteps": 4}, "time_budget": "5h"}).write(tmp_path / "run.toml")
    options = ["--spec", str(tmp_path / "run.toml"), "--time-budget", "2h", "--write", str(tmp_path / "folder")]
    assert kaggle_launcher.main(options) == 0
    expected = SPEC.model_copy(update={"overrides": {"timesteps": 4}, "time_budget": "2h"})
    assert (tmp_path / "folder" / "notebook.ipynb").read_bytes() == bundles.build_notebook("kaggle", expected)


@pytest.mark.parametrize("run_id", ["a", "A_b.c", "x" * 90, "graph_diffusion_em-laptop-20261121-050000-123456"])
def test_names_are_what_kaggle_makes_of_them(run_id):
    slug = kaggle_launcher.slug_of(run_id)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
    assert 5 <= len(slug) <= 46
    assert slug == kaggle_launcher.slug_of(run_id)


def test_long_names_that_end_differently_stay_apart():
    assert kaggle_launcher.slug_of("x" * 60 + "a") != kaggle_launcher.slug_of("x" * 60 + "b")


def test_the_launcher_does_without_torch(no_client):
    code = (
        f"import sys; sys.argv = ['launch.py', 'timestep_dbn', '--write', {str(no_client / 'folder')!r}]\n"
        "import runpy\n"
        f"try: runpy.run_path({str(LAUNCHER)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'sklearn', 'kaggle'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=no_client)


class Scripted(kaggle_launcher.Client):
    """A client whose answers are given: a list per call, the last one again and again."""

    def __init__(self, **answers):
        super().__init__(Path("none"))
        self.answers, self.calls = answers, []

    def call(self, name, within=300, **arguments):
        self.calls.append(name)
        answers = self.answers[name]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer(**arguments) if callable(answer) else answer

    def events(self, name, **arguments):
        yield from ()


def quota(left_hours):
    return {"user": "me", "quota": {"used_seconds": (30 - left_hours) * 3600, "total_seconds": 30 * 3600, "refresh": "Saturday"}}


def launch_of(tmp_path, spec=SPEC, **answers):
    return kaggle_launcher.Launch(spec, tmp_path / "runs", Scripted(**answers), poll=0.001, owner="me")


@pytest.mark.parametrize(
    ("left", "asked", "accelerator", "trains"),
    [(20, "", "", 11), (20, "2h", "", 2), (20, "24h", "", 11), (5, "", "", 5 - 1 / 6), (0.1, "", "cpu", 11)],
)
def test_a_session_trains_no_longer_than_asked_and_than_the_quota_gives(left, asked, accelerator, trains, tmp_path, capsys):
    spec = SPEC.model_copy(update={"time_budget": asked, "accelerator": accelerator})
    assert launch_of(tmp_path, spec, account=[quota(left)])._session_budget() == pytest.approx(trains * 3600)
    assert f"{left:.1f} h left of 30 h a week, renewed Saturday" in capsys.readouterr().out


def test_nothing_is_pushed_when_the_quota_is_used_up(tmp_path):
    launch = launch_of(tmp_path, account=[quota(0.2)], version=[0])
    with pytest.raises(UserError, match="used up until Saturday"):
        launch.run(1, wait=True)
    assert "push" not in launch.client.calls


def states(*names):
    return [{"status": name, "message": "why"} for name in names]


def test_an_end_that_is_told_before_the_session_began_is_not_believed(tmp_path):
    launch = launch_of(tmp_path, status=states("COMPLETE", "ERROR", "QUEUED", "COMPLETE"), pull=[[]])
    session = kaggle_launcher.Session(1, 1)
    assert launch._wait(session, []) == "why"
    assert launch.client.calls.count("status") == 4


def test_a_server_that_does_not_answer_is_waited_for_and_then_left(tmp_path):
    busy = kaggle_launcher.Busy("503")
    launch = launch_of(tmp_path, status=[busy, busy, *states("RUNNING"), busy, *states("COMPLETE")], pull=[[]])
    launch._wait(session := kaggle_launcher.Session(1, 1), [])
    assert session.status == "COMPLETE"
    with pytest.raises(kaggle_launcher.Unfinished, match="has not answered"):
        launch_of(tmp_path, status=[busy])._wait(kaggle_launcher.Session(1, 1), [])


def run_folder(path, status="stopped", segments=(("a", 0, 5),), **other):
    """What a session leaves, without checkpoints."""
    path.mkdir(parents=True)
    summary = {
        "run_id": "mine",
        "status": status,
        "why": "",
        "config_sha256": SPEC.config().sha256(),
        "step": segments[-1][2],
        "total_steps": 9,
        "segments": [{"started": name, "first_step": first, "last_step": last} for name, first, last in segments],
    }
    (path / "config.json").write_text("{}")
    (path / "run.json").write_text(json.dumps(summary | other))


def leaves(*summaries):
    """Answers of `pull`: each time the next run folder."""
    left = list(summaries)

    def pull(folder, **_):
        run_folder(Path(folder) / "runs" / "mine", **left.pop(0))
        return []

    return [pull]


ACCEPTED = {"error": "", "version": 1, "invalid": {}}


@pytest.mark.parametrize(
    ("summary", "ended", "code"),
    [
        ({"status": "complete"}, "COMPLETE", 0),
        ({"status": "complete"}, "ERROR", 0),
        ({"status": "failed"}, "ERROR", 1),
        ({"status": "failed"}, "COMPLETE", 1),
        ({"status": "running"}, "ERROR", 3),
        ({"status": "stopped"}, "CANCEL_ACKNOWLEDGED", 3),
        ({"status": "stopped", "segments": [("a", 5, 5)]}, "COMPLETE", 3),
    ],
)
def test_run_json_is_the_judge(summary, ended, code, tmp_path):
    launch = launch_of(
        tmp_path, account=[quota(20)], version=[0], push=[ACCEPTED], status=states("RUNNING", ended), pull=leaves(summary)
    )
    assert launch.run(3, wait=True) == code
    assert launch.client.calls.count("push") == 1
    assert launch.folder.summary()["status"] == summary["status"]


def test_a_session_that_leaves_nothing_has_failed(tmp_path, capsys):
    launch = launch_of(tmp_path, account=[quota(20)], version=[0], push=[ACCEPTED], status=states("RUNNING", "ERROR"), pull=[[]])
    assert launch.run(3, wait=True) == 1
    assert "why" in capsys.readouterr().err


def test_a_session_that_leaves_only_what_it_was_given_has_failed(tmp_path):
    same = {"status": "stopped", "segments": [("a", 0, 5)]}
    launch = launch_of(
        tmp_path,
        account=[quota(20)],
        version=[0],
        push=[ACCEPTED],
        status=states("RUNNING", "COMPLETE", "RUNNING", "ERROR"),
        pull=leaves(same, same),
    )
    assert launch.run(3, wait=True) == 1
    assert launch.client.calls.count("push") == 2


@pytest.mark.parametrize(("other", "said"), [({"run_id": "yours"}, "not mine"), ({"config_sha256": "0"}, "another config")])
def test_what_another_run_left_is_refused(other, said, tmp_path):
    launch = launch_of(
        tmp_path,
        account=[quota(20)],
        version=[0],
        push=[ACCEPTED],
        status=states("RUNNING", "COMPLETE"),
        pull=leaves({"status": "complete", **other}),
    )
    with pytest.raises(UserError, match=said):
        launch.run(3, wait=True)
    assert not launch.folder.path.exists()


def test_a_push_whose_answer_was_lost_is_not_pushed_again(tmp_path):
    launch = launch_of(
        tmp_path,
        account=[quota(20)],
        version=[0, 0, 1],
        push=[kaggle_launcher.Busy("cut")],
        status=states("RUNNING", "COMPLETE"),
        pull=leaves({"status": "complete"}),
    )
    assert launch.run(3, wait=True) == 0
    assert launch.client.calls.count("push") == 1


@pytest.mark.parametrize("status", ["failed", "stopped", "running"])
def test_the_same_command_starts_another_session_after_one_that_had_ended(status, tmp_path):
    launch = launch_of(
        tmp_path,
        account=[quota(20)],
        version=[1, 0],
        push=[ACCEPTED | {"version": 2}],
        status=states("ERROR", "RUNNING", "COMPLETE"),
        pull=leaves({"status": status}, {"status": "complete", "segments": [("a", 0, 5), ("b", 5, 9)]}),
    )
    assert launch.run(3, wait=True) == 0
    assert launch.client.calls.count("push") == 1


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("running", 3), ("complete", 0)])
def test_a_session_that_was_still_at_work_is_followed_to_its_end_and_judged(status, code, tmp_path):
    launch = launch_of(
        tmp_path, account=[quota(20)], version=[1, 0], status=states("RUNNING", "ERROR"), pull=leaves({"status": status})
    )
    assert launch.run(3, wait=True) == code
    assert "push" not in launch.client.calls


def test_a_complete_run_is_not_launched_again(tmp_path, capsys):
    launch = launch_of(tmp_path)
    run_folder(launch.folder.path, status="complete")
    assert launch.run(3, wait=True) == 0
    assert launch.client.calls == []


# The real client


@pytest.fixture(scope="session")
def client(tmp_path_factory):
    """The folder of the `kaggle` command in an environment of its own."""
    if importlib.util.find_spec("uv") is None:
        pytest.skip("uv is not installed")
    folder = tmp_path_factory.mktemp("client") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", folder / "bin" / "python", *CLIENT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the Kaggle client cannot be installed: {done.stderr.strip()[-300:]}")
    return folder / "bin"


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    if reason := platform_images.why_not_offline():
        pytest.skip(reason)
    return platform_images.make_image(tmp_path_factory.mktemp("image") / "kaggle", "kaggle")


class Desk:
    """A person's machine: a folder, the client, and a Kaggle to reach."""

    def __init__(self, kaggle, client, folder):
        self.kaggle, self.folder, self.home = kaggle, folder, folder / "home"
        self.home.mkdir(parents=True)
        self.environment = kaggle.environment(self.home) | {
            "PATH": f"{client}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
        }
        # A copy, because a person's own kaggle/.venv would go before the client of this test.
        shutil.copytree(ROOT / "kaggle", folder / "kaggle", ignore=shutil.ignore_patterns(".venv", "__pycache__"))
        self.command = [sys.executable, folder / "kaggle" / "launch.py"]

    def start(self, *options):
        command = [*self.command, "timestep_dbn", "--preset", "smoke", "--run-id", "mine", "--poll", "0.3", *options]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def launch(self, *options):
        """Exit code and output of the launcher."""
        process = self.start(*options)
        output = process.communicate()[0]
        print(output)  # pytest shows it when the test fails
        return process.returncode, output

    @property
    def run(self):
        return RunFolder(self.folder / "runs" / "mine")

    @property
    def sessions(self):
        return [session for versions in self.kaggle.kernels.values() for session in versions]


@pytest.fixture
def desk(client, image, tmp_path):
    """Call it with the stand-in's arguments."""
    opened = []

    def open_desk(**arguments):
        kaggle = FakeKaggle(tmp_path / "kaggle", image, **arguments)
        opened.append(kaggle)
        return Desk(kaggle.__enter__(), client, tmp_path / "desk")

    yield open_desk
    for kaggle in opened:
        kaggle.__exit__()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The same run, here and in one piece."""
    drive = Drive(tmp_path_factory.mktemp("whole"), "mine", OVERRIDES)
    assert drive() == 0
    return drive.folder


class Processes(threading.Thread):
    """Sees every command line on this machine, until it is told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.over = set(), threading.Event()
        self.start()

    def run(self):
        while not self.over.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(path.read_bytes())
                except OSError:
                    continue


@pytest.fixture(scope="module")
def one_session(client, image, tmp_path_factory):
    """A run in one session, and what was seen of it."""
    folder = tmp_path_factory.mktemp("one")
    with FakeKaggle(folder / "kaggle", image) as kaggle:
        desk, processes = Desk(kaggle, client, folder / "desk"), Processes()
        code, output = desk.launch(*as_options(OVERRIDES))
        processes.over.set()
        yield desk, code, output, processes.seen


@pytest.mark.platforms
def test_a_run_is_pushed_followed_pulled_and_judged(one_session, uninterrupted):
    desk, code, output, _ = one_session
    assert code == 0
    assert "28.0 h left of 30 h a week" in output
    for line in ("running", "Executing Cell 1-", "complete: all steps done; evaluated"):
        assert line in output
    assert output.index("quota") < output.index("session 1, version 1")
    assert [session.status for session in desk.sessions] == ["COMPLETE"]
    sent = desk.sessions[0].request
    assert (sent["machineShape"], sent["enableInternet"], sent["isPrivate"]) == ("NvidiaTeslaT4", False, True)
    assert sent["sessionTimeoutSeconds"] == 12 * 3600
    summary = desk.run.summary()
    assert (summary["status"], summary["run_id"], summary["segments"][0]["platform"]) == ("complete", "mine", "kaggle")
    for name in ("report.html", "metrics.jsonl", "export/config.json"):
        assert (desk.run.path / name).is_file()
    assert_same_run(desk.run, uninterrupted)
    assert [path.name for path in desk.run.path.parent.iterdir()] == ["mine"]


@pytest.mark.platforms
def test_the_log_is_shown_while_the_session_runs_and_once(one_session):
    _, _, output, _ = one_session
    for number in range(1, 21):
        assert output.count(f"Executing Cell {number}-") == 1
    assert output.index("Executing Cell 1-") < output.index("\ncomplete: ")


@pytest.mark.platforms
def test_the_key_is_in_no_file_no_output_and_no_process_list(one_session):
    desk, _, output, processes = one_session
    assert desk.kaggle.key not in output
    assert not [line for line in processes if desk.kaggle.key.encode() in line]
    assert any(b"launch.py" in line for line in processes)
    files = [path for path in desk.folder.parent.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    assert not [path for path in files if desk.kaggle.key.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def half(one_session):
    """A time budget that ends in the middle of training on this machine, as busy as it is now."""
    desk = one_session[0]
    times = {event["data"]: event["time"] for event in desk.sessions[0].events}
    began = next(when for line, when in times.items() if line.startswith("timestep_dbn, preset"))
    ended = next(when for line, when in times.items() if "all steps done" in line)
    seconds = desk.run.summary()["segments"][0]["seconds"]
    return f"{ended - began - 0.4 * seconds:.2f}s"


@pytest.mark.platforms
@pytest.mark.parametrize(
    ("layout", "faults", "in_vain", "datasets"),
    [
        ("new", {}, 0, 0),
        ("new", {"kernel source refused": 9}, 1, 1),
        ("old", {"kernel source empty": 9}, 1, 1),
    ],
)
def test_a_run_that_outlasts_a_session_goes_on_in_the_next_bit_for_bit(
    layout, faults, in_vain, datasets, half, desk, uninterrupted
):
    desk = desk(layout=layout, faults=faults)
    assert desk.launch(*as_options(OVERRIDES), "--time-budget", half)[0] == 0
    segments = desk.run.summary()["segments"]
    assert len(segments) >= 2
    assert len(desk.sessions) == len(segments) + in_vain  # one that did not find the earlier part ended at once
    for one, next_one in itertools.pairwise(segments):
        assert next_one["first_step"] == one["last_step"] > 0
    assert (len(desk.kaggle.datasets) > 0) == (datasets > 0)
    assert all(dataset["request"]["isPrivate"] for dataset in desk.kaggle.datasets.values())
    assert_same_run(desk.run, uninterrupted)


@pytest.mark.platforms
def test_a_busy_server_is_survived_with_one_session(desk):
    desk = desk(faults={"push 503": 1, "push lost": 1, "status 503": 3, "stale": 3, "log dropped": 3, "file cut": 3})
    code, output = desk.launch()
    assert code == 0
    assert set(desk.kaggle.faults.values()) == {0}
    assert len(desk.sessions) == 1
    assert "complete before it began" in output
    for number in range(1, 21):
        assert output.count(f"Executing Cell {number}-") == 1


@pytest.mark.platforms
def test_a_refused_push_is_said_though_the_client_exits_with_0(desk):
    desk = desk(faults={"push refused": 1})
    code, output = desk.launch()
    assert code == 2
    assert "Maximum batch GPU session count" in output
    assert desk.sessions == []


@pytest.mark.platforms
def test_a_kit_too_large_for_a_notebook_travels_in_a_private_data_set(desk):
    desk = desk(faults={"source limit": 2, "upload 503": 2})
    assert desk.launch()[0] == 0
    assert desk.kaggle.faults == {"source limit": 0, "upload 503": 0}
    (dataset,) = desk.kaggle.datasets.values()
    assert dataset["request"]["isPrivate"]
    assert (desk.kaggle.folder / "datasets" / dataset["request"]["slug"] / bundles.WHEEL_NAME).read_bytes() == bundles.wheel()
    assert len(desk.sessions[0].request["text"]) < 100_000
    nbformat.validate(nbformat.reads(desk.sessions[0].request["text"], as_version=4))


@pytest.mark.platforms
def test_a_session_that_was_killed_ends_with_3_and_goes_on_with_the_same_command(desk, uninterrupted):
    desk = desk(faults={"session killed": 1})
    options = (*as_options(OVERRIDES), "--checkpoint-every", "0.3s")
    code, output = desk.launch(*options)
    assert code == 3
    assert "ended with ERROR: Notebook killed" in output
    assert desk.run.summary()["status"] == "running"
    assert desk.launch(*options)[0] == 0
    assert [session.status for session in desk.sessions] == ["ERROR", "COMPLETE"]
    assert desk.run.summary()["segments"][1]["first_step"] > 0
    assert_same_run(desk.run, uninterrupted)


@pytest.mark.platforms
def test_a_cell_that_fails_is_a_failure_with_its_reason(desk):
    desk = desk()
    code, output = desk.launch("--dataset", "file", "--data-file", "/kaggle/input/mine/nowhere.npz")
    assert code == 1
    assert "ended with ERROR and wrote no run.json" in output
    assert "nowhere.npz" in output


@pytest.mark.platforms
def test_a_launcher_that_was_stopped_finds_its_session_again(desk):
    desk = desk()
    process = desk.start()
    for line in process.stdout:
        if "running" in line:
            break
    process.send_signal(signal.SIGINT)
    assert "goes on at kaggle.com" in process.communicate()[0]
    assert process.returncode == 3
    code, output = desk.launch()
    assert code == 0
    assert "found session 1 of mine" in output
    assert len(desk.sessions) == 1


@pytest.mark.platforms
def test_a_wrong_key_is_said_and_not_shown(desk):
    desk = desk()
    desk.environment["KAGGLE_API_TOKEN"] = "KGAT_of_somebody_else"
    code, output = desk.launch()
    assert code == 2
    assert "Kaggle does not accept a key" in output
    assert "KGAT_" not in output


@pytest.mark.platforms
def test_the_clients_own_command_takes_the_folder(desk, client):
    desk = desk()
    assert desk.launch("--write", "folder")[0] == 0
    metadata = desk.folder / "folder" / "kernel-metadata.json"
    metadata.write_text(metadata.read_text().replace("OWNER", desk.kaggle.user))
    command = [client / "kaggle", "kernels", "push", "-p", metadata.parent, "-t", "600"]
    done = subprocess.run(command, env=desk.environment, cwd=desk.folder, capture_output=True, text=True)
    assert "Kernel version 1 successfully pushed" in done.stdout, done.stdout + done.stderr
    while not desk.sessions[0].over:
        time.sleep(0.2)
    assert desk.sessions[0].status == "COMPLETE"

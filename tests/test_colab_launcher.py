"""colab/launch.py: through a stand-in of the client in the default suite, through the real client against a loopback machine."""

import contextlib
import importlib.util
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

import pytest

from tests.driving import SMALL_DBN, Drive, assert_same_run
from trainbook.handover import whole_checkpoint
from trainbook.records import RunFolder
from trainbook.spec import RunSpec

ROOT = Path(__file__).resolve().parents[1]
STUBS = Path(__file__).parent / "stubs" / "colab_client"
SECRET = "hf_" + "9c2eSecret" * 3
LONG_DBN = SMALL_DBN | {"autoencoder_epochs": 60, "epochs_per_timestep": 100, "baseline_epochs": 100}


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "colab")
    module = load("colab_launch", ROOT / "colab" / "launch.py")
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)
    yield module
    sys.modules.pop("remote", None)


class StandIn:
    """The client on the PATH, and what is behind it."""

    def __init__(self, folder):
        self.folder = folder
        self.sessions = folder / "sessions"

    def calls(self, command=""):
        lines = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [line for line in lines if line[0] == command or not command]

    def lose_machine(self, name):
        """The machine is gone with all that ran on it, and so is the session."""
        load("stand_in_colab", STUBS / "colab.py").end_training(self.sessions / name / "content")
        shutil.rmtree(self.sessions / name, ignore_errors=True)
        shutil.rmtree(self.sessions / name, ignore_errors=True)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    folder = tmp_path / "colab-cloud"
    (folder / "bin").mkdir(parents=True)
    client = folder / "bin" / "colab"
    client.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STUBS / "colab.py"}" "$@"\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_COLAB", str(folder))
    return StandIn(folder)


def options(run_id, overrides=SMALL_DBN, *more):
    spec = RunSpec(workflow="timestep_dbn", preset="smoke", overrides=overrides, run_id=run_id, checkpoint_every="0.2s")
    spec.model_copy(update={"accelerator": "cpu"}).write(Path(f"{run_id}.toml"))
    return ["--spec", f"{run_id}.toml", "--poll-seconds", "0.1", *more]


def files_with(text, root):
    return [path for path in root.rglob("*") if path.is_file() and not path.is_symlink() and text.encode() in path.read_bytes()]


def test_a_run_whose_machine_is_lost_goes_on_in_a_new_one_and_ends_like_an_uninterrupted_run(
    launch, stand_in, tmp_path, monkeypatch, capfd
):
    """Also: the key reaches the training process and nothing else; the machine is given back."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    run = RunFolder(tmp_path / "runs" / "mine")
    lost = []

    def lose():
        while not (run.config.is_file() and (whole_checkpoint(run) or 0) > 0):
            time.sleep(0.05)
        [process] = (stand_in.sessions / "mine" / "content").glob("*/pid")
        environment = Path(f"/proc/{process.read_text()}/environ").read_bytes().split(b"\0")
        lost.append(f"HF_TOKEN={SECRET}".encode() in environment)
        lost.append(files_with(SECRET, tmp_path))
        stand_in.lose_machine("mine")

    thread = threading.Thread(target=lose)
    thread.start()
    code = launch.main(options("mine", LONG_DBN, "--pull-every", "0.1s", "--key", "HF_TOKEN"))
    thread.join()
    shown = capfd.readouterr()
    assert code == 0, shown
    assert lost == [True, []]
    assert len(stand_in.calls("new")) == 2
    assert "the session is lost" in shown.out
    assert "taking along the run so far" in shown.out
    summary = run.summary()
    assert summary["status"] == "complete"
    assert [segment["platform"] for segment in summary["segments"]] == ["colab", "colab"]
    assert summary["segments"][1]["first_step"] > 0
    whole = Drive(tmp_path / "elsewhere", "whole", LONG_DBN, checkpoint_seconds=3600)
    assert whole() == 0
    assert_same_run(run, whole.folder)
    assert not list(stand_in.sessions.iterdir())
    assert not files_with(SECRET, tmp_path)
    assert SECRET not in shown.out + shown.err
    assert [path.name for path in run.path.parent.iterdir()] == ["mine"]
    assert launch.main(options("mine", LONG_DBN)) == 0  # there is nothing left to do, and nothing is opened
    assert len(stand_in.calls("new")) == 2


def test_an_error_of_the_run_is_no_success_though_the_client_ends_with_zero(launch, stand_in, tmp_path, capfd):
    impossible = {"dataset": "file", "data_file": "/not-there.npz"}
    arguments = options("broken", impossible)
    with pytest.raises(launch.RunFailed, match="did not begin"):
        launch.main(arguments)
    assert "not-there.npz" in capfd.readouterr().out
    assert not list(stand_in.sessions.iterdir())


def test_a_killed_launcher_is_followed_by_another_which_a_closed_terminal_lets_save_pull_and_give_back(
    launch, stand_in, tmp_path
):
    command = [sys.executable, str(ROOT / "colab" / "launch.py"), *options("mine", LONG_DBN, "--out", str(tmp_path / "out"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}

    def start():
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)

    killed = start()
    while not list(stand_in.sessions.glob("mine/content/*/box/runs/mine/checkpoints/0*")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = start()
    assert "mine" in again.stdout.readline()
    while "following it" not in (line := again.stdout.readline()):
        assert line
    again.terminate()
    shown, _ = again.communicate(timeout=200)
    run = RunFolder(tmp_path / "out" / "mine")
    assert run.summary()["status"] == "stopped", shown
    assert again.returncode == 3, shown
    assert whole_checkpoint(run) == run.summary()["step"] > 0
    assert len(stand_in.calls("new")) == 1
    assert not list(stand_in.sessions.iterdir())


def test_no_machine_and_another_machine_than_asked_for(launch, stand_in, tmp_path, capfd):
    (stand_in.folder / "refuse").touch()
    with pytest.raises(launch.RunFailed, match="Allocation refused"):
        launch.main(["timestep_dbn", "--preset", "smoke"])
    (stand_in.folder / "refuse").unlink()
    gpus = stand_in.folder / "bin" / "nvidia-smi"
    gpus.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-40GB'\n")
    gpus.chmod(0o755)
    with pytest.raises(launch.RunFailed, match="gave NVIDIA A100-SXM4-40GB instead of T4"):
        launch.main(["timestep_dbn", "--preset", "smoke"])
    assert stand_in.calls("new")[-1][-2:] == ["--gpu", "T4"]
    assert not list(stand_in.sessions.iterdir())


def test_a_session_that_answers_nothing_is_asked_again(launch, stand_in):
    session = launch.Session("colab", "one", "one", [])
    session.open("cpu")
    (stand_in.folder / "mute").write_text("2")
    assert session.ask("stop") == {}
    (stand_in.folder / "mute").write_text("9")
    with pytest.raises(launch.SessionLost, match="no answer"):
        session.ask("stop")
    session.close()


def test_what_is_wrong_is_said_before_anything_is_spent(launch, stand_in, monkeypatch):
    for arguments, said in (
        (["timestep_dbn", "--timesteps", "0"], "timesteps"),
        (["timestep_dbn", "--accelerator", "T5"], "T4, L4, G4, A100, H100, cpu"),
        (["timestep_dbn", "--key", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["timestep_dbn", "--pull-every", "often"], "often"),
        ([], "run what"),
    ):
        with pytest.raises(launch.UserError, match=said):
            launch.main(arguments)
    assert not (stand_in.folder / "calls").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(launch.UserError, match="uv tool install google-colab-cli"):
        launch.main(["timestep_dbn"])


def test_the_launcher_needs_no_torch_and_shows_its_help():
    code = (
        "import sys, runpy; sys.argv = ['launch.py', '--help']; sys.path.insert(0, 'colab')\n"
        "try: runpy.run_path('colab/launch.py', run_name='__main__')\n"
        "except SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)


# The real client


CLIENT = "google-colab-cli==0.7.5"


@pytest.fixture(scope="session")
def client_environment(request):
    """The real client and a Jupyter server in an environment of their own; the client says that it wants a later Python."""
    folder = Path(request.config.cache.mkdir("colab-client"))
    if not (folder / "bin" / "jupyter-server").exists() or not (folder / "bin" / "colab").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        command = [
            folder / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--ignore-requires-python",
            CLIENT,
            "jupyter_server",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{CLIENT} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture
def real(client_environment, stand_in, tmp_path, monkeypatch):
    """`colab` on the PATH: new and stop are the stand-in's, with a loopback Jupyter server for a machine; the rest is real."""
    home = tmp_path / "home"
    (home / ".config" / "colab-cli").mkdir(parents=True)
    (home / ".config" / "colab-cli" / "settings.json").write_text('{"enable_update_check": false}')
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("CLIENT_ENVIRONMENT", str(client_environment))
    monkeypatch.setenv("KERNEL_PYTHON", sys.executable)
    client = stand_in.folder / "bin" / "colab"
    client.write_text(f'#!/bin/sh\nexec "{client_environment / "bin" / "python"}" "{STUBS / "loopback.py"}" "$@"\n')
    yield stand_in
    for server in stand_in.sessions.glob("*/server"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(server.read_text()), signal.SIGKILL)


@pytest.mark.platforms
def test_the_real_client_trains_on_a_loopback_machine(launch, real, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert launch.main(options("mine", SMALL_DBN, "--key", "HF_TOKEN", "--pull-every", "1s")) == 0, capfd.readouterr()
    run = RunFolder(tmp_path / "runs" / "mine")
    assert run.summary()["segments"][-1]["platform"] == "colab"
    whole = Drive(tmp_path / "elsewhere", "whole", SMALL_DBN, checkpoint_seconds=3600)
    assert whole() == 0
    assert_same_run(run, whole.folder)
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err
    assert not files_with(SECRET, tmp_path)
    assert not list(real.sessions.iterdir())


@pytest.mark.platforms
def test_the_real_client_ends_with_zero_after_an_error_and_that_is_no_success(launch, real, tmp_path, capfd):
    session = launch.Session(shutil.which("colab"), "one", "one", [])
    session.open("cpu")
    done = session._exec("raise ValueError('no')")
    assert done.returncode == 0
    with pytest.raises(launch.RunFailed, match="FileNotFoundError"):
        session.ask("look", run_id="one")
    session.close()
    with pytest.raises(launch.SessionLost, match="not found"):
        session.ask("look", run_id="one")


def test_nothing_of_a_workflow_stands_in_the_platform_folder():
    names = re.compile("|".join(path.stem for path in (ROOT / "notebooks").glob("*.py")))
    assert not [path for path in (ROOT / "colab").rglob("*") if path.suffix in (".py", ".md") and names.search(path.read_text())]

"""The real `colab` on a machine that is a Jupyter server on loopback; only `new` and `stop`, which need an account, are ours.

Runs in the client's own environment. The kernel is $KERNEL_PYTHON's; /content is a folder of the session.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from colab import ROOT, end_training, machine_environment

STATE = Path.home() / ".config" / "colab-cli" / "sessions.json"


def new(name):
    root = ROOT / "sessions" / name
    content, kernels = root / "content", root / "jupyter" / "kernels" / "python3"
    content.mkdir(parents=True)
    kernels.mkdir(parents=True)
    (root / "site" / "sitecustomize.py").parent.mkdir()
    (root / "site" / "sitecustomize.py").write_text(
        "import os\n"
        "for name in ('makedirs', 'chdir'):\n"
        "    def wrapped(path, *more, real=getattr(os, name), **named):\n"
        "        return real(os.environ['STAND_IN_CONTENT'] if path == '/content' else path, *more, **named)\n"
        "    setattr(os, name, wrapped)\n"
    )
    kernel = {
        "argv": [os.environ["KERNEL_PYTHON"], "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    (kernels / "kernel.json").write_text(json.dumps(kernel))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "ip": "127.0.0.1",
        "port": port,
        "port_retries": 0,
        "root_dir": root,
        "open_browser": False,
        "allow_root": True,
        "disable_check_xsrf": True,
        "allow_remote_access": False,
    }
    arguments = [f"--ServerApp.{key}={value}" for key, value in settings.items()] + ["--IdentityProvider.token="]
    environment = machine_environment(content) | {
        "PYTHONPATH": str(root / "site"),  # not in kernel.json: the kernel that trains takes its own from the kit
        "JUPYTER_PATH": str(root / "jupyter"),
        "JUPYTER_RUNTIME_DIR": str(root / "runtime"),
        "JUPYTER_CONFIG_DIR": str(root / "config"),
        "JUPYTER_PREFER_ENV_PATH": "0",
    }
    with (root / "server.log").open("w") as log:
        server = subprocess.Popen(
            [Path(os.environ["CLIENT_ENVIRONMENT"]) / "bin" / "jupyter-server", *arguments],
            env=environment,
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (root / "server").write_text(str(server.pid))
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/api/status").read()
            break
        time.sleep(0.1)
    state = json.loads(STATE.read_text()) if STATE.exists() else {}
    known = {"name": name, "token": "loopback", "url": url, "endpoint": name, "token_expires_at": "2100-01-01T00:00:00Z"}
    STATE.write_text(json.dumps(state | {name: known}))
    return 0


def stop(name):
    state = json.loads(STATE.read_text()) if STATE.exists() else {}
    if name not in state:
        print(f"[colab] Session '{name}' not found.")
        return 0
    STATE.write_text(json.dumps({key: value for key, value in state.items() if key != name}))
    root = ROOT / "sessions" / name
    end_training(root / "content")
    os.killpg(int((root / "server").read_text()), signal.SIGTERM)
    time.sleep(1)
    with suppress(ProcessLookupError):
        os.killpg(int((root / "server").read_text()), signal.SIGKILL)
    shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    with (ROOT / "calls").open("a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    if sys.argv[1] in ("new", "stop"):
        sys.exit({"new": new, "stop": stop}[sys.argv[1]](sys.argv[sys.argv.index("-s") + 1]))
    client = str(Path(os.environ["CLIENT_ENVIRONMENT"]) / "bin" / "colab")
    os.execv(client, [client, *sys.argv[1:]])

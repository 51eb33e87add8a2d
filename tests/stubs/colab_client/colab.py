"""Stands in for Google's `colab`: a session is a folder, and what is executed runs here.

Like the real one it ends with 0 after an error in what it ran. $STAND_IN_COLAB holds the sessions, `calls` with every
command line, and faults: a file `refuse` (no machine), `mute` (so many calls of exec print nothing), `gpu` (what
nvidia-smi says).
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["STAND_IN_COLAB"])


def machine_environment(content):
    return {
        "PATH": f"{ROOT / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(content.parent),
        "TMPDIR": str(content.parent),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "COLAB_RELEASE_TAG": "release",
        "STAND_IN_CONTENT": str(content),
    }


def end_training(content):
    """A machine that is given back, or lost, takes its processes along."""
    for file in content.glob("*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(file.read_text()), signal.SIGKILL)


def main(command, arguments):
    with (ROOT / "calls").open("a") as calls:
        calls.write(json.dumps([command, *arguments]) + "\n")
    name = arguments[arguments.index("-s") + 1]
    content = ROOT / "sessions" / name / "content"
    if command == "new":
        if (ROOT / "refuse").exists():
            print("[colab] Allocation refused (precondition failed).", file=sys.stderr)
            return 1
        content.mkdir(parents=True)
        print("[colab] Session READY.")
        return 0
    if not content.exists():
        print(f"[colab] Session '{name}' not found.")
        return 0 if command == "stop" else 1
    if command == "stop":
        end_training(content)
        shutil.rmtree(content.parent)
    elif command == "exec":
        mute = ROOT / "mute"
        left = int(mute.read_text()) if mute.exists() else 0
        if left:
            mute.write_text(str(left - 1))
            return 0
        subprocess.run([sys.executable, "-"], input=sys.stdin.read(), text=True, cwd=content, env=machine_environment(content))
    elif command == "upload":
        shutil.copyfile(arguments[-2], content.parent / arguments[-1])
    elif command == "download":
        shutil.copyfile(content.parent / arguments[-2], arguments[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

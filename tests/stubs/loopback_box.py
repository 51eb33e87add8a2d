"""A box on loopback: a real sshd on a port of its own, with a home folder of its own and this environment's Python."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

# What every ssh session runs instead of a login shell: the box's own home, and faults where a test asks for them.
SESSION = """#!/bin/bash
export HOME={home} TRAINBOOK_LOOPBACK_BOX={mark} PATH={path} OMP_NUM_THREADS=1 MPLBACKEND=agg LANG=C.UTF-8
cd "$HOME" || exit 1
echo "$SSH_ORIGINAL_COMMAND" >> {folder}/sessions
for fault in {folder}/fault-255-*; do
    [ -e "$fault" ] && rm "$fault" && exit 255
done
if [[ "$SSH_ORIGINAL_COMMAND" == rsync* ]]; then
    for fault in {folder}/fault-rsync-*; do
        # So many bytes of the answer, then the connection is gone.
        [ -e "$fault" ] && bytes=$(cat "$fault") && rm "$fault" && exec {python} -c '
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2], shell=True, stdout=subprocess.PIPE)
left = int(sys.argv[1])
while left > 0 and (block := os.read(process.stdout.fileno(), min(left, 4096))):
    left -= len(block)
    os.write(1, block)
process.kill()
sys.exit(255)' "$bytes" "$SSH_ORIGINAL_COMMAND"
    done
fi
exec bash -c "$SSH_ORIGINAL_COMMAND"
"""
CONFIG = """Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/authorized_keys
ForceCommand {folder}/session
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
MaxStartups 100
LogLevel VERBOSE
"""


def why_not():
    """Why no loopback box can be had here; "" when it can."""
    missing = [name for name in ("ssh", "ssh-keygen", "rsync", "flock", "setsid") if shutil.which(name) is None]
    if not Path(sshd()).is_file():
        missing.append("sshd")
    return f"not installed: {', '.join(missing)} (apt-get install openssh-server rsync)" if missing else ""


def sshd():
    return shutil.which("sshd") or "/usr/sbin/sshd"


def make_key(path):
    """A new key pair without a passphrase; returns the public key."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "loopback", "-f", path], check=True)
    return Path(f"{path}.pub").read_text().strip()


class LoopbackBox:
    """One machine that ssh reaches.

    Args:
        folder: everything of it lies there.
        public_key: the key it lets in.
        environment: of the container, as Vast sets it; ssh sessions do not inherit it.
    """

    def __init__(self, folder, public_key, environment=None):
        self.folder, self.home, self.mark = folder, folder / "home", f"{os.getpid()}-{folder.name}-{time.time_ns()}"
        self.environment = environment or {}
        self.home.mkdir(parents=True)
        make_key(folder / "host_key")
        (folder / "authorized_keys").write_text(public_key + "\n")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        values = {"home": self.home, "mark": self.mark, "path": self.path, "folder": folder, "python": sys.executable}
        (folder / "session").write_text(SESSION.replace("{}", "{{}}").format(**values))
        (folder / "session").chmod(0o755)
        (folder / "sshd_config").write_text(CONFIG.format(port=self.port, folder=folder))
        self.server = self.script = None

    def boot(self, onstart=""):
        """Start sshd, and run the start script as the container does."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        command = [sshd(), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "sshd.log").open("ab") as log:
            self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment())
        if onstart:
            (self.folder / "onstart").write_text(onstart)
            with (self.folder / "onstart.log").open("ab") as file:
                self.script = subprocess.Popen(
                    ["bash", str(self.folder / "onstart")],
                    cwd=self.home,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=self._environment() | self.environment,
                    start_new_session=True,
                )
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        raise AssertionError((self.folder / "sshd.log").read_text())

    def _environment(self):
        own = {"HOME": str(self.home), "PATH": self.path, "TRAINBOOK_LOOPBACK_BOX": self.mark, "LANG": "C.UTF-8"}
        return own | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}

    def fail(self, kind, count=1, content=""):
        """The next `count` sessions of a kind fail: "255" any, "rsync" an rsync, after so many bytes of its answer."""
        for number in range(count):
            (self.folder / f"fault-{kind}-{number}").write_text(str(content))

    def processes(self):
        """Process ids of everything that runs on this box."""
        mark, found, parents = f"TRAINBOOK_LOOPBACK_BOX={self.mark}".encode(), set(), {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    found.add(int(path.name))
        # sshd's children write their titles over their environment: known by their parent.
        grown = self.server is not None
        while grown:
            children = {number for number, parent in parents.items() if parent in {*found, self.server.pid}}
            grown = not children <= found
            found |= children
        return found

    def halt(self):
        """As when somebody pulls the plug: everything on it is killed, its disk stays."""
        for _ in range(20):
            living = self.processes()
            for number in living:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            for process in (self.server, self.script):
                if process is not None:
                    process.kill()
                    process.wait()
            self.server = self.script = None
            if not living:
                return
            time.sleep(0.05)

    def host_key(self, host="127.0.0.1"):
        """A known_hosts line."""
        return f"[{host}]:{self.port} " + (self.folder / "host_key.pub").read_text()

"""Python environments that hold what Kaggle's and Colab's images hold, and not the kit; and a machine without a network."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PREINSTALLED = Path(__file__).parent / "preinstalled"
SITE_PACKAGES = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
COLAB_FRONT_END = ("ipython", "ipykernel", "ipywidgets", "nbclient", "nbformat", "jupyter-client", "traitlets", "psutil", "pyzmq")

RUN_NOTEBOOK = {
    "kaggle": ["-m", "papermill", "--no-progress-bar", "notebook.ipynb", "executed.ipynb"],
    "colab": [
        "-c",
        "import nbclient, nbformat\n"
        "notebook = nbformat.read('notebook.ipynb', as_version=4)\n"
        "try:\n"
        "    nbclient.NotebookClient(notebook, timeout=None, kernel_name='python3').execute()\n"
        "finally:\n"
        "    nbformat.write(notebook, 'executed.ipynb')",
    ],
}
MARKS = {"kaggle": {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "colab": {"COLAB_RELEASE_TAG": "release"}}


def preinstalled(platform):
    """Name to version of what a platform's image has; "" where the version is not known."""
    lines = (PREINSTALLED / f"{platform}.txt").read_text().splitlines()
    return {name: version for name, _, version in (line.partition("==") for line in lines if line and line[0] != "#")}


def make_image(folder, platform, front_end=()):
    """A virtual environment with links to this environment's copies of what the platform has, and nothing else.

    What this environment's versions need stays, though the platform's older versions may need something else.

    Args:
        folder: the new environment.
        platform: kaggle or colab.
        front_end: distributions to install in the platform's own versions instead (needs an index or a filled cache).
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python, site = folder / "bin" / "python", folder / SITE_PACKAGES
    versions = preinstalled(platform)
    if front_end:
        pins = [f"{name}=={versions[name]}" for name in front_end]
        subprocess.run([sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *pins], check=True)
    own = {canonicalize_name(found.metadata["Name"]) for found in metadata.distributions(path=[str(site)])}
    for distribution in _closure(set(versions)) - own:
        files = metadata.distribution(distribution).files
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            source = Path(metadata.distribution(distribution).locate_file(top))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return python


def _closure(names):
    """Installed distributions among some names, and what those need."""
    found, waiting = set(), [(name, "") for name in names]
    while waiting:
        name, extra = waiting.pop()
        try:
            requirements = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        new = name not in found
        found.add(name)
        for requirement in requirements:
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            needed = canonicalize_name(requirement.name)
            if wanted and (new or extra) and (needed not in found or requirement.extras):
                waiting += [(needed, ""), *((needed, part) for part in requirement.extras if needed not in found)]
    return found


def why_not_offline():
    """Why no machine without a network and with read-only folders can be had here; "" when it can."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "unshare (util-linux) or ip (iproute2) is not installed"
    done = subprocess.run(["unshare", "-rnm", "ip", "link", "set", "lo", "up"], capture_output=True, text=True)
    return f"no network namespace here: {done.stderr.strip()}" if done.returncode else ""


def run_offline(command, working, inputs=None, **environment):
    """Run a command where there is no network but loopback, with an empty home, and with the inputs read-only."""
    script = "ip link set lo up && exec"
    if inputs is not None:
        script = f"ip link set lo up && mount --bind {inputs} {inputs} && mount -o remount,ro,bind {inputs} && exec"
        environment["TRAINBOOK_INPUTS"] = str(inputs)
    home = working.parent / "home"
    home.mkdir(exist_ok=True)
    clean = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
    return subprocess.run(
        ["unshare", "-rnm", "sh", "-c", f'{script} "$@"', "sh", *map(str, command)],
        cwd=working,
        env=clean | {"PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
    )

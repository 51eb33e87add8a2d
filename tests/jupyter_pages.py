"""A Jupyter server with a kernel that has the kit, and a browser that clicks in its notebooks as a person does."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCREENSHOTS = Path(os.environ.get("TRAINBOOK_SCREENSHOTS", REPOSITORY / "build" / "screenshots"))


def why_no_browser():
    """Why no browser can be driven here; "" when one can."""
    if not any(map(shutil.which, BROWSERS)):
        return "no Chromium here: apt-get install chromium"
    try:
        import playwright  # noqa: F401
    except ModuleNotFoundError:
        return "playwright is not installed: make test-browser installs it"
    return ""


def make_environment(folder, *packages):
    """A virtual environment with these packages, from an index or a filled cache."""
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    subprocess.run([sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *packages], check=True)
    return python


def install_kernel(folder, python):
    """A Jupyter path whose kernel `python3` runs this Python."""
    place = folder / "kernels" / "python3"
    place.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (place / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    return folder


@contextmanager
def serve(command, folder, jupyter_path, **environment):
    """A server over a folder; gives its address with its token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    options = [f"--port={port}", "--ip=127.0.0.1", "--no-browser", "--allow-root", f"--ServerApp.token={token}"]
    options += [f"--NotebookApp.token={token}", "--ServerApp.disable_check_xsrf=False"]
    with (folder.parent / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*map(str, command), *options],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "HOME": str(home),
                "JUPYTER_PATH": str(jupyter_path),
                "OMP_NUM_THREADS": "1",
                "TRAINBOOK_RUNS": str(folder / "runs"),
                **environment,
            },
        )
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{address}/api?token={token}", timeout=2).read()
                    break
                except OSError:
                    assert server.poll() is None, (folder.parent / "server.log").read_text()[-3000:]
                    time.sleep(0.2)
            yield address, token
        finally:
            server.terminate()
            server.wait(30)


@contextmanager
def browser_page(width=1250, height=1500):
    """A page of a browser without a window."""
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(120_000)
            yield page
        finally:
            browser.close()


def keep(page, name):
    """Keep what the page looks like for a person to look at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")

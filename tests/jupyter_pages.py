"""A Jupyter server with a kernel that has the kit, and a browser that clicks in its notebooks as a person does."""

import json
import os
import re
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


def install_kernel(folder, python, **environment):
    """A Jupyter path whose kernel `python3` runs this Python."""
    place = folder / "kernels" / "python3"
    place.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (place / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "Python 3", "language": "python", "env": environment})
    )
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


def wait_for_kernel(address, token):
    """Until a page has a kernel that waits for work."""
    for _ in range(600):
        sessions = json.loads(urllib.request.urlopen(f"{address}/api/sessions?token={token}", timeout=30).read())
        kernels = [session["kernel"] for session in sessions]
        if any(kernel["execution_state"] == "idle" and kernel["connections"] for kernel in kernels):
            return
        time.sleep(0.2)
    raise AssertionError(f"no kernel is ready: {sessions}")


class Lab:
    """JupyterLab's notebook, by the words on it."""

    CELL, EDITOR, PROMPT = ".jp-CodeCell", ".cm-content", ".jp-InputPrompt"

    def __init__(self, page, address, token, notebook):
        self.page = page
        page.goto(f"{address}/lab/tree/{notebook}?token={token}")
        page.locator(self.CELL).first.wait_for()
        page.get_by_role("button", name="No", exact=True).click()  # to be told Jupyter's news
        wait_for_kernel(address, token)
        page.wait_for_timeout(2000)  # a cell that is run before the page knows of the kernel asks which one to take

    def cell(self, source):
        return self.page.locator(self.CELL, has=self.page.locator(self.EDITOR, has_text=source)).first

    def run(self, source, wait=True):
        """Run the cell with this source as a person does, and give it."""
        cell = self.cell(source)
        cell.locator(self.EDITOR).first.click()
        self.page.keyboard.press("Shift+Enter")
        if wait:
            cell.locator(self.PROMPT).filter(has_text=re.compile(r"\[\d+\]")).wait_for()
        return cell


class Notebook6(Lab):
    """The classic notebook."""

    CELL, EDITOR, PROMPT = ".code_cell", ".CodeMirror", ".input_prompt"

    def __init__(self, page, address, token, notebook):
        self.page = page
        page.goto(f"{address}/notebooks/{notebook}?token={token}")
        page.locator(self.CELL).first.wait_for()
        wait_for_kernel(address, token)
        page.wait_for_timeout(5000)  # its widgets load in their own time

"""A notebook as a person uses it, in a real browser: the form, a mistake, training watched, stopped, resumed, the figures."""

import json
import os
import subprocess
import sys
import tomllib

import pytest

from tests.driving import REPOSITORY
from tests.jupyter_pages import Lab, Notebook6, browser_page, install_kernel, keep, make_environment, serve, why_no_browser
from tests.platform_images import COLAB_FRONT_END, make_image
from trainbook.records import RunFolder

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser())]
EPOCHS = 150


@pytest.fixture(params=["jupyterlab", "notebook6"])
def notebook(request, tmp_path):
    """The notebook on a page: JupyterLab with ipywidgets 8 and ipykernel 7; the classic one with Colab's 7.7.1 and 6.17.1."""
    work = tmp_path / "work"
    work.mkdir()
    content = json.loads((REPOSITORY / "notebooks" / "timestep_dbn.ipynb").read_text())
    for cell in content["cells"]:
        cell["source"] = "".join(cell["source"]).replace('preset = "laptop"', 'preset = "smoke"')
    (work / "dbn.ipynb").write_text(json.dumps(content))
    if request.param == "jupyterlab":
        server = [make_environment(tmp_path / "server", "jupyterlab>=4.4,<5", "ipywidgets>=8,<9"), "-m", "jupyterlab"]
        kernel, front_end = sys.executable, Lab
    else:
        server = [
            make_environment(tmp_path / "server", "notebook==6.5.7", "ipywidgets==7.7.1", "setuptools<81"),
            "-m",
            "notebook",
        ]
        kernel, front_end = make_image(tmp_path / "image", "colab", COLAB_FRONT_END), Notebook6
    jupyter_path = install_kernel(tmp_path / "jupyter", kernel, PYTHONPATH=str(REPOSITORY / "src"))
    with serve(server, work, jupyter_path) as (address, token), browser_page() as page:
        yield request.param, front_end(page, address, token, "dbn.ipynb"), work


def test_a_person_tunes_trains_stops_and_resumes(notebook):
    name, lab, work = notebook
    for source in ("import trainbook", "preset = ", "trainbook.start("):
        lab.run(source)

    # The form: a mistake is told beside its field, and cannot be saved.
    form = lab.run("run.config_table()")
    form.get_by_text("timesteps, schedule").click()

    def change(field, value):
        row = form.locator(".widget-hbox, .jupyter-widget-hbox").filter(has=lab.page.get_by_text(field, exact=True)).last
        row.locator("input").fill(value)
        row.locator("input").press("Tab")
        return row

    row = change("timesteps", "0")
    row.get_by_text("greater than or equal to 1").first.wait_for()
    save = form.get_by_role("button", name="Save")
    save.and_(lab.page.locator(":disabled")).wait_for()
    form.scroll_into_view_if_needed()
    keep(lab.page, f"{name}-1-mistake")
    row = change("timesteps", "4")
    row.get_by_text("the preset has '3'").first.wait_for()
    change("epochs_per_timestep", str(EPOCHS)).get_by_text("the preset has '2'").first.wait_for()
    form.get_by_role("button", name="Estimate").click()
    form.get_by_text(" parameters; ").first.wait_for()
    save.click()
    form.get_by_text("saved as run.toml").first.wait_for()
    keep(lab.page, f"{name}-2-saved")
    spec = tomllib.loads((work / "run.toml").read_text())
    assert (spec["workflow"], spec["preset"]) == ("timestep_dbn", "smoke")
    assert spec["overrides"] == {"timesteps": 4, "epochs_per_timestep": EPOCHS}

    # Training: watched while the cell runs, stopped, resumed.
    for source in ("run.load_data()", "run.build()"):
        lab.run(source)
    cell = lab.run("run.train()", wait=False)
    cell.locator("svg polyline").first.wait_for()
    cell.get_by_text("chain ·").first.wait_for()
    cell.scroll_into_view_if_needed()
    keep(lab.page, f"{name}-3-training")
    cell.get_by_role("button", name="Stop").click()
    cell.get_by_text("stopped at step").first.wait_for()
    keep(lab.page, f"{name}-4-stopped")
    (path,) = (work / "runs").glob("*/run.json")
    folder = RunFolder(path.parent)
    stopped = folder.summary()
    assert (stopped["status"], stopped["why"]) == ("stopped", "Stop was pressed")
    assert 0 < stopped["step"] < stopped["total_steps"]
    cell.get_by_role("button", name="Resume").click()
    cell.get_by_text("complete at step").first.wait_for()
    keep(lab.page, f"{name}-5-resumed")

    # The figures.
    for source in ("run.curves()", "run.evaluate()", "run.draw()"):
        cell = lab.run(source)
        cell.locator("img").first.wait_for()
    assert cell.locator("img").count() >= 4
    cell.scroll_into_view_if_needed()
    keep(lab.page, f"{name}-6-figures")
    lab.run("run.finish()").get_by_text("complete: ").first.wait_for()
    summary = folder.summary()
    assert summary["status"] == "complete"
    assert [segment["first_step"] for segment in summary["segments"]] == [0, stopped["step"]]

    # What the form saved is what every launcher reads: headless it gives the same records.
    environment = {**os.environ, "TRAINBOOK_RUNS": str(work / "headless"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainbook", "run", "--spec", "run.toml"]
    subprocess.run(command, cwd=work, env=environment, check=True, capture_output=True)
    (path,) = (work / "headless").glob("*/run.json")
    assert RunFolder(path.parent).metrics.read_bytes() == folder.metrics.read_bytes()

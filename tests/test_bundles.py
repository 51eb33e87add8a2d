"""Bundles: the same bytes each time, nothing unpacked that is not the kit, and a run where there is nothing but the platform."""

import base64
import bz2
import csv
import hashlib
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from tests import platform_images
from tests.driving import Drive, assert_same_run
from trainbook import bundles, catalog, records
from trainbook.__main__ import main
from trainbook.bootstrap import find_wheel, unpack, unpack_wheel
from trainbook.errors import UserError
from trainbook.records import RunFolder
from trainbook.spec import RunSpec

ROOT = Path(__file__).resolve().parents[1]
NAMES = catalog.names()
SPEC = RunSpec(workflow="timestep_dbn", preset="smoke", overrides={"timesteps": 4}, run_id="mine", time_budget="5h")

# Appended to a bundle: where the kit of the kernel and of its children comes from, and what network there is.
PROOF = """
import socket, subprocess, sys
child = subprocess.run([sys.executable, "-c", "import trainbook; print(trainbook.__file__)"], capture_output=True, text=True)
print(trainbook.__file__, child.stdout.strip(), [name for _, name in socket.if_nameindex()], sep="\\n")
"""


def embedded(files):
    """A kit as the first cell holds it, and its digest."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return base64.b64encode(bz2.compress(buffer.getvalue())).decode(), hashlib.sha256(buffer.getvalue()).hexdigest()


def read(notebook):
    return nbformat.reads(notebook.decode(), as_version=4)


# The wheel


def test_the_wheel_is_what_setuptools_builds(tmp_path):
    """Same files with the same content, same metadata; setuptools adds its name and the README."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, copy)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=copy, check=True, capture_output=True)
    theirs = zipfile.ZipFile(tmp_path / bundles.WHEEL_NAME)
    ours = zipfile.ZipFile(bundles.build_wheel(tmp_path / "ours"))
    package = {name for name in theirs.namelist() if name.startswith("trainbook/")}
    assert package == {name for name in ours.namelist() if name.startswith("trainbook/")}
    assert all(theirs.read(name) == ours.read(name) for name in package)
    described = f"trainbook-{bundles.__version__}.dist-info"
    assert theirs.read(f"{described}/entry_points.txt").strip() == ours.read(f"{described}/entry_points.txt").strip()
    texts = [archive.read(f"{described}/METADATA").decode() for archive in (theirs, ours)]
    requirements = [
        {platform_images.Requirement(line.split(": ", 1)[1]) for line in text.splitlines() if line.startswith("Requires-Dist")}
        for text in texts
    ]
    assert {requirement for requirement in requirements[0] if requirement.marker is None} == requirements[1]
    fields = [{line for line in text.splitlines() if line.startswith(("Name", "Version", "Summary"))} for text in texts]
    assert fields[0] == fields[1]


def test_the_record_names_every_file_with_its_digest():
    with zipfile.ZipFile(io.BytesIO(bundles.wheel())) as archive:
        rows = list(csv.reader(archive.read(f"trainbook-{bundles.__version__}.dist-info/RECORD").decode().splitlines()))
        assert sorted(row[0] for row in rows) == archive.namelist() == sorted(set(archive.namelist()))
        for name, digest, size in rows[:-1]:
            content = archive.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={expected}", len(content))


def test_the_wheel_does_not_depend_on_file_times_modes_folder_or_bytecode(tmp_path, monkeypatch):
    expected = bundles.wheel()
    shutil.copytree(ROOT / "src", tmp_path / "elsewhere" / "src")
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / "elsewhere")
    package = tmp_path / "elsewhere" / "src" / "trainbook"
    for number, path in enumerate(package.rglob("*.py")):
        os.utime(path, (1e9 + number, 1e9 + number))
        path.chmod(0o755 if number % 2 else 0o600)
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "run.cpython-311.pyc").write_bytes(b"x")
    (package / ".run.py.swp").write_bytes(b"x")
    monkeypatch.setattr(bundles, "PACKAGE", package)
    assert bundles.wheel() == expected
    (package / "run.py").write_text("changed = True\n")
    assert bundles.wheel() != expected


def test_an_installed_kit_builds_the_same_wheel_and_says_what_it_lacks_for_a_notebook(tmp_path):
    """The kit unpacked from its own wheel, away from any checkout."""
    folder = unpack(*embedded_kit(), tmp_path)
    code = (
        "import sys, hashlib, trainbook.bundles as b; print(hashlib.sha256(b.wheel()).hexdigest());"
        "from trainbook.spec import RunSpec; b.build_notebook('colab', RunSpec(workflow='timestep_dbn'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(bundles.wheel()).hexdigest()
    assert "work in a clone of the repository" in done.stderr


# The first cell


def embedded_kit():
    return base64.b64encode(bz2.compress(bundles.wheel())).decode(), hashlib.sha256(bundles.wheel()).hexdigest()


def test_a_kit_is_unpacked_once_for_this_user_only(tmp_path):
    text, digest = embedded({"trainbook/__init__.py": "value = 1", "trainbook/deep/file.txt": "two"})
    folder = unpack(text, digest, tmp_path)
    assert folder.name == f"trainbook-{digest[:16]}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "trainbook/deep/file.txt").read_text() == "two"
    before = (folder / "trainbook/__init__.py").stat().st_mtime_ns
    assert unpack("\n" + text[:30] + "\n" + text[30:] + "\n", digest, tmp_path) == folder
    assert (folder / "trainbook/__init__.py").stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("position", [0, 0.3, 0.7, 0.95])  # the last bits only pad
def test_damaged_text_is_refused_and_nothing_is_unpacked(position, tmp_path):
    text, digest = embedded({"trainbook/__init__.py": "x = 1\n" * 500})
    index = int(position * len(text))
    other = "A" if text[index] != "A" else "B"
    for damaged in (text[:index] + other + text[index + 1 :], text[:index], text[:index] + "!" + text[index:]):
        with pytest.raises(ValueError, match="damaged"):
            unpack(damaged, digest, tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_kit_than_the_digest_says_is_refused(tmp_path):
    text, _ = embedded({"trainbook/__init__.py": "print('mine now')"})
    with pytest.raises(ValueError, match="damaged"):
        unpack(text, embedded({"trainbook/__init__.py": ""})[1], tmp_path)


@pytest.mark.parametrize(
    "name", ["../outside.py", "/outside.py", "trainbook/../../outside.py", "..\\outside.py", "C:/outside.py"]
)
def test_a_file_outside_the_folder_is_refused_and_nothing_is_unpacked(name, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="outside"):
        unpack(*embedded({"trainbook/__init__.py": "", name: "bad"}), tmp_path / "in")
    assert [path.name for path in tmp_path.rglob("*")] == ["in"]


@pytest.mark.parametrize("harm", ["half", "changed", "open to others", "a link", "a file"])
def test_what_lies_there_under_the_same_name_is_not_trusted(harm, tmp_path):
    text, digest = embedded({"trainbook/__init__.py": "value = 1", "trainbook/other.py": "value = 2"})
    folder = unpack(text, digest, tmp_path)
    if harm == "half":
        (folder / "trainbook/other.py").unlink()
    elif harm == "changed":
        (folder / "trainbook/other.py").write_text("value = 3")
    elif harm == "open to others":
        folder.chmod(0o777)
    elif harm == "a link":
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
    else:
        shutil.rmtree(folder)
        folder.write_text("")
    again = unpack(text, digest, tmp_path)
    assert again != folder
    assert (again / "trainbook/other.py").read_text() == "value = 2"


def test_another_kit_in_use_is_said(tmp_path):
    folder = unpack(*embedded_kit(), tmp_path)
    code = f"import trainbook; from trainbook.bootstrap import import_kit; import_kit({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another trainbook is in use" in done.stderr
    assert "restart the kernel" in done.stderr


@pytest.mark.parametrize("layout", ["some-files", "datasets/someone/some-files"])
def test_a_kit_in_an_attached_data_set_is_found_by_its_digest(layout, tmp_path):
    (tmp_path / "inputs" / "other").mkdir(parents=True)
    (tmp_path / "inputs" / "other" / bundles.WHEEL_NAME).write_bytes(b"an older kit")
    _, digest = embedded_kit()
    with pytest.raises(FileNotFoundError, match="add it as an input"):
        find_wheel(bundles.WHEEL_NAME, digest, tmp_path / "inputs")
    wheel = bundles.build_wheel(tmp_path / "inputs" / layout)
    found = find_wheel(bundles.WHEEL_NAME, digest, tmp_path / "inputs")
    assert found == wheel.read_bytes()
    assert unpack_wheel(found, digest, tmp_path) == unpack(*embedded_kit(), tmp_path)


def test_a_notebook_without_the_kit_is_small_and_names_the_wheel_it_needs():
    notebook = bundles.build_notebook("kaggle", SPEC, carry_kit=False)
    assert len(notebook) < 100_000 < len(bundles.build_notebook("kaggle", SPEC))
    first = next(cell.source for cell in read(notebook).cells if "bootstrap" in cell.metadata.get("tags", []))
    assert bundles.WHEEL_NAME in first
    assert hashlib.sha256(bundles.wheel()).hexdigest() in first
    assert "time_budget='5h'" in first


# Notebooks and boxes


@pytest.mark.parametrize("platform", ["kaggle", "colab"])
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_one_valid_file_with_the_same_bytes_each_time(platform, name):
    spec = SPEC.model_copy(update={"workflow": name, "overrides": {"seed": 3}})
    built = bundles.build_notebook(platform, spec)
    assert built == bundles.build_notebook(platform, spec)
    assert len(built) < bundles.MAX_NOTEBOOK_BYTES == 900_000
    notebook = read(built)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info.name == "python"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert not [line for cell in cells for line in cell.source.splitlines() if line.lstrip().startswith(("!", "%", "pip"))]
    assert max(len(line) for line in cells[0].source.splitlines()) <= 20_000
    # Beside the first cell and the parameters, it is the notebook of the source tree.
    source = [cell.source for cell in read((ROOT / "notebooks" / f"{name}.ipynb").read_bytes()).cells]
    changed = [cell for cell in notebook.cells if cell.source not in source]
    drive = [["drive"]] if platform == "colab" else []
    assert [cell.metadata.tags for cell in changed] == [["bootstrap"], *drive, ["injected-parameters"]]
    given = {}
    exec(changed[-1].source, given)
    assert {key: given[key] for key in ("preset", "overrides", "run_id")} == {
        "preset": "smoke",
        "overrides": {"seed": 3},
        "run_id": "mine",
    }


def test_what_the_notebook_says_already_is_not_said_again():
    notebook = read(bundles.build_notebook("colab", RunSpec(workflow="timestep_dbn")))
    assert not [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]


def test_platform_metadata():
    kaggle = read(bundles.build_notebook("kaggle", SPEC)).metadata.kaggle
    assert (kaggle.accelerator, kaggle.isGpuEnabled, kaggle.isInternetEnabled) == ("nvidiaTeslaT4", True, False)
    colab = read(bundles.build_notebook("colab", SPEC)).metadata
    assert (colab.accelerator, colab.colab.gpuType) == ("GPU", "T4")
    plain = SPEC.model_copy(update={"accelerator": "cpu"})
    assert read(bundles.build_notebook("kaggle", plain)).metadata.kaggle.accelerator == "none"
    assert "accelerator" not in read(bundles.build_notebook("colab", plain)).metadata
    assert read(bundles.build_notebook("colab", SPEC.model_copy(update={"accelerator": "L4"}))).metadata.colab.gpuType == "L4"
    with pytest.raises(UserError, match="choose T4"):
        bundles.build_notebook("kaggle", SPEC.model_copy(update={"accelerator": "H100"}))


def test_a_notebook_that_is_too_large_names_what_to_make_smaller(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "src", tmp_path / "src")
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "src/trainbook/workflows/pictures.bin").write_bytes(os.urandom(650_000))
    monkeypatch.setattr(bundles, "PACKAGE", tmp_path / "src" / "trainbook")
    with pytest.raises(UserError, match=r"make these smaller: workflows/pictures.bin 8\d\d kB, "):
        bundles.build_notebook("kaggle", SPEC)


def test_an_authentic_bundle_needs_an_unchanged_kit_and_says_which_one_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "git_revision", lambda: "abc+changes")
    with pytest.raises(UserError, match="unchanged kit"):
        bundles.build_notebook("colab", SPEC.model_copy(update={"authentic": True}))
    monkeypatch.setattr(records, "git_revision", lambda: "abc")
    box = bundles.build_box(SPEC.model_copy(update={"authentic": True}), tmp_path / "box")
    code = "from trainbook.records import check_unchanged; print(check_unchanged())"
    environment = {**os.environ, "PYTHONPATH": str(unzipped(box / bundles.WHEEL_NAME, tmp_path / "kit"))}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout == "abc\n"


def unzipped(wheel, folder):
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_a_box_folder_is_complete_checked_and_the_same_each_time(tmp_path):
    boxes = [bundles.build_box(SPEC, tmp_path / name) for name in ("one", "two")]
    contents = [{path.name: path.read_bytes() for path in sorted(box.iterdir())} for box in boxes]
    assert contents[0] == contents[1]
    assert {"timestep_dbn.ipynb", "run.toml", "requirements.txt", "SHA256SUMS", bundles.WHEEL_NAME} == set(contents[0])
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=boxes[0], check=True)
    assert len(contents[0]["SHA256SUMS"].splitlines()) == len(contents[0]) - 1
    assert RunSpec.read(boxes[0] / "run.toml") == SPEC
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    stated = [platform_images.Requirement(line).name for line in lines if line]
    assert contents[0]["requirements.txt"].decode().split() == stated


def test_files_that_the_config_names_are_taken_along_under_the_same_path(tmp_path):
    Path("mine/weights").mkdir(parents=True)
    Path("mine/images.npz").write_bytes(b"images")
    Path("mine/weights/dbn.safetensors").write_bytes(b"weights")
    named = {"dataset": "file", "data_file": "mine/images.npz", "initial_weights": "mine/weights"}
    spec = SPEC.model_copy(update={"overrides": named})
    box = bundles.build_box(spec, tmp_path / "box")
    assert (box / "mine/images.npz").read_bytes() == b"images"
    assert (box / "mine/weights/dbn.safetensors").read_bytes() == b"weights"
    assert RunSpec.read(box / "run.toml").config() == spec.config()
    (box / "mine/images.npz").write_bytes(b"broken")
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=box, capture_output=True, text=True)
    assert "mine/images.npz: FAILED" in checked.stdout


@pytest.mark.parametrize(
    ("path", "complaint"),
    [("gone.npz", "no such file"), ("../images.npz", "not be found on the box"), ("{here}", "not be found")],
)
def test_a_file_that_cannot_be_taken_along_is_said_before_a_box_is_paid_for(path, complaint, tmp_path):
    here = tmp_path.parent / "images.npz"
    here.write_bytes(b"images")
    spec = SPEC.model_copy(update={"overrides": {"dataset": "file", "data_file": path.format(here=here)}})
    with pytest.raises(UserError, match=complaint):
        bundles.build_box(spec, tmp_path / "box")
    assert not (tmp_path / "box").exists()


def test_a_notebook_names_files_of_its_platform_only(tmp_path):
    (tmp_path / "images.npz").write_bytes(b"images")
    for path in ("images.npz", str(tmp_path / "images.npz")):
        spec = SPEC.model_copy(update={"overrides": {"dataset": "file", "data_file": path}})
        with pytest.raises(UserError, match=r"upload it to a Kaggle data set and give the path it has there, /kaggle/input"):
            bundles.build_notebook("kaggle", spec)
    there = SPEC.model_copy(update={"overrides": {"dataset": "file", "data_file": "/kaggle/input/mine/images.npz"}})
    assert b"/kaggle/input/mine/images.npz" in bundles.build_notebook("kaggle", there)


def test_the_command_writes_each_kind_without_torch(tmp_path, capsys):
    for platform in ("kaggle", "colab", "vastai"):
        assert main(["bundle", platform, "timestep_dbn", "--preset", "smoke", "--timesteps", "4", "--run-id", "mine"]) == 0
    assert sorted(path.name for path in (tmp_path / "dist").iterdir()) == [
        "timestep_dbn-colab.ipynb",
        "timestep_dbn-kaggle.ipynb",
        "timestep_dbn-vastai",
    ]
    expected = SPEC.model_copy(update={"time_budget": ""})
    assert (tmp_path / "dist" / "timestep_dbn-kaggle.ipynb").read_bytes() == bundles.build_notebook("kaggle", expected)
    assert RunSpec.read(tmp_path / "dist" / "timestep_dbn-vastai" / "run.toml") == expected
    assert main(["bundle", "kaggle", "timestep_dbn", "--timesteps", "0"]) == 2
    assert "timesteps = '0'" in capsys.readouterr().err
    code = (
        "import sys; from trainbook.__main__ import main\n"
        "assert main(['bundle', 'colab', 'timestep_dbn']) == main(['bundle', 'vastai', 'timestep_dbn']) == 0\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# Where there is nothing but the platform


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    if reason := platform_images.why_not_offline():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("images")
    return {platform: platform_images.make_image(folder / platform, platform) for platform in ("kaggle", "colab")}


def execute(python, platform, name, folder, inputs=None):
    """Run a workflow's bundle at smoke as the platform does; returns its run folder, after proof of where it ran."""
    notebook = read(bundles.build_notebook(platform, RunSpec(workflow=name, preset="smoke", run_id="mine")))
    notebook.cells.append(nbformat.v4.new_code_cell(PROOF))
    working = folder / "working"
    working.mkdir(parents=True)
    nbformat.write(notebook, working / "notebook.ipynb")
    command = [python, *platform_images.RUN_NOTEBOOK[platform]]
    done = platform_images.run_offline(command, working, inputs, **platform_images.MARKS[platform])
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = nbformat.read(working / "executed.ipynb", as_version=4).cells[-1].outputs
    output = "".join(part.text for part in outputs).splitlines()  # a slow machine hands them over in parts
    kit = folder / "home" / f"trainbook-{hashlib.sha256(bundles.wheel()).hexdigest()[:16]}" / "trainbook" / "__init__.py"
    assert output == [str(kit), str(kit), "['lo']"]
    summary = RunFolder(working / "runs" / "mine").summary()
    assert summary["status"] == "complete", summary["why"]
    assert summary["segments"][-1]["platform"] == platform
    return RunFolder(working / "runs" / "mine")


@pytest.fixture(scope="module", params=NAMES)
def colab_run(request, images, tmp_path_factory):
    """A workflow's bundle, run from its beginning to its end as on Colab."""
    return execute(images["colab"], "colab", request.param, tmp_path_factory.mktemp("colab"))


def test_the_images_hold_neither_the_kit_nor_papermill_on_colab(images, tmp_path):
    for platform, missing in (("kaggle", {"trainbook", "pre_commit"}), ("colab", {"trainbook", "papermill"})):
        code = f"import importlib.util as u; print(sorted(n for n in {sorted(missing)} if u.find_spec(n) is None))"
        done = subprocess.run([images[platform], "-P", "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True)
        assert done.stdout.strip() == str(sorted(missing))


def test_everything_that_the_kit_needs_is_on_both_platforms_except_what_only_the_command_line_uses():
    needed = {platform_images.canonicalize_name(name) for name in bundles.requirement_names()}
    assert needed - set(platform_images.preinstalled("kaggle")) == set()
    assert needed - set(platform_images.preinstalled("colab")) == {"papermill"}


def test_a_bundle_runs_on_colab_without_a_network(colab_run):
    assert len(colab_run.summary()["segments"]) == 1
    assert colab_run.report.is_file()


LAYOUTS = ("notebooks/someone/earlier-part/runs", "earlier-part/runs")


# Where a run is found does not depend on whose it is, nor what a bundle holds on where it runs: by default every other workflow
# goes on, in either layout in turn.
@pytest.mark.parametrize("layout", [LAYOUTS[0], pytest.param(LAYOUTS[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "colab_run", [*NAMES[::2], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1::2])], indirect=True
)
def test_a_bundle_goes_on_on_kaggle_from_a_read_only_input_bit_for_bit(layout, colab_run, images, tmp_path):
    name, steps = colab_run.summary()["workflow"], colab_run.summary()["total_steps"]
    if NAMES.index(name) // 2 % 2:
        layout = LAYOUTS[1 - LAYOUTS.index(layout)]
    stopped = Drive(tmp_path / "inputs" / layout, "mine", {}, name, signal_step=steps // 2, signal_number=signal.SIGTERM)
    assert stopped() == 0
    assert stopped.folder.summary()["status"] == "stopped"
    finished = execute(images["kaggle"], "kaggle", name, tmp_path / "session", tmp_path / "inputs")
    assert finished.summary()["segments"][-1]["first_step"] >= steps // 2
    assert stopped.folder.summary()["status"] == "stopped"
    assert_same_run(finished, colab_run)


def test_a_box_folder_runs_with_no_source_tree_and_once_only(images, tmp_path):
    box = bundles.build_box(SPEC.model_copy(update={"overrides": {}}), tmp_path / "box")
    kit = unzipped(box / bundles.WHEEL_NAME, tmp_path / "kit")
    command = [images["kaggle"], "-m", "trainbook", "run", "--spec", "run.toml"]
    done = platform_images.run_offline(command, box, PYTHONPATH=str(kit))
    assert done.returncode == 0, done.stdout + done.stderr
    written = RunFolder(box / "runs" / "mine").run_json.read_bytes()
    assert RunFolder(box / "runs" / "mine").summary()["status"] == "complete"
    again = platform_images.run_offline(command, box, PYTHONPATH=str(kit))
    assert (again.returncode, RunFolder(box / "runs" / "mine").run_json.read_bytes()) == (0, written), again.stderr


@pytest.mark.platforms
@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_runs_with_the_front_end_of_colab(name, tmp_path):
    """IPython 7.34 and ipywidgets 7.7.1 in their own versions; installs them."""
    if reason := platform_images.why_not_offline() or (importlib.util.find_spec("uv") is None and "uv is not installed"):
        pytest.skip(reason)
    python = platform_images.make_image(tmp_path / "image", "colab", platform_images.COLAB_FRONT_END)
    code = "import IPython, ipywidgets, ipykernel; print(IPython.__version__, ipywidgets.__version__, ipykernel.__version__)"
    versions = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True).stdout
    assert versions == "7.34.0 7.7.1 6.17.1\n"
    execute(python, "colab", name, tmp_path / "session")

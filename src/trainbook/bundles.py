"""Everything a run needs, in one file or one folder: a notebook that carries the kit, or a folder for a rented box.

The same sources give the same bytes on every machine. Needs no torch.
"""

import ast
import base64
import bz2
import hashlib
import io
import re
import shutil
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat

from trainbook import __version__, bootstrap, catalog
from trainbook.errors import UserError
from trainbook.execution import with_parameters
from trainbook.files import file_sha256
from trainbook.records import REVISION_FILE, check_unchanged
from trainbook.spec import RunSpec

PACKAGE = Path(__file__).resolve().parent
WHEEL_NAME = f"trainbook-{__version__}-py3-none-any.whl"
FIXED_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file knows
FILE_MODE = 0o100644 << 16
LINE_CHARACTERS = 20_000
MAX_NOTEBOOK_BYTES = 900_000  # Kaggle refuses a source of 1 MB
CHECKSUMS_FILE, SPEC_FILE, REQUIREMENTS_FILE = "SHA256SUMS", "run.toml", "requirements.txt"

STORES = {
    "kaggle": "a Kaggle data set and give the path it has there, /kaggle/input/...",
    "colab": "Drive and give the path it has there, /content/drive/MyDrive/...",
}
KAGGLE_ACCELERATORS = {"": "nvidiaTeslaT4", "T4": "nvidiaTeslaT4", "cpu": "none"}  # a T4 there means two of them

# The notebook's own text for the two lines that differ between kits; the rest of the cell is bootstrap.py.
CELL = '''# @title The kit, trainbook {version}: run this cell and go on
{bootstrap}

KIT = """
{lines}
"""
import_kit(unpack(KIT, "{sha256}"){settings})
import trainbook
'''
CELL_WITHOUT_KIT = """# @title The kit, trainbook {version}, from an attached data set: run this cell and go on
{bootstrap}

import_kit(unpack_wheel(find_wheel("{wheel}", "{sha256}", Path("/kaggle/input")), "{sha256}"){settings})
import trainbook
"""


class NotebookTooLarge(UserError):  # noqa: N818  (the state of the notebook)
    """A notebook that the platform would refuse; on Kaggle the kit can travel beside it, in a private data set."""


# Colab takes the machine's disk away when it disconnects.
DRIVE_CELL = """# @title Keep the run on Drive: allow it when asked; after a disconnect, run all cells again
# To train without Drive, leave out the line with keep_on_drive. Keys come from Colab's key icon and are never shown.
from trainbook import colab

colab.keep_on_drive("trainbook")  # a folder in My Drive
colab.take_secrets("HF_TOKEN")"""


def wheel(revision: str = "") -> bytes:
    """The kit as a wheel, byte for byte the same from the same sources: sorted, fixed dates and modes, stored.

    Stored, because compressed bytes differ between builds of zlib. Made from the package as it lies here, so a checkout
    and an installed kit both can.

    Args:
        revision: the git revision that the wheel shall say it is; runs that must be authentic need one.
    """
    files = {f"trainbook/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes() for path in _sources()}
    if revision:
        files[f"trainbook/{REVISION_FILE}"] = revision.encode()
    described = f"trainbook-{__version__}.dist-info"
    files |= {f"{described}/{name}": text.encode() for name, text in _metadata().items()}
    files[f"{described}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: trainbook\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_record_digest(content)},{len(content)}" for name, content in sorted(files.items())]
    files[f"{described}/RECORD"] = "\n".join([*record, f"{described}/RECORD,,"]).encode() + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, FIXED_DATE)
            entry.create_system, entry.external_attr = 3, FILE_MODE  # as on Unix, wherever it is built
            archive.writestr(entry, content)
    return buffer.getvalue()


def build_wheel(out: Path, revision: str = "") -> Path:
    """Write the wheel into a folder and return its path."""
    out.mkdir(parents=True, exist_ok=True)
    (out / WHEEL_NAME).write_bytes(wheel(revision))
    return out / WHEEL_NAME


def build_notebook(platform: str, spec: RunSpec, carry_kit: bool = True) -> bytes:
    """The workflow's notebook as one file that needs neither pip nor a network, for Kaggle or Colab.

    Args:
        platform: kaggle or colab.
        spec: its config goes into the notebook as papermill would put it there, its settings into the first cell.
        carry_kit: False leaves the kit out; the first cell then takes the wheel from a data set attached on Kaggle.

    Raises:
        NotebookTooLarge: over 900 kB.
        UserError: for an unknown platform or accelerator, or an authentic run of a changed kit.
    """
    if platform not in ("kaggle", "colab"):
        raise UserError(f"there is no notebook for {platform!r}", "choose kaggle or colab; a box takes `build_box`")
    for name, path in _files_here(spec):
        raise UserError(
            f"{name} = {str(path)!r} is a path of this machine, and a notebook carries no files",
            f"upload it to {STORES[platform]}",
        )
    notebook = _notebook(spec)
    content = kit_of(spec)
    text = base64.b64encode(bz2.compress(content)).decode()
    settings = "".join(f", {name}={value!r}" for name, value in spec.settings().items() if value)
    cell = notebook.cells[_tagged(notebook, "bootstrap")]
    cell.source = (
        (CELL if carry_kit else CELL_WITHOUT_KIT)
        .format(
            wheel=WHEEL_NAME,
            version=__version__,
            bootstrap=Path(bootstrap.__file__).read_text().partition('"""\n\n')[2].strip(),
            lines="\n".join(text[at : at + LINE_CHARACTERS] for at in range(0, len(text), LINE_CHARACTERS)),
            sha256=hashlib.sha256(content).hexdigest(),
            settings=settings,
        )
        .rstrip()
    )
    # Folded away in JupyterLab, on Kaggle and in Colab.
    cell.metadata |= {"jupyter": {"source_hidden": True}, "_kg_hide-input": True, "cellView": "form"}
    if platform == "colab":
        drive = nbformat.v4.new_code_cell(DRIVE_CELL, id="drive", metadata={"tags": ["drive"]})
        notebook.cells.insert(_tagged(notebook, "bootstrap") + 1, drive)
    notebook.metadata.pop("jupytext", None)  # there is no .py beside it to pair with
    notebook.metadata |= _platform_metadata(platform, spec.accelerator)
    nbformat.validate(notebook)
    written = (nbformat.writes(notebook) + "\n").encode()
    if len(written) > MAX_NOTEBOOK_BYTES:
        raise NotebookTooLarge(
            f"the notebook has {len(written) / 1000:.0f} kB; {platform} is given {MAX_NOTEBOOK_BYTES / 1000:.0f} kB at most",
            "make these smaller: " + ", ".join(f"{name} {size / 1000:.0f} kB" for name, size in _largest_parts(notebook)),
        )
    return written


def kit_of(spec: RunSpec) -> bytes:
    """The wheel that a run of this spec carries; that of an authentic run says which git revision it is.

    Raises:
        UserError: when an authentic run of a changed kit is asked for.
    """
    return wheel(check_unchanged() if spec.authentic else "")


def build_box(spec: RunSpec, out: Path) -> Path:
    """Write the folder that a box with ssh needs, and return it.

    It holds the wheel, the notebook, run.toml (with a run id), requirements.txt (plain names, so that pip leaves the
    versions of the box's image alone), the files that the config names, and SHA256SUMS over all of them. On the box, in
    that folder: `pip install --no-deps *.whl`, `pip install -r requirements.txt`, `trainbook run --spec run.toml`.

    Args:
        spec: what to run.
        out: the folder; files of these names in it are replaced.

    Raises:
        UserError: when an authentic run of a changed kit is asked for, or a file that the config names cannot be taken along.
    """
    spec = spec.named()
    source = catalog.load(spec.workflow).notebook
    taken = _take_along(spec, out)
    built = build_wheel(out, check_unchanged() if spec.authentic else "")
    shutil.copyfile(source, out / source.name)
    spec.write(out / SPEC_FILE)
    (out / REQUIREMENTS_FILE).write_text("\n".join(requirement_names()) + "\n")
    names = sorted([built.name, source.name, SPEC_FILE, REQUIREMENTS_FILE, *taken])
    (out / CHECKSUMS_FILE).write_text("".join(f"{file_sha256(out / name)}  {name}\n" for name in names))
    return out


def _files_here(spec: RunSpec) -> list[tuple[str, Path]]:
    """The config's fields that name a file or folder of this machine; an absolute path that is not here is the other's."""
    config = spec.config()
    paths = [(name, Path(getattr(config, name))) for name in config.FILE_FIELDS if getattr(config, name)]
    return [(name, path) for name, path in paths if path.exists() or not path.is_absolute()]


def _take_along(spec: RunSpec, out: Path) -> list[str]:
    """Copy what the config names under the same relative path, so that the config stays the same; returns the files' names."""
    names = []
    for name, path in _files_here(spec):
        if not path.exists():
            raise UserError(f"{name} = {str(path)!r}: there is no such file here to take along", "give its path from this folder")
        if path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"{name} = {str(path)!r} would not be found on the box",
                "start from the folder that holds it and give its path from there: it is taken along",
            )
        for file in [path] if path.is_file() else sorted(part for part in path.rglob("*") if part.is_file()):
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / file)
            names.append(file.as_posix())
    return names


def requirement_names() -> list[str]:
    """Names of the packages the kit needs at run time, without versions."""
    lines = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", _metadata()["METADATA"], re.MULTILINE)
    return [name for name, rest in lines if "extra ==" not in rest]


def _sources() -> list[Path]:
    paths = (path for path in PACKAGE.rglob("*") if path.is_file() and path.name != REVISION_FILE)
    hidden = ("__pycache__", ".")
    return sorted(path for path in paths if not any(part.startswith(hidden) for part in path.relative_to(PACKAGE).parts))


def _metadata() -> dict[str, str]:
    """METADATA and entry_points.txt: from pyproject.toml in a checkout, as they were installed elsewhere."""
    project_file = PACKAGE.parents[1] / "pyproject.toml"
    project = tomllib.loads(project_file.read_text())["project"] if project_file.is_file() else {}
    if project.get("name") != "trainbook":
        try:
            installed = metadata.distribution("trainbook")
        except metadata.PackageNotFoundError:
            raise UserError(f"{PACKAGE} is neither a checkout nor installed", "work in a clone of the repository") from None
        return {name: installed.read_text(name) for name in ("METADATA", "entry_points.txt")}
    requirements = (line.partition("#")[0].strip() for line in (PACKAGE.parents[1] / "requirements.txt").read_text().splitlines())
    lines = [
        "Metadata-Version: 2.1",
        "Name: trainbook",
        f"Version: {__version__}",
        f"Summary: {project['description']}",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {requirement}" for requirement in requirements if requirement),
    ]
    scripts = [f"{name} = {target}" for name, target in project["scripts"].items()]
    return {"METADATA": "\n".join(lines) + "\n", "entry_points.txt": "\n".join(["[console_scripts]", *scripts]) + "\n"}


def _record_digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _notebook(spec: RunSpec) -> nbformat.NotebookNode:
    """The workflow's notebook with the spec's parameters, as far as they differ from what its `parameters` cell says."""
    notebook = nbformat.read(catalog.load(spec.workflow).notebook, as_version=4)
    cell = ast.parse(notebook.cells[_tagged(notebook, "parameters")].source)
    declared = {statement.targets[0].id: ast.literal_eval(statement.value) for statement in cell.body}
    changed = {name: value for name, value in spec.parameters().items() if value != declared[name]}
    return with_parameters(notebook, changed) if changed else notebook


def _tagged(notebook: nbformat.NotebookNode, tag: str) -> int:
    return next(index for index, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", []))


def _platform_metadata(platform: str, accelerator: str) -> dict[str, Any]:
    common = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
    }
    if platform == "colab":
        gpu = {} if accelerator == "cpu" else {"accelerator": "GPU"}
        return common | gpu | {"colab": {"provenance": [], **({"gpuType": accelerator or "T4"} if gpu else {})}}
    if accelerator not in KAGGLE_ACCELERATORS:
        raise UserError(f"Kaggle has no accelerator {accelerator!r} for everyone", "choose T4 (there are two) or cpu")
    return common | {
        "kaggle": {
            "accelerator": KAGGLE_ACCELERATORS[accelerator],
            "dataSources": [],
            "isGpuEnabled": accelerator != "cpu",
            "isInternetEnabled": False,
            "language": "python",
            "sourceType": "notebook",
        }
    }


def _largest_parts(notebook: nbformat.NotebookNode, count: int = 6) -> list[tuple[str, int]]:
    """The files of the kit, by what each adds to the notebook, and the cells of the notebook, largest first."""
    sizes = {str(path.relative_to(PACKAGE)): len(bz2.compress(path.read_bytes())) * 4 // 3 for path in _sources()}
    bootstrap_cell = _tagged(notebook, "bootstrap")
    sizes |= {f"cell {i + 1}": len(cell.source) for i, cell in enumerate(notebook.cells) if i != bootstrap_cell}
    return sorted(sizes.items(), key=lambda part: -part[1])[:count]

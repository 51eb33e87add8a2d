"""The first cell of a self-contained notebook: unpacks the kit that the notebook carries and imports it from there.

`bundles` copies this file into that cell, so it needs the standard library only; it uses neither pip nor a network.
"""

import base64
import bz2
import hashlib
import io
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath


def unpack(text: str, sha256: str, parent: Path | None = None) -> Path:
    """Unpack a wheel from text, once, and return the folder to import from.

    Args:
        text: the wheel, compressed by bz2, in base64.
        sha256: of the wheel.
        parent: where the folder is made; the system's temporary folder by default.

    Raises:
        ValueError: when the text is not that wheel, or a file in it would land outside the folder.
    """
    try:
        wheel = bz2.decompress(base64.b64decode("".join(text.split()), validate=True))
    except (ValueError, OSError, EOFError):
        wheel = b""
    return unpack_wheel(wheel, sha256, parent)


def find_wheel(name: str, sha256: str, inputs: Path) -> bytes:
    """The wheel in a data set that is attached to the notebook, for a kit too large to travel in it.

    Args:
        name: of the file.
        sha256: of the wheel.
        inputs: folder of the attached data sets, each directly below it or as datasets/OWNER/NAME.

    Raises:
        FileNotFoundError: when no attached data set has that very file.
    """
    for path in (*inputs.glob(f"*/{name}"), *inputs.glob(f"datasets/*/*/{name}")):
        wheel = path.read_bytes()
        if hashlib.sha256(wheel).hexdigest() == sha256:
            return wheel
    raise FileNotFoundError(f"no data set with {name} of this very notebook is attached: add it as an input")


def unpack_wheel(wheel: bytes, sha256: str, parent: Path | None = None) -> Path:
    """Unpack a wheel, once, and return the folder to import from; arguments and errors as `unpack` has them."""
    if hashlib.sha256(wheel).hexdigest() != sha256:
        raise ValueError("the kit in this notebook is damaged: download the notebook again, or build it with `trainbook bundle`")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise ValueError(f"the kit in this notebook would write outside its folder: {name!r}")
    parent = Path(parent or tempfile.gettempdir())
    folder = parent / f"trainbook-{sha256[:16]}"
    if not _holds(folder, files):
        partial = Path(tempfile.mkdtemp(prefix=folder.name + "-", dir=parent))
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        try:
            partial.rename(folder)
        except OSError:  # something has that name: the same kit from a quicker notebook, or what is not to be trusted
            if not _holds(folder, files):
                return partial
            shutil.rmtree(partial)
    return folder


def _holds(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether a folder is this user's own and holds the files whole: a temporary folder may be shared, or half cleaned."""
    try:
        status = folder.lstat()
        own = status.st_uid == os.getuid() and status.st_mode & 0o077 == 0 and not folder.is_symlink()
        return own and all((folder / name).read_bytes() == content for name, content in files.items())
    except OSError:
        return False


def import_kit(folder: Path, **settings: str) -> None:
    """Import the kit from a folder, in this process and its children; settings as `trainbook.runtime.export` takes them.

    Raises:
        RuntimeError: when another copy of the kit is imported already.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    import trainbook
    from trainbook import runtime

    if Path(trainbook.__file__).parents[1].resolve() != Path(folder).resolve():
        sys.path.remove(str(folder))
        raise RuntimeError(f"another trainbook is in use, from {trainbook.__file__}: restart the kernel and run the cells again")
    runtime.import_from(folder)
    runtime.export(**settings)

"""Grey pictures that the literature reports on, fetched file by file and checked against git's own checksum of their folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from trainbook.downloads import fetch_missing
from trainbook.errors import UserError

COMMIT = "e93b27812d3ff523a3a79d19e5e50d233d7a8d0a"
SOURCE = f"https://raw.githubusercontent.com/cszn/DnCNN/{COMMIT}"


@dataclass(frozen=True)
class PictureSet:
    """A folder of PNG files in the repository of DnCNN (Zhang et al. 2017), and git's hash of the folder at `COMMIT`."""

    folder: str
    pattern: str
    number: int
    tree_sha1: str

    def names(self) -> list[str]:
        """Of the files."""
        return [self.pattern.format(index) for index in range(1, self.number + 1)]


SETS = {
    "set12": PictureSet("testsets/Set12", "{:02}.png", 12, "e44e73ff6bac7f1df008b58faf75daad3ef87677"),
    "bsd68": PictureSet("testsets/BSD68", "test{:03}.png", 68, "037eafc2dddf972355a1c13c9eb717da3bc8758b"),
    "bsd400": PictureSet(
        "TrainingCodes/DnCNN_TrainingCodes_v1.0/data/Train400", "test_{:03}.png", 400, "9a5693f21ef035c168eb10c9f73d120a60a32bf4"
    ),
}


def fetch(name: str, data_folder: Path, source: str = SOURCE) -> Path:
    """The folder with a set's files; what is there already is not fetched again.

    Raises:
        UserError: when a file cannot be had, or the folder is not the one that was checked.
    """
    wanted = SETS[name]
    place = data_folder / name
    remedy = f"turn the internet on, or put the {wanted.number} files of github.com/cszn/DnCNN, {wanted.folder}, in that folder"
    fetch_missing({place / file: f"{source}/{wanted.folder}/{file}" for file in wanted.names()}, name, remedy)
    found = tree_sha1({file: (place / file).read_bytes() for file in wanted.names()})
    if found != wanted.tree_sha1:
        raise UserError(f"{place} is not {name}: its checksum is {found}", "delete that folder, so that it is fetched again")
    return place


def tree_sha1(files: dict[str, bytes]) -> str:
    """Git's hash of a folder with these plain files: SHA-1 over each file's mode, name and own SHA-1."""
    content = b""
    for name in sorted(files):
        blob = hashlib.sha1(f"blob {len(files[name])}\0".encode() + files[name], usedforsecurity=False)
        content += f"100644 {name}\0".encode() + blob.digest()
    return hashlib.sha1(f"tree {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()

"""Text corpora that are fetched file by file, from one commit each, and checked against the SHA-256 of what was looked at."""

from dataclasses import dataclass
from pathlib import Path

from trainbook.downloads import fetch_missing
from trainbook.errors import UserError
from trainbook.files import file_sha256


@dataclass(frozen=True)
class TextFile:
    """A file of a corpus: where it lies below the data folder, where it comes from, and its SHA-256."""

    place: str
    url: str
    sha256: str


_CLINC150 = "https://raw.githubusercontent.com/clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data"
_WIKISPLIT = "https://raw.githubusercontent.com/google-research-datasets/wiki-split/80f5bddf42d1a68201b7b107ee4b8d86d82e9fde"
FILES = {
    "clinc150": (
        TextFile(
            "clinc150/data_full.json",
            f"{_CLINC150}/data_full.json",
            "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",
        ),
    ),
    "wikisplit": tuple(
        TextFile(f"wikisplit/{name}.tsv", f"{_WIKISPLIT}/{name}.tsv", sha256)
        for name, sha256 in (
            ("tune", "67118f483438fc9f0ba12e63dc37f0eeff8bbad1873157509ced7e3e46582312"),
            ("validation", "63931ff45b7d95d60480bdcd466d69894fc02a0ec975cab8d0955e9b8cceb922"),
            ("test", "88c3eff253f7ff3fcce9370bb54f750bc35f646c1b6d2a45df2b993c96670f7f"),
        )
    ),
}


def fetch(files: tuple[TextFile, ...], text_folder: str, data_folder: Path) -> list[Path]:
    """The paths of a corpus's files: from the user's folder, or downloaded once into the data folder.

    Args:
        files: a value of `FILES`.
        text_folder: holds them already, below their `place`; "" downloads what is missing in `data_folder`.
        data_folder: where downloads are kept.

    Raises:
        UserError: when a file is missing and cannot be had, or is another one than was checked.
    """
    paths = [Path(text_folder or data_folder) / file.place for file in files]
    for file, path in zip(files, paths, strict=True):
        if text_folder and not path.is_file():
            raise UserError(f"there is no {path}", f"put it there from {file.url}, or leave text_folder empty to download it")
        remedy = f"turn the internet on, put the file at {path} yourself, or use --corpus docstrings, which needs no network"
        fetch_missing({path: file.url}, file.place, remedy)
        if (found := file_sha256(path)) != file.sha256:
            raise UserError(
                f"{path} is not the file of {file.url}: its SHA-256 is {found}", "delete it, so that it is fetched again"
            )
    return paths

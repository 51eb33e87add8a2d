"""Real ICU stays: set A of the PhysioNet/Computing in Cardiology Challenge 2012, 4,000 patients, from files or downloaded."""

import csv
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np

from trainbook.downloads import fetch_missing
from trainbook.errors import UserError
from trainbook.runtime import Runtime
from trainbook.workflows.clinical_series.config import Config
from trainbook.workflows.clinical_series.recordings import Raster, Recordings

ADDRESS = "https://physionet.org/files/challenge-2012/1.0.0"
ARCHIVE, OUTCOMES = "set-a.tar.gz", "Outcomes-a.txt"
SHA256 = "b284b6ec9d8215ca2ce440f3456a9df32311e1b3db14965ff66a6e3dd8c894e1"  # of all files, see content_sha256
# The name in the files to ours, where a cuff's reading stands in for a catheter's; and values that no living patient has.
NAMES = {"NIMAP": "MAP", "NISysABP": "SysABP"}
LOWEST = {"HR": 10, "MAP": 10, "SysABP": 20, "RespRate": 1, "Temp": 25, "GCS": 3, "Urine": 0, "FiO2": 0.15}
HIGHEST = {"HR": 300, "MAP": 250, "SysABP": 320, "RespRate": 90, "Temp": 45, "GCS": 15, "Urine": 5000, "FiO2": 1}
UNITS_OF_CARE = 4


def load_physionet(config: Config, runtime: Runtime) -> Recordings:
    """The first hours of every stay; static: age, sex, and which of four units of care.

    Raises:
        UserError: when the files are missing or others, or cannot be downloaded.
    """
    files = _read(Path(config.data_path)) if config.data_path else _fetch(runtime.data_folder / "physionet2012")
    if (found := content_sha256(files)) != SHA256:
        raise UserError(f"these files are not set A of PhysioNet 2012: their checksum is {found}", "download them again")
    outcomes = {row["RecordID"]: float(row["In-hospital_death"]) for row in csv.DictReader(io.StringIO(files.pop(OUTCOMES)))}
    columns = {variable.name: index for index, variable in enumerate(config.variables)}
    stays = {name.removesuffix(".txt"): read_stay(text, config, columns) for name, text in sorted(files.items())}
    return Recordings(
        values=np.stack([values for values, _ in stays.values()]),
        patients=np.arange(len(stays)),
        outcomes=np.array([outcomes[stay] for stay in stays], np.float32),
        static=np.stack([static for _, static in stays.values()]),
        source="PhysioNet/Computing in Cardiology Challenge 2012, set A: 4,000 ICU stays (Silva et al. 2012)",
        licence="ODC-By 1.0",
        synthetic=False,
    )


def read_stay(text: str, config: Config, columns: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """One file of the set: readings on the raster, (L, V), and static features, (2 + UNITS_OF_CARE,).

    Args:
        text: lines of "HH:MM,parameter,value", -1 for unknown.
        config: raster and window.
        columns: name of a variable to its place.
    """
    raster = Raster(config.window_samples, len(columns), config.sample_minutes)
    static = np.zeros(2 + UNITS_OF_CARE, np.float32)
    for time, parameter, value in csv.reader(text.splitlines()[1:]):
        number = float(value)
        name = NAMES.get(parameter, parameter)
        if name in columns:
            hours, minutes = time.split(":")
            if LOWEST[name] <= number <= HIGHEST[name]:
                raster.add(60 * int(hours) + int(minutes), columns[name], number)
        elif number >= 0 and parameter == "Age":
            static[0] = (number - 65) / 20
        elif number >= 0 and parameter == "Gender":
            static[1] = number
        elif number >= 1 and parameter == "ICUType":
            static[1 + int(number)] = 1
    return raster.values(), static


def content_sha256(files: dict[str, str]) -> str:
    """SHA-256 over names and contents in the order of the names, however they were packed."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0{files[name]}".encode())
    return digest.hexdigest()


def _read(place: Path) -> dict[str, str]:
    """Name to text of the outcomes and every stay, from a folder or an archive."""
    if place.is_dir():
        return {path.name: path.read_text() for path in place.rglob("*.txt")}
    try:
        with tarfile.open(place) as archive:
            members = [member for member in archive.getmembers() if member.isfile() and member.name.endswith(".txt")]
            return {Path(member.name).name: archive.extractfile(member).read().decode() for member in members}
    except (OSError, tarfile.TarError) as error:
        remedy = "give the folder or .tar.gz that holds set-a and Outcomes-a.txt"
        raise UserError(f"cannot read {place}: {error}", remedy) from None


def _fetch(folder: Path) -> dict[str, str]:
    """Both files from PhysioNet; what is there already is not fetched again."""
    remedy = f"turn the internet on, give data_path, or put {ARCHIVE} and {OUTCOMES} of {ADDRESS} in that folder"
    fetch_missing({folder / name: f"{ADDRESS}/{name}" for name in (ARCHIVE, OUTCOMES)}, "PhysioNet 2012", remedy)
    return {**_read(folder / ARCHIVE), OUTCOMES: (folder / OUTCOMES).read_text()}

"""Is a run what its run.json says: checkpoint, records, files, data, and the metrics recomputed."""

import math
from dataclasses import dataclass

import torch

from trainbook.errors import UserError
from trainbook.files import file_sha256, read_json
from trainbook.records import RunFolder
from trainbook.run import prepare
from trainbook.state import load_newest_checkpoint

# Same device kind, same number of threads: sums come out bit for bit. Another CPU model may order them otherwise.
RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-4, 1e-6


@dataclass(frozen=True)
class Finding:
    """One comparison of what was recorded with what is found now."""

    check: str
    recorded: str
    found: str
    well: bool

    def row(self) -> list[str]:
        """As a table row."""
        return [self.check, self.recorded, self.found, "same" if self.well else "DIFFERS"]


def verify_run(folder: RunFolder) -> list[Finding]:
    """Compare every checksum and every metric of a complete run with what is found now.

    Raises:
        UserError: when the run is not complete, or was trained on a kind of device that is not here.
    """
    summary, saved = folder.summary(), read_json(folder.config)
    if summary["status"] != "complete":
        raise UserError(
            f"{folder.path.name} is {summary['status']}, not complete",
            f"finish it: trainbook resume {folder.path.name}",
        )
    run = prepare(saved["workflow"], saved["preset"], saved["config"], folder.path.name, saved["authentic"], folder)
    segment = summary["segments"][-1]
    if segment["device"].split(":")[0] != run.runtime.device.split(":")[0]:
        raise UserError(
            f"{folder.path.name} was measured on {segment['device']}, this is {run.runtime.device}: their random numbers differ",
            "verify it on the same kind of device (--device)",
        )
    torch.set_num_threads(segment["threads"])
    findings = [_text("config", summary["config_sha256"], run.config.sha256())]
    findings += [
        _text(name, digest, file_sha256(path) if (path := folder.path / name).is_file() else "missing")
        for name, digest in summary["files"].items()
    ]
    run.load_data()
    findings.append(_text("data", summary["data"]["sha256"], run.data.sha256))
    run.build()
    metadata = load_newest_checkpoint(folder.checkpoints, run.state, run.runtime.device)
    findings.append(_text("checkpoint step", str(summary["step"]), str(metadata["step"]) if metadata else "no whole checkpoint"))
    if metadata is None:
        return findings
    measured = run.measure()
    return findings + [_number(name, value, measured.get(name, math.nan)) for name, value in summary["metrics"].items()]


def _text(check: str, recorded: str, found: str) -> Finding:
    return Finding(check, recorded[:16], found[:16], recorded == found)


def _number(check: str, recorded: float, found: float) -> Finding:
    close = math.isclose(recorded, found, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
    return Finding(check, f"{recorded:.8g}", f"{found:.8g}", close)

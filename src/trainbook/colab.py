"""Colab's two conveniences: Drive, which outlives the machine, and the keys behind the key icon. Elsewhere both do nothing.

What goes wrong here is a warning: training on this machine is never refused for want of Drive or a key.
"""

import logging
from pathlib import Path

from trainbook import runtime

logger = logging.getLogger("trainbook")


def keep_on_drive(folder: str = "trainbook", mount_point: Path | None = None) -> Path | None:
    """Mount Drive and copy runs to a folder of it while they train; a run that lies there is continued.

    Training happens on this machine's own disk: Drive is slow, and can drop while a run trains.

    Args:
        folder: below My Drive; made when it is not there.
        mount_point: where Drive appears; `drive` in the working folder, which on Colab is /content/drive.

    Returns:
        The folder, or None where there is no Drive.
    """
    try:
        from google.colab import drive
    except ImportError:
        print("This is not Colab: no Drive is mounted, and runs stay on this machine.")
        return None
    mount_point = mount_point or Path.cwd() / "drive"
    kept = mount_point / "MyDrive" / folder
    try:
        drive.mount(str(mount_point))
        kept.mkdir(parents=True, exist_ok=True)
    except Exception as error:  # refused by its owner, timed out, full: each Colab version has its own
        logger.warning(
            "Drive is not there (%s: %s). Training goes on, but what this machine holds is lost when it disconnects. "
            "To keep it, run this cell again and allow access before training begins.",
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "no reason given",
        )
        return None
    runtime.export(mirror=str(kept))
    print(f"Finished checkpoints are copied to {kept}; after a disconnect, run all cells again.")
    return kept


def take_secrets(*names: str) -> None:
    """Hand keys from Colab's own store (the key icon) to what looks for them in the environment; a value is never shown.

    Args:
        names: such as HF_TOKEN. A key that is not there, or that this notebook may not read, is passed over.
    """
    try:
        from google.colab import userdata
    except ImportError:
        return
    for name in names:
        try:
            runtime.keep_secret(name, userdata.get(name))
        except Exception as error:  # not there, not allowed, no answer; the type says which
            print(f"{name}: not taken ({type(error).__name__}); only needed for data that asks for it")
        else:
            print(f"{name}: taken")

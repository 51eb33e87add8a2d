"""Drive is a folder: $STAND_IN_DRIVE names it, or says `refused`, as when its owner does not allow access."""

import os
from pathlib import Path


def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    mountpoint = Path(mountpoint)
    if os.environ["STAND_IN_DRIVE"] == "refused":
        raise ValueError("mount failed")
    if mountpoint.is_symlink():
        print(f'Drive already mounted at {mountpoint}; to attempt to forcibly remount, call drive.mount("{mountpoint}").')
        return
    if mountpoint.exists() and any(mountpoint.iterdir()):
        raise ValueError("Mountpoint must not already contain files")
    mountpoint.symlink_to(os.environ["STAND_IN_DRIVE"])
    print(f"Mounted at {mountpoint}")

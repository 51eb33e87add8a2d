"""Files of data sets, fetched once, each whole or not at all; whose they are, their checksums say."""

import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from trainbook.errors import UserError
from trainbook.files import write_atomic

TIMEOUT_SECONDS = 60


def fetch_missing(files: Mapping[Path, str], what: str, remedy: str) -> None:
    """Download the files that are not there yet.

    Args:
        files: place to address.
        what: they are, for the message.
        remedy: how to do without a network.

    Raises:
        UserError: when one cannot be had or written; those before it stay.
    """
    for place, address in files.items():
        if place.is_file():
            continue
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
                write_atomic(place, answer.read())
        except (OSError, urllib.error.URLError) as error:
            raise UserError(f"cannot get {what} from {address} into {place.parent}: {error}", remedy) from None

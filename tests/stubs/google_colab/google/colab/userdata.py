"""Keys come from the file $STAND_IN_SECRETS, a line NAME=VALUE each; a name without a value is not open to this notebook."""

import os
from pathlib import Path


class SecretNotFoundError(Exception):
    def __init__(self, key):
        super().__init__(f"Secret {key} does not exist.")


class NotebookAccessError(Exception):
    def __init__(self, key):
        super().__init__(f"Notebook does not have access to secret {key}")


def get(key):
    path = os.environ.get("STAND_IN_SECRETS")
    lines = Path(path).read_text().splitlines() if path else []
    secrets = dict(line.partition("=")[::2] for line in lines)
    if key not in secrets:
        raise SecretNotFoundError(key)
    if not secrets[key]:
        raise NotebookAccessError(key)
    return secrets[key]

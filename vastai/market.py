"""Vast's market through its own client: offers, rentals, the ledger of what was rented, and what may be spent."""

import fcntl
import json
import math
import os
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainbook.errors import RunFailed, UserError
from trainbook.launching import without
from trainbook.runtime import parse_duration

LABEL = "trainbook-"  # every rental of ours carries it, and the run's id
CALL_SECONDS = 180
DEAD_STATES = ("exited", "unknown", "offline")  # a rental in one of these never runs
HOURS_PER_MONTH = 730
KEY = "VAST_API_KEY"


@dataclass(frozen=True)
class Policy:
    """What may be rented and how long to wait for what: offers.toml with its durations in seconds."""

    query: list[str]
    image: str
    disk_gb: float
    interruptible: bool
    bid_factor: float
    start: float
    ssh: float
    boxes: int
    shortest: float
    poll: float
    pull_every: float
    no_progress: float
    saving: float
    unpulled: float

    @classmethod
    def read(cls, path: Path) -> "Policy":
        """The policy in a file.

        Raises:
            UserError: when a value is missing, unknown or not what it should be.
        """
        try:
            tables = tomllib.loads(path.read_text())
            values = {name: value for table in tables.values() for name, value in table.items()}
            durations = {name: parse_duration(value) for name, value in values.items() if name in _DURATIONS}
            return cls(**{**values, **durations})
        except (OSError, tomllib.TOMLDecodeError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: {error}", "compare it with vastai/offers.toml") from None


_DURATIONS = ("start", "ssh", "shortest", "poll", "pull_every", "no_progress", "saving", "unpulled")


@dataclass(frozen=True)
class Offer:
    """One machine on offer.

    Attributes:
        price: dollars an hour, disk included, at which it would be rented.
        bid: what to bid for the machine alone, or None when it is rented on demand.
        row: what Vast says of it.
    """

    price: float
    bid: float | None
    row: dict[str, Any]

    def line(self) -> list[str]:
        """As a table row."""
        row = self.row
        traffic = f"{row.get('inet_down_cost', 0):.3f} / {row.get('inet_up_cost', 0):.3f}"
        return [
            str(row["id"]),
            f"{row.get('num_gpus', 1)}x {row.get('gpu_name')}",
            f"{row.get('gpu_ram', 0) / 1000:.0f} GB",
            f"{row.get('reliability', row.get('reliability2', 0)) * 100:.1f} %",
            str(row.get("geolocation")),
            traffic,
            f"{self.price:.3f}" + (f" (bid {self.bid:.3f})" if self.bid is not None else ""),
        ]

    HEADER = ("offer", "GPU", "memory", "reliability", "where", "$/GB down / up", "$/h")


class ClientError(RunFailed):
    """The client could not do what it was asked to; its words, without any key."""


class NothingToRent(UserError):  # noqa: N818  (the state of the market)
    """No offer fits the policy, the price and what is left of the budget."""


class Vast:
    """The `vastai` client, called as a person would; its exit code means nothing, its JSON counts.

    The key stays where the client finds it: in the environment or in its own file.

    Args:
        client: name or path of the program.
    """

    def __init__(self, client: str) -> None:
        self.client = client

    def call(self, *arguments: str) -> Any:
        """One command's JSON answer; None when it said nothing.

        Raises:
            ClientError: when it could not be run, or answered with an error.
        """
        command = [self.client, *arguments, "--raw"]
        environment = {**os.environ, "VASTAI_NO_UPDATE_CHECK": "1"}
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=CALL_SECONDS,
                start_new_session=True,  # Ctrl-C is for the launcher: the call that ends a rental must not hear it
            )
        except FileNotFoundError:
            raise UserError(
                f"there is no client {self.client!r}",
                "install it in an environment of its own (`uv tool install vastai`), or name it with --client",
            ) from None
        except subprocess.TimeoutExpired:
            raise ClientError(f"`vastai {' '.join(arguments[:2])}` did not answer in {CALL_SECONDS} s") from None
        said = without(done.stderr.strip(), [os.environ.get(KEY, "")])
        with suppress(ValueError):
            return json.loads(done.stdout)
        if said or done.returncode or done.stdout.strip():
            with suppress(ValueError, LookupError, TypeError):
                said = json.loads(said.splitlines()[-1])["msg"]
            shown = without(done.stdout.strip(), [os.environ.get(KEY, "")])
            last = (said or shown or f"exit code {done.returncode}").splitlines()[-1]
            raise ClientError(f"`vastai {' '.join(arguments[:2])}`: {last}")
        return None

    def check(self, public_keys: list[str]) -> None:
        """Refuse before anything is spent: no client, no key, or an ssh key that Vast does not know.

        Args:
            public_keys: in OpenSSH's one-line form, of the keys that ssh would offer.

        Raises:
            UserError: saying what to do.
        """
        try:
            known = json.dumps(self.call("show", "ssh-keys"))
        except ClientError as error:
            raise UserError(f"Vast does not let us in: {error}", "`vastai set api-key KEY`, or set VAST_API_KEY") from None
        if not public_keys:
            raise UserError("there is no ssh key here", "make one: ssh-keygen -t ed25519")
        if not any(key.split()[1] in known for key in public_keys):
            raise UserError(
                "Vast knows none of the ssh keys here, so a box would not let us in",
                "`vastai create ssh-key ~/.ssh/id_ed25519.pub`, or name the key it knows with --identity",
            )

    def offers(self, policy: Policy, gpu: str, interruptible: bool, max_price: float, hours: float) -> list[Offer]:
        """The offers within the policy and the price, cheapest first.

        Args:
            gpu: as Vast names it, such as RTX_4090; empty for any.
            max_price: dollars an hour, disk included.
            hours: the machine must be on offer for at least so long.
        """
        query = [*policy.query, f"disk_space>={policy.disk_gb:g}", f"duration>={hours / 24:.4f}"]
        if gpu:
            query.append(f"gpu_name={gpu.replace(' ', '_')}")
        if not interruptible:
            query.append(f"dph_total<={max_price}")
        kind = ["--type", "bid" if interruptible else "on-demand", "-o", "dph_total", "--storage", f"{policy.disk_gb:g}"]
        rows = self.call("search", "offers", " ".join(query), *kind) or []
        found = [_priced(row, policy, interruptible, max_price) for row in rows]
        # The prices are compared here too: a query that the server reads otherwise must not cost anything.
        return sorted((offer for offer in found if offer is not None and offer.price <= max_price), key=lambda offer: offer.price)

    def rent(self, offer: Offer, policy: Policy, label: str, onstart: Path) -> int | None:
        """Rent a machine and return the rental's number; None when somebody else has it.

        When the answer is lost the rental is looked up by its label: it may have been made all the same.
        """
        arguments = ["create", "instance", str(offer.row["id"]), "--image", policy.image, "--disk", f"{policy.disk_gb:g}"]
        arguments += ["--ssh", "--direct", "--label", label, "--cancel-unavail", "--onstart", str(onstart)]
        if offer.bid is not None:
            arguments += ["--bid_price", f"{offer.bid:.4f}"]
        try:
            answer = self.call(*arguments)
            if isinstance(answer, dict) and answer.get("success"):
                return int(answer["new_contract"])
            why = str(answer.get("msg", "no")) if isinstance(answer, dict) else "no answer"  # the rest may hold the box's key
        except ClientError as error:
            why = str(error)
        print(f"offer {offer.row['id']} could not be rented: {why}")
        made = self.rentals(label)
        return made[0]["id"] if made else None

    def rentals(self, label: str = "") -> list[dict[str, Any]]:
        """Our rentals: those of one label, or all that begin like ours."""
        rows = self.call("show", "instances") or []
        return [row for row in rows if (row.get("label") == label if label else str(row.get("label") or "").startswith(LABEL))]

    def rental(self, number: int) -> dict[str, Any] | None:
        """What Vast says of a rental; None when there is none of that number."""
        row = self.call("show", "instance", str(number))
        return row if isinstance(row, dict) and row.get("id") is not None else None

    def start(self, number: int) -> None:
        """Start a stopped rental."""
        with suppress(ClientError):  # it speaks English here, whether it worked or not
            self.call("start", "instance", str(number))

    def destroy(self, number: int, attempts: int = 8) -> None:
        """End a rental and see that it is gone.

        Raises:
            RunFailed: when it is still there, saying what to do at once.
        """
        why = ""
        for attempt in range(attempts):
            with suppress(ClientError):
                self.call("destroy", "instance", str(number), "--yes")
            try:
                if all(row["id"] != number for row in self.rentals()):
                    return
            except ClientError as error:
                why = str(error)
            time.sleep(min(2**attempt, 30))
        raise RunFailed(
            f"RENTAL {number} COULD NOT BE ENDED AND COSTS MONEY. {why}\n"
            f"  -> vastai destroy instance {number}, or https://cloud.vast.ai/instances/"
        )


def _priced(row: dict[str, Any], policy: Policy, interruptible: bool, max_price: float) -> Offer | None:
    """An offer with its price an hour, or None when it cannot be had for the cap."""
    if not interruptible:
        return Offer(float(row["dph_total"]), None, row)
    disk = float(row.get("storage_cost") or 0) * policy.disk_gb / HOURS_PER_MONTH
    lowest = float(row["min_bid"])
    bid = math.floor(1e4 * min(lowest * policy.bid_factor, max_price - disk)) / 1e4  # never more than the cap by rounding
    return Offer(bid + disk, bid, row) if bid >= lowest else None


class Ledger:
    """What was rented, when and for how much: lines of JSON, written before the rental is made.

    Args:
        folder: also holds one lock per run, held while its launcher lives.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path.home() / ".local" / "state" / "trainbook"
        self.path = self.folder / "vastai.jsonl"

    def write(self, event: str, label: str, **details: Any) -> None:
        """Add a line and wait until the disk has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        entry = {"when": datetime.fromtimestamp(now, UTC).isoformat(), "time": now, "event": event, "label": label, **details}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def entries(self) -> Iterator[dict[str, Any]]:
        """All lines that can be read, oldest first."""
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                with suppress(ValueError):  # cut off in the middle
                    yield json.loads(line)

    def spent(self, label: str) -> float:
        """Dollars that a run's rentals have cost so far: from before they were made until they were known to be gone."""
        total, begun, price = 0.0, None, 0.0
        for entry in self.entries():
            if entry["label"] != label:
                continue
            if entry["event"] == "renting":
                total += (entry["time"] - begun) * price / 3600 if begun is not None else 0.0
                begun, price = entry["time"], entry["price_per_hour"]
            elif entry["event"] in ("ended", "not rented"):
                if begun is not None and entry["event"] == "ended":
                    total += (entry["time"] - begun) * price / 3600
                begun = None
        return total + ((time.time() - begun) * price / 3600 if begun is not None else 0.0)

    def open_price(self, label: str) -> float | None:
        """What the run's rental costs an hour when it is not known to have ended; else None."""
        price = None
        for entry in self.entries():
            if entry["label"] == label:
                if entry["event"] == "renting":
                    price = entry["price_per_hour"]
                elif entry["event"] in ("ended", "not rented"):
                    price = None
        return price

    def knows(self, label: str) -> bool:
        """Whether a rental of that label was made from here."""
        return any(entry["label"] == label for entry in self.entries())

    @contextmanager
    def claim(self, label: str) -> Iterator[None]:
        """Be the only launcher of a run.

        Raises:
            UserError: when there is another one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{label}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another launcher looks after {label}", "wait for it or stop it first") from None
            yield

    def claimed(self, label: str) -> bool:
        """Whether a launcher that looks after a run is alive on this machine."""
        try:
            with self.claim(label):
                return False
        except UserError:
            return True

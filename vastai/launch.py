"""Trains a workflow on a rented Vast.ai machine, or on any box that ssh reaches, and brings the run back.

python vastai/launch.py NAME --max-price 0.50 --budget 3     rent, train, pull, verify, end the rental
python vastai/launch.py NAME --ssh user@host                 the same on a box of your own
python vastai/launch.py reap                                 end rentals whose launcher is gone
python vastai/launch.py engines NAME --out DIR               files for SkyPilot and dstack
"""

import argparse
import functools
import json
import math
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from box import Box, BoxLost, drop_old_checkpoints
from market import DEAD_STATES, LABEL, ClientError, Ledger, NothingToRent, Offer, Policy, Vast

from trainbook.bundles import CHECKSUMS_FILE, build_box
from trainbook.errors import RunFailed, UserError
from trainbook.files import file_sha256
from trainbook.handover import copy_run, whole_checkpoint
from trainbook.launching import Verdict, add_run_options, exit_code, judge, say_verdict, spec_of, undisturbed
from trainbook.records import BAD_INPUT, EXIT_CODES, RunFolder
from trainbook.runtime import parse_duration
from trainbook.spec import RunSpec
from trainbook.tables import Table

HERE = Path(__file__).resolve().parent
SETUP_FAILED = 90  # onstart.sh: no Python, or pip could not install
ENDLESS_SECONDS = 10 * 365 * 86400.0
MARGIN_SECONDS = 60.0  # between two clocks
SHOWN_OFFERS = 5
ENGINE_IMAGE, ENGINE_HOURS = "pytorch/pytorch:2.10.0-cuda12.8-cudnn9-runtime", 24
ONSTART_CHARACTERS = 4000
LEFT_RUNNING = "The box goes on without this launcher"


def main(arguments: list[str]) -> int:
    """Run one command and return the kit's exit code."""
    if arguments[:1] == ["reap"]:
        return reap(_reap_parser().parse_args(arguments[1:]))
    if arguments[:1] == ["engines"]:
        parser = argparse.ArgumentParser(prog="launch.py engines", allow_abbrev=False, description=engines.__doc__)
        add_run_options(parser, arguments[1:], also={"max_price_per_hour": "--max-price"})
        parser.add_argument("--nodes", type=int, default=1, help="so many machines, joined by torchrun (default 1)")
        parser.add_argument("--policy", type=Path, default=HERE / "offers.toml", help=argparse.SUPPRESS)
        return engines(parser.parse_args(arguments[1:]))
    options = _parser(arguments).parse_args(arguments)
    spec, policy = spec_of(options), Policy.read(options.policy)
    for program in ("ssh", "rsync"):
        with _needs(program):
            subprocess.run([program, "-V" if program == "ssh" else "--version"], capture_output=True, check=True)
    run = RunFolder(options.out.absolute() / spec.run_id)
    if run.run_json.is_file():
        verdict = judge(run.path, spec.run_id)
        if verdict.code == EXIT_CODES["complete"]:
            return say_verdict(verdict, run)
    if (process := run.training_process()) is not None:
        raise UserError(f"process {process} is training in {run.path}", "wait for it or stop it first")
    with tempfile.TemporaryDirectory(prefix="trainbook-") as folder:  # what cannot be built must not cost anything
        build_box(spec, Path(folder))
        onstart(spec, 2 * policy.start)
    with Ledger().claim(LABEL + spec.run_id):
        verdict = on_own_box(spec, policy, run, options) if options.ssh else on_rented_boxes(spec, policy, run, options)
    return say_verdict(verdict, run)


def on_own_box(spec: RunSpec, policy: Policy, run: RunFolder, options: argparse.Namespace) -> Verdict:
    """Train on the box that --ssh names; its host key must be known already."""
    known = ["-o", "StrictHostKeyChecking=yes", *_login(options.identity)]
    known += ["-p", str(options.ssh_port)] if options.ssh_port else []
    known += ["-o", f"UserKnownHostsFile={options.known_hosts}"] if options.known_hosts else []
    box = Box(options.ssh, spec.run_id, known, policy.ssh, trusted=True)
    deadline = parse_duration(spec.time_budget) + 1800 if spec.time_budget else ENDLESS_SECONDS
    try:
        box.check()
        return train(box, spec, policy, run, deadline, None, options.wait, lambda: True)
    except BoxLost as error:
        raise RunFailed(f"{error}\n  -> the same command with --run-id {spec.run_id} goes on") from None
    finally:
        box.close()


def on_rented_boxes(spec: RunSpec, policy: Policy, run: RunFolder, options: argparse.Namespace) -> Verdict:
    """Rent, train, and end the rental whatever happens; when a box dies, go on with the next offer."""
    if spec.accelerator == "cpu":
        raise UserError("Vast rents GPUs", "leave --accelerator out, or name one such as RTX_4090")
    if spec.max_price_per_hour is None or spec.budget is None:
        raise UserError("what may it cost?", "give --max-price (dollars an hour) and --budget (dollars altogether)")
    vast, ledger, label = Vast(options.client), Ledger(), LABEL + spec.run_id
    vast.check(_public_keys(options.identity))
    interruptible = policy.interruptible if options.interruptible is None else options.interruptible
    avoided: set[Any] = set()
    for number in range(policy.boxes):
        box, keep = None, False
        try:
            rental = attached = _attach(vast, ledger, label)
            if rental is None:
                try:
                    offer = _choose(vast, ledger, spec, policy, label, interruptible, avoided, options.dry_run)
                except NothingToRent as error:
                    if number == 0:
                        raise
                    verdict = judge(run.path, spec.run_id)
                    return Verdict(verdict.code, f"{verdict.text}\n{error}")
                if options.dry_run:
                    return Verdict(0, "nothing was rented")
                avoided.add(offer.row["machine_id"])
                rental = _rent(vast, ledger, spec, policy, label, offer)
                if rental is None:
                    continue
            price = ledger.open_price(label) or spec.max_price_per_hour
            box = _answering(vast, rental, spec, policy, options, attached is not None)
            left = spec.budget - ledger.spent(label)
            deadline = left / price * 3600 - policy.unpulled - policy.saving - MARGIN_SECONDS
            alive = functools.partial(_running, vast, rental)
            verdict = train(box, spec, policy, run, deadline, price, options.wait, alive)
            keep = not options.wait
            return verdict
        except BoxLost as error:
            print(f"box {number + 1} is lost: {error}", file=sys.stderr)
        finally:
            with undisturbed():
                if not keep and ledger.open_price(label) is not None:
                    _end(vast, ledger, label)
                if box is not None:
                    box.close()
    verdict = judge(run.path, spec.run_id)
    return Verdict(verdict.code, f"{verdict.text}\n{policy.boxes} boxes were tried")


def _end(vast: Vast, ledger: Ledger, label: str) -> None:
    """End every rental of a run, also one whose number never reached us."""
    for row in vast.rentals(label):
        vast.destroy(row["id"])
        print(f"rental {row['id']} has ended")
    ledger.write("ended", label)
    print(f"this run has cost ${ledger.spent(label):.2f} so far")


def _running(vast: Vast, rental: int) -> bool:
    """Whether Vast says that a rental runs; not knowing is no reason to give it up."""
    try:
        row = vast.rental(rental)
    except ClientError:
        return True
    return row is not None and row.get("actual_status") == "running"


def train(
    box: Box,
    spec: RunSpec,
    policy: Policy,
    run: RunFolder,
    deadline: float,
    price: float | None,
    wait: bool,
    alive: Callable[[], bool],
) -> Verdict:
    """The protocol on any box: push, start, follow, pull, verify.

    Args:
        deadline: seconds from its start after which the watchdog ends the run.
        price: dollars an hour, for the run's report.
        wait: follow the run; else leave it to the watchdog.
        alive: whether the box is still ours.

    Raises:
        BoxLost: when it must go on elsewhere; what was pulled stays.
    """
    if box.watched():
        print(f"{box.target} is at work on {spec.run_id} already: following it")
    else:
        with tempfile.TemporaryDirectory(prefix="trainbook-") as folder:
            settings = {
                "run_id": spec.run_id,
                "price_per_hour": price,
                "deadline_seconds": deadline,
                "no_progress_seconds": policy.no_progress,
                "saving_seconds": policy.saving,
                "unpulled_seconds": policy.unpulled,
            }
            step = _stage(spec, Path(folder), settings, run, box)
            print(f"pushing to {box.target}" + (f", to go on from step {step}" if step is not None else ""))
            box.push(Path(folder))
        box.start()
    if not wait:
        return Verdict(0, f"{LEFT_RUNNING}: follow it with the same command and --run-id {spec.run_id}")
    try:
        status = _follow(box, policy, run, alive, time.monotonic() + deadline + policy.saving + policy.unpulled)
    except KeyboardInterrupt:
        print("interrupted: the box saves, then what it has is pulled; once more to leave it at that", file=sys.stderr)
        with suppress(BoxLost, KeyboardInterrupt):
            box.end("interrupted")
            _collect(box, run, _follow(box, policy, run, alive, time.monotonic() + policy.saving))
        raise
    if status["exit_code"] == SETUP_FAILED:
        raise BoxLost("it could not be made ready, see its last lines above")
    _collect(box, run, status)
    if status["exit_code"] == BAD_INPUT and not status["run"]:
        return Verdict(BAD_INPUT, "the box refused the run, see its last lines above")
    verdict = judge(run.path, spec.run_id)
    return Verdict(verdict.code, verdict.text + (f"; the watchdog ended it: {status['reason']}" if status["reason"] else ""))


def _stage(spec: RunSpec, folder: Path, settings: dict[str, Any], run: RunFolder, box: Box) -> int | None:
    """Fill a folder with what the box needs; returns the step from which it can go on, or None."""
    build_box(spec, folder)
    (folder / "onstart.sh").write_text(onstart(spec, 0))
    (folder / "watchdog.py").write_bytes((HERE / "watchdog.py").read_bytes())
    (folder / "box.json").write_text(json.dumps(settings))
    step = whole_checkpoint(run) if run.checkpoints.is_dir() else None
    there = box.furthest()
    ahead = step is not None and (there is None or there < step)
    step = copy_run(run, folder / "runs" / spec.run_id) if ahead else there
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in names if name != CHECKSUMS_FILE]
    (folder / CHECKSUMS_FILE).write_text("".join(lines))
    return step


def onstart(spec: RunSpec, wait_seconds: float) -> str:
    """The text of onstart.sh for a run: how long it waits for the launcher's files before it gives the box back."""
    first, rest = (HERE / "onstart.sh").read_text().split("\n", 1)
    text = f"{first}\nexport TRAINBOOK_RUN_ID={spec.run_id} TRAINBOOK_WAIT_SECONDS={wait_seconds:.0f}\n{rest}"
    if len(text) >= ONSTART_CHARACTERS:
        raise UserError(f"onstart.sh has {len(text)} characters, Vast takes {ONSTART_CHARACTERS}", "choose a shorter --run-id")
    return text


def _follow(box: Box, policy: Policy, run: RunFolder, alive: Callable[[], bool], latest: float) -> dict[str, Any]:
    """Show the job's log and pull what it saves until it has ended; returns the watchdog's last word.

    Raises:
        BoxLost: when the box has died, or does not answer any more.
    """
    pulled, heard, shown = time.monotonic(), time.monotonic(), None
    patience, box.patience = box.patience, min(box.patience, 4 * policy.poll)
    try:
        while True:
            try:
                status, log = box.status()
                heard = time.monotonic()
                if log:
                    print(log.replace("\r", "\n"), end="", flush=True)
                if status["ended"]:
                    return status
                if not status["watched"]:  # the box was restarted, and nothing there started the run again
                    box.start()
                if status["run"] and time.monotonic() - pulled >= policy.pull_every:
                    box.pull(run)
                    pulled, step = time.monotonic(), drop_old_checkpoints(run)
                    if step is not None and step != shown:
                        print(f"[launcher] the checkpoint of step {step} is here, every checksum fits")
                        shown = step
            except BoxLost as error:
                if not alive():
                    raise BoxLost("Vast has stopped it, or somebody bid more") from None
                if time.monotonic() - heard > policy.ssh:
                    raise
                print(f"[launcher] {error}; trying again", file=sys.stderr)
            if time.monotonic() > latest:
                raise BoxLost("it is past its deadline, and its watchdog has not ended the run")
            time.sleep(policy.poll)
    finally:
        box.patience = patience


def _collect(box: Box, run: RunFolder, status: dict[str, Any]) -> None:
    """Pull an ended run whole, compare every checksum with the box's, and tell the box."""
    if status["run"]:
        damaged = box.pull_whole(run)
        if damaged:
            print(f"NOT whole after three attempts: {', '.join(damaged)}", file=sys.stderr)
            return
        print("[launcher] pulled; every file has the checksum it has there")
    box.say_pulled()


def _attach(vast: Vast, ledger: Ledger, label: str) -> int | None:
    """The rental that an earlier launcher of this run left behind, started again if it stopped; None when there is none."""
    rentals = vast.rentals(label)
    for extra in rentals[1:]:  # never two for one run
        vast.destroy(extra["id"])
    if rentals:
        row = rentals[0]
        print(f"rental {row['id']} of this run is still there: going on with it")
        if row.get("actual_status") != "running":
            vast.start(row["id"])
        return row["id"]
    if ledger.open_price(label) is not None:
        ledger.write("ended", label, why="gone when the next launcher looked")
    return None


def _choose(
    vast: Vast,
    ledger: Ledger,
    spec: RunSpec,
    policy: Policy,
    label: str,
    interruptible: bool,
    avoided: set[Any],
    dry_run: bool,
) -> Offer:
    """The cheapest offer within policy, price and budget, shown with what it may cost.

    Raises:
        UserError: when there is none, or the budget does not pay for it.
    """
    left = spec.budget - ledger.spent(label)
    planned = parse_duration(spec.time_budget) / 3600 if spec.time_budget else None
    hours = planned or min(left / spec.max_price_per_hour, 24.0)
    try:
        offers = vast.offers(policy, spec.accelerator, interruptible, spec.max_price_per_hour, max(hours, 0.0))
    except ClientError as error:
        raise RunFailed(f"the search for offers failed: {error}") from None
    offers = [offer for offer in offers if offer.row["machine_id"] not in avoided]
    if not offers:
        tried = f", {len(avoided)} machines tried" if avoided else ""
        what = f"no offer of {spec.accelerator or 'any GPU'} under ${spec.max_price_per_hour}/h within the policy{tried}"
        raise NothingToRent(what, "raise --max-price, take another --accelerator, or edit offers.toml")
    offer = offers[0]
    around = (policy.start + policy.saving + policy.unpulled + MARGIN_SECONDS) / 3600
    affordable = left / offer.price - around
    if affordable < (planned or policy.shortest / 3600):
        raise NothingToRent(
            f"${left:.2f} of the ${spec.budget:.2f} are left: at ${offer.price:.3f}/h they pay for {max(affordable, 0):.2f} h of "
            f"training beside {around:.2f} h to start, save and pull"
            + (f", and {planned:.2f} h are asked for" if planned else ""),
            "raise --budget, or lower --time-budget",
        )
    print(Table(list(Offer.HEADER), [offer.line() for offer in offers[:SHOWN_OFFERS]]))
    limit = f"{planned:.2f} h of --time-budget" if planned else f"{affordable:.2f} h, then the watchdog ends it"
    estimate = min((planned or affordable) + around, left / offer.price) * offer.price
    kind = "interruptible" if interruptible else "on demand"
    print(f"{'would rent' if dry_run else 'renting'} offer {offer.row['id']} {kind}: at most {limit}, at most ${estimate:.2f}")
    return offer


def _rent(vast: Vast, ledger: Ledger, spec: RunSpec, policy: Policy, label: str, offer: Offer) -> int | None:
    """Make the rental, in the ledger before it is made; returns its number, or None when it could not be had."""
    machine = {"offer": offer.row["id"], "machine": offer.row["machine_id"], "price_per_hour": offer.price}
    ledger.write("renting", label, run_id=spec.run_id, **machine)
    with tempfile.TemporaryDirectory(prefix="trainbook-") as folder:
        script = Path(folder) / "onstart.sh"
        script.write_text(onstart(spec, 2 * policy.start))
        rental = vast.rent(offer, policy, label, script)
    if rental is None:
        ledger.write("not rented", label, **machine)
        return None
    ledger.write("rented", label, instance=rental)
    return rental


def _answering(vast: Vast, rental: int, spec: RunSpec, policy: Policy, options: argparse.Namespace, restarted: bool) -> Box:
    """The box of a rental, once it runs and ssh reaches it.

    Args:
        restarted: it may have been stopped and still say so.

    Raises:
        BoxLost: when it has died, or patience has.
    """
    latest, state = time.monotonic() + policy.start, ""
    while True:
        try:
            row = vast.rental(rental)
        except ClientError as error:
            print(error, file=sys.stderr)
            row = {"actual_status": state}
        if row is None:
            raise BoxLost("the rental is gone")
        if (now := str(row.get("actual_status"))) != state:
            print(f"rental {rental}: {now}" + (f" ({row['status_msg'].strip()})" if row.get("status_msg") else ""))
            state = now
        if state in DEAD_STATES and not restarted:
            raise BoxLost(f"its state is {state}")
        if state == "running" and "id" in row:
            host, port = _address(row)
            box = Box(f"root@{host}", spec.run_id, ["-p", str(port), *_login(options.identity)], policy.ssh)
            try:
                box.run("true", patience=4 * policy.poll)
                return box
            except BoxLost as error:
                box.close()
                print(error, file=sys.stderr)
        if time.monotonic() > latest:
            raise BoxLost(f"it did not answer within {policy.start:.0f} s (state: {state})")
        time.sleep(policy.poll)


def _address(row: dict[str, Any]) -> tuple[str, int]:
    """Where ssh finds a rental: its own port where it has one, else Vast's proxy."""
    mapped = (row.get("ports") or {}).get("22/tcp")
    if mapped and row.get("public_ipaddr"):
        return row["public_ipaddr"].strip(), int(mapped[0]["HostPort"])
    return row["ssh_host"], int(row["ssh_port"])


def reap(options: argparse.Namespace) -> int:
    """End rentals whose launcher is gone; those of other machines only with --all."""
    vast, ledger = Vast(options.client), Ledger()
    try:
        rentals = vast.rentals()
    except ClientError as error:
        raise UserError(f"Vast does not let us in: {error}", "`vastai set api-key KEY`, or set VAST_API_KEY") from None
    if not rentals:
        print("no rental of ours is there")
    code = 0
    for row in rentals:
        label, number = row["label"], row["id"]
        described = f"rental {number} ({label}, {row.get('actual_status')}, ${row.get('dph_total') or 0:.3f}/h)"
        if not options.all and ledger.claimed(label):
            print(f"{described}: its launcher is alive, left alone")
        elif not options.all and not ledger.knows(label):
            print(f"{described}: not rented from this machine, left alone; --all ends it")
        else:
            try:
                vast.destroy(number)
                ledger.write("ended", label, instance=number, why="reaped")
                print(f"{described}: ended")
            except RunFailed as error:
                print(error, file=sys.stderr)
                code = EXIT_CODES["failed"]
    return code


def engines(options: argparse.Namespace) -> int:
    """Write a folder that SkyPilot or dstack can run: for clouds other than Vast, or several machines."""
    spec = spec_of(options)
    out = options.out / f"{spec.workflow}-engines" if options.out == Path("runs") else options.out
    build_box(spec, out)
    price = spec.max_price_per_hour
    values = {
        "name": "".join(letter if letter.isalnum() else "-" for letter in spec.run_id.lower())[:40].strip("-"),
        "gpu": (spec.accelerator or "T4").replace("_", ""),  # Vast's RTX_4090 is theirs RTX4090
        "nodes": options.nodes,
        "sky_price": f"  max_hourly_cost: {price}\n" if price is not None else "",
        "dstack_price": f"max_price: {price}\n" if price is not None else "",
        "image": ENGINE_IMAGE,
        "hours": f"{math.ceil(parse_duration(spec.time_budget) / 3600) + 1 if spec.time_budget else ENGINE_HOURS}",
    }
    for template in sorted((HERE / "engines").glob("task.*")):
        path = out / template.name
        path.write_text(string.Template(template.read_text()).substitute(values))
        print(path)
    return 0


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.py", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_options(parser, arguments, also={"max_price_per_hour": "--max-price"})
    parser.add_argument("--ssh", metavar="USER@HOST", help="train on this box instead of renting one")
    parser.add_argument("--ssh-port", type=int, help="its port, when it is not what ssh's configuration says")
    parser.add_argument("--known-hosts", type=Path, help="file that knows its host key (default: ssh's own)")
    parser.add_argument("--identity", type=Path, help="private key to log in with (default: what ssh takes)")
    parser.add_argument("--interruptible", action=argparse.BooleanOptionalAction, help="bid for spare machines (see offers.toml)")
    parser.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True, help="follow the run to its end")
    parser.add_argument("--dry-run", action="store_true", help="show the offer it would rent, and stop")
    parser.add_argument("--policy", type=Path, default=HERE / "offers.toml", help="which offers to take, how long to wait")
    parser.add_argument("--client", default="vastai", help="the vastai program (default: the one on PATH)")
    return parser


def _reap_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch.py reap", allow_abbrev=False, description=reap.__doc__)
    parser.add_argument("--all", action="store_true", help="also those of living launchers and of other machines")
    parser.add_argument("--client", default="vastai", help="the vastai program (default: the one on PATH)")
    return parser


def _login(identity: Path | None) -> list[str]:
    return ["-i", str(identity), "-o", "IdentitiesOnly=yes"] if identity else []


def _public_keys(identity: Path | None) -> list[str]:
    """The public keys that ssh would offer, in their one-line form."""
    files = [Path(f"{identity}.pub")] if identity else sorted((Path.home() / ".ssh").glob("id_*.pub"))
    keys = [path.read_text().strip() for path in files if path.is_file()]
    if not identity:
        with suppress(OSError):
            listed = subprocess.run(["ssh-add", "-L"], capture_output=True, text=True)
            keys += listed.stdout.strip().splitlines() if listed.returncode == 0 else []
    return [key for key in keys if len(key.split()) >= 2]


@contextmanager
def _needs(program: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"there is no {program} here", f"install it, for instance: apt-get install {program}") from None


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))

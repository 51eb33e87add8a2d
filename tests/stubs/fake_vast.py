"""A Vast.ai on loopback for the real client: offers, rentals whose machines are loopback boxes, and faults on request.

Written from what the released client sends and reads. It knows two keys: the account's, and one for each box.
"""

import json
import operator
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from tests.stubs.loopback_box import LoopbackBox

COMPARE = {
    "eq": operator.eq,
    "neq": operator.ne,
    "gte": operator.ge,
    "gt": operator.gt,
    "lte": operator.le,
    "lt": operator.lt,
}
NO_SUCH_ASK = {"success": False, "error": "invalid_args", "msg": "error 404/3603: no_such_ask"}


def offer(number, price, **changes):
    """One machine on offer, in the fields that the client and the launcher read."""
    return {
        "id": number,
        "machine_id": 1000 + number,
        "gpu_name": "RTX 4090",
        "num_gpus": 1,
        "gpu_ram": 24564,
        "dph_total": price,
        "min_bid": price / 2,
        "storage_cost": 0.1,
        "inet_down_cost": 0.002,
        "inet_up_cost": 0.002,
        "reliability": 0.995,
        "direct_port_count": 10,
        "compute_cap": 890,
        "cuda_max_good": 12.8,
        "inet_down": 800.0,
        "inet_up": 400.0,
        "disk_space": 200.0,
        "duration": 30 * 86400.0,
        "verified": True,
        "external": False,
        "rentable": True,
        "geolocation": "SE",
        **changes,
    }


class FakeVast:
    """The server.

    Args:
        folder: where the boxes live.
        offers: what is on offer.
        account_key: the key of the account.
        public_keys: ssh keys that the account knows.

    Attributes:
        faults: offer number to what happens to whom rents it: "taken"; "lost answer" (rented, but the answer is an error);
            a state such as "exited" or "offline"; "loading" for ever; "unreachable" (runs, sshd does not).
        requests: method, path and body of every call.
        rentals: number to what there is of a rental; one that was destroyed is gone.
        history: (number, event) in order.
    """

    def __init__(self, folder, offers, account_key, public_keys):
        self.folder, self.offers, self.account_key, self.public_keys = folder, offers, account_key, public_keys
        self.faults, self.rentals, self.boxes, self.requests, self.history = {}, {}, {}, [], []
        self.refuse_destroy = 0
        self.box_may_destroy = True
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"vast": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        for box in self.boxes.values():
            box.halt()

    def search(self, query):
        """The offers that a query allows."""
        plain = {name: test for name, test in query.items() if isinstance(test, dict)}

        def fits(row):
            return all(
                name in row and COMPARE[how](row[name], type(row[name])(value))
                for name, test in plain.items()
                for how, value in test.items()
            )

        return sorted((row for row in self.offers if fits(row)), key=lambda row: row["dph_total"])

    def rent(self, number, wanted):
        """Make a rental of an offer; None when it is not to be had."""
        row = next((row for row in self.offers if row["id"] == number), None)
        fault = self.faults.get(number)
        if row is None or fault == "taken":
            return None
        self.offers.remove(row)
        rental = 7000 + number
        key = f"boxkey{rental}"
        environment = {
            "CONTAINER_ID": str(rental),
            "CONTAINER_API_KEY": key,
            "VAST_CONTAINERLABEL": f"C.{rental}",
            "VAST_URL": self.url,
        }
        box = LoopbackBox(self.folder / f"box-{rental}", self.public_keys[0], environment)
        self.boxes[rental] = box
        self.rentals[rental] = {
            "id": rental,
            "machine_id": row["machine_id"],
            "label": wanted["label"],
            "onstart": wanted["onstart"],
            "actual_status": "loading",
            "intended_status": "running",
            "status_msg": None,
            "start_date": time.time(),
            "extra_env": [],
            "dph_total": row["dph_total"] if wanted["price"] is None else wanted["price"],
            "is_bid": wanted["price"] is not None,
            "public_ipaddr": "127.0.0.1 ",
            "ports": {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(box.port)}]},
            "ssh_host": "ssh.invalid",
            "ssh_port": 1,
            "key": key,
        }
        self.history.append((rental, "rented"))
        if fault in ("exited", "offline", "unknown"):
            self.rentals[rental]["actual_status"] = fault
        elif fault == "unreachable":
            self.rentals[rental]["actual_status"] = "running"
        elif fault != "loading":
            box.boot(wanted["onstart"])
            self.rentals[rental]["actual_status"] = "running"
        return rental

    def outbid(self, rental):
        """Somebody bids more: the box is gone at once, its disk stays."""
        with self.lock:
            self.boxes[rental].halt()
            self.rentals[rental].update(actual_status="exited", intended_status="stopped")
            self.history.append((rental, "outbid"))

    def set_state(self, rental, state):
        if state == "stopped":
            self.boxes[rental].halt()
            self.rentals[rental].update(actual_status="exited", intended_status="stopped")
        else:
            self.boxes[rental].boot(self.rentals[rental]["onstart"])
            self.rentals[rental].update(actual_status="running", intended_status="running")
        self.history.append((rental, state))

    def destroy(self, rental, by):
        self.boxes[rental].halt()  # what lay on its disk stays, for the tests to look through
        del self.rentals[rental]
        self.history.append((rental, f"destroyed by {by}"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _serve(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        address = urlsplit(self.path)
        self.vast.requests.append((self.command, address.path, body))
        with self.vast.lock:
            status, answer = self._answer(address.path, parse_qs(address.query), body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _answer(self, path, query, body):
        vast = self.vast
        parts = path.strip("/").split("/")[2:]  # without api/v0
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        number = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None
        rental = vast.rentals.get(number)
        by_box = rental is not None and key == rental["key"]
        if key != vast.account_key and not by_box:
            return 401, {"success": False, "msg": "Invalid user key"}
        call = (self.command, parts[0])
        if call == ("GET", "users"):
            return 200, {"id": 1, "host_agreement_accepted": False}
        if call == ("GET", "ssh"):
            return 200, [{"id": 1, "public_key": public} for public in vast.public_keys]
        if call == ("GET", "gpu_names"):
            return 200, {"gpu_names": ["RTX 4090"]}
        if call == ("POST", "bundles"):
            return 200, {"offers": vast.search(body)}
        if call == ("PUT", "asks"):
            made = vast.rent(number, body)
            if made is None:
                return 404, NO_SUCH_ASK
            if vast.faults.get(number) == "lost answer":
                return 500, {"msg": "internal error"}
            return 200, {"success": True, "new_contract": made, "instance_api_key": vast.rentals[made]["key"]}
        if call == ("GET", "instances"):
            shown = [{k: v for k, v in row.items() if k != "key"} for row in vast.rentals.values()]
            if number is not None:
                return 200, {"instances": next((row for row in shown if row["id"] == number), None)}
            return 200, {"instances": shown, "next_token": None, "total_instances": len(shown)}
        if rental is None:
            return 404, {"success": False, "msg": f"no_such_instance {number}"}
        if call == ("PUT", "instances"):
            # The one who asks may run on the box: answer first.
            threading.Timer(0.05, vast.set_state, (number, body["state"])).start()
            return 200, {"success": True}
        if call == ("DELETE", "instances"):
            if by_box and not vast.box_may_destroy:
                return 403, {"success": False, "msg": "this key may not"}
            if vast.refuse_destroy:
                vast.refuse_destroy -= 1
                return 503, {"success": False, "msg": "try later"}
            threading.Timer(0.05, vast.destroy, (number, "the box" if by_box else "the account")).start()
            return 200, {"success": True}
        return 404, {"msg": f"{self.command} {path}"}

    def log_message(self, *_):
        pass

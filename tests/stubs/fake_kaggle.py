"""A Kaggle on this machine: keeps notebooks and data sets, and really runs what is pushed, where there is no network.

The real client reaches it with `environment()`: requests to http://localhost go through it as their HTTP proxy. A pushed
notebook runs in a Python environment that holds only what Kaggle's image has, in /kaggle/working, with its inputs
read-only below /kaggle/input; nothing else about the machine changes, because all of that lies in a mount namespace.
"""

import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

MAX_SOURCE_BYTES = 1_000_000
REQUIRED = ("isPrivate", "enableInternet", "machineShape", "enableGpu", "sessionTimeoutSeconds")
MACHINE_SHAPES = ("NvidiaTeslaT4", "None")

# Arguments: an empty folder, the working folder, the folder of inputs, then the command.
AS_ON_KAGGLE = """
set -e
root=$1 working=$2 inputs=$3
shift 3
ip link set lo up
mount -t tmpfs tmpfs "$root"
for entry in /*; do
    if [ -L "$entry" ]; then cp -P "$entry" "$root$entry"
    elif [ -d "$entry" ] && [ "$entry" != /kaggle ]; then mkdir "$root$entry" && mount --rbind "$entry" "$root$entry"
    fi
done
mkdir -p "$root/kaggle/working" "$root/kaggle/input"
mount --bind "$working" "$root/kaggle/working"
mount --bind "$inputs" "$root/kaggle/input"
mount -o remount,ro,bind "$root/kaggle/input"
exec chroot "$root" sh -c 'cd /kaggle/working && exec "$@"' sh "$@"
"""


@dataclass
class Session:
    """One version of a notebook, and its run."""

    request: dict
    folder: Path
    status: str = "QUEUED"
    message: str = ""
    events: list = field(default_factory=list)
    process: subprocess.Popen | None = None

    @property
    def over(self):
        return self.status not in ("QUEUED", "RUNNING")


class FakeKaggle:
    """The server; a context manager.

    Args:
        folder: everything is kept here.
        python: interpreter of the environment like Kaggle's image.
        layout: where inputs are mounted: "new" (notebooks/OWNER/NAME, datasets/OWNER/NAME) or "old" (NAME).
        quota_hours: GPU hours used and allowed this week.
        faults: name to how often it happens. "push refused", "push 503" (before it arrives), "push lost" (the answer only),
            "upload 503" (half-way), "log dropped", "stale" (status answers of an older version), "source limit" (100 kB are
            too many), "kernel source refused", "kernel source empty", "session killed", "status 503", "file cut".
    """

    user, key = "someone", "KGAT_" + secrets.token_hex(16)

    def __init__(self, folder, python, layout="new", quota_hours=(2.0, 30.0), faults=None):
        self.folder, self.python, self.layout, self.quota_hours = Path(folder), python, layout, quota_hours
        self.faults = dict(faults or {})
        self.kernels, self.datasets, self.uploads, self.calls = {}, {}, {}, []
        self._lock = threading.Lock()

    def __enter__(self):
        kaggle = self

        class Handler(_Handler):
            pass

        Handler.kaggle = kaggle
        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        for session in itertools.chain(*self.kernels.values()):
            if session.process is not None and session.process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(session.process.pid, signal.SIGKILL)
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home):
        """Environment variables that lead the real client here, with a key that is in no file."""
        proxy = f"http://127.0.0.1:{self._server.server_address[1]}"
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "TMPDIR": str(home),
            "LANG": "C.UTF-8",
            "HTTP_PROXY": proxy,
            "http_proxy": proxy,
            "NO_PROXY": "",
            "no_proxy": "",
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "KAGGLE_API_TOKEN": self.key,
        }

    def takes(self, fault):
        """Whether a fault happens now; one fewer is left then."""
        with self._lock:
            if self.faults.get(fault, 0) <= 0:
                return False
            self.faults[fault] -= 1
            return True

    # What the client asks for

    def introspect_token(self, request):
        known = request["token"] == self.key
        return {"active": known, "username": self.user if known else ""}

    def quota(self, request):
        used, total = (f"{round(hours * 3600)}s" for hours in self.quota_hours)
        return {"quotaRefreshTime": "2026-11-28T00:00:00.000Z", "gpuQuota": {"timeUsed": used, "totalTimeAllowed": total}}

    def save_kernel(self, request):
        if missing := [name for name in REQUIRED if name not in request]:
            return {"error": f"missing: {missing}"}
        if request["machineShape"] not in MACHINE_SHAPES or not request["isPrivate"]:
            return {"error": f"not allowed: {request['machineShape']}, private {request['isPrivate']}"}
        if self.takes("push refused"):
            return {"error": "Maximum batch GPU session count of 2 reached."}
        limit = 100_000 if self.takes("source limit") else MAX_SOURCE_BYTES
        if len(request["text"].encode()) > limit:
            return {"error": "The kernel source must be less than 1 megabytes"}
        owner, slug = request["slug"].split("/")
        if owner != self.user:
            return {"error": f"Permission denied to {owner}"}
        versions = self.kernels.setdefault(slug, [])
        session = Session(request, self.folder / "kernels" / slug / str(len(versions) + 1))
        bad_kernels, bad_datasets = self._mount(session)
        versions.append(session)
        threading.Thread(target=self._run, args=(session,), daemon=True).start()
        return {
            "ref": f"/code/{owner}/{slug}",
            "url": f"https://www.kaggle.com/code/{owner}/{slug}",
            "versionNumber": len(versions),
            "invalidKernelSources": bad_kernels,
            "invalidDatasetSources": bad_datasets,
        }

    def session(self, request):
        """The session that a request is about, by its version where it names one."""
        versions = self.kernels.get(request.get("kernelSlug"))
        if not versions or request.get("userName") != self.user:
            return None
        label = request.get("versionLabel")
        return versions[int(label[1:]) - 1] if label else versions[-1]

    def get_kernel(self, request):
        return {"metadata": {"currentVersionNumber": len(self.kernels[request["kernelSlug"]])}}

    def session_status(self, request):
        if self.takes("stale"):
            return {"status": "COMPLETE"}
        session = self.session(request)
        return {"status": session.status, **({"failureMessage": session.message} if session.message else {})}

    def session_output(self, request):
        session = self.session(request)
        if not session.over:
            return {"files": []}
        root = session.folder / "working"
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        first, size = int(request.get("pageToken") or 0), min(request.get("pageSize", 20), 10)
        base = f"http://localhost/files/{session.folder.relative_to(self.folder)}/working"
        names = [str(path.relative_to(root)) for path in paths[first : first + size]]
        page = [{"fileName": name, "url": f"{base}/{name}"} for name in names]
        more = {"nextPageToken": str(first + size)} if first + size < len(paths) else {}
        return {"files": page, "log": json.dumps(session.events), **more}

    def start_upload(self, request):
        token = secrets.token_hex(8)
        self.uploads[token] = (request["name"], int(request["contentLength"]), bytearray())
        return {"token": token, "createUrl": f"http://localhost/upload/{token}"}

    def create_dataset(self, request):
        folder = self.folder / "datasets" / request["slug"]
        folder.mkdir(parents=True)
        for file in request.get("files", []):
            name, size, content = self.uploads[file["token"]]
            assert len(content) == size, f"{name} is not whole"
            (folder / name).write_bytes(content)
            if name.endswith((".zip", ".tar")):  # Kaggle unpacks archives into a folder of their name
                kind = zipfile.ZipFile if name.endswith(".zip") else tarfile.open
                with kind(folder / name) as archive:
                    archive.extractall(folder / name.rpartition(".")[0])
                (folder / name).unlink()
        self.datasets[request["slug"]] = {"request": request, "pending": 2}
        return {"ref": f"/{self.user}/{request['slug']}", "url": "", "status": "ok"}

    def dataset_status(self, request):
        dataset = self.datasets[request["datasetSlug"]]
        dataset["pending"] -= 1
        return {"status": "READY" if dataset["pending"] < 0 else "BLOBS_RECEIVED"}

    # The machine that runs notebooks

    def _mount(self, session):
        """Copy the inputs to where they are mounted from; returns the names that cannot be attached."""
        inputs, bad = session.folder / "inputs", ([], [])
        inputs.mkdir(parents=True)
        for kind, names, wrong in (
            ("notebooks", session.request.get("kernelDataSources", []), bad[0]),
            ("datasets", session.request.get("datasetDataSources", []), bad[1]),
        ):
            for name in names:
                slug = name.split("/")[1]
                if kind == "notebooks":
                    earlier = self.kernels.get(slug, [None])[-1]
                    known = earlier is not None and earlier.status == "COMPLETE" and not self.takes("kernel source refused")
                    source = earlier.folder / "working" if known else None
                else:
                    known = slug in self.datasets and self.datasets[slug]["pending"] < 0
                    source = self.folder / "datasets" / slug
                if not known:
                    wrong.append(name)
                    continue
                target = inputs / slug if self.layout == "old" else inputs / kind / name
                if kind == "notebooks" and self.takes("kernel source empty"):
                    target.mkdir(parents=True)
                else:
                    shutil.copytree(source, target)
        return bad

    def _run(self, session):
        time.sleep(0.5)
        working, home = session.folder / "working", session.folder / "home"
        for folder in (working, home, session.folder / "root"):
            folder.mkdir()
        (home / "__notebook__.ipynb").write_text(session.request["text"])
        command = [self.python, "-m", "papermill", "--no-progress-bar", "--log-output", home / "__notebook__.ipynb"]
        command += [home / "__results__.ipynb", "--cwd", "/kaggle/working"]
        places = [session.folder / "root", working, session.folder / "inputs"]
        session.process = subprocess.Popen(
            ["unshare", "-rnm", "sh", "-c", AS_ON_KAGGLE, "sh", *places, *command],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(home),
                "TMPDIR": str(home),
                "LANG": "C.UTF-8",
                "OMP_NUM_THREADS": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
                "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        session.status = "RUNNING"
        began = time.monotonic()
        killer = threading.Timer(session.request["sessionTimeoutSeconds"], os.killpg, (session.process.pid, signal.SIGKILL))
        killer.daemon = True
        killer.start()
        for line in session.process.stdout:
            session.events.append({"stream_name": "stderr", "time": time.monotonic() - began, "data": line})
            if "step/s" in line and "| 0/" not in line and self.takes("session killed"):
                os.killpg(session.process.pid, signal.SIGKILL)
        session.process.stdout.close()
        code = session.process.wait()
        killer.cancel()
        session.message = "" if code == 0 else "Your notebook hit an exception while running." if code == 1 else "Notebook killed"
        session.status = "COMPLETE" if code == 0 else "ERROR"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was stopped
            super().handle_error(request, address)


class _Handler(BaseHTTPRequestHandler):
    kaggle: FakeKaggle
    protocol_version = "HTTP/1.1"
    METHODS = {  # noqa: RUF012
        "OAuthService/IntrospectToken": "introspect_token",
        "KernelsApiService/GetAcceleratorQuotaStatistics": "quota",
        "KernelsApiService/SaveKernel": "save_kernel",
        "KernelsApiService/GetKernel": "get_kernel",
        "KernelsApiService/GetKernelSessionStatus": "session_status",
        "KernelsApiService/ListKernelSessionOutput": "session_output",
        "BlobApiService/StartBlobUpload": "start_upload",
        "DatasetApiService/CreateDataset": "create_dataset",
        "DatasetApiService/GetDatasetStatus": "dataset_status",
    }

    def log_message(self, *_):
        pass

    def _answer(self, code, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        headers.setdefault("Content_Type", "application/json" if not isinstance(content, bytes) else "application/octet-stream")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, code, message=""):
        self._answer(code, {"code": code, "message": message or f"{code} from the stand-in"})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        name = urlsplit(self.path).path.removeprefix("/api/v1/").partition(".")[2]
        kaggle, method = self.kaggle, self.METHODS.get(name)
        kaggle.calls.append(name)
        if method is None:
            return self._refuse(404, f"no such method: {self.path}")
        if method != "introspect_token" and self.headers.get("Authorization") != f"Bearer {kaggle.key}":
            return self._refuse(401, "Unauthenticated")
        if method in ("get_kernel", "session_status", "session_output") and kaggle.session(request) is None:
            return self._refuse(403, "Permission 'kernels.get' was denied")
        if method == "dataset_status" and request["datasetSlug"] not in kaggle.datasets:
            return self._refuse(403, "Permission 'datasets.get' was denied")
        if (method == "save_kernel" and kaggle.takes("push 503")) or (method == "session_status" and kaggle.takes("status 503")):
            return self._refuse(503)
        answer = getattr(kaggle, method)(request)
        if method == "save_kernel" and kaggle.takes("push lost"):
            return self._refuse(503)
        return self._answer(200, answer)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/files/"):
            content = (self.kaggle.folder / path.removeprefix("/files/")).read_bytes()
            if content and self.kaggle.takes("file cut"):
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return None
            return self._answer(200, content)
        session = self.kaggle.session({"userName": path.split("/")[-2], "kernelSlug": path.split("/")[-1]})
        if session is None:
            return self._refuse(403)
        if session.over:
            return self._answer(200, json.dumps(session.events).encode(), Content_Type="application/json")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = 0
        while sent < len(session.events) or not session.over:
            for event in session.events[sent:]:
                self._chunk(f"data: {json.dumps(event)}\n\n")
                sent += 1
            if sent > 2 and self.kaggle.takes("log dropped"):
                self.close_connection = True  # in the middle of the chunks
                return None
            time.sleep(0.1)
        self._chunk("data: END_OF_LOG\n\n")
        return self._chunk("")

    def _chunk(self, text):
        self.wfile.write(f"{len(text.encode()):x}\r\n{text}\r\n".encode())
        self.wfile.flush()

    def do_PUT(self):
        _, size, content = self.kaggle.uploads[self.path.rpartition("/")[2]]
        length = int(self.headers.get("Content-Length") or 0)
        given = self.headers.get("Content-Range", "")
        if given.startswith("bytes */"):
            self.rfile.read(length)
            if len(content) == size:
                return self._answer(200)
            return self._answer(308, **({"Range": f"bytes=0-{len(content) - 1}"} if content else {}))
        body = self.rfile.read(length)
        assert given == "" or int(given.split()[1].split("-")[0]) == len(content), given
        if self.kaggle.takes("upload 503"):
            content += body[: len(body) // 2]
            return self._answer(503)
        content += body
        return self._answer(200 if len(content) == size else 503)

"""The Kaggle client, run in an environment of its own: reads one JSON request a line and answers each with JSON lines.

`launch.py` starts it, so that the client's packages and those that train never meet. It uses the client's Python API and
not its command line: `kaggle kernels push` exits 0 when the server refuses, and only the API can ask about one version.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

ATTEMPTS = 6
CHUNK_BYTES = 1 << 20


def account(api: Any) -> dict[str, Any]:
    """Who the key belongs to, and the GPU hours of this week."""
    try:
        found = api.quota_view()
        quota, refresh = found.gpu_quota, found.quota_refresh_time
    except (AttributeError, requests.HTTPError, KeyError, ValueError):  # an older client, or an account without any
        quota = refresh = None
    answer = {"user": api.config_values["username"], "quota": None}
    if quota is not None and quota.total_time_allowed is not None:
        used = quota.time_used.total_seconds() if quota.time_used else 0.0
        answer["quota"] = {
            "used_seconds": used,
            "total_seconds": quota.total_time_allowed.total_seconds(),
            "refresh": refresh.isoformat(timespec="minutes") if refresh else "",
        }
    return answer


def push(api: Any, folder: str, seconds: int) -> dict[str, Any]:
    """Push the notebook of a folder with a kernel-metadata.json; says what the server said, refusals too."""
    saved = api.kernels_push(folder, timeout=str(seconds))
    kinds = ("kernel", "dataset", "competition", "model")
    return {
        "error": saved.error or "",
        "version": saved.version_number or 0,
        "url": saved.url,
        "invalid": {kind: list(getattr(saved, f"invalid_{kind}_sources")) for kind in kinds},
    }


def version(api: Any, kernel: str) -> int:
    """The newest version of a kernel, 0 when there is none."""
    from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

    request = _about(ApiGetKernelRequest(), kernel)
    try:
        with api.build_kaggle_client() as client:
            return client.kernels.kernels_api_client.get_kernel(request).metadata.current_version_number or 0
    except requests.HTTPError as error:
        if error.response.status_code in (403, 404):  # private and missing look alike
            return 0
        raise


def status(api: Any, kernel: str, version: int) -> dict[str, str]:
    """The state of one version's session, such as RUNNING, and why it failed."""
    from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelSessionStatusRequest

    request = _about(ApiGetKernelSessionStatusRequest(), kernel, version)
    with api.build_kaggle_client() as client:
        found = client.kernels.kernels_api_client.get_kernel_session_status(request)
    return {"status": found.status.name, "message": found.failure_message or ""}


def follow(api: Any, kernel: str, seen: int) -> Iterator[dict[str, str]]:
    """The log of a kernel's newest session from its event number `seen` on, as it comes."""
    for index, event in enumerate(api.kernels_logs_stream(kernel)):
        if index >= seen:
            yield {"data": str(event.get("data") or "")}


def pull(api: Any, kernel: str, version: int, folder: str, prefix: str) -> list[str]:
    """Download the output files of one version whose names begin with `prefix`; each is whole or not there."""
    from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

    root, pulled, token = Path(folder).resolve(), [], ""
    while True:
        request = _about(ApiListKernelSessionOutputRequest(), kernel, version)
        request.page_size, request.page_token = 100, token
        with api.build_kaggle_client() as client:
            page = client.kernels.kernels_api_client.list_kernel_session_output(request)
        for file in page.files or []:
            path = (root / file.file_name).resolve()
            if file.file_name.startswith(prefix) and path.is_relative_to(root):
                _download(file.url, path)
                pulled.append(file.file_name)
        token = page.next_page_token
        if not token:
            return pulled


def dataset(api: Any, folder: str) -> str:
    """Create the private data set of a folder with a dataset-metadata.json; says why not, or "" when it was created."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        made = api.dataset_create_new(folder, public=False, quiet=False, dir_mode="zip")
    said = printed.getvalue()
    if "Upload unsuccessful" in said:  # the client goes on without that file
        return next(line for line in said.splitlines() if "Upload unsuccessful" in line)
    return made.error or ""


def dataset_status(api: Any, ref: str) -> str:
    """The state of a data set, ready when it can be attached; "" when there is none."""
    try:
        return api.dataset_status(ref)
    except requests.HTTPError as error:
        if error.response.status_code in (403, 404):
            return ""
        raise


CALLS = {call.__name__: call for call in (account, push, version, status, follow, pull, dataset, dataset_status)}


def _about(request: Any, kernel: str, version: int = 0) -> Any:
    request.user_name, request.kernel_slug = kernel.split("/")
    if version:
        request.version_label = f"v{version}"
    return request


def _download(url: str, path: Path) -> None:
    """One file, beside its place first; tried again when the connection breaks or the server is busy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    for attempt in range(ATTEMPTS):
        try:
            with requests.get(url, stream=True, timeout=60) as response:
                response.raise_for_status()
                with partial.open("wb") as file:
                    for chunk in response.iter_content(CHUNK_BYTES):
                        file.write(chunk)
            expected = response.headers.get("Content-Length")
            if expected and not response.headers.get("Content-Encoding") and partial.stat().st_size != int(expected):
                raise requests.ConnectionError(f"{path.name} came cut short")
            partial.replace(path)
            return
        except requests.RequestException as error:
            if attempt == ATTEMPTS - 1 or _kind(error) != "busy":
                raise
            time.sleep(2**attempt / 2)


def _kind(error: BaseException) -> str:
    """busy: worth another try; key: who are you; refused: no."""
    if isinstance(error, SystemExit):
        return "key"
    response = getattr(error, "response", None)
    if response is not None:
        code = response.status_code
        return "busy" if code == 429 or code >= 500 else "key" if code == 401 else "refused"
    return "busy" if isinstance(error, requests.RequestException | ConnectionError | TimeoutError) else "refused"


def _without_keys(text: str, api: Any) -> str:
    for name in ("key", "token", "api_token"):
        secret = getattr(api, "config_values", {}).get(name) or ""
        text = text.replace(secret, "***") if len(secret) > 3 else text
    return text


def _signed_in() -> Any:
    """The client with its key checked; exits the way the client does when there is none."""
    from kaggle import api  # tries to sign in, and says nothing when that fails

    if not api.config_values.get("username"):
        api.authenticate()
    return api


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the client prints there

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    api = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            api = api or _signed_in()
            result = CALLS[request.pop("call")](api, **request)
            if isinstance(result, Iterator):
                for event in result:
                    answer(event=event)
                result = None
            answer(result=result)
        except (Exception, SystemExit) as error:
            answer(error=_without_keys(f"{type(error).__name__}: {error}", api), kind=_kind(error))


if __name__ == "__main__":
    main()

#!/bin/bash
# Runs on the box. Vast calls it whenever the instance starts, the launcher calls it too: the first one goes on, and one that
# finds an unfinished run continues it. Vast takes 4,000 characters. The launcher writes two settings below the first line.
#   onstart.sh                   wait for the launcher's files, then watch the run
#   onstart.sh job               what the watchdog starts: make the kit ready and train
#   onstart.sh status|sums|end   asks the watchdog's program
wait_seconds=${TRAINBOOK_WAIT_SECONDS:-0}
export HOME=${HOME:-/root}
folder=$HOME/trainbook/${TRAINBOOK_RUN_ID:?}
mkdir -p "$folder" && cd "$folder" || exit 1

# An ssh session does not see the paths that an image sets: look where images keep Python.
find_python() {
    for python in python3 python /venv/main/bin/python /opt/conda/bin/python; do
        "$python" -c "$1" 2>/dev/null && return 0
    done
    return 1
}
find_python 'import sys; sys.exit(sys.version_info < (3, 8))' || { echo "this box has no Python"; exit 90; }

case "$1" in
job)
    find_python 'import torch' || find_python 'import sys; sys.exit(sys.version_info < (3, 11))' || exit 90
    # pip only where something is missing, and by plain names: the image's own torch stays.
    there='from importlib.metadata import version; [version(name) for name in open("requirements.txt").read().split()]'
    "$python" -c "$there" 2>/dev/null || "$python" -m pip install -r requirements.txt || exit 90
    rm -rf kit && "$python" -m zipfile -e trainbook-*.whl kit || exit 90
    export PYTHONPATH=$PWD/kit TRAINBOOK_RUNS=$PWD/runs
    exec "$python" -m trainbook run --spec run.toml
    ;;
status | sums | end)
    exec "$python" watchdog.py "$@"
    ;;
esac

touch ~/.no_auto_tmux
exec 9>.lock
flock -n 9 || exit 0
command -v rsync >/dev/null || { apt-get update && apt-get install -y rsync; }
for ((waited = 0; waited < wait_seconds; waited++)); do
    [ -f pushed ] && break
    sleep 1
done
if [ ! -f pushed ]; then
    # The launcher died after it had rented: there is nothing to lose here, so end the rental. The key is this box's own.
    echo "nothing came in $wait_seconds s: giving the box back"
    exec "$python" -c '
import os, time, urllib.request
url = os.environ.get("VAST_URL", "https://console.vast.ai") + "/api/v0/instances/" + os.environ["CONTAINER_ID"] + "/"
headers = {"Authorization": "Bearer " + os.environ["CONTAINER_API_KEY"], "Content-Type": "application/json"}
while True:
    for method, body in (("DELETE", b"{}"), ("PUT", b"{\"state\": \"stopped\"}")):
        try:
            urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=30)
            raise SystemExit(method)
        except OSError as error:
            print(method, error)
    time.sleep(30)
'
fi
exec "$python" watchdog.py watch

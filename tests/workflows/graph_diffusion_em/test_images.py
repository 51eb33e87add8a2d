"""Data: split by picture, sizes, the user's folder, downloads that are checked."""

import http.server
import subprocess
import tarfile
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from trainbook.errors import UserError
from trainbook.workflows.graph_diffusion_em import downloads
from trainbook.workflows.graph_diffusion_em.config import Config
from trainbook.workflows.graph_diffusion_em.downloads import SETS, PictureSet, fetch, tree_sha1
from trainbook.workflows.graph_diffusion_em.images import PHOTOS, load_data, read, split_by_picture

SHARED = Path(__file__).parents[4] / "shared/data/denoising"  # beside the checkout


def runtime(folder):
    return SimpleNamespace(device="cpu", data_folder=folder)


def write(folder, number, size=(40, 50), seed=0):
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (number, *size, 3), dtype=np.uint8)
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{index}.png")
    return pixels


@pytest.mark.parametrize("colour", [False, True])
def test_embedded_photos_are_there_and_split_by_picture(colour, tmp_path):
    names = [name for split in PHOTOS.values() for name in split]
    assert len(names) == len(set(names))
    data = load_data(Config(colour=colour, train_crops=32), runtime(tmp_path))
    channels = 3 if colour else 1
    assert data.train["crops"].shape == (32, channels, 32, 32)
    assert data.valid["crops"].shape == (128, channels, 32, 32)
    assert data.test["pictures"].shape == (3 if colour else 6, channels, 256, 256)
    assert data.synthetic is False
    assert 0 <= float(data.test["pictures"].min()) < float(data.test["pictures"].max()) <= 1
    again = load_data(Config(colour=colour, train_crops=32, seed=5), runtime(tmp_path))
    assert torch.equal(data.train["crops"], again.train["crops"])  # the split belongs to the data, not to the seed


def test_a_folder_is_split_by_picture(tmp_path):
    write(tmp_path / "mine", 10)
    (tmp_path / "mine" / "notes.txt").write_text("not a picture")
    config = Config(dataset="folder", image_folder=str(tmp_path / "mine"), train_crops=16, batch_size=8)
    data = load_data(config, runtime(tmp_path))
    assert data.test["pictures"].shape == (2, 1, 40, 40)
    assert data.synthetic is None
    pictures = [torch.full((1, 4, 4), float(i)) for i in range(10)]
    parts = split_by_picture(pictures)
    assert sorted(int(p[0, 0, 0]) for part in parts.values() for p in part) == list(range(10))


def test_a_picture_is_read_as_it_is(tmp_path):
    pixels = write(tmp_path / "one", 1)[0]
    torch.testing.assert_close(read(tmp_path / "one" / "0.png", True).permute(1, 2, 0) * 255, torch.from_numpy(pixels).float())
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    assert float((read(tmp_path / "one" / "0.png", False)[0] * 255 - torch.from_numpy(grey)).abs().max()) <= 1


def test_bad_folders_are_refused_with_a_remedy(tmp_path):
    def load(folder, **changes):
        return load_data(Config(dataset="folder", image_folder=str(folder), train_crops=16, **changes), runtime(tmp_path))

    with pytest.raises(UserError, match="there is no folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        load(tmp_path / "empty")
    write(tmp_path / "two", 2)
    with pytest.raises(UserError, match="cannot be split"):
        load(tmp_path / "two")
    write(tmp_path / "small", 5, (20, 60))
    with pytest.raises(UserError, match="only 20 pixels"):
        load(tmp_path / "small")
    (tmp_path / "two" / "torn.png").write_bytes((tmp_path / "two" / "0.png").read_bytes()[:500])
    with pytest.raises(UserError, match="cannot read the picture"):
        load(tmp_path / "two")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A small set behind a web server on this machine."""
    folder = tmp_path / "web" / "mine"
    folder.parent.mkdir()
    write(folder, 3)
    (folder / "0.png").rename(folder / "3.png")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setitem(downloads.SETS, "set12", PictureSet("mine", "{}.png", 3, tree_sha1(contents)))
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_downloads_are_fetched_once_and_checked(served, tmp_path):
    place = fetch("set12", tmp_path / "data", served)
    assert sorted(path.name for path in place.iterdir()) == ["1.png", "2.png", "3.png"]
    assert fetch("set12", tmp_path / "data", "http://127.0.0.1:9") == place  # nothing is fetched again
    (place / "2.png").write_bytes(b"something else")
    with pytest.raises(UserError, match="delete that folder"):
        fetch("set12", tmp_path / "data", served)


def test_without_a_network_it_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="turn the internet on"):
        fetch("bsd68", tmp_path, "http://127.0.0.1:9")


def test_the_checksum_is_gits(tmp_path):
    files = {"b.png": b"two", "a.png": b"one\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    run = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True, text=True)
    run(["git", "init", "-q"])
    run(["git", "add", "."])
    assert run(["git", "write-tree"]).stdout.strip() == tree_sha1(files)


@pytest.mark.parametrize(("archive", "name"), [("set12", "set12"), ("train400", "bsd400")])
def test_the_recorded_checksums_are_those_of_the_published_files(archive, name, tmp_path):
    path = SHARED / f"{archive}.tar"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with tarfile.open(path) as tar:
        files = {Path(m.name).name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}
    assert sorted(files) == sorted(SETS[name].names())
    assert tree_sha1(files) == SETS[name].tree_sha1

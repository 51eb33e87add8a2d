"""Files are replaced in one move, by several processes at once too, and what fails leaves nothing behind."""

import multiprocessing
import os

import pytest

from trainbook import files
from trainbook.files import write_atomic

NUM_WRITES = 200


def write_often(path, letter):
    for _ in range(NUM_WRITES):
        write_atomic(path, letter * 10_000)


def test_two_processes_write_one_file(tmp_path):
    context = multiprocessing.get_context("forkserver")
    both = [context.Process(target=write_often, args=(tmp_path / "shared", letter)) for letter in (b"a", b"b")]
    for process in both:
        process.start()
    seen = set()
    while any(process.is_alive() for process in both):
        if (tmp_path / "shared").exists():
            content = (tmp_path / "shared").read_bytes()
            assert content == content[:1] * 10_000
            seen.add(content[:1])
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert seen <= {b"a", b"b"}
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_a_full_disk_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    write_atomic(tmp_path / "kept", b"old")
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "kept", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("kept", b"old")]

"""The cache of teacher vectors: hits, its size, damage, and no pickle."""

import os

import numpy as np
import pytest

from trainbook.workflows.cellular_cube.embedding_cache import EmbeddingCache, cache_key

IDENTITY = ("model", "revision", "pooling")
WIDTH = 8


class CountingTeacher:
    def __init__(self):
        self.embedded = []

    def __call__(self, texts):
        self.embedded += texts
        return np.array([np.random.default_rng(len(text)).standard_normal(WIDTH) for text in texts], dtype=np.float32)


def test_the_second_time_nothing_is_embedded_and_the_vectors_are_the_same(tmp_path):
    teacher, texts = CountingTeacher(), ["one", "three", "fifteen", "one"]
    cache = EmbeddingCache(tmp_path, 10**6)
    first = cache.fetch(IDENTITY, WIDTH, texts, teacher)
    assert teacher.embedded == ["one", "three", "fifteen"]  # a text that comes twice is embedded once
    np.testing.assert_array_equal(first[0], first[3])
    np.testing.assert_allclose(first, teacher(texts), atol=2e-3)
    again = EmbeddingCache(tmp_path, 10**6)
    teacher.embedded.clear()
    np.testing.assert_array_equal(again.fetch(IDENTITY, WIDTH, [*texts, "seventeen chars!!"], teacher)[:4], first)
    assert teacher.embedded == ["seventeen chars!!"]
    assert again.hit_rate == pytest.approx(4 / 5)


def test_model_revision_pooling_and_text_all_tell_vectors_apart(tmp_path):
    assert cache_key("a", "b", "c", "d") == cache_key("a", "b", "c", "d")
    keys = {
        cache_key(*parts) for parts in (("a", "b", "c", "d"), ("ab", "", "c", "d"), ("a", "b", "cd", ""), ("a", "b", "c", "e"))
    }
    assert len(keys) == 4
    teacher, cache = CountingTeacher(), EmbeddingCache(tmp_path, 10**6)
    for identity in (IDENTITY, ("model", "another", "pooling")):
        cache.fetch(identity, WIDTH, ["text"], teacher)
    assert teacher.embedded == ["text", "text"]


def test_a_damaged_shard_is_computed_again_and_nothing_is_unpickled(tmp_path, caplog):
    teacher, cache = CountingTeacher(), EmbeddingCache(tmp_path, 10**6)
    right = cache.fetch(IDENTITY, WIDTH, ["text"], teacher)
    (shard,) = tmp_path.glob("*.npy")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.testing.assert_array_equal(cache.fetch(IDENTITY, WIDTH, ["text"], teacher), right)
    assert teacher.embedded == ["text", "text"]
    assert "computed again" in caplog.text
    assert not (tmp_path / "object.npy").exists()


def test_the_least_recently_used_goes_first_and_the_size_is_kept(tmp_path):
    teacher = CountingTeacher()
    cache = EmbeddingCache(tmp_path, 10**6)
    for age, text in enumerate(("oldest", "middle one", "newest of all")):
        cache.fetch(IDENTITY, WIDTH, [text], teacher)
        (new,) = [path for path in tmp_path.glob("*.npy") if path.stat().st_mtime > 10**8]
        os.utime(new, (age, age))
    size = new.stat().st_size
    cache.fetch(IDENTITY, WIDTH, ["oldest"], teacher)  # now it is the one used last
    teacher.embedded.clear()
    small = EmbeddingCache(tmp_path, 2 * size)
    small.fetch(IDENTITY, WIDTH, ["oldest"], teacher)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.npy")) <= 2 * size
    small.fetch(IDENTITY, WIDTH, ["newest of all"], teacher)
    assert teacher.embedded == []
    small.fetch(IDENTITY, WIDTH, ["middle one"], teacher)
    assert teacher.embedded == ["middle one"]


def test_vectors_beyond_16_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        EmbeddingCache(tmp_path, 10**6).fetch(IDENTITY, 1, ["text"], lambda texts: np.full((1, 1), 1e6))

"""The store of a teacher's outputs: equal to computing them, never stale, safe against damage and against a second process."""

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from trainbook.workflows.distillation.logit_store import (
    LogitStore,
    cache_key,
    fingerprint_tensors,
)

N, K, C = 12, 2, 4
SHAPES = {"logits": (K, N, C)}
PLENTY = 10**9


def teacher_of(seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, C)).eval()


def images_of(seed=0):
    return torch.randn(N, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def key_of(teacher=None, images=None, transform=None, views=K, seed=0, dtype="float32"):
    data = fingerprint_tensors({"images": images_of() if images is None else images})
    return cache_key(teacher or teacher_of(), data, transform or {"mean": 0.1, "shift": 1}, views, seed, dtype)


def outputs(teacher=None):
    """Two views: as it is and mirrored."""
    images = images_of()
    with torch.no_grad():
        return torch.stack([(teacher or teacher_of())(view) for view in (images, images.flip(3))])


class Fill:
    """Computes in batches, as a teacher's pass does, and counts how often it is asked."""

    def __init__(self, values):
        self.values, self.calls = values, 0

    def __call__(self, arrays):
        self.calls += 1
        for first in range(0, N, 5):
            for array in arrays.values():
                array[:, first : first + 5] = self.values[:, first : first + 5]


def test_kept_logits_are_the_computed_ones_bit_for_bit(tmp_path):
    fill = Fill(outputs())
    for _ in range(2):
        arrays = LogitStore(tmp_path, PLENTY).fetch(key_of(), SHAPES, "float32", fill)
        assert torch.equal(torch.from_numpy(arrays["logits"]), outputs())
    assert fill.calls == 1


def test_half_precision_is_within_its_rounding(tmp_path):
    arrays = LogitStore(tmp_path, PLENTY).fetch(key_of(dtype="float16"), SHAPES, "float16", Fill(outputs()))
    kept = torch.from_numpy(arrays["logits"]).float()
    assert bool(((kept - outputs()).abs() <= 2**-11 * outputs().abs()).all())
    assert not torch.equal(kept, outputs())


def test_shuffled_rows_belong_to_their_examples(tmp_path):
    arrays = LogitStore(tmp_path, PLENTY).fetch(key_of(), SHAPES, "float32", Fill(outputs()))
    indices = torch.randperm(N)[:7]
    views = torch.arange(7) % K
    images = images_of()[indices]
    shown = torch.where((views == 1)[:, None, None, None], images.flip(3), images)
    with torch.no_grad():
        live = teacher_of()(shown)
    torch.testing.assert_close(torch.from_numpy(arrays["logits"])[views, indices], live, rtol=1e-5, atol=1e-6)


def changed(module, name):
    with torch.no_grad():
        module.state_dict()[name].view(-1)[0] += 1e-6 if module.state_dict()[name].is_floating_point() else 1
    return module


@pytest.mark.parametrize(
    "other",
    [
        *({"teacher": changed(teacher_of(), name)} for name in teacher_of().state_dict()),
        {"teacher": nn.Sequential(*teacher_of()[:3], nn.Tanh(), teacher_of()[4])},
        {"images": images_of().index_put((torch.tensor([3]), *[torch.tensor([0])] * 3), torch.tensor([9.0]))},
        {"images": images_of().flip(0)},
        {"transform": {"mean": 0.1, "shift": 2}},
        {"views": 3},
        {"seed": 1},
        {"dtype": "float16"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_any_change_misses(other):
    assert key_of() == key_of()
    assert key_of(**other) != key_of()


def test_reading_does_not_change_what_is_kept(tmp_path):
    store = LogitStore(tmp_path, PLENTY)
    store.fetch(key_of(), SHAPES, "float32", Fill(outputs()))["logits"][:] = 0
    assert torch.equal(torch.from_numpy(store.fetch(key_of(), SHAPES, "float32", Fill(outputs()))["logits"]), outputs())


@pytest.mark.parametrize("damage", ["bit", "cut", "header", "gone"])
def test_a_damaged_entry_is_computed_again(tmp_path, damage, caplog):
    fill, store = Fill(outputs()), LogitStore(tmp_path, PLENTY)
    store.fetch(key_of(), SHAPES, "float32", fill)
    file, header = (tmp_path / key_of() / name for name in ("logits.npy", "header.json"))
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-8])
    elif damage == "header":
        header.write_text(header.read_text()[:20])
    else:
        file.unlink()
    arrays = store.fetch(key_of(), SHAPES, "float32", fill)
    assert torch.equal(torch.from_numpy(arrays["logits"]), outputs())
    assert (fill.calls, store.counters.misses, store.counters.hits) == (2, 2, 0)
    assert "computed again" in caplog.text


def test_a_pass_that_failed_leaves_nothing(tmp_path):
    store, fill = LogitStore(tmp_path, PLENTY), Fill(outputs())

    def breaks(arrays):
        arrays["logits"][:, :3] = 1
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        store.fetch(key_of(), SHAPES, "float32", breaks)
    arrays = store.fetch(key_of(), SHAPES, "float32", fill)
    assert fill.calls == 1
    assert torch.equal(torch.from_numpy(arrays["logits"]), outputs())
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize(("value", "dtype"), [(1e6, "float16"), (float("nan"), "float32")])
def test_what_the_format_cannot_hold_is_refused(tmp_path, value, dtype):
    values = outputs()
    values[1, 4, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        LogitStore(tmp_path, PLENTY).fetch(key_of(dtype=dtype), SHAPES, dtype, Fill(values))


def test_features_are_added_to_an_entry_that_has_logits(tmp_path):
    store, fill = LogitStore(tmp_path, PLENTY), Fill(outputs())
    store.fetch(key_of(), SHAPES, "float32", fill)
    both = store.fetch(key_of(), {**SHAPES, "features": (K, N, C)}, "float32", fill)
    assert sorted(both) == ["features", "logits"]
    store.fetch(key_of(), SHAPES, "float32", fill)
    assert fill.calls == 2


def test_counters_tell_hits_misses_and_seconds(tmp_path):
    store, fill = LogitStore(tmp_path, PLENTY), Fill(outputs())

    def slow(arrays):
        time.sleep(0.2)
        fill(arrays)

    for _ in range(4):
        store.fetch(key_of(), SHAPES, "float32", slow)
    counters = store.counters
    assert (counters.hits, counters.misses) == (3, 1)
    assert counters.seconds_computing == pytest.approx(0.2, abs=0.1)
    assert 0.3 < counters.seconds_saved <= 3 * counters.seconds_computing


def test_the_entry_unused_for_longest_is_deleted(tmp_path):
    size = 8 * K * N * C  # of an entry: its logits, and less than as much for the header
    store = LogitStore(tmp_path, 3 * (4 * K * N * C + 128 + 300))
    for seed in (0, 1, 2):
        store.fetch(key_of(seed=seed), SHAPES, "float32", Fill(outputs()))
    mapped = store.fetch(key_of(seed=0), SHAPES, "float32", Fill(outputs()))["logits"]  # used again: 1 is now the oldest
    store.fetch(key_of(seed=3), SHAPES, "float32", Fill(outputs()))
    there = [seed for seed in range(4) if (tmp_path / key_of(seed=seed)).exists()]
    assert there == [0, 2, 3]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.npy")) <= 3 * size
    LogitStore(tmp_path, 1).fetch(key_of(seed=4), SHAPES, "float32", Fill(outputs()))
    assert [seed for seed in range(5) if (tmp_path / key_of(seed=seed)).exists()] == [4]  # too large, but asked for
    assert torch.equal(torch.from_numpy(mapped), outputs())  # an entry in use stays readable


def test_two_processes_do_the_work_once(tmp_path):
    program = (
        "import sys, time, numpy, pathlib\n"
        "from trainbook.workflows.distillation.logit_store import LogitStore\n"
        "def fill(arrays):\n"
        "    print('computed', flush=True)\n"
        "    time.sleep(1.5)\n"
        "    arrays['logits'][:] = 7\n"
        "store = LogitStore(pathlib.Path(sys.argv[1]), 10**9)\n"
        "print(float(store.fetch('a' * 64, {'logits': (1, 5, 2)}, 'float32', fill)['logits'].sum()))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = "".join(process.communicate()[0] for process in processes).split()
    assert printed.count("computed") == 1
    assert printed.count("70.0") == 2

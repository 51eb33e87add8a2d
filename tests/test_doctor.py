"""Which wheel runs on which card: the published tables, not this machine's."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainbook import doctor, runtime
from trainbook.devices import kernels_missing
from trainbook.errors import UserError
from trainbook.run import start

CUDA_12_8 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("card", "capability", "wheel", "works"),
    [
        ("V100", (7, 0), CUDA_12_8, False),
        ("P100", (6, 0), CUDA_12_8, False),
        ("V100", (7, 0), CUDA_12_6, True),
        ("P100", (6, 0), CUDA_12_6, True),
        ("T4", (7, 5), CUDA_12_8, True),
        ("L4 runs sm_86 kernels", (8, 9), CUDA_12_8, True),
        ("H200", (9, 0), ["sm_90a"], True),
        ("a later card by portable code", (13, 0), CUDA_12_8, True),
        ("a later card without it", (13, 0), CUDA_12_6, False),
    ],
)
def test_kernels_missing(card, capability, wheel, works):
    reason = kernels_missing(capability, wheel)
    assert (reason == "") is works
    assert works or f"{capability[0]}.{capability[1]}" in reason


def test_a_build_for_other_makers_cards_is_left_to_the_operation():
    assert kernels_missing((9, 4), ["gfx90a", "gfx942"]) == ""
    assert kernels_missing((7, 0), []) == ""


@pytest.fixture
def card(monkeypatch):
    """A machine with one card, as torch describes it."""

    def describe(name, capability, gigabytes, architectures):
        properties = SimpleNamespace(name=name, total_memory=int(gigabytes * 1e9))
        answers = {
            "is_available": True, "device_count": 1, "get_device_capability": capability, "get_arch_list": architectures,
            "get_device_name": name, "get_device_properties": properties,
        }  # fmt: skip
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, lambda *_, answer=answer: answer)

    return describe


@pytest.mark.parametrize("wanted", ["auto", "cuda", "cuda:0"])
def test_a_v100_on_a_wheel_without_its_kernels_is_told_before_training(wanted, card, monkeypatch, tmp_path):
    card("Tesla V100-SXM2-32GB", (7, 0), 34, CUDA_12_8)
    monkeypatch.setenv(runtime.DEVICE, wanted)
    with pytest.raises(UserError, match=r"V100-SXM2-32GB has compute capability 7\.0, but .* sm_75(?s:.*)cu126.*--device cpu"):
        runtime.detect()
    with pytest.raises(UserError, match="V100"):  # what the notebook does first; the command exits 2 then
        start("timestep_dbn", "smoke")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(runtime.DEVICE, "cpu")
    assert runtime.detect().device == "cpu"


def test_doctor_has_a_row_for_it(card):
    card("Tesla V100-SXM2-32GB", (7, 0), 34, CUDA_12_8)
    row = doctor._devices()[0].row()
    assert (row[0], row[2]) == ("GPU 0", "NOT OK")
    assert "cu126" in row[3]


@pytest.mark.parametrize(("gigabytes", "told"), [(8, True), (11.5, True), (15.8, False), (34, False)])
def test_doctor_says_what_a_small_card_means(gigabytes, told, card):
    card("Tesla T4", (7, 5), gigabytes, CUDA_12_8)
    finding = doctor._devices()[0]
    assert finding.well
    assert ("cut until they fit" in finding.found) is told


def test_doctor_checks_the_ranges_of_the_requirements_file():
    lines = (Path(__file__).parents[1] / "requirements.txt").read_text().splitlines()
    ranges = dict(re.match(r"([\w-]+)>=(\S+)", line).groups() for line in lines if line and not line.startswith("#"))
    assert {name: ranges[name] for name in doctor.PACKAGES} == {n: f"{low},<{high}" for n, (low, high) in doctor.PACKAGES.items()}


def test_doctor_names_a_package_that_is_missing_or_too_old(monkeypatch):
    assert doctor._package("nvidia-ml-py", "12", "14").well  # whose module is pynvml
    missing = doctor._package("a-package-nobody-has", "1", "2")
    assert (missing.well, missing.found) == (False, "not installed")
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "4.60")
    old = doctor._package("tqdm", "4.66", "5")
    assert (old.well, old.found, old.remedy) == (False, "4.60", "pip install 'tqdm>=4.66,<5'")

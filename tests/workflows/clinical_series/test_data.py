"""Splits by patient, the raster, PhysioNet's files, CSV files in both shapes, and every refusal."""

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainbook.brief import read_brief
from trainbook.errors import UserError
from trainbook.workflows.clinical_series import physionet
from trainbook.workflows.clinical_series.config import Config
from trainbook.workflows.clinical_series.csv_series import read_csv
from trainbook.workflows.clinical_series.data import load_data, patch_means, split_by_patient
from trainbook.workflows.clinical_series.recordings import Raster, Recordings

BRIEF = Path(__file__).parents[4] / "shared/notes/training.yaml"


def runtime(folder=None):
    return SimpleNamespace(device="cpu", data_folder=folder)


def test_generated_data_belong_to_the_data_and_not_to_the_run():
    one, two = (load_data(Config.from_preset("smoke", {"seed": seed}), runtime()) for seed in (0, 1))
    assert one.synthetic is True
    assert one.sha256 == two.sha256
    assert torch.equal(one.train["values"], two.train["values"])
    patients = [set(getattr(one, split)["patients"].tolist()) for split in ("train", "valid", "test")]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 160
    for split in ("train", "valid", "test"):
        assert 0 < getattr(one, split)["outcomes"].mean() < 0.5
    read = one.test["values"].view(40, 12, 20, 3)
    seen = one.test["observed"].view(40, 12, 20, 3)
    expected = (read * seen).sum(2) / seen.sum(2).clamp(min=1)
    torch.testing.assert_close(one.test["patch_means"][:, :12], expected)
    assert one.test["patch_observed"][:, 12:].all()  # the future is judged without gaps


def test_windows_of_a_patient_stay_together():
    patients = np.repeat(np.arange(20), 3)
    outcomes = np.repeat(np.arange(20) % 2, 3).astype(np.float32)
    values = np.zeros((60, 4, 1), np.float32)
    parts = split_by_patient(Recordings(values, patients, outcomes, np.zeros((60, 0), np.float32), "", "", None))
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(60))
    groups = [set(patients[part]) for part in parts.values()]
    assert not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])
    few = Recordings(values[:6], patients[:6], outcomes[:6], np.zeros((6, 0), np.float32), "", "", None)
    with pytest.raises(UserError, match="2 patients"):
        split_by_patient(few)


def test_readings_in_one_cell_are_averaged_and_others_left_out():
    raster = Raster(3, 2, 10)
    for minutes, variable, value in ((0, 0, 1.0), (9.9, 0, 3.0), (20, 1, 5.0), (30, 0, 9.0), (-1, 0, 9.0)):
        raster.add(minutes, variable, value)
    np.testing.assert_array_equal(raster.values(), np.array([[2, np.nan], [np.nan, np.nan], [np.nan, 5]], np.float32))
    means, seen = patch_means(torch.tensor([[[1.0], [np.nan], [3.0], [np.nan], [np.nan], [np.nan]]]), 3)
    assert means.flatten().tolist() == [2, 0]
    assert seen.flatten().tolist() == [True, False]


# PhysioNet

STAY = """\
Time,Parameter,Value
00:00,RecordID,7
00:00,Age,85
00:00,Gender,1
00:00,Height,-1
00:00,ICUType,3
00:10,HR,80
00:50,HR,90
01:30,NIMAP,70
01:40,MAP,0
02:00,Temp,-17.8
30:00,HR,100
"""


def stays(folder, number=24):
    """A folder as PhysioNet packs it."""
    (folder / "set-a").mkdir(parents=True)
    for index in range(number):
        (folder / "set-a" / f"{100 + index}.txt").write_text(STAY.replace("HR,80", f"HR,{60 + index}"))
    rows = "".join(f"{100 + index},1,1,1,1,{index % 2}\n" for index in range(number))
    (folder / "Outcomes-a.txt").write_text("RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n" + rows)
    return folder


def test_a_stay_is_read_as_it_stands():
    config = Config(dataset="physionet", sample_minutes=60)
    columns = {variable.name: index for index, variable in enumerate(config.variables)}
    values, static = physionet.read_stay(STAY, config, columns)
    assert values.shape == (36, 8)
    assert values[0, columns["HR"]] == 85
    assert values[30, columns["HR"]] == 100
    assert values[1, columns["MAP"]] == 70  # the cuff's; the catheter's 0 is none
    assert np.isnan(values[:, columns["Temp"]]).all()
    assert np.isfinite(values).sum() == 3
    assert static.tolist() == [1, 1, 0, 0, 1, 0]


def test_a_folder_and_an_archive_are_the_same_data(tmp_path, monkeypatch):
    folder = stays(tmp_path / "stays")
    with tarfile.open(tmp_path / "stays.tar.gz", "w:gz") as archive:
        archive.add(folder, "elsewhere")
    with pytest.raises(UserError, match="not set A"):
        load_data(Config(dataset="physionet", sample_minutes=60, data_path=str(folder)), runtime())
    monkeypatch.setattr(physionet, "SHA256", physionet.content_sha256(physionet._read(folder)))
    one, two = (
        load_data(Config(dataset="physionet", sample_minutes=60, data_path=str(path)), runtime())
        for path in (folder, tmp_path / "stays.tar.gz")
    )
    assert one.sha256 == two.sha256
    assert one.synthetic is False
    assert torch.equal(one.train["values"], two.train["values"])


def test_what_physionet_serves_is_kept_and_without_a_network_it_says_what_to_do(tmp_path, monkeypatch):
    folder = stays(tmp_path / "stays")
    place = tmp_path / "data" / "physionet2012"
    place.mkdir(parents=True)
    with tarfile.open(place / physionet.ARCHIVE, "w:gz") as archive:
        archive.add(folder / "set-a", "set-a")
    monkeypatch.setattr(physionet, "ADDRESS", (folder.parent / "web").as_uri())
    (tmp_path / "web").mkdir()
    with pytest.raises(UserError, match="turn the internet on"):
        physionet._fetch(place)
    (tmp_path / "web" / physionet.OUTCOMES).write_text((folder / physionet.OUTCOMES).read_text())
    assert physionet._fetch(place) == physionet._read(folder)
    (tmp_path / "torn.tar.gz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot read"):
        physionet._read(tmp_path / "torn.tar.gz")


# CSV


def write_csv(path, long=False, ids=10):
    """Two variables every 5 minutes for 20 hours, with a gap; dates for even ids and minutes for odd ones."""
    out = io.StringIO()
    out.write("id,time,variable,value\n" if long else "id,time,gl,hr,note\n")
    for i in range(ids):
        for step in range(240):
            day, rest = divmod(5 * step, 1440)
            time = f"2024-03-0{1 + day} {rest // 60:02}:{rest % 60:02}:00" if i % 2 == 0 else str(5 * step)
            gl, hr = 100 + i + step / 10, "" if 100 < step < 110 else f"{60 + i}"
            if long:
                out.write(f"p{i},{time},gl,{gl}\n" + (f"p{i},{time},hr,{hr}\n" if hr else "") + f"p{i},{time},other,1\n")
            else:
                out.write(f"p{i},{time},{gl},{hr},text\n")
    path.write_text(out.getvalue())
    return path


CSV = {"dataset": "csv", "value_columns": ("gl", "hr"), "sample_minutes": 5, "patch_minutes": 5, "sequence_length": 180,
       "prediction_horizon": 12}  # fmt: skip


def test_long_and_wide_files_hold_the_same_readings(tmp_path):
    wide, long = write_csv(tmp_path / "wide.csv"), write_csv(tmp_path / "long.csv", long=True)
    one, two = (read_csv(path, ("gl", "hr")) for path in (wide, long))
    assert one == two
    assert len(one["p1"]) == 240 + 231


def test_windows_slide_over_a_record_and_outcomes_join_by_id(tmp_path):
    path = write_csv(tmp_path / "mine.csv", ids=16)
    (tmp_path / "outcomes.csv").write_text("id,outcome\n" + "".join(f"p{i},{i % 2}\n" for i in range(16) if i != 3))
    config = Config(**CSV, data_path=str(path), window_stride_minutes=240, outcome_file=str(tmp_path / "outcomes.csv"))
    data = load_data(config, runtime())
    assert data.synthetic is None
    total = torch.cat([getattr(data, split)["patients"] for split in ("train", "valid", "test")])
    assert torch.bincount(total).tolist() == [4] * 16  # 20 hours hold starts at 0, 4, 8 and 12 hours, not 16
    for split in ("train", "valid", "test"):
        part = getattr(data, split)
        numbers = part["values"][:, 0, 1] - 60  # the heart rate says who it is
        expected = torch.where(numbers == 3, -1, numbers % 2)
        assert torch.equal(part["outcomes"], expected)
        first = part["values"][:, 0, 0]
        torch.testing.assert_close(part["patch_means"][:, 36, 0], first + 3.6)  # 36 readings later
    one = load_data(config.model_copy(update={"window_stride_minutes": 0}), runtime())
    assert len(torch.cat([getattr(one, split)["patients"] for split in ("train", "valid", "test")])) == 16


def test_bad_files_are_refused_with_a_remedy(tmp_path):
    path = write_csv(tmp_path / "mine.csv")
    for columns, message in ((("gl", "bp"), "no column bp"), (("note",), "line 2: could not convert")):
        with pytest.raises(UserError, match=message):
            load_data(Config(**{**CSV, "value_columns": columns}, data_path=str(path)), runtime())
    with pytest.raises(UserError, match="cannot read"):
        load_data(Config(**CSV, data_path=str(tmp_path / "gone.csv")), runtime())
    with pytest.raises(UserError, match="half full"):
        load_data(Config(**{**CSV, "sequence_length": 5 * 3000}, data_path=str(path)), runtime())
    for text in ("id,outcome\np1,2\n", "id,death\np1,1\n"):
        (tmp_path / "outcomes.csv").write_text(text)
        with pytest.raises(UserError, match="outcome"):
            load_data(Config(**CSV, data_path=str(path), outcome_file=str(tmp_path / "outcomes.csv")), runtime())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_minutes": 50}, "multiple"),
        ({"num_heads": 7}, "num_heads"),
        ({"dataset": "csv"}, "data_path and value_columns"),
        ({"value_columns": ("gl",)}, "dataset = csv"),
        ({"sample_minutes": 5}, "sample_minutes = 1"),
        ({**CSV, "data_path": "x", "units": ("mg/dL",)}, "one unit per value column"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_the_brief_loads_as_it_stands():
    if not BRIEF.is_file():
        pytest.skip(f"the file that was given is not at {BRIEF}")
    config = Config.from_preset("laptop", read_brief(BRIEF, "clinical_series", Config).overrides)
    given = {"seed": 42, "num_epochs": 100, "batch_size": 32, "precision": "mixed", "clip_norm": 1.0, "learning_rate": 1e-4}
    given |= {"sequence_length": 1440, "prediction_horizon": 12}
    assert {name: getattr(config, name) for name in given} == given

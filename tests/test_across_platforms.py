"""One run on three machines: started on Kaggle and cut off, gone on with on a rented box, finished here."""

import shutil
import signal

import pytest

from tests.driving import assert_same_run
from tests.stubs.fake_kaggle import FakeKaggle
from tests.test_kaggle_launcher import Desk as KaggleDesk
from tests.test_kaggle_launcher import as_options, image
from tests.test_kaggle_launcher import client as kaggle_client
from tests.test_vastai_launcher import client, desk, local_run, rent, until, vast
from trainbook.handover import whole_checkpoint

__all__ = ["client", "desk", "image", "kaggle_client", "vast"]  # fixtures

OVERRIDES = {"autoencoder_epochs": 20, "epochs_per_timestep": 60, "baseline_epochs": 1500}


@pytest.mark.platforms
def test_a_run_cut_off_on_kaggle_goes_on_on_a_rented_box_and_ends_here_as_if_nothing_had_been(
    kaggle_client, image, desk, vast, tmp_path
):
    options = (*as_options(OVERRIDES), "--checkpoint-every", "0.3s")
    with FakeKaggle(tmp_path / "kaggle", image, faults={"session killed": 1}) as kaggle:
        at_kaggle = KaggleDesk(kaggle, kaggle_client, tmp_path / "kaggle-desk")
        assert at_kaggle.launch(*options)[0] == 3
    first = whole_checkpoint(at_kaggle.run)
    assert first > 0

    shutil.copytree(at_kaggle.run.path, desk.run("mine").path)
    launcher = desk.start(*rent(desk, "--run-id", "mine", *options))
    until(lambda: whole_checkpoint(desk.run("mine")) > first, launcher=launcher)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(90) == 3, desk.output.read_text()
    assert not vast.rentals
    second = whole_checkpoint(desk.run("mine"))

    shutil.copytree(desk.run("mine").path, desk.folder / "local" / "mine")
    finished = local_run(desk, "mine", *options)
    segments = finished.summary()["segments"]
    assert finished.summary()["status"] == "complete"
    assert [segment["first_step"] for segment in segments] == [0, first, second]
    assert 0 < first < second < finished.summary()["step"]
    assert [segment["platform"] for segment in segments] == ["kaggle", "vastai", "local"]
    assert_same_run(finished, local_run(desk, "whole", *options))

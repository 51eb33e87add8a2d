"""What --authentic asks for, and what every output of a run says of where it comes from."""

import json

import pytest
from PIL import Image
from safetensors import safe_open

from trainbook import __main__ as command_line
from trainbook.__main__ import main
from trainbook.run import prepare

BRIEF = ["run", "timestep_dbn", "--autoencoder", "coder.pth", "--timesteps", "50", "--batch-size", "32"]
BRIEF += ["--epochs-per-timestep", "100"]
KNOWN = ["--code-channels", "4,8,32", "--autoencoder-width", "64"]  # the file need not be there then


@pytest.fixture
def asked(monkeypatch):
    """What `trainbook run` would train."""
    calls = []
    monkeypatch.setattr(command_line, "execute", lambda *arguments: calls.append(arguments) or 0)
    return calls


@pytest.mark.parametrize(
    ("words", "authentic"),
    [
        (["--authentic"], True),
        (["--authentic", "true"], True),
        (["--authentic=True"], True),
        (["--authentic-mode", "true"], True),
        ([], False),
        (["--authentic", "false", "--preset", "smoke"], False),
        (["--authentic-mode=false", "--preset", "smoke"], False),
    ],
)
def test_authentic_is_read_as_it_is_written(words, authentic, asked):
    assert main([*BRIEF, *KNOWN, *words]) == 0
    name, preset, overrides, _, given = asked[0]
    assert (name, preset, given) == ("timestep_dbn", "smoke" if "smoke" in words else "laptop", authentic)
    assert {
        "autoencoder": "coder.pth",
        "timesteps": "50",
        "batch_size": "32",
        "epochs_per_timestep": "100",
    }.items() <= overrides.items()


@pytest.mark.parametrize("word", ["maybe", "1", "no", ""])
def test_what_is_neither_true_nor_false_is_refused(word, asked, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*BRIEF, "--authentic", word])
    assert (ended.value.code, asked) == (2, [])
    assert f"{word!r} is neither true nor false" in capsys.readouterr().err


def test_false_is_for_smoke_runs(asked, capsys):
    for preset in ("laptop", "full"):
        assert main([*BRIEF, *KNOWN, "--preset", preset, "--authentic", "false"]) == 2
        assert f"smoke runs, not for preset {preset}" in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize(("authentic", "checked"), [(True, "authentic"), (False, "authenticity not checked")])
def test_all_outputs_say_what_was_checked(authentic, checked, monkeypatch):
    monkeypatch.setattr("trainbook.run.check_unchanged", lambda: "a" * 40)
    small = {"stage": "autoencoder", "autoencoder_epochs": 1, "max_train_images": 64, "autoencoder_width": 4}
    run = prepare("timestep_dbn", "smoke", small, "mine", authentic)
    for step in (run.load_data, run.build, lambda: run.train(progress=False), run.curves, run.evaluate, run.draw, run.finish):
        step()
    summary = run.folder.summary()
    expected = {"authentic": authentic, "stamp": ["SMOKE RUN", checked], "command": summary["command"]}
    assert {key: summary[key] for key in expected} == expected
    assert summary["command"].endswith(" --authentic") is authentic
    assert json.loads(run.folder.config.read_text())["authentic"] is authentic
    for checkpoint in run.folder.checkpoints.glob("[0-9]*"):
        origin = json.loads((checkpoint / "metadata.json").read_text())["origin"]
        assert {key: origin[key] for key in expected} == expected
        assert (origin["seed"], origin["data"]["sha256"]) == (run.config.seed, run.data.sha256)
        assert origin["provenance"]["packages"]["torch"]
    pictures = list(run.folder.figures.glob("*.png"))
    assert pictures
    for picture in pictures:
        origin = json.loads(Image.open(picture).text["Description"])
        assert {key: origin[key] for key in expected} == expected
    with safe_open(run.folder.export / "autoencoder.safetensors", "np") as file:
        assert file.metadata()["stamp"] == f"SMOKE RUN, {checked}"
    assert ("authenticity not checked" in run.folder.report.read_text()) is not authentic
    assert summary["command"] in run.folder.report.read_text()


def test_the_line_below_a_picture_says_it(monkeypatch):
    said = []
    monkeypatch.setattr("trainbook.plots.to_png", lambda figure, footnote="", description="": said.append(footnote) or b"")
    run = prepare("timestep_dbn", "smoke", {"stage": "autoencoder"}, "mine")
    run.load_data()
    run.build()
    run.folder.path.mkdir(parents=True)
    run._show({"data": None})
    assert said[-1].startswith("mine · step 0 · seed 0 · kit ")
    assert said[-1].endswith(f" · data {run.data.sha256[:8]} · SMOKE RUN · authenticity not checked")

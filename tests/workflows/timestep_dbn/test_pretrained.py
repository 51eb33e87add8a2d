"""A pre-trained autoencoder: one run exports it, another starts from it, and what does not fit is refused with a remedy."""

import hashlib
import json
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.driving import assert_identical, final_state
from trainbook.__main__ import main
from trainbook.errors import UserError
from trainbook.run import prepare
from trainbook.workflows.timestep_dbn.config import Config
from trainbook.workflows.timestep_dbn.pretrained import Architecture, check_codes, read_architecture

SMALL = {"autoencoder_width": 8, "code_channels": (2, 3, 5), "autoencoder_epochs": 1, "max_train_images": 64}
REST = {"hidden_units": (6, 5, 4), "epochs_per_timestep": 1, "baseline_epochs": 1, "max_train_images": 64}


def finished(run):
    run.load_data()
    run.build()
    run.train(progress=False)
    run.curves()
    run.evaluate()
    run.draw()
    run.finish()
    return run


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    """A run of the autoencoder alone, to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINBOOK_RUNS", str(tmp_path_factory.mktemp("runs")))
        return finished(prepare("timestep_dbn", "smoke", {"stage": "autoencoder", **SMALL}, "coder"))


@pytest.fixture
def exported(coder):
    return coder.folder.export / "autoencoder.safetensors"


def test_a_run_of_the_autoencoder_alone_exports_it_and_claims_nothing_else(coder):
    summary = coder.folder.summary()
    assert (summary["status"], summary["total_steps"], summary["step"]) == ("complete", 2, 2)
    assert [path.stem for path in coder.folder.export.glob("*.safetensors")] == ["autoencoder"]
    assert {name.partition("/")[0] for name in summary["metrics"]} == {"autoencoder", "mean_image"}
    assert {v["verdict"] for v in summary["verdicts"]} == {"not for preset smoke"}
    assert {path.stem for path in coder.folder.figures.glob("*.png")} >= {"curves", "reconstruction"}


def test_the_chain_is_built_from_the_file_and_the_stage_is_left_out(coder, exported):
    run = finished(prepare("timestep_dbn", "smoke", {"autoencoder": str(exported), **REST}, "chain"))
    assert (run.config.code_channels, run.config.autoencoder_width) == ((2, 3, 5), 8)
    assert run.state.modules["dbn"].level_sizes == [2 * 16, 3 * 4, 5 * 1]
    assert "autoencoder" not in {record["stage"] for record in run.folder.history()}
    assert run.state.total_steps == 2 + 2  # an epoch of the chain in one block, and one of the baselines
    assert_identical(dict(run.state.modules["autoencoder"].state_dict()), load_file(exported))
    digest = hashlib.sha256(exported.read_bytes()).hexdigest()
    assert run.folder.summary()["initial_weights"] == {"autoencoder": digest}
    newest = sorted(path for path in run.folder.checkpoints.iterdir() if path.name.isdigit())[-1]
    origin = json.loads((newest / "metadata.json").read_text())["origin"]
    assert origin["initial_weights"] == {"autoencoder": digest}
    assert origin["data"]["sha256"] == run.data.sha256
    assert shlex.split(origin["command"])[:5] == ["trainbook", "run", "timestep_dbn", "--preset", "smoke"]


def test_the_command_in_run_json_makes_the_same_config(coder, exported):
    run = prepare("timestep_dbn", "smoke", {"autoencoder": str(exported), "timesteps": 5, **REST}, "again")
    words = run.config.options("smoke")
    given = dict(zip([word.removeprefix("--").replace("-", "_") for word in words[::2]], words[1::2], strict=True))
    assert Config.from_preset("smoke", given) == run.config
    assert "--timesteps 5" in " ".join(words)


def test_a_resumed_run_needs_the_file_no_more(coder, exported, tmp_path):
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(exported.read_bytes())
    run = prepare("timestep_dbn", "smoke", {"autoencoder": str(copy), **REST}, "cut")
    run.load_data()
    run.build()
    run.train(progress=False)
    run.leave()
    whole = final_state(run.folder)
    copy.unlink()
    for newest in sorted(run.folder.checkpoints.glob("[0-9]*"))[1:]:
        newest.rename(newest.with_name(f".torn-{newest.name}"))
    run.folder.run_json.write_text(run.folder.run_json.read_text().replace('"complete"', '"stopped"'))
    saved = json.loads(run.folder.config.read_text())
    again = prepare("timestep_dbn", "smoke", saved["config"], "cut")
    again.load_data()
    again.build()
    again.train(progress=False)
    again.leave()
    assert again.folder.summary()["segments"][-1]["first_step"] > 0
    assert_identical(final_state(again.folder), whole)


WRAPPED = {
    "plain": lambda tensors: tensors,
    "state_dict": lambda tensors: {"epoch": 50, "state_dict": tensors},
    "by name": lambda tensors: {"autoencoder": tensors, "optimizer": {}},
    "our checkpoint": lambda tensors: {"step": 3, "modules": {"autoencoder": tensors, "dbn": {}}},
    "of several processes": lambda tensors: {"model_state_dict": {f"module.{key}": value for key, value in tensors.items()}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_torch_checkpoint_fills_the_autoencoder(wrap, coder, exported, tmp_path):
    path = tmp_path / "checkpoint_epoch_50.pth"
    torch.save(wrap(load_file(exported)), path)
    assert read_architecture(str(path)) == Architecture(1, (2, 3, 5), 8)
    run = prepare("timestep_dbn", "smoke", {"autoencoder": str(path), **REST})
    run.load_data()
    run.build()
    assert_identical(dict(run.state.modules["autoencoder"].state_dict()), load_file(exported))


class Program:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (open, ("made-by-a-checkpoint", "w"))


def write(path, tensors, metadata=None):
    if path.suffix == ".safetensors":
        save_file(tensors, str(path), metadata=metadata)
    else:
        torch.save(tensors, path)


def renamed(tensors):
    return {f"encoder.{key}": value for key, value in tensors.items()}


def with_nan(tensors):
    tensors = dict(tensors)
    tensors["heads.1.bias"] = torch.tensor([0.0, torch.nan, 0.0])
    return tensors


def without_decoder(tensors):
    return {key: value for key, value in tensors.items() if not key.startswith("out")}


def with_odd_head(tensors):
    return {**tensors, "inject.2.weight": torch.zeros(8, 4, 1, 1)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (renamed, "is no binary autoencoder with 3 levels: it has no stem.weight, heads.0.weight"),
        (lambda tensors: dict(nn.Linear(3, 2).state_dict()), "is no binary autoencoder"),
        (with_nan, "holds NaN or infinite values in heads.1.bias"),
        (without_decoder, "is an autoencoder of another architecture: out.0.body.0.bias is missing"),
        (with_odd_head, "is an autoencoder of another architecture: inject.2.weight is (8, 4, 1, 1), not (8, 5, 1, 1)"),
        (lambda tensors: {}, "holds no weights of 'autoencoder'"),
    ],
    ids=["other names", "another model", "NaN", "half of it", "one shape", "nothing"],
)
def test_files_of_something_else_are_refused(suffix, damage, message, exported, tmp_path):
    path = tmp_path / f"other{suffix}"
    write(path, damage(load_file(exported)))
    with pytest.raises(UserError, match=re.escape(f"{path} {message}")) as told:
        prepare("timestep_dbn", "smoke", {"autoencoder": str(path), **REST})
    assert "->" in str(told.value)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"PK\x03\x04 torn"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("epoch 50, loss 0.1"),
        lambda path: torch.save({"model": nn.Linear(1, 1)}, path),
        lambda path: torch.save(Program(), path),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"epoch": 50, "loss": 0.1}, path),
    ],
    ids=["torn", "empty", "text", "a whole model", "a program", "a list", "no tensors"],
)
def test_torch_files_without_plain_weights_are_refused_and_never_executed(write, tmp_path):
    path = tmp_path / "checkpoint_epoch_50.pth"
    write(path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        prepare("timestep_dbn", "smoke", {"autoencoder": str(path)})
    assert not (tmp_path / "made-by-a-checkpoint").exists()


def test_a_file_that_declares_other_code_channels_than_it_has_is_refused(exported, tmp_path):
    path = tmp_path / "wrong.safetensors"
    write(path, load_file(exported), {"config": json.dumps({"code_channels": [4, 8, 16], "autoencoder_width": 8})})
    with pytest.raises(UserError, match=re.escape("declares code_channels = [4, 8, 16], but its tensors have (2, 3, 5)")):
        read_architecture(str(path))


def test_what_is_given_and_differs_from_the_file_is_refused_with_the_tensor(coder, exported):
    given = {"autoencoder": str(exported), "code_channels": (2, 3, 4), "autoencoder_width": 8, **REST}
    run = prepare("timestep_dbn", "smoke", given)
    run.load_data()
    with pytest.raises(UserError, match=r"heads\.2\.bias is \(5,\), not \(4,\)(?s:.*)--stage autoencoder"):
        run.build()


def test_an_autoencoder_of_colour_images_does_not_code_grey_ones(exported, tmp_path):
    tensors = load_file(exported)
    tensors["stem.weight"] = tensors["stem.weight"].repeat(1, 3, 1, 1)
    tensors["out.2.weight"], tensors["out.2.bias"] = tensors["out.2.weight"].repeat(3, 1, 1, 1), tensors["out.2.bias"].repeat(3)
    write(tmp_path / "colour.safetensors", tensors)
    run = prepare("timestep_dbn", "smoke", {"autoencoder": str(tmp_path / "colour.safetensors"), **REST})
    run.load_data()
    with pytest.raises(UserError, match=r"stem\.weight is \(8, 3, 3, 3\), not \(8, 1, 3, 3\)"):
        run.build()


class Soft(nn.Module):
    """An autoencoder whose codes are what a test wants."""

    def __init__(self, codes, rebuilt):
        super().__init__()
        self.codes, self.rebuilt = codes, rebuilt

    def encode(self, images):
        return self.codes

    def decode(self, codes):
        return self.rebuilt


BITS = [torch.zeros(4, 1, 4, 4), torch.ones(4, 1, 2, 2), torch.ones(4, 2, 1, 1)]
IMAGES = torch.zeros(4, 1, 8, 8)


@pytest.mark.parametrize(
    ("codes", "rebuilt", "message"),
    [
        ([*BITS[:2], BITS[2][:, :1]], IMAGES, "gives [16, 4, 1] bits per level, the chain is built for [16, 4, 2]"),
        ([BITS[0], BITS[1] * 0.5, BITS[2]], IMAGES, "not exactly 0 or 1"),
        (BITS, torch.full((4, 1, 8, 8), torch.nan), "not to finite images"),
        (BITS, torch.zeros(4, 1, 4, 4), "decodes to (4, 1, 4, 4)"),
    ],
)  # fmt: skip
def test_codes_that_are_not_the_declared_bits_are_refused(codes, rebuilt, message):
    config = Config(code_channels=(1, 1, 2), autoencoder="mine.pth", autoencoder_width=8)
    with pytest.raises(UserError, match=re.escape(message)):
        check_codes(Soft(codes, rebuilt), config, torch.rand(4, 1, 8, 8))


def test_an_autoencoder_of_other_images_is_warned_about(caplog):
    config = Config(code_channels=(1, 1, 2), autoencoder="mine.pth")
    images = torch.rand(4, 1, 8, 8)
    check_codes(Soft(BITS, 1 - images), config, images)
    assert "worse than their mean" in caplog.text
    caplog.clear()
    check_codes(Soft(BITS, images), config, images)
    assert "worse than their mean" not in caplog.text


def test_a_missing_file_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"'nowhere\.pth' is no run and no file(?s:.*)code_channels and autoencoder_width"):
        Config.from_preset("laptop", {"autoencoder": "nowhere.pth"})
    known = {"autoencoder": "/kaggle/input/a/autoencoder.safetensors", "code_channels": "4,8,16", "autoencoder_width": "96"}
    assert Config.from_preset("full", known).code_channels == (4, 8, 16)  # the file lies where the run will be


def test_nothing_is_left_to_train_with_both(capsys):
    known = ["--autoencoder", "a.pth", "--code-channels", "4,8,16", "--autoencoder-width", "8", "--stage", "autoencoder"]
    assert main(["run", "timestep_dbn", *known]) == 2
    assert "nothing is left to train" in capsys.readouterr().err

"""The exported quadratic models have the machine's energies: on all states of a tiny one, on random ones of a trained one."""

import json
import math

import pytest
import torch
from torch import Tensor

from tests.workflows.timestep_dbn.enumeration import all_bits, random_case
from trainbook.run import prepare
from trainbook.workflows.timestep_dbn.chain import TimestepDBN
from trainbook.workflows.timestep_dbn.qubo import QuadraticModel, export, main, quadratic_model

SMALL = {
    "timesteps": 3, "hidden_units": (6, 5, 4), "code_channels": (1, 1, 4), "autoencoder_width": 4, "autoencoder_epochs": 1,
    "epochs_per_timestep": 1, "baseline_epochs": 1, "max_train_images": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(2)


def tiny() -> tuple[QuadraticModel, Tensor, Tensor]:
    """A random machine's model, every state of its bits, and -E of each by the definition, (2^9, 9) and (2^9,)."""
    case = random_case(T=1, B=1, V=5, H=4, G=3)
    block = case.block
    model = quadratic_model(block.weight[0], block.visible_bias[0], case.context_bias[0, 0], case.field[0, 0])
    z, h = all_bits(5), all_bits(4)
    states = torch.cat([z.repeat_interleave(len(h), 0), h.repeat(len(z), 1)], 1)
    return model, states, case.log_joint(0, 0).flatten()


def sum_over_pairs(content: dict, states: Tensor) -> Tensor:
    """Energies of a serialised model, term by term."""
    energy = torch.full((len(states),), content["offset"], dtype=torch.float64)
    for i, bias in enumerate(content["linear_biases"]):
        energy += bias * states[:, i]
    pairs = (content["quadratic_head"], content["quadratic_tail"], content["quadratic_biases"])
    for head, tail, bias in zip(*pairs, strict=True):
        energy += bias * states[:, head] * states[:, tail]
    return energy


def test_every_state_has_the_machines_energy_as_bits_and_as_spins():
    model, states, log_joint = tiny()
    spins = 2 * states - 1
    for kind, values in ((model, states), (model.to_spins(), spins)):
        torch.testing.assert_close(kind.energy(values), -log_joint, rtol=0, atol=1e-10)
        torch.testing.assert_close(sum_over_pairs(kind.serializable({}), values), -log_joint, rtol=0, atol=1e-10)
    assert model.offset == 0
    assert int(model.energy(states).argmin()) == int(log_joint.argmax())


def test_the_minimum_of_the_energy_is_the_most_probable_state_and_boltzmann_weights_give_the_conditional():
    model, states, log_joint = tiny()
    p = torch.softmax(-model.to_spins().energy(2 * states - 1), 0)
    torch.testing.assert_close(p, torch.softmax(log_joint, 0), rtol=0, atol=1e-12)


def test_dimod_reads_both_kinds_and_agrees_on_every_state():
    dimod = pytest.importorskip("dimod", reason="dimod is not installed")
    model, states, log_joint = tiny()
    for kind, values in ((model, states), (model.to_spins(), 2 * states - 1)):
        content = json.loads(json.dumps(kind.serializable({"run_id": "mine"})))
        read = dimod.BinaryQuadraticModel.from_serializable(content)
        assert (read.num_variables, read.num_interactions, read.vartype.name) == (9, 20, kind.kind)
        found = torch.as_tensor(read.energies((values.numpy().astype("int8"), content["variable_labels"])))
        torch.testing.assert_close(found, -log_joint, rtol=0, atol=1e-10)
    best = dimod.ExactSolver().sample(read.change_vartype("BINARY", inplace=False)).first
    row = states[int(log_joint.argmax())].tolist()
    assert [best.sample[name] for name in content["variable_labels"]] == row
    assert best.energy == pytest.approx(-float(log_joint.max()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINBOOK_RUNS", str(tmp_path_factory.mktemp("runs")))
        run = prepare("timestep_dbn", "smoke", SMALL, "mine")
        for step in (run.load_data, run.build, lambda: run.train(progress=False), run.evaluate, run.finish):
            step()
        return run


@pytest.mark.parametrize(("level", "name"), [(0, "fine"), (1, "middle"), (2, "coarse")])
@pytest.mark.parametrize("kind", ["binary", "spin"])
def test_a_trained_machine_on_random_states(kind, level, name, trained, tmp_path, capsys):
    out = tmp_path / "model.json"
    command = [str(trained.folder.path), "--timestep", "2", "--level", name, "--kind", kind, "--image", "3", "--seed", "7"]
    assert main([*command, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    dbn: TimestepDBN = trained.state.modules["dbn"]
    num_visible, num_hidden = dbn.level_sizes[level], trained.config.hidden_units[level]
    assert f"{num_visible + num_hidden} {kind} variables, {num_visible * num_hidden} couplings" in capsys.readouterr().out
    info = content["info"]
    assert (info["run_id"], info["timestep"], info["level"], info["image"], info["seed"]) == ("mine", 2, name, 3, 7)
    noisy = torch.tensor([int(bit) for bit in info["noisy_bits"]], dtype=torch.float64)
    assert len(noisy) == num_visible

    # Differences of E between states with equal h: -a.dz - Gamma (2 z_t - 1).dz - dz W h, from the module's own tensors.
    W, a = (dbn.levels[level].get_parameter(n)[1].detach().double() for n in ("weight", "visible_bias"))
    kept = [torch.cos(torch.tensor(math.pi * t / 6, dtype=torch.float64)) ** 2 * 0.998 + 0.002 for t in (1, 2)]
    beta = (1 - kept[1] / kept[0]) / 2
    z, other = torch.randint(2, (2, 20, num_visible)).double()
    h = torch.randint(2, (20, num_hidden)).double()
    field = torch.log((1 - beta) / beta) * (2 * noisy - 1)
    expected = -((z - other) @ (a + field)) - (((z - other) @ W) * h).sum(1)
    states = [torch.cat([bits, h], 1) for bits in (z, other)]
    states = [2 * bits - 1 for bits in states] if kind == "spin" else states
    energies = [sum_over_pairs(content, bits) for bits in states]
    torch.testing.assert_close(energies[0] - energies[1], expected, rtol=0, atol=1e-4)  # the field was made in float32


def test_the_hidden_biases_hold_the_context(trained):
    """The level's own noisy bits and coarser levels reach h only there: another image changes nothing but linear terms."""
    one, other = (export(str(trained.folder.path), 2, 0, image, 7)[0] for image in (3, 4))
    assert torch.equal(one.coupling, other.coupling)
    num_visible = one.coupling.shape[0]
    assert not torch.equal(one.linear[num_visible:], other.linear[num_visible:])
    again = export(str(trained.folder.path), 2, 0, 3, 7)[0]
    assert torch.equal(one.linear, again.linear)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--timestep": "0"}, "there is no timestep 0\n  -> the run has 3"),
        ({"--timestep": "4"}, "there is no timestep 4"),
        ({"--image": "9999"}, "there is no image 9999"),
        ({"--image": "-1"}, "there is no image -1"),
    ],
)
def test_what_is_not_there_is_told(changed, message, trained, tmp_path, capsys):
    options = {"--timestep": "1", "--level": "fine", "--out": str(tmp_path / "m.json")} | changed
    words = [f"{name}={value}" for name, value in options.items()]
    assert main([str(trained.folder.path), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m.json").exists()


def test_a_run_without_a_chain_is_told(trained, tmp_path, capsys):
    folder = tmp_path / "runs" / "coder"
    folder.mkdir(parents=True)
    saved = json.loads(trained.folder.config.read_text())
    saved["config"]["stage"] = "autoencoder"
    (folder / "config.json").write_text(json.dumps(saved))
    assert main(["coder", "--timestep", "1", "--level", "fine", "--out", "m.json"]) == 2
    assert "coder has no chain" in capsys.readouterr().err

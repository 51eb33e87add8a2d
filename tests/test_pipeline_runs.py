"""What a training step does in two stages of a pipeline, against the same step in one process."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from tests.driving import assert_identical
from tests.test_pipeline import together
from trainbook import distributed
from trainbook.errors import UserError
from trainbook.optimization import OptimizationConfig
from trainbook.stepper import Stepper
from trainbook.weights import load_weights

STEPS, CUT, ODD_STEP = 8, 5, 2
CASES = {
    "clipping": {"clip_norm": 0.1, "accumulation": 4},
    "batch statistics and averages": {"optimizer": "sgd", "ema_decay": 0.7, "weight_decay": 0.1, "clip_value": 0.01},
    "an overflow": {"precision": "float16", "ema_decay": 0.7},
    "a frozen stage": {"ema_decay": 0.7},
    "a spike": {"spike_deviations": 5.0, "on_spike": "lower_rate", "ema_decay": 0.7},
}


def network(seed=0):
    torch.manual_seed(seed)
    first = nn.Linear(5, 8, bias=False)  # before batch normalisation a bias has no gradient but rounding
    return nn.Sequential(first, nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def network_of(case, seed=0):
    module = network(seed)
    if case == "a frozen stage":
        module[:3].requires_grad_(False)
    return module


def examples(step, number=16):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(number, 5, generator=generator), torch.randint(3, (number,), generator=generator)


def loss_of(model, batch):
    outputs = model(batch[0]).float()
    return functional.cross_entropy(outputs, batch[1]), {"sharpness": outputs.detach().softmax(1).square().sum(1).mean()}


def stepper_of(module, **choices):
    return Stepper(module, OptimizationConfig(learning_rate=0.01, schedule="cosine", **choices), STEPS)


def train(stepper, case, steps):
    """Reports of some steps; an odd one brings a gradient that overflows in the first stage only, or a loss that is a spike."""
    reports = []
    for step in steps:
        inputs, labels = examples(step)
        odd = case if step == ODD_STEP else ""
        weight = stepper.module[0].weight
        hook = weight.register_hook(lambda g: g * torch.inf) if odd == "an overflow" else None
        report = stepper.step((inputs * torch.inf if odd == "a spike" else inputs, labels), loss_of)
        reports.append({name: torch.as_tensor(value).double() for name, value in report.items()})
        if hook is not None:
            hook.remove()
    return reports


def everything(stepper):
    return {"model": stepper.module.state_dict(), "stepper": stepper.state_dict()}


# What the processes do


def double_call(model, batch):
    return (model(batch[0]) + model(-batch[0])).square().mean()


def same_noise(model, batch):
    noise = torch.randn_like(batch[0])
    later = torch.rand(())
    return (model(noise) - noise).square().mean(), {"later": later}


def dropped(model, batch):
    outputs = model(torch.ones_like(batch[0]))
    return outputs.mean(), {"dropped": (outputs == 0).float().mean()}


def identity(*others):
    linear = nn.Linear(5, 5)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(5))
        linear.bias.zero_()
    return nn.Sequential(linear, *others)


def complaint(module, loss_function, number=16, **choices):
    try:
        stepper_of(module, **choices).step(examples(0, number), loss_function)
    except UserError as error:
        return str(error)
    return "none"


def in_two_stages(folder):
    distributed._parallel = "pipeline"
    found = {}
    for case, choices in CASES.items():
        stepper = stepper_of(network_of(case), **choices)
        reports = train(stepper, case, range(CUT))
        saved = distributed.whole(everything(stepper))
        if distributed.rank() == 0:
            torch.save(saved, folder / f"two {case}.pt")
        reports += train(stepper, case, range(CUT, STEPS))

        stepper, earlier = (
            stepper_of(network_of(case, seed=5), **choices),
            torch.load(folder / f"one {case}.pt", weights_only=True),
        )
        stepper.module.load_state_dict(distributed.sliced_like(earlier["model"], stepper.module.state_dict()))
        stepper.load_state_dict(earlier["stepper"])
        found[case] = {"reports": reports, "later": train(stepper, case, range(CUT, STEPS))}
        held = {
            "module": stepper.module.parameters(),
            "optimizer": (p for g in stepper.optimizer.param_groups for p in g["params"]),
        }
        found[case]["held"] = {name: [p.numel() for p in tensors if not p.is_meta] for name, tensors in held.items()}
        saved = distributed.whole(everything(stepper))
        if distributed.rank() == 0:
            torch.save(saved, folder / f"one, then two {case}.pt")

    torch.manual_seed(7)
    found["noise"] = [stepper_of(identity(identity()), ema_decay=0.5).step(examples(0), same_noise) for _ in range(2)]
    dropouts = [nn.Sequential(identity(nn.Dropout()), identity(nn.Dropout())) for _ in range(2)]
    found["dropout"] = [stepper_of(blocks).step(examples(0, 4000), dropped) for blocks in dropouts]
    found["drawn afterwards"] = torch.rand(3)

    pretrained, other = network(), network(seed=3)
    first, second = (stepper_of(pretrained, optimizer="sgd") for _ in range(2))
    found["twice"] = train(first, "", range(3)) + train(second, "", range(3, 6))

    load_weights({"model": pretrained}, str(folder / "model.safetensors"), folder)
    found["loaded"] = distributed.whole(pretrained.state_dict())
    pretrained.eval()
    found["outputs"] = pretrained(examples(0)[0])

    stepper_of(other)
    found["complaints"] = {
        "never": complaint(network(), lambda model, batch: batch[0].mean()),
        "named": complaint(network(), lambda model, batch: model(input=batch[0]).mean()),
        "several": complaint(network(), lambda model, batch: model(*batch).mean()),
        "attribute": complaint(network(), lambda model, batch: model.weight.norm()),
        "another": complaint(network(), lambda model, batch: (other(batch[0]) - model(batch[0])).mean()),
        "gradient": complaint(network(), lambda model, batch: model(batch[0].clone().requires_grad_()).mean()),
        "uneven": complaint(network(), loss_of, number=15),
        "idle": complaint(network_of("a frozen stage"), loss_of, precision="float16"),
        "no sequence": complaint(nn.Linear(5, 3), loss_of),
        "one block": complaint(identity(), loss_of),
    }
    return found


# What came of it


@pytest.fixture(scope="module")
def one():
    """Reports of one process, and its state at the cut."""
    found = {}
    for case, choices in CASES.items():
        stepper = stepper_of(network_of(case), **{"accumulation": 2, **choices})
        reports = train(stepper, case, range(CUT))
        saved = copied(everything(stepper))
        reports += train(stepper, case, range(CUT, STEPS))
        found[case] = {"saved": saved, "reports": reports, "saved last": everything(stepper)}
    return found


def copied(values):
    if isinstance(values, dict):
        return {key: copied(value) for key, value in values.items()}
    return values.clone() if isinstance(values, torch.Tensor) else values


@pytest.fixture(scope="module")
def two(tmp_path_factory, one):
    folder = tmp_path_factory.mktemp("two")
    for case in CASES:
        torch.save(one[case]["saved"], folder / f"one {case}.pt")
    save_file(network(seed=9).state_dict(), str(folder / "model.safetensors"))
    return together(2, in_two_stages, folder), folder


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_two_stages_report_what_one_process_reports(two, one, case):
    reports = one[case]["reports"]
    odd = {"an overflow": "skipped", "a spike": "spike"}.get(case)
    assert odd is None or [float(report[odd]) for report in reports] == [step == ODD_STEP for step in range(STEPS)]
    for rank in two[0]:
        close(rank[case]["reports"], reports)


@pytest.mark.parametrize("case", CASES)
def test_two_stages_go_on_from_what_one_process_saved(two, one, case):
    module = network_of(case)
    trained = [p.numel() for p in module.parameters() if p.requires_grad]
    for name, sizes in {"module": [p.numel() for p in module.parameters()], "optimizer": trained}.items():
        assert sorted(size for rank in two[0] for size in rank[case]["held"][name]) == sorted(sizes)
    assert all(rank[case]["held"]["module"] for rank in two[0])
    for rank in two[0]:
        close(rank[case]["later"], one[case]["reports"][CUT:])


@pytest.mark.parametrize(("who", "when"), [("two", "saved"), ("one, then two", "saved last")])
@pytest.mark.parametrize("case", CASES)
def test_two_stages_save_what_one_process_saves(two, one, case, who, when):
    found, expected = torch.load(two[1] / f"{who} {case}.pt", weights_only=True), one[case][when]
    configured = CASES[case].get("accumulation", 1 if who == "two" else 2)
    assert found["stepper"].pop("accumulation") == configured
    assert_close_parts(found, {**expected, "stepper": {k: v for k, v in expected["stepper"].items() if k != "accumulation"}})


def assert_close_parts(found, expected):
    """The same keys and kinds throughout, and close numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close_parts(found[key], value)
    elif isinstance(expected, torch.Tensor | float):
        close(found, expected)
    else:
        assert found == expected


def test_the_noise_of_a_loss_is_the_same_where_it_enters_the_model_and_where_the_loss_is(two):
    first, second = two[0][0]["noise"]
    assert_identical(two[0][1]["noise"], [first, second])
    assert max(first["loss"], second["loss"]) < 1e-6  # else some 2, the variance of a difference
    assert first["later"] != second["later"]


def test_stages_drop_units_independently_of_each_other(two):
    first, second = (float(report["dropped"]) for report in two[0][0]["dropout"])
    assert first == pytest.approx(0.75, abs=0.02)
    assert second == pytest.approx(0.75, abs=0.02)
    assert first != second


def test_all_processes_draw_alike_outside_the_stages(two):
    assert torch.equal(*(rank["drawn afterwards"] for rank in two[0]))


def test_a_module_can_be_trained_in_two_stages_of_a_run(two):
    module = network()
    first, second = (stepper_of(module, optimizer="sgd", accumulation=2) for _ in range(2))
    expected = train(first, "", range(3)) + train(second, "", range(3, 6))
    for rank in two[0]:
        close(rank["twice"], expected)


def test_weights_are_loaded_into_stages_and_evaluated_in_all(two):
    expected = network(seed=9)
    assert_identical(two[0][0]["loaded"], dict(expected.state_dict()))
    for rank in two[0]:
        close(rank["outputs"], expected.eval()(examples(0)[0]).detach())


@pytest.mark.parametrize(
    ("case", "message"),
    {
        "never": "the loss does not call the model",
        "named": "other than one tensor",
        "several": "other than one tensor",
        "attribute": "the loss uses the model's 'weight'",
        "another": "not the one it is given",
        "gradient": "a gradient for the model's input",
        "uneven": "a batch of 15 does not make 2 equal micro-batches",
        "idle": "nothing to train in float16",
        "no sequence": "cannot be cut into a pipeline: blocks must be an nn.Sequential.*got Linear",
        "one block": "1 layers cannot fill 2 stages",
    }.items(),
)
def test_what_a_pipeline_cannot_do_is_refused_in_every_process(two, case, message):
    for rank in two[0]:
        assert re.search(f"{message}.*\\n.*(--parallel|multiple of 2)", rank["complaints"][case]), rank["complaints"][case]


def calling_twice(folder):
    distributed._parallel = "pipeline"
    stepper_of(network()).step(examples(0), double_call)


def test_a_loss_that_calls_the_model_twice_ends_the_run(tmp_path):
    """Only the last stage comes so far as to know."""
    with pytest.raises(pytest.fail.Exception, match="UserError: the loss calls the model twice"):
        together(2, calling_twice, tmp_path)

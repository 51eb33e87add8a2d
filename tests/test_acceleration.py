"""What each way to run a module computes, against float64 and hand-made faults; which one is chosen, by a clock of the test's."""

import copy
import logging
import math
import types

import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.nn import functional

from tests.driving import assert_identical
from trainbook import acceleration
from trainbook.acceleration import VARIANTS, allow_tf32, apply_variant, fastest_variant, variant_table
from trainbook.optimization import OptimizationConfig
from trainbook.optimizer import make_optimizer

pytestmark = [
    # The inductor of torch 2.10 imports torch.utils.mkldnn, whose classes use it; 2.15 no longer does.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    # dynamo says so of this one release of Python, whose guards lack a fast path.
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch.compiler.reset()


def dropout_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))


def convolutional_network():
    """Smooth: a ReLU that rounds to the other side of 0 would move the gradient by more than float32 does."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Tanh()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(36, 3))


NETWORKS = {"dropout": (dropout_network, (32, 6)), "convolutional": (convolutional_network, (16, 3, 9, 9))}


def examples(shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.randint(3, shape[:1], generator=generator)


def loss_on(inputs, labels):
    return lambda network: functional.cross_entropy(network(inputs), labels)


def everything_of(network):
    """Values, storages and identities that the caller's optimizer, average and checkpoint hold on to."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "memory": {name: (id(tensor), tensor.data_ptr(), tensor.stride()) for name, tensor in tensors.items()},
        "gradients": {name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in network.named_parameters()},
        "modes": [part.training for part in network.modules()],
        "generator": torch.get_rng_state(),
    }


def gradients_of(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


class Scaled(nn.Module):
    """A network whose output is multiplied by a number: what a wrong compiler might do."""

    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, inputs):
        return self.network(inputs) * self.factor


# With torch's compiler


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_variant_agrees_in_float32_and_leaves_everything_as_it_was(kind):
    make, shape = NETWORKS[kind]
    network = make()
    network[0].eval()
    network[-1].weight.grad = torch.ones_like(network[-1].weight)
    torch.manual_seed(5)
    before = everything_of(network)
    chosen, variants = fastest_variant(network, loss_on(*examples(shape)), rounds=2)
    assert_identical(before, everything_of(network))
    names = [name for name in VARIANTS if kind == "convolutional" or "channels_last" not in name]
    assert [variant.name for variant in variants] == names
    assert [variant.name for variant in variants if not variant.why_not] == [chosen]
    for variant in variants:
        assert variant.difference < 1e-5
        assert "times as fast" in variant.why_not or "is faster" in variant.why_not or variant.name == chosen
    assert variants[-1].preparation_seconds > variants[0].preparation_seconds  # it compiled


@pytest.mark.parametrize("kind", NETWORKS)
def test_an_applied_variant_has_the_gradients_of_float64_and_trains_the_modules_own_weights(kind):
    make, shape = NETWORKS[kind]
    network, (inputs, labels) = make(), examples(shape)
    exact = copy.deepcopy(network).double()
    names = list(network.state_dict())
    called = apply_variant(network, VARIANTS[-1])
    torch.manual_seed(3)
    ours = gradients_of(network, functional.cross_entropy(called(inputs), labels))
    after = torch.rand(1)
    torch.manual_seed(3)  # draws of float64 and of float32 differ: the mask is the one of eager float32
    mask = nn.Dropout(0.5)(torch.ones(32, 16)) if kind == "dropout" else None
    assert kind != "dropout" or torch.equal(torch.rand(1), after)
    hidden = exact[:2](inputs.double()) * mask if kind == "dropout" else exact[:-1](inputs.double())
    theirs = gradients_of(exact, functional.cross_entropy(exact[-1](hidden), labels))
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient.double(), theirs[name], rtol=1e-4, atol=1e-6, msg=f"{kind} {name}")
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer.double(), dict(exact.named_buffers())[name].double(), rtol=1e-5, atol=1e-6)
    assert list(network.state_dict()) == names
    make().load_state_dict(network.state_dict())
    with torch.no_grad():
        network[-1].weight.zero_()
        network[-1].bias.fill_(2.0)
        assert torch.equal(called(inputs), torch.full((len(labels), 3), 2.0))
    network.eval()
    assert not called.training
    if kind == "convolutional":
        assert network[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_without_a_compiler_the_reason_is_reported_and_an_applied_variant_runs_as_written(caplog):
    network, (inputs, labels) = convolutional_network(), examples((16, 3, 9, 9))
    expected = network(inputs)
    with fresh_cache(), torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        chosen, variants = fastest_variant(network, loss_on(inputs, labels), rounds=1, least_gain=99.0)
        with caplog.at_level(logging.WARNING, "trainbook"):
            called = apply_variant(network, "compiled")
    assert chosen == "as written"
    for variant in variants[2:]:
        assert variant.why_not.startswith("not available: ")
        assert "no-such-compiler" in variant.why_not
        assert (variant.seconds, variant.speed, variant.difference, variant.preparation_seconds) == (None,) * 4
    assert called is network
    assert "no-such-compiler" in caplog.text
    assert torch.equal(network(inputs), expected)


def test_a_kernel_does_not_depend_on_the_shapes_seen_before():
    """Else a run resumed just before the short batch of an epoch would compute other bits than one that was not stopped."""

    def forward(sizes):
        torch.compiler.reset()
        called = apply_variant(dropout_network().eval(), "compiled")
        graphs = torch._dynamo.utils.counters["stats"]
        graphs.clear()
        outputs = {size: called(examples((size, 6))[0]) for size in sizes}
        for size in sizes:
            called(examples((size, 6))[0])
        return outputs, graphs["unique_graphs"]

    (stopped, graphs), (whole, same) = forward([5, 32, 17]), forward([32, 17, 5])
    assert graphs == same == 3
    assert_identical(dict(sorted(stopped.items())), dict(sorted(whole.items())))


# With a compiler and a clock of the test's own


@pytest.fixture
def compiler(monkeypatch):
    """Puts a function in the compiler's place."""
    return lambda compiled: monkeypatch.setattr(acceleration, "_compiled", compiled)


@pytest.mark.parametrize(
    ("precision", "factor", "allowed"),
    [
        ("float32", 1.0005, True),
        ("float32", 1.002, False),
        ("float16", 1.002, True),
        ("float16", 1.02, False),
        ("bfloat16", 1.02, True),
        ("bfloat16", 1.1, False),
        ("bfloat16", math.nan, False),
    ],
)
def test_a_variant_that_computes_something_else_is_refused_by_the_tolerance_of_the_precision(
    compiler, precision, factor, allowed
):
    network, (inputs, _) = dropout_network().eval(), examples((32, 6))
    compiler(lambda module, name: Scaled(module, factor))
    _, (_, variant) = fastest_variant(network, lambda called: called(inputs).sum(), precision, rounds=1)
    assert variant.difference == pytest.approx(abs(factor - 1), rel=1e-2, nan_ok=True)  # linear: loss and gradient alike
    assert (variant.seconds is not None) == allowed
    assert variant.why_not.startswith("loss, gradient or buffers differ by") != allowed
    if not allowed:
        assert variant.why_not.endswith(f"{acceleration.TOLERANCES[precision]:.0e} is allowed")


class WrongGradient(Scaled):
    def forward(self, inputs):
        outputs = self.network(inputs)
        return outputs.detach() + self.factor * (outputs - outputs.detach())


class ForgetsStatistics(Scaled):
    def forward(self, inputs):
        statistics = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        return torch.func.functional_call(self.network, statistics, inputs)


@pytest.mark.parametrize(("fault", "factor", "expected"), [(WrongGradient, 1.25, 0.25), (ForgetsStatistics, 1.0, None)])
def test_a_right_loss_with_a_wrong_gradient_or_batch_statistic_is_refused(compiler, fault, factor, expected):
    network = convolutional_network()
    compiler(lambda module, name: fault(module, factor))
    _, variants = fastest_variant(network, loss_on(*examples((16, 3, 9, 9))), rounds=1)
    refused = [variant for variant in variants if "differ by" in variant.why_not]
    assert [variant.name for variant in refused] == ["compiled", "compiled, channels_last"]
    if expected:
        assert [variant.difference for variant in refused] == pytest.approx([expected] * 2, rel=1e-4)


class Clock:
    """Time that passes only when a module takes it; every call makes the machine slower by `drift`."""

    def __init__(self, monkeypatch, drift=1.0):
        self.now, self.drift, self.slowness = 0.0, drift, 1.0
        monkeypatch.setattr(acceleration, "time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def take(self, seconds):
        self.now += seconds * self.slowness
        self.slowness *= self.drift


class Timed(nn.Module):
    def __init__(self, network, clock, seconds):
        super().__init__()
        self.network, self.clock, self.seconds = network, clock, seconds

    def forward(self, inputs):
        self.clock.take(self.seconds)
        return self.network(inputs)


@pytest.mark.parametrize(
    ("seconds", "drift", "kept"),
    [
        (0.5, 1.0, True),
        (0.95, 1.0, True),
        (0.96, 1.0, False),  # 1 / 0.96 = 1.042 times as fast, and 1.05 is asked
        (1.0, 1.0, False),
        (3.0, 1.0, False),
        (0.9, 1.15, True),  # always second in its round it would look slower than it is, always first faster
        (0.99, 1.15, False),
        (0.9, 0.87, True),
        (0.99, 0.87, False),
    ],
)
def test_a_variant_is_kept_when_it_is_fast_enough_on_a_machine_whose_speed_changes(monkeypatch, compiler, seconds, drift, kept):
    clock = Clock(monkeypatch, drift)
    network = Timed(dropout_network(), clock, 1.0)
    compiler(lambda module, name: Timed(module.network, clock, seconds))
    chosen, variants = fastest_variant(network, loss_on(*examples((32, 6))))
    assert chosen == ("compiled" if kept else "as written")
    if drift == 1.0:
        assert variants[1].seconds == pytest.approx((seconds,) * 3)
        assert variants[1].speed == pytest.approx(1 / seconds)
    if kept:
        assert [variant.why_not for variant in variants] == ["compiled is faster", ""]
    else:
        assert variants[0].why_not == ""
        assert variants[1].why_not.endswith("times as fast as written; at least 1.05 is asked")
    first, second = variant_table(variants).rows
    assert (first[2], second[2]) == ("1.00", f"{variants[1].speed:.2f}")
    assert (first[-1], second[-1]) == (("compiled is faster", "kept") if kept else ("kept", variants[1].why_not))
    if drift == 1.0:
        assert first[1] == "1e+03 (1e+03 to 1e+03)"


@pytest.mark.parametrize("fastest", ["compiled", "compiled, channels_last"])
def test_of_several_fast_enough_variants_the_fastest_is_kept(monkeypatch, compiler, fastest):
    clock = Clock(monkeypatch)
    network = Timed(convolutional_network(), clock, 1.0)
    compiler(lambda module, name: Timed(module.network, clock, 0.5 if name == fastest else 0.8))
    chosen, variants = fastest_variant(network, loss_on(*examples((16, 3, 9, 9))), rounds=2)
    assert chosen == fastest
    assert {v.name: v.why_not for v in variants if v.name != "channels_last"} == {
        name: "" if name == fastest else f"{fastest} is faster" for name in VARIANTS if name != "channels_last"
    }


def test_short_steps_are_timed_many_at_a_time(monkeypatch, compiler):
    clock = Clock(monkeypatch)
    network, calls = Timed(dropout_network(), clock, 0.001), []
    counted = types.SimpleNamespace(take=lambda seconds: (calls.append(seconds), clock.take(seconds)))
    compiler(lambda module, name: Timed(module.network, counted, 0.0005))
    fastest_variant(network, loss_on(*examples((32, 6))), rounds=3)
    assert len(calls) == 2 + 3 * 20  # warm-up, comparison, three rounds of 20 ms as written


# What breaks, and what is not there


@pytest.mark.parametrize("at_once", [True, False])
def test_a_compiler_that_raises_is_reported_by_its_first_telling_line(compiler, at_once):
    def fails(*_):
        raise RuntimeError("backend='inductor' raised:\nNoCompiler: there is none\n\nSet TORCHDYNAMO_VERBOSE=1")

    compiler(fails if at_once else lambda module, name: fails)
    network = dropout_network()
    chosen, variants = fastest_variant(network, loss_on(*examples((32, 6))), rounds=1)
    assert chosen == "as written"
    assert variants[1].why_not == "not available: RuntimeError: NoCompiler: there is none"
    assert variant_table(variants).rows[1] == ["compiled", "", "", "", "", variants[1].why_not]


def test_a_mistake_of_the_caller_is_raised_and_everything_put_back():
    network = convolutional_network()
    before = everything_of(network)
    calls = []

    def run(called):
        calls.append(called)
        called(examples((16, 3, 9, 9))[0])
        torch.rand(3)
        called.eval()
        called[0].weight.data.mul_(2)
        raise LookupError("no such batch")

    with pytest.raises(LookupError, match="no such batch"):
        fastest_variant(network, run)
    assert_identical(before, everything_of(network))
    assert calls == [network]  # at once, before anything is compiled


def test_other_leaves_get_no_gradient(compiler):
    compiler(lambda module, name: module)
    network, other = dropout_network(), nn.Parameter(torch.ones(3))
    inputs, labels = examples((32, 6))
    fastest_variant(network, lambda called: functional.cross_entropy(called(inputs) * other, labels), rounds=1)
    assert other.grad is None


def test_channels_last_is_tried_only_where_it_would_reorder_a_weight(compiler):
    compiler(lambda module, name: module)

    def names(network, shape):
        return [v.name for v in fastest_variant(network, lambda called: called(torch.ones(shape)).sum(), rounds=1)[1]]

    assert names(nn.Conv2d(3, 4, 2), (1, 3, 5, 5)) == list(VARIANTS)
    for network, shape in [
        (nn.Conv3d(3, 4, 2), (1, 3, 5, 5, 5)),
        (nn.Conv1d(3, 4, 2), (1, 3, 5)),
        (nn.Conv2d(3, 4, 1), (1, 3, 5, 5)),  # one element per filter and channel: both orders are one
        (nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last), (1, 3, 5, 5)),
    ]:
        assert names(network, shape) == ["as written", "compiled"]


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="'eager' is no way to run a module; there are 'as written', 'channels_last'"):
        apply_variant(nn.Linear(2, 2), "eager")
    with pytest.raises(ValueError, match="no parameter of the module requires a gradient"):
        fastest_variant(nn.Linear(2, 2).requires_grad_(False), lambda called: called(torch.ones(2)).sum())
    for wrong in ({"precision": "float8"}, {"rounds": 0}):
        with pytest.raises(ValueError, match="must be one of"):
            fastest_variant(nn.Linear(2, 2), lambda called: called(torch.ones(2)).sum(), **wrong)


# Channels last in training


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_fused_optimizer_goes_on_with_the_momentum_of_each_weight(optimizer):
    config = OptimizationConfig(optimizer=optimizer, learning_rate=0.05)
    peer, network = convolutional_network(), convolutional_network()
    run = loss_on(*examples((16, 3, 9, 9)))
    optimizers = {trained: make_optimizer(trained, config) for trained in (peer, network)}
    for step in range(6):
        if step == 3:
            assert apply_variant(network, "channels_last", optimizers[network]) is network
            assert network[0].weight.stride() == (27, 1, 9, 3)
        for trained, its_optimizer in optimizers.items():
            its_optimizer.zero_grad()
            run(trained).backward()
            its_optimizer.step()
    for ours, theirs in zip(network.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# TF32


@pytest.fixture
def default_precision():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


def test_tf32_is_set_for_products_and_convolutions_and_both_of_torchs_apis_can_be_read(default_precision):
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the newer API, by somebody else: reads of the older one raise now
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        _ = torch.backends.cuda.matmul.allow_tf32
    for enabled in (True, False):
        allow_tf32(enabled)
        assert torch.get_float32_matmul_precision() == ("high" if enabled else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is enabled
        for newer in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            assert (newer.fp32_precision == "tf32") is enabled

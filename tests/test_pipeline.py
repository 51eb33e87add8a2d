"""A pipeline of processes against one process: the same outputs, gradients, training curves and checkpoints."""

import datetime
import itertools
import random
import re
import time
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_

from tests.driving import CHILDREN, assert_identical
from trainbook.pipeline import SCHEDULES, Pipeline, distribute_layers

PATIENCE_SECONDS = 120
PARTS, STEPS, CLIP = 4, 20, 0.3
COSTS = (4, 1, 1, 1, 1)  # the first of two stages is the LayerNorm alone: one optimizer group where the other has two
DIGITS = load_digits()


def digits(step, size=24):
    chosen = torch.randperm(len(DIGITS.target), generator=torch.Generator().manual_seed(step))[:size]
    return torch.from_numpy(DIGITS.data)[chosen] / 16, torch.from_numpy(DIGITS.target)[chosen]


def dense(seed=0):
    torch.manual_seed(seed)
    hidden = nn.Sequential(nn.Linear(64, 32), nn.GELU())
    return nn.Sequential(nn.LayerNorm(64), hidden, nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 10)).double()


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(1, 3)  # its output is not contiguous


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean((1, 2))  # the gradient of its input has stride 0


class Chosen(nn.Module):
    def forward(self, x):
        return x.argmax(1)  # integers have no gradient


class Awkward(nn.Sequential):
    """In three stages of two blocks the first has no parameters, and others begin or end with unusual layouts."""

    def __init__(self, width):
        super().__init__(
            nn.Unflatten(1, (1, 8, 8)), nn.Identity(), nn.Conv2d(1, width, 3), Turned(), Pooled(), nn.Linear(width, 10)
        )


def awkward():
    torch.manual_seed(0)
    return Awkward(4).double()


def language():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(17, 6), nn.LayerNorm(6), nn.Linear(6, 17)).double()


def sentences(step, length):
    return torch.randint(17, (2, 8, length), generator=torch.Generator().manual_seed(step)).unbind()


def token_loss(outputs, targets):
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def noisy(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.4), nn.Linear(16, 10)).double()


def make_optimizer(module):
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=3e-3)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def whole_gradients(network, *batches, loss_function=functional.cross_entropy):
    network.zero_grad()
    losses = [loss_function(network(inputs), targets) for inputs, targets in batches]
    sum(losses).backward()
    return losses, gradients(network)


def train(network, optimizer, steps):
    """One process, by torch's own means."""
    losses = []
    for step in steps:
        inputs, targets = digits(step)
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(inputs), targets)
        loss.backward()
        clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def train_pipeline(pipeline, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        losses.append(pipeline.step(*digits(step)))
        clip_grads_with_norm_(pipeline.stage.parameters(), CLIP, pipeline.gradient_norm())
        optimizer.step()
    return losses


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# What the processes do


def together(number, task, folder):
    """Run a task in so many processes; what each returned. Whatever goes wrong in one fails the test, with its words."""
    processes = [CHILDREN.Process(target=_session, args=(rank, number, task, folder), daemon=True) for rank in range(number)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    if any(process.exitcode for process in processes):
        codes = {rank: process.exitcode for rank, process in enumerate(processes)}
        reports = [path.read_text() for path in sorted(folder.glob("*.error"))]
        pytest.fail("\n".join([f"exit codes by rank: {codes}", *reports]), pytrace=False)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(number)]


def _session(rank, number, task, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        patience = datetime.timedelta(seconds=PATIENCE_SECONDS / 2)
        dist.init_process_group("gloo", f"file://{folder}/meeting", patience, number, rank)
        torch.save(task(folder), folder / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"in rank {rank}:\n{traceback.format_exc()}")
        raise


def one_step(pipeline, *batches):
    losses = [pipeline.step(*batch) for batch in batches]
    return {"losses": losses, "gradients": gradients(pipeline.stage), "norm": pipeline.gradient_norm()}


def complaint(function, *arguments, **choices):
    try:
        function(*arguments, **choices)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def in_two_stages(folder):
    found = {}
    for schedule in SCHEDULES:
        pipeline = Pipeline(dense(), functional.cross_entropy, PARTS, schedule)
        before = torch.get_rng_state()
        found[schedule] = one_step(pipeline, digits(0))
        found[schedule]["outputs"] = [pipeline.forward(digits(1, size)[0]) for size in (24, 7, 1)]
        assert not any(outputs.requires_grad for outputs in found[schedule]["outputs"])
        assert torch.equal(torch.get_rng_state(), before)
        pipeline.stage.zero_grad()
        found[schedule]["sizes"] = one_step(pipeline, digits(0, 8), digits(1, 12), digits(2, 8))

    blocks = dense()
    pipeline = Pipeline(blocks, functional.cross_entropy, PARTS, costs=COSTS)
    found["layers"] = [list(layers) for layers in pipeline.layers]
    found["held"] = [name for name, p in blocks.named_parameters() if not p.is_meta]
    found["curve"] = train_pipeline(pipeline, make_optimizer(pipeline.stage), range(STEPS))

    pipeline = Pipeline(noisy(), functional.cross_entropy, PARTS, costs=(1, 1, 2, 1))
    for _ in range(2):
        torch.manual_seed(dist.get_rank())
        pipeline.stage.zero_grad()
        found.setdefault("noisy", []).append(one_step(pipeline, digits(0)))
    found["statistics"] = pipeline.stage.state_dict()

    pipeline = Pipeline(dense().float(), functional.cross_entropy, PARTS)
    inputs, targets = digits(0)
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = one_step(pipeline, (inputs.float(), targets))

    tied = nn.Linear(64, 64)
    found["complaints"] = {
        "uneven": complaint(pipeline.step, *digits(0, 23)),
        "few": complaint(Pipeline, dense(), functional.cross_entropy, 1),
        "schedule": complaint(Pipeline, dense(), functional.cross_entropy, 2, "zigzag"),
        "blocks": complaint(Pipeline, nn.Sequential(nn.Linear(2, 2)), functional.cross_entropy, 2),
        "costs": complaint(Pipeline, dense(), functional.cross_entropy, 2, costs=[1, 2]),
        "tied": complaint(Pipeline, nn.Sequential(tied, nn.Tanh(), tied), functional.cross_entropy, 2),
        "module": complaint(Pipeline, nn.Linear(2, 2), functional.cross_entropy, 2),
        "border": complaint(Pipeline(nn.Sequential(Chosen(), nn.Embedding(64, 10)), None, 2, costs=(1, 1)).step, *digits(0)),
    }
    return found


def in_three_stages(folder):
    found = {}
    for schedule in SCHEDULES:
        pipeline = Pipeline(awkward(), functional.cross_entropy, PARTS, schedule, costs=[1] * 6)
        found[schedule] = one_step(pipeline, digits(0), digits(1))
        found[schedule]["outputs"] = pipeline.forward(digits(1, 5)[0])
        pipeline = Pipeline(language(), token_loss, PARTS, schedule)
        found[schedule]["language"] = one_step(pipeline, sentences(0, 5), sentences(1, 3))
    return found


# What came of it


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return together(2, in_two_stages, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return together(3, in_three_stages, tmp_path_factory.mktemp("three"))


def assert_equal_step(ranks, network, *batches, **choices):
    losses, expected = whole_gradients(network, *batches, **choices)
    found = {}
    for rank in ranks:
        close(rank["losses"], [loss.detach() for loss in losses])
        assert not found.keys() & rank["gradients"].keys()
        found |= rank["gradients"]
    close(found, expected)
    norm = clip_grad_norm_(network.parameters(), 1.0)
    close([rank["norm"] for rank in ranks], [norm] * len(ranks))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_stages_have_the_loss_gradients_and_outputs_of_one_process(two, schedule):
    ranks, network = [rank[schedule] for rank in two], dense()
    assert_equal_step(ranks, network, digits(0))
    for rank in ranks:
        with torch.no_grad():
            close(rank["outputs"], [network(digits(1, size)[0]) for size in (24, 7, 1)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_add_up_over_batches_of_several_sizes(two, schedule):
    assert_equal_step([rank[schedule]["sizes"] for rank in two], dense(), digits(0, 8), digits(1, 12), digits(2, 8))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_three_stages_without_parameters_and_with_unusual_layouts(three, schedule):
    ranks, network = [rank[schedule] for rank in three], awkward()
    assert [list(rank["gradients"]) for rank in ranks] == [[], ["2.weight", "2.bias"], ["5.weight", "5.bias"]]
    assert_equal_step(ranks, network, digits(0), digits(1))
    for rank in ranks:
        with torch.no_grad():
            close(rank["outputs"], network(digits(1, 5)[0]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_in_sentences_of_several_lengths(three, schedule):
    ranks = [rank[schedule]["language"] for rank in three]
    assert_equal_step(ranks, language(), sentences(0, 5), sentences(1, 3), loss_function=token_loss)


def test_a_process_keeps_only_its_own_blocks(two):
    names = [name for name, _ in dense().named_parameters()]
    for rank, held in zip(two, [names[:2], names[2:]], strict=True):
        assert rank["layers"] == [[0], [1, 2, 3, 4]]
        assert rank["held"] == held


def test_training_in_two_stages_follows_the_curve_of_one_process(two):
    network = dense()
    expected = train(network, make_optimizer(network), range(STEPS))
    network = dense()
    whole_gradients(network, digits(0))
    assert clip_grad_norm_(network.parameters(), CLIP) > CLIP  # the clipping acts
    assert expected[-1] < 0.8 * expected[0]
    for rank in two:
        close(rank["curve"], expected)


def test_the_first_step_draws_no_random_numbers_and_moves_no_statistics_of_its_own(two):
    for rank in two:
        first, second = rank["noisy"]
        assert_identical(first["gradients"], second["gradients"])
    network = noisy()
    for _ in range(2):
        for part in digits(0)[0].chunk(PARTS):
            network[:2](part)
    found = two[0]["statistics"]
    assert found["1.num_batches_tracked"] == 2 * PARTS
    close(found, network[:2].state_dict())


def test_half_precision_inside_the_stages(two):
    network = dense().float()
    inputs, targets = digits(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.cross_entropy(network(inputs.float()), targets)
    loss.backward()
    expected = gradients(network)
    for rank in two:
        found = rank["autocast"]
        assert found["losses"][0].dtype == torch.float32
        torch.testing.assert_close(found["losses"][0], loss.detach(), rtol=1e-2, atol=0)
        for name, gradient in found["gradients"].items():
            assert functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.999


@pytest.mark.parametrize(
    ("case", "message"),
    {
        "uneven": "ValueError: 23 examples do not make 4 equal micro-batches.*multiple of 4",
        "few": "ValueError: 1 micro-batches are fewer than the 2 stages",
        "schedule": "ValueError: schedule is 'zigzag'; there are gpipe, 1f1b",
        "blocks": "ValueError: 1 layers cannot fill 2 stages",
        "costs": "ValueError: 2 costs for 5 blocks",
        "tied": "ValueError: two of the stages .* share a parameter",
        "module": "TypeError: blocks must be an nn.Sequential",
        "border": "TypeError: stage 0 .* gives torch.int64",
    }.items(),
)
def test_mistakes_are_told_in_every_process(two, case, message):
    for rank in two:
        assert re.match(message, rank["complaints"][case], re.DOTALL), rank["complaints"][case]


def test_one_process_is_a_pipeline_too(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        pipeline = Pipeline(dense(), functional.cross_entropy, PARTS)
        assert_equal_step([one_step(pipeline, digits(0))], dense(), digits(0))
    finally:
        dist.destroy_process_group()


def failing(folder):
    if dist.get_rank() == 1:
        raise ArithmeticError("the second process failed")
    dist.barrier()


def test_a_failure_in_one_process_is_reported(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="the second process failed"):
        together(2, failing, tmp_path)


# Layers


def heaviest(costs, layers):
    return max(sum(costs[i] for i in stage) for stage in layers)


@pytest.mark.parametrize("seed", range(40))
def test_layers_are_distributed_as_well_as_the_best_of_all_cuts(seed):
    generator = random.Random(seed)
    number = generator.randint(1, 9)
    costs = [generator.choice([0, 1, generator.randint(0, 30), generator.random()]) for _ in range(number)]
    for stages in range(1, number + 1):
        cuts = ([0, *inner, number] for inner in itertools.combinations(range(1, number), stages - 1))
        best = min(heaviest(costs, itertools.starmap(range, itertools.pairwise(cut))) for cut in cuts)
        found = distribute_layers(costs, stages)
        assert [layer for stage in found for layer in stage] == list(range(number))
        assert all(found)
        assert len(found) == stages
        assert heaviest(costs, found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("costs", "stages"), [([1, 2], 3), ([], 1), ([1], 0), ([1, -1], 1), ([1, float("nan")], 2)])
def test_what_cannot_be_distributed_is_refused(costs, stages):
    with pytest.raises(ValueError, match=r"layers cannot fill|must not be negative"):
        distribute_layers(costs, stages)

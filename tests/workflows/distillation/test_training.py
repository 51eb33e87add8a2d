"""Jobs as pure functions: any cut into chunks, any number of processes and any unseen label give the same network."""

import pickle
from dataclasses import asdict, replace

import pytest
import torch

from tests.driving import assert_identical
from trainbook.errors import RunFailed, UserError
from trainbook.runtime import detect
from trainbook.seeding import seed_step
from trainbook.workflows.distillation.arms import (
    HPM_KD,
    KD,
    KD_LONG,
    WARM,
    WITHOUT,
    Arm,
    Settings,
    arms,
    default_settings,
    hpm_kd,
)
from trainbook.workflows.distillation.config import Config
from trainbook.workflows.distillation.graph import STUDENT, student_name
from trainbook.workflows.distillation.images import load_data
from trainbook.workflows.distillation.job_table import JOBS, JobTable
from trainbook.workflows.distillation.jobs import Job, advance, logits_of_views, new_network, seen
from trainbook.workflows.distillation.training import build, train
from trainbook.workflows.distillation.turns import Turns, _shared, run_chunk

SMALL = {
    "max_train_images": 160, "batch_size": 32, "teacher_epochs": 2, "student_epochs": 2, "chunk_steps": 6, "methods": (),
    "missing_class": -1, "ablation": False, "search_arms": 2,
}  # fmt: skip
BARE = {"chain": False, "temperature_law": "constant", "multi_teacher": False, "adaptive": False}  # HPM-KD without components


@pytest.fixture(scope="module")
def data():
    return load_data(Config.from_preset("smoke", SMALL), detect())


@pytest.fixture
def runtime(tmp_path):
    return replace(detect(), jobs=1, data_folder=tmp_path / "data")


def run(overrides, data, runtime):
    """The state of a small run, trained to its end."""
    config = Config.from_preset("smoke", SMALL | overrides)
    seed_step(config.seed, 0)
    state = build(config, data, runtime)
    records = [record.metrics for record in train(config, data, state)]
    assert state.step == state.total_steps == len(records)
    state.stateful[JOBS].check_all_trained()
    return config, state, records


def networks(state, regime, arm):
    table = state.stateful[JOBS]
    return [table.networks[student_name(regime, arm, seed)] for seed in table.config.student_seeds]


# The plan


def test_every_component_that_is_on_has_an_arm_without_it_that_differs_in_nothing_else():
    config = Config()
    found = {arm.name: arm for arm in arms(config, "all_labels")}
    full = asdict(hpm_kd(config))
    changed = {"chain": "chain", "temperature": "law", "multi_teacher": "gate", "adaptive": "adaptive", "memory": "live"}
    for component, field in changed.items():
        without = asdict(found[WITHOUT + component])
        assert {key for key in full if full[key] != without[key]} == {"name", field}, component
    assert not [name for name in found if name.startswith(WITHOUT) and name.removeprefix(WITHOUT) not in changed]
    off = Config(ablation=True, **BARE)
    assert [a.name for a in arms(off, "all_labels") if a.name.startswith(WITHOUT)] == [WITHOUT + "memory"]


def test_the_control_of_the_chain_takes_as_many_steps_as_the_whole_chain(data, runtime):
    for number in (1, 2):
        config = Config.from_preset("smoke", SMALL | {"num_assistants": number})
        table = JobTable(config, data, runtime)
        graph = table.graph
        jobs = [job for level in graph.levels() for job in graph.jobs(level, table)]
        seed = graph.student_seeds()[0]

        def steps(name, stages, jobs=jobs, seed=seed):
            return sum(job.steps for job in jobs if job.arm.name == name and job.seed == seed and job.stage in stages)

        assert steps(KD_LONG, [STUDENT]) == steps(HPM_KD, ["assistant", STUDENT]) == (1 + number) * graph.student_steps


def test_a_stage_alone_trains_what_it_needs_and_nothing_else(data, runtime):
    def trained(stage):
        config = Config.from_preset("smoke", SMALL | {"stage": stage, "student_seeds": (5,), "adaptive": False, "chain": False})
        table = JobTable(config, data, runtime)
        return [job.name for level in table.graph.levels() for job in table.graph.jobs(level, table)]

    assert trained("teacher") == ["teacher_1", "teacher_2"]
    assert trained("direct") == ["all_labels/direct/5"]
    assert trained("kd") == ["teacher_1", "all_labels/kd/5"]
    assert trained("hpm_kd") == ["teacher_1", "teacher_2", "all_labels/hpm_kd/5"]


def test_a_student_that_is_not_smaller_than_its_teacher_is_refused_when_a_chain_is_wanted(data, runtime):
    with pytest.raises(UserError, match="smaller student"):
        JobTable(Config.from_preset("smoke", SMALL | {"student_width": 64}), data, runtime)


# One job


def job_of(method="kd", law="constant", **other):
    values = {"steps": 20, "sources": (("teacher_1",),), "regime": "all_labels", "seed": 3, "arm": Arm("one", law=law), **other}
    settings = Settings(method, 4.0, 0.9, 0.05, 5e-4)
    return Job("one", STUDENT, settings=settings, network="small_cnn", **{"width": 4, **values})


@pytest.fixture(scope="module")
def table(data, tmp_path_factory):
    """With two teachers that are trained for two epochs."""
    _, state, _ = run({"stage": "teacher"}, data, replace(detect(), jobs=1, data_folder=tmp_path_factory.mktemp("data")))
    return state.stateful[JOBS]


def taught(table, data, job, chunk_steps):
    saved, records = None, []
    config = table.config.model_copy(update={"chunk_steps": chunk_steps})
    while saved is None or "network" not in saved:
        torch.manual_seed(len(records))  # what others did to the generators does not matter
        saved, metrics = advance(config, data, job, table.teaching(job), saved)
        records.append(metrics)
    return saved, records


@pytest.mark.parametrize("law", ["constant", "cosine", "plateau", "adversarial", "hyper"])
def test_cutting_a_job_into_chunks_changes_nothing_under_any_law(law, table, data):
    whole, _ = taught(table, data, job_of(law=law), 20)
    parts, records = taught(table, data, job_of(law=law), 7)
    assert_identical(whole, parts)
    temperatures = [record["temperature"] for record in records]
    low, high = table.config.temperature_range
    assert all(low <= value <= high for value in temperatures)
    assert len(set(temperatures)) == 1 if law == "constant" else law == "plateau" or len(set(temperatures)) > 1


@pytest.mark.parametrize("method", ["dkd", "logit_std", "dist", "fitnets", "attention", "rkd", "crd"])
def test_cutting_a_job_into_chunks_changes_nothing_for_any_method(method, table, data):
    whole, records = taught(table, data, job_of(method), 20)
    assert_identical(whole, taught(table, data, job_of(method), 9)[0])
    assert all(value == value for record in records for value in record.values())


def test_kept_logits_teach_what_a_live_teacher_teaches(table, data):
    job = job_of(sources=(("teacher_1", "teacher_2"),), arm=Arm("one", gate="entropy"), steps=10)
    live = replace(job, arm=replace(job.arm, live=True))
    assert table.teaching(live).networks
    assert not table.teaching(job).networks
    (_, kept), (_, asked) = taught(table, data, job, 5), taught(table, data, live, 5)
    for one, other in zip(kept, asked, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    exact = logits_of_views(table.network("teacher_1"), data.train["images"], "shifts")
    assert torch.equal(table.logits("teacher_1"), exact)


def test_one_changed_weight_is_another_teacher(table, data, tmp_path, runtime):
    other = JobTable(table.config, data, runtime)
    other.networks = {name: {key: tensor.clone() for key, tensor in each.items()} for name, each in table.networks.items()}
    before = other.logits("teacher_1").clone()
    assert (other.store.counters.misses, other.store.counters.hits) == (1, 0)
    again = JobTable(table.config, data, runtime)
    again.networks = other.networks
    assert torch.equal(again.logits("teacher_1"), before)
    assert (again.store.counters.misses, again.store.counters.hits) == (0, 1)
    changed = JobTable(table.config, data, runtime)
    changed.networks = other.networks
    changed.networks["teacher_1"]["output.bias"][0] += 0.5
    assert not torch.equal(changed.logits("teacher_1"), before)
    assert (changed.store.counters.misses, changed.store.counters.hits) == (1, 0)


@pytest.mark.parametrize("arm", ["direct", "kd", "kd_unlabelled"])
def test_labels_that_a_student_must_not_see_do_not_matter(arm, table, data):
    """Permute the labels of all images but the 20 labelled ones: the same network, bit for bit."""
    config = table.config.model_copy(update={"labels": (20,)})
    learner = Arm(arm, method="" if arm == "direct" else "kd", unlabelled=arm == "kd_unlabelled")
    job = job_of(method=learner.method, regime="20_labels", arm=learner, steps=6)
    job = replace(job, sources=() if arm == "direct" else job.sources)
    known = seen(config, data, replace(job, arm=replace(learner, unlabelled=False)))
    wrong = data.train["labels"].roll(1)
    wrong[known] = data.train["labels"][known]
    altered = replace(data, train={**data.train, "labels": wrong})
    # Which images have a label is decided by the labels: keep the choice.
    results = []
    for each in (data, altered):
        table_config = config.model_copy(update={"chunk_steps": 6})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trainbook.workflows.distillation.jobs.labelled_indices", lambda *_: known)
            results.append(advance(table_config, each, job, table.teaching(job), None)[0]["network"])
    assert_identical(*results)
    assert (len(seen(config, data, job)) == 160) == learner.unlabelled


def test_students_of_a_regime_without_a_class_never_see_it(data):
    config = Config.from_preset("smoke", SMALL | {"missing_class": 3})
    job = job_of(regime="without_3")
    labels = data.train["labels"][seen(config, data, job)]
    assert 3 not in labels
    assert len(labels) == int((data.train["labels"] != 3).sum())


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("shared_memory", [False, True])
def test_what_is_sent_to_a_process_computes_what_is_computed_here(live, shared_memory, table, data, runtime):
    config = table.config.model_copy(update={"shared_memory": shared_memory})
    mine = JobTable(config, data, runtime)
    mine.networks, mine.results = table.networks, table.results
    job = job_of(sources=(("teacher_1", "teacher_2"),), arm=Arm("one", gate="uniform", live=live), steps=10)
    turns, saved = Turns(config, data, mine), None
    for _ in range(2):
        here = advance(config, data, job, mine.teaching(job), saved)
        there = run_chunk(pickle.loads(pickle.dumps(turns._spec(job))), _shared(data))
        assert_identical(here[0], there[0])
        assert here[1] == there[1]
        saved = here[0]
        mine.take(job, saved)


def test_a_warm_start_begins_with_the_assistants_leading_channels_and_goes_on_from_its_own_steps(table, data, runtime):
    assistant, weights = "all_labels/hpm_kd_warm_start/0/assistant_1", {}
    for chunk_steps in (4, 10):
        config = table.config.model_copy(update={"stage": "all", "chunk_steps": chunk_steps})
        mine = JobTable(config, data, runtime)
        wide = new_network(config, data, config.student_network, mine.graph.widths[0], seed=5).state_dict()
        mine.networks = {**table.networks, assistant: dict(wide)}
        job = job_of(arm=Arm(WARM, warm=True), sources=(("teacher_1",), (assistant,)), steps=10, width=config.student_width)
        weights[chunk_steps] = taught_by(mine, data, job, -(-10 // chunk_steps))
        hardly = replace(job, settings=replace(job.settings, learning_rate=1e-12, weight_decay=0.0), steps=1)
        left = taught_by(mine, data, hardly, 1)
        for name in ("output.weight", "stages.0.0.weight"):
            assert left[name].shape != wide[name].shape
            torch.testing.assert_close(left[name], wide[name][tuple(map(slice, left[name].shape))], rtol=0, atol=1e-9)
    assert_identical(weights[4], weights[10])
    assert not torch.equal(weights[4]["output.weight"], taught_by(mine, data, replace(job, arm=Arm("one")), 1)["output.weight"])


def taught_by(table, data, job, num_chunks):
    """The network of a job after so many chunks, as the table hands them out."""
    for _ in range(num_chunks):
        table.take(job, advance(table.config, data, job, table.teaching(job), table.saved(job))[0])
    assert job.name not in table._under_way
    return table.networks.pop(job.name)


# Whole runs


def test_hpm_kd_without_components_is_kd_bit_for_bit(data, runtime):
    _, state, _ = run({**BARE, "student_seeds": (0,)}, data, runtime)
    assert_identical(networks(state, "all_labels", HPM_KD), networks(state, "all_labels", KD))


def test_the_chain_is_left_out_where_the_trial_does_not_speak_for_it(data, runtime):
    off = {"temperature_law": "constant", "multi_teacher": False, "adaptive": False, "student_seeds": (0,)}
    _, state, _ = run(off, data, runtime)
    table = state.stateful[JOBS]
    base, with_one = (table.results[f"all_labels/trial/student{end}"]["valid_losses"] for end in ("", "_of_assistant_1"))
    kept = table.assistants("all_labels", 1)
    error = float((base - with_one).double().std()) / len(base) ** 0.5
    assert kept == ([0] if float((base - with_one).mean()) > error else [])
    assert any("assistant" in name and "trial" not in name for name in table.networks) == bool(kept)
    if not kept:
        assert_identical(networks(state, "all_labels", HPM_KD), networks(state, "all_labels", KD))


def test_the_search_never_does_worse_than_the_defaults_on_valid(data, runtime):
    config, state, _ = run({"stage": "hpm_kd", "search_arms": 3, "chain": False, "student_seeds": (0,)}, data, runtime)
    found = state.stateful[JOBS].selection("all_labels")
    assert found.valid_nll <= found.default_valid_nll
    assert asdict(default_settings(config, hpm_kd(config))) in [row["config"] for row in found.rows if row["is_default"]]
    assert len(found.rows) == 3


def test_settings_known_from_an_earlier_search_are_tried_after_the_default_and_before_what_is_drawn(data, runtime):
    plain, known = (
        Config.from_preset("smoke", SMALL | {"search_arms": 3, "known_settings": k}) for k in ((), ("dist/2.5/0.4/0.03/0.0005",))
    )
    tables = [JobTable(config, data, runtime) for config in (plain, known)]
    drawn, mixed = (table.rung("all_labels", 0) for table in tables)
    assert mixed == [drawn[0], Settings("dist", 2.5, 0.4, 0.03, 0.0005), drawn[1]]
    assert len(drawn) == len(mixed) == 3


@pytest.mark.parametrize("text", ["dist/2.5/0.4/0.03", "nothing/1/1/1/1", "kd/1/1/-1/1", "kd/1/1/x/1", "kd/1/1/inf/1"])
def test_known_settings_that_mean_nothing_are_refused(text):
    with pytest.raises(UserError, match="method/temperature/weight/rate/decay"):
        Config.from_preset("smoke", {"known_settings": (text,)})


def test_teachers_are_frozen_while_students_learn(data, runtime):
    config = Config.from_preset("smoke", SMALL | {"student_seeds": (0,), "chain": False, "adaptive": False})
    state = build(config, data, runtime)
    table, before = state.stateful[JOBS], {}
    for _ in train(config, data, state):
        if not before and "teacher_2" in table.networks:
            before = {key: tensor.clone() for key, tensor in table.networks["teacher_1"].items()}
    assert_identical(before, table.networks["teacher_1"])
    assert_identical(before, dict(state.modules["teacher"].state_dict()))
    assert not any(p.requires_grad for p in table.network("teacher_1").parameters())


def test_a_trained_teacher_is_taken_as_it_is_and_one_that_knows_nothing_is_refused(data, runtime, table):
    config = Config.from_preset("smoke", SMALL | {"teacher": "elsewhere", "stage": "kd", "student_seeds": (0,)})
    state = build(config, data, runtime)
    with pytest.raises(UserError, match="validation images"):
        list(train(config, data, state))
    state = build(config, data, runtime)
    state.modules["teacher"].load_state_dict(table.networks["teacher_1"])
    if table.results["teacher_1"]["valid_accuracy"] >= 0.2:
        records = [record.metrics for record in train(config, data, state)]
        assert {record["job"] for record in records} == {"all_labels/kd/0"}
        assert_identical(dict(state.modules["teacher"].state_dict()), table.networks["teacher_1"])


def test_what_is_not_trained_is_not_reported(data, runtime):
    config = Config.from_preset("smoke", SMALL)
    state = build(config, data, runtime)
    next(iter(train(config, data, state)))
    with pytest.raises(RunFailed, match="never trained to the end"):
        state.stateful[JOBS].check_all_trained()


def test_several_processes_leave_the_same_records_and_states(data, runtime):
    overrides = {"parallel_pipeline": True, "student_seeds": (0,), "chain": False, "adaptive": False, "ablation": True}
    (_, one, records), (_, two, others) = (run(overrides, data, replace(runtime, jobs=jobs)) for jobs in (1, 2))
    assert records == others
    assert_identical(one.state_dict(), two.state_dict())
    assert (one.stateful[JOBS].jobs_at_once, two.stateful[JOBS].jobs_at_once) == (1, 2)

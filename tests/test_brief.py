"""A training brief: which lines reach which field, against PyYAML's own reader, and every mistake with its line."""

import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from pydantic import Field, create_model

from trainbook.brief import Brief, read_brief
from trainbook.config import BaseConfig
from trainbook.errors import UserError
from trainbook.optimization import OptimizationConfig

GIVEN = Path(__file__).parents[2] / "shared/notes/training.yaml"
TEXT = """\
# The same values as in the file that was given.
training:
  seed: 42
  num_epochs: 100
  batch_size: 32
  num_workers: 4
  device: "cuda"
  mixed_precision: true
  gradient_clipping: 1.0
  checkpoint_dir: "checkpoints"
  log_dir: "logs"
models:
  nerf: {learning_rate: 5e-4, num_rays: 1024, num_samples: 64}
  license_plate: {learning_rate: 1e-4, nms_threshold: 0.5, confidence_threshold: 0.25}
  clinical: {learning_rate: 1e-4, sequence_length: 1440, prediction_horizon: 12}
  legal_bert: {learning_rate: 2e-5, max_sequence_length: 512, weight_decay: 0.01}
  diffusion: {learning_rate: 2e-5, num_timesteps: 1000, num_inference_steps: 50}
"""


class Trained(OptimizationConfig):
    """What every gradient-trained workflow has."""

    batch_size: int = Field(default=8, ge=1)


class Nerf(Trained):
    num_epochs: int = 1
    num_rays: int = 8
    num_samples: int = 8
    widths: tuple[int, int] = (4, 4)
    note: str = ""


def trained(epochs, **fields):
    """A config whose word for the number of passes is `epochs`, with further fields of these defaults."""
    defaults = {epochs: 1, **fields}
    config = create_model("Model", __base__=Trained, **{name: (type(value), value) for name, value in defaults.items()})
    config.BRIEF_NAMES = {"num_epochs": epochs} if epochs != "num_epochs" else {}
    return config


LicensePlates = trained("epochs", nms_threshold=0.1, confidence_threshold=0.1)
ClinicalSeries = trained("num_epochs", sequence_length=8, prediction_horizon=8)
LegalBert = trained("num_epochs", max_sequence_length=8, weight_decay=0.5)
Diffusion = trained("passes", num_timesteps=8, num_inference_steps=8)


class Chain(BaseConfig):
    """Not trained by gradient: two of the brief's words do not apply."""

    BRIEF_NAMES: ClassVar[dict[str, str]] = {
        "num_epochs": "epochs_per_timestep", "gradient_clipping": "", "mixed_precision": "",
    }  # fmt: skip

    epochs_per_timestep: int = 1
    batch_size: int = 8


TRAINING = {"seed": 42, "batch_size": 32, "clip_norm": 1.0, "precision": "mixed"}
FIVE = {
    "nerf": (Nerf, {"num_epochs": 100, "learning_rate": 0.0005, "num_rays": 1024, "num_samples": 64}),
    "license_plates": (
        LicensePlates,
        {"epochs": 100, "learning_rate": 0.0001, "nms_threshold": 0.5, "confidence_threshold": 0.25},
    ),
    "clinical_series": (
        ClinicalSeries,
        {"num_epochs": 100, "learning_rate": 0.0001, "sequence_length": 1440, "prediction_horizon": 12},
    ),
    "legal_bert": (LegalBert, {"num_epochs": 100, "learning_rate": 2e-5, "max_sequence_length": 512, "weight_decay": 0.01}),
    "diffusion": (Diffusion, {"passes": 100, "learning_rate": 2e-5, "num_timesteps": 1000, "num_inference_steps": 50}),
}
WITHOUT_SECTION = ["distillation", "cellular_cube", "graph_diffusion_em"]


def read(text, workflow="nerf", config=Nerf):
    path = Path("brief.yaml")
    path.write_text(text, encoding="utf-8")
    return read_brief(path, workflow, config)


def mistakes(text, workflow="nerf", config=Nerf):
    with pytest.raises(UserError) as error:
        read(text, workflow, config)
    *lines, remedy = str(error.value).splitlines()
    assert all(line.startswith("brief.yaml") for line in lines)
    assert remedy.startswith("  -> ")
    return [line.removeprefix("brief.yaml, ") for line in lines]


# What arrives


@pytest.fixture(params=["inline", "given"])
def text(request):
    if request.param == "inline":
        return TEXT
    if not GIVEN.is_file():
        pytest.skip(f"the file that was given is not at {GIVEN}")
    return GIVEN.read_text()


@pytest.mark.parametrize("workflow", FIVE)
def test_the_brief_reaches_every_field_it_names_and_no_other(text, workflow):
    config, own = FIVE[workflow]
    brief = read(text, workflow, config)
    assert config.from_preset("laptop", brief.overrides).model_dump() == {**config().model_dump(), **TRAINING, **own}
    assert brief.settings == {"device": "cuda", "workers": "4", "checkpoint_dir": "checkpoints", "log_dir": "logs"}


@pytest.mark.parametrize("workflow", WITHOUT_SECTION)
def test_a_workflow_without_a_section_takes_the_common_one(text, workflow):
    found = Nerf.from_preset("laptop", read(text, workflow, Nerf).overrides)
    assert found.model_dump() == {**Nerf().model_dump(), **TRAINING, "num_epochs": 100}


def test_words_that_do_not_apply_are_left_out_with_a_warning(text, monkeypatch, caplog):
    monkeypatch.setattr("trainbook.brief.logger.propagate", True)
    found = Chain.from_preset("laptop", read(text, "timestep_dbn", Chain).overrides)
    assert found.model_dump() == {**Chain().model_dump(), "seed": 42, "epochs_per_timestep": 100, "batch_size": 32}
    assert [record.getMessage() for record in caplog.records] == [
        "mixed_precision does not apply to timestep_dbn and is left out",
        "gradient_clipping does not apply to timestep_dbn and is left out",
    ]


@pytest.mark.parametrize("notation", ["5e-4", "0.0005", "5.0e-4", "'5e-4'", "5E-4", "+.5e-3"])
def test_every_notation_of_a_rate_is_that_number(notation):
    brief = read(f"models: {{nerf: {{learning_rate: {notation}}}}}")
    assert Nerf.from_preset("laptop", brief.overrides).learning_rate == 0.0005


@pytest.mark.parametrize("word", ["precision", "mixed_precision"])
@pytest.mark.parametrize(
    ("given", "precision"),
    [
        *((word, "mixed") for word in ("true", "True", "yes", "on", "'true'")),
        *((word, "float32") for word in ("false", "NO", "off")),
        *((word, word) for word in ("mixed", "bfloat16")),
    ],
)
def test_mixed_precision_is_a_number_format(word, given, precision):
    brief = read(f"training: {{{word}: {given}}}")
    assert Nerf.from_preset("laptop", brief.overrides).precision == precision


def test_true_is_no_number():
    with pytest.raises(UserError, match="clip_norm = 'true'"):
        Nerf.from_preset("laptop", read("training: {gradient_clipping: true}").overrides)


@pytest.mark.parametrize("seed", range(30))
def test_any_two_sections_are_those_that_pyyaml_reads_the_later_over_the_former(seed):
    draw = random.Random(seed)
    values = {
        "seed": lambda: draw.randrange(2**31),
        "learning_rate": lambda: 10 ** draw.uniform(-9, 2),
        "gradient_checkpointing": lambda: draw.random() < 0.5,
        "schedule": lambda: draw.choice(["cosine", "step"]),
        "widths": lambda: [draw.randrange(100), draw.randrange(100)],
        "note": lambda: "".join(draw.choices("yn07:#'\"\\ \n\t{}[]&*!|>-é\u2028\U0001f600", k=draw.randrange(6))),
        "num_rays": lambda: draw.randrange(10**6),
    }

    def section():
        return {name: values[name]() for name in draw.sample(list(values), draw.randrange(len(values) + 1))}

    sections = {"training": section(), "models": {"nerf": section(), "diffusion": {"anything": section()}}}
    text = yaml.safe_dump(sections, default_flow_style=draw.choice([True, False, None]), sort_keys=False)
    assert yaml.safe_load(text) == sections
    expected = Nerf(**{**sections["training"], **sections["models"]["nerf"]})
    assert Nerf.from_preset("laptop", read(text).overrides) == expected


def test_the_models_word_wins_under_whichever_name():
    text = "training: {gradient_clipping: 1, epochs: 3, log_dir: a, device: cpu}\n"
    text += "models: {license_plate: {clip_norm: 2, num_epochs: 4, log_dir: b}}"
    brief = read(text, "license_plates", LicensePlates)
    assert brief == Brief({"clip_norm": "2", "epochs": "4"}, {"log_dir": "b", "device": "cpu"})


@pytest.mark.parametrize(
    ("workflow", "taken"),
    [("nerf", "1"), ("nerf_fast", "2"), ("nerf_faster", "2"), ("ner", None), ("a_nerf", None), ("graph_diffusion_em", None)],
)
def test_the_longest_key_that_begins_the_workflows_name_is_its_section(workflow, taken):
    text = "models: {nerf: {seed: 1}, nerf_fast: {seed: 2}, diffusion: {seed: 3}, '': {seed: 4}}"
    assert read(text, workflow).overrides.get("seed") == taken


def test_a_child_changes_a_word_of_its_parents():
    class Left(Trained):
        BRIEF_NAMES: ClassVar[dict[str, str]] = {"gradient_clipping": "clip_value"}

    class Right(Trained):
        pass

    class Both(Right, Left):
        BRIEF_NAMES: ClassVar[dict[str, str]] = {"rays": "batch_size"}

    brief = read("training: {gradient_clipping: 3, mixed_precision: no, rays: 9}", config=Both)
    assert brief.overrides == {"clip_value": "3", "precision": "float32", "batch_size": "9"}


def test_the_fields_own_name_goes_before_the_briefs_words():
    class Own(Trained):
        mixed_precision: bool = False

    assert read("training: {mixed_precision: true}", config=Own).overrides == {"mixed_precision": "true"}


@pytest.mark.parametrize(
    "text",
    ["{}", "training:\n", "models:\n", "training: {}\nmodels: {nerf: }", "models: {other: [1, {a: 2}]}", "\ufefftraining: {}"],
)
def test_what_is_missing_or_anothers_is_fine(text):
    assert read(text) == Brief({}, {})


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
@pytest.mark.parametrize("workers", ["0", "16"])
def test_runtime_options_are_text(device, workers):
    brief = read(f"training: {{device: {device}, num_workers: {workers}, log_dir: '2024', checkpoint_dir: /a b/ü}}")
    assert brief.settings == {"device": device, "workers": workers, "log_dir": "2024", "checkpoint_dir": "/a b/ü"}


# Mistakes


@pytest.mark.parametrize("line", range(3, 13))
def test_an_unknown_key_is_told_with_its_line_wherever_it_stands(line):
    lines = TEXT.splitlines()
    lines.insert(line - 1, "  num_sample: 3")
    assert mistakes("\n".join(lines)) == [
        f"line {line}: the config of nerf has no field 'num_sample'; did you mean 'num_samples'?"
    ]


NAMES = ["seed", "learning_rate", "num_rays", "widths", "clip_norm", "batch_size", "precision", "weight_decay"]  # fields
NAMES += ["gradient_clipping", "mixed_precision", "num_workers", "device", "log_dir"]  # words of the brief


@pytest.mark.parametrize("name", NAMES)
def test_a_slip_of_the_pen_is_told_with_the_closest_name(name):
    for word in (name[:-1], name + "s", name[1:], name[1] + name[0] + name[2:]):
        (found,) = mistakes(f"models:\n  nerf:\n    {word}: 1")
        assert found == f"line 3: the config of nerf has no field {word!r}; did you mean {name!r}?"


def test_a_key_like_no_field_is_told_without_a_guess():
    assert mistakes("training: {xyzzy: 1}") == ["line 1: the config of nerf has no field 'xyzzy'"]


def test_a_word_for_a_field_that_is_not_there_is_no_word():
    class Astray(BaseConfig):
        BRIEF_NAMES: ClassVar[dict[str, str]] = {"gradient_clipping": "clip"}

    assert "no field 'gradient_clipping'" in mistakes("training: {gradient_clipping: 1}", config=Astray)[0]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file():
    text = """\
trainings: {}
training:
  sed: 1
  seed: 1
  num_workers: many
  seed: 2
  device: 3
models:
  clinical: {seed: 1, seed: 2}
  nerf:
    clip_norm: 1
    gradient_clipping: 2
    num_rays:
    widths: [[1], 2]
    note: !tuple [1]
"""
    found = mistakes(text)
    expected = [
        (1, "no section 'trainings'; did you mean 'training'?"),
        (3, "no field 'sed'; did you mean 'seed'?"),
        (5, "num_workers must be a whole number from 0, not 'many'"),
        (6, "'seed' is there twice, first in line 4"),
        (7, "device must be auto, cpu, cuda or cuda:INDEX, not 3"),
        (9, "'seed' is there twice, first in line 9"),
        (12, "'gradient_clipping' sets clip_norm again, after 'clip_norm'"),
        (13, "num_rays must be one value or a list of values"),
        (14, "widths must be one value or a list of values"),
        (15, "the tag !tuple is refused"),
    ]
    assert len(found) == len(expected)
    for line, (number, words) in zip(found, expected, strict=True):
        assert line.startswith(f"line {number}: ")
        assert words in line


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("num_workers: -1", "-1"), ("num_workers: many", "'many'"), ("num_workers: 1.5", "1.5"), ("num_workers: true", "true"),
        ("num_workers: [1]", "a list"), ("num_workers: 007", "007"), ("num_workers:", "empty"), ("num_workers: ٣", "'٣'"),
        ("device: 3", "3"), ("device: gpu", "'gpu'"), ("device: 'cuda:'", "'cuda:'"), ("device: on", "on"),
        ("device: {cuda: 0}", "a section"), ("device: CUDA", "'CUDA'"), ("device: \"cpu\\n\"", r"'cpu\n'"),
        ("log_dir: 3", "3"), ("log_dir: false", "false"), ("log_dir: ''", "''"), ("log_dir: ~", "empty"),
        ("checkpoint_dir: 2024-01-01", "2024-01-01"), ("checkpoint_dir: \"a\\0b\"", r"'a\x00b'"), ("checkpoint_dir: ' '", "' '"),
    ],
)  # fmt: skip
def test_runtime_options_that_make_no_sense_are_refused(given, shown):
    (found,) = mistakes(f"training:\n  {given}")
    assert found.startswith(f"line 2: {given.split(':')[0]} must be ")
    assert found.endswith(f", not {shown}")


@pytest.mark.parametrize("section", ["training", "models", "models: {nerf"])
@pytest.mark.parametrize(
    ("shape", "shown"), [("[seed]", "a list"), ("!!null [seed]", "a list"), ("3", "3"), ("seed", "'seed'"), ("true", "true")]
)
def test_wrong_shapes(section, shape, shown):
    name = section.rpartition("{")[2]
    text = f"\n{section}: {shape}" + "}" * section.count("{")
    assert mistakes(text) == [f"line 2: {name} must hold lines of `key: value`, not {shown}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is empty"),
        ("# nothing\n", r"is empty"),
        ("---\n", r"is empty"),
        ("- training", r"line 1: the file must hold .*not a list"),
        ("training:\n\tseed: 1", r"line 2: a tab\n  -> .*spaces"),
        ("training:\n  seed: 1\n\tbatch_size: 2", r"line 3: a tab"),
        ("training:\n  seed:\t1", r"line 2: a tab"),
        ("training: {seed: 1}\nmodels: {nerf", r"line 2 is not YAML: "),
        ("training:\n  seed: 1\n seed: 2", r"line 3 is not YAML: "),
        ("training: {}\nmodels: a: b", r"line 2 is not YAML: mapping values are not allowed here"),
        ("training: {seed: *other}", r"line 1 is not YAML: found undefined alias"),
        ("training: {}\n---\nmodels: {}", r"line 2 is not YAML: .*another document"),
        ("training:\n  note: \x07", r"line 2: character U\+0007"),
        ("training: {[1]: 2}", r"line 1: a list or section cannot be a key"),
        ("[" * 5000, r"nests lists or sections too deeply"),
    ],
)
def test_what_is_no_brief(text, message):
    with pytest.raises(UserError, match=rf"brief\.yaml,? {message}"):
        read(text)


def test_files_that_cannot_be_read(tmp_path):
    for path, message in ((tmp_path, "cannot be read: Is a directory"), (tmp_path / "no.yaml", "cannot be read: No such file")):
        with pytest.raises(UserError, match=message):
            read_brief(path, "nerf", Nerf)
    (tmp_path / "brief.yaml").write_bytes(b"training: {note: \xff}")
    with pytest.raises(UserError, match="is not text"):
        read_brief(tmp_path / "brief.yaml", "nerf", Nerf)


@pytest.mark.parametrize("seed", range(10))
def test_a_damaged_file_is_read_or_refused_and_refused_where_pyyaml_refuses_it(seed):
    draw, refused = random.Random(seed), 0
    for _ in range(30):
        text = TEXT
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(["", *"\t\n :{}[]#&*!|'\"-?%~x0\0"]) + text[at + draw.randrange(3) :]
        try:
            yaml.safe_load(text)
            is_yaml = True
        except (yaml.YAMLError, ValueError):
            is_yaml = False
        try:
            read(text)
        except UserError:
            refused += 1
        else:
            assert is_yaml, text
    assert 0 < refused <= 30


@pytest.mark.parametrize(
    "template",
    [
        "training: {{seed: {}}}",
        "training: {{log_dir: {}}}",
        "training: {}",
        "{}",
        "models: {{nerf: {{widths: [1, {}]}}}}",
        "models: {{another: {{seed: [{{a: {}}}]}}}}",
        "training: {{? {} : 1}}",
        "training: &a {{seed: 1}}\nmodels: {{nerf: {}, other: *a}}",
    ],
)
@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir", "python/object/new:os.mkdir"])
def test_nothing_in_the_file_runs(template, tag):
    text = template.format(f"!!{tag} [harm]")
    with suppress(yaml.YAMLError, TypeError):  # what comes of it may not fit where it stands
        yaml.unsafe_load(text)
    assert Path("harm").exists()  # the text does harm where a reader is not safe
    Path("harm").rmdir()
    assert any(f"the tag !!{tag} is refused" in line for line in mistakes(text))
    assert not Path("harm").exists()


@pytest.mark.parametrize("tag", ["!!python/name:os.system", "!!python/tuple", "!!binary", "!!set", "!own", "!<tag:x,2000:y>"])
def test_tags_are_refused(tag):
    assert any(" is refused" in line for line in mistakes(f"models: {{other: {{seed: {tag} }}}}"))


def test_a_mistake_read_twice_is_told_once():
    assert len(mistakes("training: &a {xyzzy: 1, device: 3}\nmodels: {nerf: *a}")) == 2


def test_a_merge_is_refused_rather_than_overlooked():
    found = mistakes("models:\n  other: &a {seed: 1}\n  nerf:\n    <<: *a")
    assert any(line.startswith("line 4: the tag !!merge is refused") for line in found)


def test_a_thousand_million_laughs_are_over_at_once():
    text = "models:\n  a: &a0 [ha]\n" + "".join(f"  b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9))
    assert mistakes(text + "  nerf: {widths: *a9}") == [
        "line 12: widths must be one value or a list of values, none of them empty or a list itself"
    ]
    assert read("models: {other: &a [*a, {b: *a}]}") == Brief({}, {})


def test_reading_needs_no_torch():
    code = "import sys, trainbook.brief\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

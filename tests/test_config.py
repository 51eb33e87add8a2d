"""Config: presets, overrides from text, and errors that a person can act on."""

import pytest
from pydantic import Field, ValidationError

from trainbook.config import BaseConfig, allowed_values
from trainbook.errors import UserError


class Sample(BaseConfig):
    """A config of every kind of field."""

    PRESETS = {"smoke": {"epochs": 1}, "laptop": {}, "full": {"epochs": 9}}  # noqa: RUF012

    epochs: int = Field(default=3, ge=1, le=10)
    """Passes over the data."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Step size."""
    sizes: tuple[int, int] = (4, 2)
    """Two sizes."""
    quick: bool = False
    """Hurry."""


def test_text_from_a_command_line_or_yaml_is_read_as_the_fields_type():
    config = Sample.from_preset("laptop", {"learning_rate": "5e-4", "epochs": "7", "sizes": "16, 8", "quick": "true"})
    assert (config.learning_rate, config.epochs, config.sizes, config.quick) == (5e-4, 7, (16, 8), True)


@pytest.mark.parametrize("text", ["", "()", "[]", " "])
def test_no_text_is_an_empty_tuple_where_one_is_allowed(text):
    class Loose(BaseConfig):
        """A config with a tuple of any length."""

        PRESETS = {"smoke": {}, "laptop": {}, "full": {}}  # noqa: RUF012
        sizes: tuple[int, ...] = (4, 2)

    config = Loose.from_preset("laptop", {"sizes": text})
    assert config.sizes == ()
    assert Loose.from_preset("laptop", {"sizes": config.options("laptop")[1]}) == config
    with pytest.raises(UserError):
        Sample.from_preset("laptop", {"sizes": text})


@pytest.mark.parametrize("text", ["false", "False", "0", "no"])
def test_the_word_false_is_false(text):
    assert Sample.from_preset("laptop", {"quick": text}).quick is False


def test_overrides_win_over_the_preset():
    assert Sample.from_preset("full").epochs == 9
    assert Sample.from_preset("full", {"epochs": 2}).epochs == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epoch": 3}, r"there is no field 'epoch'; did you mean 'epochs'\?"),
        ({"epochs": 0}, r"epochs = 0: .*greater than or equal to 1"),
        ({"epochs": 11}, r"epochs = 11: .*less than or equal to 10"),
        ({"learning_rate": "fast"}, r"learning_rate = 'fast'"),
        ({"learning_rate": float("nan")}, r"learning_rate = nan"),
        ({"sizes": "1, 2, 3"}, r"sizes = .*at most 2"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(overrides, message):
    with pytest.raises(UserError, match=message):
        Sample.from_preset("laptop", overrides)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as error:
        Sample.from_preset("laptop", {"epoch": 3, "learning_rate": -1})
    assert "epoch" in str(error.value)
    assert "learning_rate = -1" in str(error.value)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'huge'\n.*smoke, laptop, full"):
        Sample.from_preset("huge")


def test_a_config_cannot_be_changed_behind_its_digest():
    with pytest.raises(ValidationError):
        Sample().epochs = 4


def test_digest_depends_on_values_only():
    assert Sample().sha256() == Sample.from_preset("laptop", {"epochs": "3"}).sha256()
    assert Sample().sha256() != Sample(seed=1).sha256()


def test_rows_mark_what_differs_from_the_preset():
    rows = {row[0]: row for row in Sample.from_preset("full", {"epochs": 2}).rows("full")}
    assert rows["epochs"] == ["epochs", "2", "9", "1 to 10", "Passes over the data."]
    assert rows["learning_rate"][2] == ""


def test_allowed_values_of_every_kind():
    texts = {name: allowed_values(field) for name, field in Sample.model_fields.items()}
    assert texts["epochs"] == "1 to 10"
    assert texts["learning_rate"] == "> 0"
    assert texts["quick"] == "true, false"
    assert texts["seed"] == "0 to < 2147483648"

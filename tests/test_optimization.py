"""The config of training by gradient."""

import subprocess
import sys

import pytest

from trainbook.optimization import OptimizationConfig


def test_the_config_needs_no_torch_and_explains_every_field():
    code = "import sys, trainbook.optimization\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert all(row[4] for row in OptimizationConfig().rows())


@pytest.mark.parametrize(
    "choice", [{"momentum": 1.0}, {"accumulation": 0}, {"ema_decay": 1.0}, {"clip_norm": -1}, {"learning_rate": 0}]
)
def test_values_out_of_range_are_refused(choice):
    with pytest.raises(ValueError, match=next(iter(choice))):
        OptimizationConfig(**choice)


def test_patience_without_validation_is_refused():
    with pytest.raises(ValueError, match="set validate_every"):
        OptimizationConfig(patience=3)
    assert OptimizationConfig(patience=3, validate_every=10).patience == 3

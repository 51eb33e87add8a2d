"""CUAD's clauses with 16 labels, from scratch; by hand: `pytest -m slow`. The figures are in the README."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainbook.seeding import seed_step
from trainbook.workflows.legal_bert.config import Config
from trainbook.workflows.legal_bert.data import load_data
from trainbook.workflows.legal_bert.evaluation import evaluate
from trainbook.workflows.legal_bert.training import build, train

CUAD = Path(__file__).parents[4] / "shared/data/legal/cuad_clauses16.jsonl"  # beside the checkout
RUNTIME = SimpleNamespace(device="cpu", data_folder=None, kept={})
CPU_SECONDS = 180


@pytest.mark.slow
def test_clauses_of_cuad_from_scratch():
    if not CUAD.is_file():
        pytest.skip(f"{CUAD} is not there")
    config = Config(dataset="file", data_file=str(CUAD), num_epochs=5, validate_every=122)
    data = load_data(config, RUNTIME)
    seed_step(config.seed, 0)
    state = build(config, data, RUNTIME)
    records, began = train(config, data, state), time.process_time()
    while True:
        seed_step(config.seed, state.step)
        if next(records, None) is None:
            break
    seconds = time.process_time() - began
    metrics = evaluate(config, data, state)
    print(f"{seconds:.0f} CPU-s", {name: round(value, 3) for name, value in metrics.items() if "@" not in name})
    assert metrics["model/micro_f1"] >= 0.8
    assert metrics["model/macro_f1"] >= 0.75
    assert seconds <= CPU_SECONDS
    assert metrics["tfidf_svm/micro_f1"] >= 0.88  # the baseline is the one of the literature, not a weak one

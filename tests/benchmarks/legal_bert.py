"""A step of LegalBERT through the kit beside a bare loop over the same model: `python -m tests.benchmarks.legal_bert`.

Both train a copy of one model on the same batches, with fused AdamW and clipping; afterwards their weights must be equal to 1e-4.
Needed: a step of the kit's takes at most 3 % more CPU time.
"""

import copy
import sys
from types import SimpleNamespace

from tests.benchmarks import pairing

# isort: split
import torch
from torch.nn.functional import cross_entropy

from trainbook.data import Batches
from trainbook.fitting import Stage
from trainbook.seeding import seed_step
from trainbook.state import TrainState
from trainbook.workflows.legal_bert.config import Config
from trainbook.workflows.legal_bert.data import load_data
from trainbook.workflows.legal_bert.training import build, train

ROUNDS, STEPS = 5, 12
NEEDED = 1 / 1.03
TOLERANCE = 1e-4


def compare() -> tuple[pairing.Comparison, float]:
    """Rounds of a few steps each, ours and the bare loop's, on the same batches; and how far apart the weights end."""
    total = (ROUNDS + 1) * STEPS
    config = Config(dropout=0.0, validate_every=0, warmup_steps=0, schedule="constant", learning_rate=2e-5)
    data = load_data(config, SimpleNamespace(device="cpu", data_folder=None, kept={}))
    seed_step(0, 0)
    state: TrainState = build(config, data, SimpleNamespace(device="cpu"))
    model = copy.deepcopy(state.modules["model"])
    state.stateful["fit"] = Stage("fit", state.modules["model"], config, total)
    records = train(config, data, state)

    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    batches = Batches({name: data.train[name] for name in ("ids", "labels")}, config.seed, config.batch_size)
    steps = iter(range(total))

    def ours() -> None:
        for _ in range(STEPS):
            next(records)

    def theirs() -> None:
        for _ in range(STEPS):
            batch = batches(next(steps))
            loss = cross_entropy(model(batch["ids"]), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()

    found = pairing.alternate(
        ours, theirs, ROUNDS, benchmark="legal_bert step", peer="bare loop, transformers", unit="CPU time", units=STEPS
    )
    pairs = zip(state.modules["model"].parameters(), model.parameters(), strict=True)
    apart = max(float((a - b).detach().abs().max()) for a, b in pairs)
    print(f"largest difference of a weight after {total} steps: {apart:.2g}")
    return found, apart


def main() -> int:
    """Print the table and the JSON line; 1 when a step takes more than is allowed."""
    found, apart = compare()
    pairing.report([found])
    return 0 if found.ratio >= NEEDED and apart <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())

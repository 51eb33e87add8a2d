"""Builds and trains: warm-up on synthetic vectors, the main phase, read-out in closed form, fine-tuning on a second domain."""

# D numbers of a vector

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trainbook.data import Batches
from trainbook.fitting import Stage
from trainbook.records import Record
from trainbook.runtime import Runtime
from trainbook.state import TrainState
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.continual import Elastic, Replay, Reservoir
from trainbook.workflows.cellular_cube.curriculum import Curriculum, synthetic_vectors
from trainbook.workflows.cellular_cube.data import SentenceData
from trainbook.workflows.cellular_cube.epoch_examples import NAME as EXAMPLES
from trainbook.workflows.cellular_cube.epoch_examples import NUM_SHOWN, EpochExamples
from trainbook.workflows.cellular_cube.heads import start_heads
from trainbook.workflows.cellular_cube.losses import cube_loss, pair_of, reconstruction, similarity
from trainbook.workflows.cellular_cube.network import CellularCube
from trainbook.workflows.cellular_cube.principal import Principal, fit_principal
from trainbook.workflows.cellular_cube.readout_fit import fit_readout, standardise_readout
from trainbook.workflows.cellular_cube.reptile import Alternating, Reptile
from trainbook.workflows.cellular_cube.text_decoder import TextDecoder, Vocabulary, text_loss

AUTOENCODER, WARM_UP, STANDARDISE, MAIN, READOUT, FINE_TUNE, TEXT_DECODER = (
    "autoencoder", "warm_up", "standardise", "main", "readout", "fine_tune", "text_decoder",
)  # fmt: skip
VALID_SENTENCES = 1000  # at most, while training
FINE_TUNE_RATE = 0.1


class ReadoutStep:
    """One step of the run, which sets the read-out's coordinates, or fits it in closed form, at once."""

    def __init__(self) -> None:
        self.finished = False

    def state_dict(self) -> dict[str, Any]:
        """Whether it was taken."""
        return {"finished": self.finished}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.finished = saved["finished"]


class Preliminary(nn.Module):
    """The autoencoder transformer and a two-layer decoder that is only there to pretrain it."""

    def __init__(self, network: CellularCube, width: int) -> None:
        super().__init__()
        size = network.transformer.linear.out_features
        self.transformer = network.transformer
        self.decoder = nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, network.readout.out_features))

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        return self.decoder(self.transformer(vectors)[0])


def build(config: Config, data: SentenceData, runtime: Runtime) -> TrainState:
    """The network, at PCA, and the phases of its training."""
    principal = fit_principal(data.train["embeddings"])
    network = CellularCube(config, principal, data.mean.to(runtime.device), data.scale).to(runtime.device)
    start_heads(network, data, principal)
    modules: dict[str, nn.Module] = {"cube": network, "core": network.cube.rule}
    stateful: dict[str, Any] = {}
    first, second = domains(config, data)

    def steps(number: int, epochs: int) -> int:
        return epochs * max(1, number // config.batch_size)

    if config.transformer == "autoencoder":
        modules["preliminary"] = preliminary = Preliminary(network, 512).to(runtime.device)
        stateful[AUTOENCODER] = Stage(AUTOENCODER, preliminary, _phase(config, 0), steps(len(first["labels"]), config.num_epochs))
    if config.warm_up_epochs:
        choose_trained(config, network, WARM_UP)
        number = steps(len(first["labels"]), config.warm_up_epochs)
        stateful[WARM_UP] = Stage(WARM_UP, network, _phase(config, 0), number)
    choose_trained(config, network, MAIN)
    if config.fits_readout:
        stateful[STANDARDISE] = ReadoutStep()
    epoch = max(1, len(first["labels"]) // config.batch_size)
    main = _phase(config, config.validate_every or epoch)
    stateful[MAIN] = Stage(MAIN, network, main, steps(len(first["labels"]), config.num_epochs))
    if config.fits_readout:
        stateful[READOUT] = ReadoutStep()
    if config.elastic_weight:
        modules["elastic"] = Elastic(network)
    if config.reptile_steps:
        modules["reptile"] = Reptile(network, config.reptile_steps, config.reptile_share)
    if config.fine_tune_epochs:
        choose_trained(config, network, FINE_TUNE)
        rate = config.learning_rate * (FINE_TUNE_RATE if config.domains == "one" else 1.0)
        fine = _phase(config, config.validate_every or max(1, len(second["labels"]) // config.batch_size), rate)
        stateful[FINE_TUNE] = Stage(FINE_TUNE, network, fine, steps(len(second["labels"]), config.fine_tune_epochs))
        choose_trained(config, network, MAIN)
    if config.decoder_epochs:
        decoder = TextDecoder(len(data.mean), len(Vocabulary(data.sentences["train"])), config.decoder_width).to(runtime.device)
        modules[TEXT_DECODER] = decoder
        number = steps(len(data.train["labels"]), config.decoder_epochs)
        stateful[TEXT_DECODER] = Stage(TEXT_DECODER, decoder, _phase(config, 0), number)
    if config.text_weight:
        stateful = {TEXT_DECODER: stateful.pop(TEXT_DECODER), **stateful}
    total = sum(getattr(part, "total_steps", 1) for part in stateful.values())
    first_stage = next(iter(stateful))
    stateful[EXAMPLES] = EpochExamples()
    return TrainState(modules, stateful=stateful, total_steps=total, stage=first_stage)


def _phase(config: Config, validate_every: int, rate: float = 0.0) -> Config:
    return config.model_copy(update={"validate_every": validate_every, "learning_rate": rate or config.learning_rate})


def domains(config: Config, data: SentenceData) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Training vectors of the first and of the second domain; all of them twice where there is one."""
    if config.domains == "one":
        return data.train, data.train
    is_first = data.train["labels"] < data.num_first_domain
    return tuple({name: tensor[chosen] for name, tensor in data.train.items()} for chosen in (is_first, ~is_first))


def choose_trained(config: Config, network: CellularCube, phase: str) -> None:
    """Say which parameters a phase trains and how fast: by `requires_grad` and by a factor of the learning rate."""
    grown = phase == FINE_TUNE and config.expert_columns == "grow"
    outside = config.train_scope == "all" and not grown
    for name, parameter in network.named_parameters():
        inside = name.startswith("cube.rule.")
        parameter.requires_grad_(inside or outside or (name.startswith("cube.hardware.") and not grown))
    if config.transformer == "autoencoder":
        network.transformer.requires_grad_(False)
    if phase == WARM_UP:  # synthetic vectors have one teacher only
        network.heads.requires_grad_(False)
    factors = {name: getattr(config, f"{name}_rate") for name in ("local", "functional", "distant", "gate")}
    for index, column in enumerate(network.cube.rule.columns):
        column.requires_grad_((index == 1) == grown)
        for name, factor in factors.items():
            for parameter in getattr(column, name).parameters():
                parameter.rate_factor = factor
                if factor == 0:
                    parameter.requires_grad_(False)
    network.cube.rule.level_gains.requires_grad_(network.cube.rule.level_gains.numel() > 0 and not grown)


def train(config: Config, data: SentenceData, state: TrainState) -> Iterator[Record]:
    """Train phase after phase from where each one is; yields once per step."""
    network: CellularCube = state.modules["cube"]
    principal = fit_principal(data.train["embeddings"])
    decoder: TextDecoder | None = None
    if config.text_weight:
        data = with_tokens(data)
        yield from _train_decoder(config, data, state)
        decoder = state.modules[TEXT_DECODER]
        decoder.freeze()
    first, second = domains(config, data)
    common = (config.seed, config.batch_size, config.batch_scaling)
    if AUTOENCODER in state.stateful:
        yield from state.stateful[AUTOENCODER].train(state, Batches(first, *common), _preliminary_loss)
    if WARM_UP in state.stateful:
        choose_trained(config, network, WARM_UP)
        stage = state.stateful[WARM_UP]
        made = {"embeddings": synthetic_vectors(principal, len(first["labels"]), config.seed), "labels": first["labels"]}
        yield from stage.train(state, Batches(made, *common), _loss(config, stage))
    choose_trained(config, network, MAIN)
    valid = data.valid["embeddings"][:VALID_SENTENCES]
    known = data.train if config.reptile_steps else first
    if STANDARDISE in state.stateful:
        yield from _once(state, STANDARDISE, lambda: standardise_readout(network, known["embeddings"]), len(known["labels"]))
    stage = state.stateful[MAIN]
    validate = validation(valid)
    if config.curriculum_start < 1:
        total = stage.total_steps
        batches: Any = Curriculum(first, principal, config.code_size, config.curriculum_start, total, *common)
    elif config.reptile_steps:
        batches = Alternating(Batches(first, *common), Batches(second, *common), config.reptile_steps)
        validate = _settled(validate, state.modules["reptile"], network, stage)
    else:
        batches = Batches(first, *common)
    for record in stage.train(state, batches, _loss(config, stage, decoder), validate):
        if config.reptile_steps:
            state.modules["reptile"].settle(network, stage.stepper.steps_done)
        if "valid_fvu" in record.metrics:
            shown = reconstruct(network, data.valid["embeddings"][:NUM_SHOWN])
            state.stateful[EXAMPLES].add(data, state.step, record.metrics["valid_fvu"], shown)
        if stage.finished:
            if READOUT not in state.stateful:
                record.metrics.update(_keep_pca_if_better(network, data, principal, valid))
            if "elastic" in state.modules:
                state.modules["elastic"].remember(network, first["embeddings"], _squared_error)
        yield record
    if READOUT in state.stateful:

        def fit() -> dict[str, float]:
            further = {name: (known[name], data.valid[name][:VALID_SENTENCES]) for name in data.further}
            found = fit_readout(network, known["embeddings"], valid, further)
            return found | _keep_pca_if_better(network, data, principal, valid)

        yield from _once(state, READOUT, fit, len(known["labels"]))
    if FINE_TUNE in state.stateful:
        yield from _fine_tune(config, data, state, first, second)
    if TEXT_DECODER in state.stateful and decoder is None:
        yield from _train_decoder(config, with_tokens(data), state)


def with_tokens(data: SentenceData) -> SentenceData:
    """The data with the training sentences' "tokens", (N, L) as the decoder to text reads them."""
    tokens = Vocabulary(data.sentences["train"]).encode(data.sentences["train"]).to(data.train["labels"].device)
    return replace(data, train={**data.train, "tokens": tokens})


def _train_decoder(config: Config, data: SentenceData, state: TrainState) -> Iterator[Record]:
    source = {name: data.train[name] for name in ("embeddings", "tokens")}
    batches = Batches(source, config.seed, config.batch_size, config.batch_scaling)
    yield from state.stateful[TEXT_DECODER].train(state, batches, text_loss)


def _fine_tune(
    config: Config, data: SentenceData, state: TrainState, first: dict[str, Tensor], second: dict[str, Tensor]
) -> Iterator[Record]:
    network, stage = state.modules["cube"], state.stateful[FINE_TUNE]
    choose_trained(config, network, FINE_TUNE)
    if config.expert_columns == "grow":
        network.cube.rule.grow()
    batches: Any = Batches(second, config.seed, config.batch_size, config.batch_scaling)
    if config.replay_share:
        reservoir = Reservoir(config.replay_size, config.seed)
        reservoir.add(torch.arange(len(first["labels"])))
        kept = reservoir.items.to(first["labels"].device)
        batches = Replay(batches, {name: tensor[kept] for name, tensor in first.items()}, config.replay_share, config.seed)
    valid = data.valid["embeddings"]
    if config.domains == "two":
        valid = valid[data.valid["labels"] >= data.num_first_domain]
    decoder = state.modules[TEXT_DECODER] if config.text_weight else None
    loss = _loss(config, stage, decoder, state.modules.get("elastic"))
    yield from stage.train(state, batches, loss, validation(valid[:VALID_SENTENCES]))


def _settled(
    measure: Callable[[nn.Module], dict[str, float]], reptile: Reptile, network: CellularCube, stage: Stage
) -> Callable[[nn.Module], dict[str, float]]:
    """A validation of the weights after the end of a turn: the best ones are chosen among those that training goes on from."""
    if stage.stepper.steps_done == 0:
        reptile.begin(network)

    def settle_and_measure(module: nn.Module) -> dict[str, float]:
        reptile.settle(network, stage.stepper.steps_done)
        return measure(module)

    return settle_and_measure


def _once(state: TrainState, name: str, work: Callable[[], dict[str, float] | None], examples: int) -> Iterator[Record]:
    part: ReadoutStep = state.stateful[name]
    if part.finished:
        return
    metrics = work() or {}
    part.finished = True
    state.stage = name
    state.step += 1
    yield Record(metrics, milestone=True, examples=examples)


def _loss(
    config: Config, stage: Stage, decoder: TextDecoder | None = None, elastic: Elastic | None = None
) -> Callable[[nn.Module, dict[str, Tensor]], Any]:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = cube_loss(config, model, batch, stage.stepper.steps_done / stage.total_steps, decoder)
        if elastic is not None:
            parts["elastic"] = elastic(getattr(model, "module", model))
            total = total + config.elastic_weight * parts["elastic"]
            parts["elastic"] = parts["elastic"].detach()
        return total, parts

    return loss


def _preliminary_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["embeddings"]) - batch["embeddings"]).square().mean()


def _squared_error(network: nn.Module, vector: Tensor) -> Tensor:
    """Half the squared error of a sentence, summed over its numbers: a negative log-likelihood."""
    return 0.5 * (network(vector).vectors - vector).square().sum()


def validation(vectors: Tensor) -> Callable[[nn.Module], dict[str, float]]:
    """What a phase measures on the validation split: share of variance unexplained, and cosine in the teacher's units."""

    def measure(network: nn.Module) -> dict[str, float]:
        output = reconstruct(network, vectors)
        pair = pair_of(network, vectors, output)
        total = vectors.square().mean()
        return {"valid_fvu": float(reconstruction(pair) / total), "valid_cosine": float(1 - similarity(pair))}

    return measure


@torch.no_grad()
def reconstruct(network: CellularCube, vectors: Tensor, size: int = 64, head: str = "") -> Tensor:
    """(N, D) standardised to the cube's (N, D), or a head's, in evaluation mode and passes of bounded size."""
    was_training = network.training
    network.eval()
    parts = []
    for part in vectors.split(size):
        output = network(part)
        parts.append(output.further[head] if head else output.vectors)
    network.train(was_training)
    return torch.cat(parts)


def _keep_pca_if_better(network: CellularCube, data: SentenceData, principal: Principal, valid: Tensor) -> dict[str, float]:
    """Where what training led to is worse on the validation split than PCA, go back to PCA."""
    size = network.config.code_size
    pca = float((principal.reconstructed(valid, size) - valid).square().sum() / valid.square().sum())
    own = validation(valid)(network)["valid_fvu"]
    if own > pca:
        network.start_at_principal(principal)
        start_heads(network, data, principal)
    return {"kept_valid_fvu": min(own, pca), "pca_valid_fvu": pca, "fell_back_to_pca": float(own > pca)}

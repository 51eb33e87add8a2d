"""Where a cube must earn its place: five trials against a plain network of as many parameters, each over several seeds."""

# N sentences, D numbers of a vector, K of a code

from collections.abc import Callable

import torch
from torch import Tensor

from trainbook.comparison import ABOVE, HIGH, LOW
from trainbook.data import Batches
from trainbook.intervals import t_interval
from trainbook.seeding import seed_step
from trainbook.stepper import Stepper
from trainbook.workflows.cellular_cube.baselines import Autoencoder, fit_autoencoder, fit_decoder, shape_of_equal_size
from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.data import SentenceData
from trainbook.workflows.cellular_cube.losses import cube_loss
from trainbook.workflows.cellular_cube.network import CellularCube
from trainbook.workflows.cellular_cube.principal import Principal, fit_principal
from trainbook.workflows.cellular_cube.readout_fit import fit_readout, standardise_readout

DAMAGE = 0.2  # share of cells, or of the plain network's hidden units, set to zero
HOLE_SHARE = 0.25  # of the wall's cells that are open
GROWN = 1.5  # side of the larger cube over the smaller one's
NAMES = ("narrow_code", "damage", "transfer", "any_time", "wall")


def trial_metrics(config: Config, data: SentenceData) -> dict[str, float]:
    """Metrics "cube/<trial>_fvu" and "plain/<trial>_fvu", means over seeds; "plain/<trial>_fvu_above_cube" with a t interval.

    narrow_code: held-out FVU of the code of the run's width. damage: the same when 20 % of the cells at mid-pass, or of the
    plain network's hidden units, are set to zero, both trained with as much. transfer: of a cube 1.5 times as wide after one
    epoch from the smaller cube's rule; the plain network's hidden layers cannot start from another width, so it has an epoch
    from PCA. any_time: after half of the further steps that the cube may take, trained to answer at any time; the plain network
    has one answer. wall: with a wall across the middle whose hole has a quarter of the face's cells; for the plain network a
    code of as many numbers as those cells hold, at most its usual one: a cube's hole passes other numbers in every step.

    Both start at PCA and have their read-out fitted in closed form at the end, but for damage. The cube's weights are the last
    ones before that, the plain network's the best on the validation split.
    """
    if not config.trial_seeds:
        return {}
    principal = fit_principal(data.train["embeddings"])
    metrics: dict[str, float] = {}
    for name in NAMES:
        pairs = [TRIALS[name](config.model_copy(update={"seed": seed}), data, principal) for seed in range(config.trial_seeds)]
        ours, plain = (list(values) for values in zip(*pairs, strict=True))
        metrics[f"cube/{name}_fvu"], metrics[f"plain/{name}_fvu"] = t_interval(ours)[0], t_interval(plain)[0]
        if config.trial_seeds > 1:
            mean, half = t_interval([b - a for a, b in pairs])
            key = f"plain/{name}_fvu{ABOVE}cube"
            metrics |= {key: mean, key + LOW: mean - half, key + HIGH: mean + half}
    return metrics


def train_cube(config: Config, data: SentenceData, principal: Principal, rule: dict[str, Tensor] | None = None) -> CellularCube:
    """A cube after `trial_epochs` epochs and a fit of its read-out, from a rule's weights if given."""
    seed_step(config.seed, 0)
    device = data.train["embeddings"].device
    network = CellularCube(config, principal, data.mean.to(device), data.scale).to(device)
    if rule is not None:
        network.cube.rule.load_state_dict(rule)
    standardise_readout(network, data.train["embeddings"])
    batches = Batches(data.train, config.seed, config.batch_size)
    total = config.trial_epochs * batches.per_epoch
    stepper = Stepper(network, config, total)
    for step in range(total):
        seed_step(config.seed, step)
        stepper.step(batches(step), lambda model, batch: cube_loss(config, model, batch, 0.0), config.batch_size)
    if config.fits_readout:
        fit_readout(network, data.train["embeddings"], data.valid["embeddings"])
    return network.eval()


def train_plain(
    config: Config, data: SentenceData, principal: Principal, cube: CellularCube, damage: float = 0.0, size: int = 0
) -> Autoencoder:
    """A plain autoencoder from PCA with as many parameters as the cube, and its width of code or another one."""
    number = sum(parameter.numel() for parameter in cube.parameters())
    shape = shape_of_equal_size(number, len(data.mean), size or config.code_size, "pca")
    vectors = (data.train["embeddings"], data.valid["embeddings"])
    model = fit_autoencoder(shape, principal, *vectors, config.seed, config.baseline_epochs, damage)
    return model if damage else fit_decoder(model, *vectors)


@torch.no_grad()
def unexplained(model: Callable[[Tensor], Tensor], vectors: Tensor) -> float:
    """FVU of (N, D) standardised vectors."""
    return float(sum((model(part) - part).square().sum() for part in vectors.split(64)) / vectors.square().sum())


def _narrow_code(config: Config, data: SentenceData, principal: Principal) -> tuple[float, float]:
    cube, test = train_cube(config, data, principal), data.test["embeddings"]
    plain = train_plain(config, data, principal, cube)
    return unexplained(lambda part: cube(part).vectors, test), unexplained(plain, test)


def _damage(config: Config, data: SentenceData, principal: Principal) -> tuple[float, float]:
    cube, test = train_cube(config.model_copy(update={"damage_share": DAMAGE}), data, principal), data.test["embeddings"]
    plain = train_plain(config, data, principal, cube, DAMAGE)
    generator = torch.Generator().manual_seed(config.seed)

    def hurt(step: int, state: Tensor, weights: Tensor | None) -> Tensor | None:
        if step != config.steps // 2:
            return None
        return state * (torch.rand(state.shape[:-1], generator=generator).to(state.device) >= DAMAGE).unsqueeze(-1)

    def broken(part: Tensor) -> Tensor:
        return plain.decode(plain.encode(part), DAMAGE, generator)

    return unexplained(lambda part: cube(part, hurt).vectors, test), unexplained(broken, test)


def _transfer(config: Config, data: SentenceData, principal: Principal) -> tuple[float, float]:
    small = config.model_copy(update={"hardware": "coordinates"})
    rule = train_cube(small, data, principal).cube.rule.state_dict()
    large = small.model_copy(update={"side": round(GROWN * config.side), "num_steps": 0, "trial_epochs": 1})
    cube, test = train_cube(large, data, principal, rule), data.test["embeddings"]
    plain = train_plain(large.model_copy(update={"baseline_epochs": 1}), data, principal, cube)
    return unexplained(lambda part: cube(part).vectors, test), unexplained(plain, test)


def _any_time(config: Config, data: SentenceData, principal: Principal) -> tuple[float, float]:
    further = config.side // 2
    options = {"any_time": True, "write": "clamp", "num_steps": config.side - 1 + further}
    cube, test = train_cube(config.model_copy(update=options), data, principal), data.test["embeddings"]
    cube.cube.num_steps = config.side - 1 + further // 2
    plain = train_plain(config, data, principal, cube)
    return unexplained(lambda part: cube(part).vectors, test), unexplained(plain, test)


def _wall(config: Config, data: SentenceData, principal: Principal) -> tuple[float, float]:
    hole = max(1, round(HOLE_SHARE * config.side**2))
    cube, test = train_cube(config.model_copy(update={"wall_hole": hole}), data, principal), data.test["embeddings"]
    plain = train_plain(config, data, principal, cube, size=min(config.code_size, hole * config.channels))
    return unexplained(lambda part: cube(part).vectors, test), unexplained(plain, test)


TRIALS = dict(zip(NAMES, (_narrow_code, _damage, _transfer, _any_time, _wall), strict=True))

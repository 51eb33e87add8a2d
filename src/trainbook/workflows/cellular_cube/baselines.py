"""What the cube has to beat: the mean, PCA, and plain networks of the same width of code and the same number of parameters."""

# N sentences, D numbers of a vector, K of a code, H hidden units, P parameters

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.principal import Principal
from trainbook.workflows.cellular_cube.readout import Readout
from trainbook.workflows.cellular_cube.readout_fit import fit_layer

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1.0  # of 12,000 MiniLM vectors: cosine .790 against .782 with the usual 0.01
BATCH_SIZE = 64
WARM_UP_SHARE = 0.05
VALIDATIONS = 20  # over the training; the weights that were best are the ones that count


@dataclass(frozen=True)
class Shape:
    """Of a plain autoencoder: D -> H -> K -> H -> D.

    Attributes:
        width, code, hidden: D, K, H.
        start: "random", "pca" (a linear path that starts at PCA beside the hidden layer, trained too) or "frozen_pca" (that
            path's encoder and decoder stay, and the hidden layer decodes what PCA leaves).
    """

    width: int
    code: int
    hidden: int
    start: str = "random"


class Autoencoder(nn.Module):
    """A plain network at the cube's width of code, and what stands for damage to cells: hidden units of the decoder set to zero.

    Args:
        shape: sizes and start.
        principal: components of the training vectors, in standard units; for the starts that use them.
    """

    def __init__(self, shape: Shape, principal: Principal) -> None:
        super().__init__()
        self.shape = shape
        width, code, hidden = shape.width, shape.code, shape.hidden
        self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, code))
        self.decoder_in, self.decoder_out = nn.Linear(code, hidden), nn.Linear(hidden, width)
        if shape.start == "frozen_pca":
            self.encoder = None
        if shape.start != "random":
            components = principal.components[:code]
            components = functional.pad(components, (0, 0, 0, code - len(components)))
            trained = shape.start == "pca"
            self.project = nn.Parameter(components.clone(), requires_grad=trained)
            self.restore = nn.Parameter(components.T.clone(), requires_grad=trained)
            with torch.no_grad():  # so that it starts at PCA exactly
                self.decoder_out.weight.zero_()
                self.decoder_out.bias.zero_()
                if self.encoder is not None:
                    self.encoder[2].weight.zero_()
                    self.encoder[2].bias.zero_()

    def encode(self, vectors: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        code = 0.0 if self.shape.start == "random" else vectors @ self.project.T
        return code if self.encoder is None else code + self.encoder(vectors)

    def decode(self, code: Tensor, damage_share: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """(B, K) -> (B, D).

        Args:
            code: (B, K).
            damage_share: of the decoder's hidden units that are set to zero, others in each row.
            generator: of which.
        """
        hidden = functional.gelu(self.decoder_in(code))
        if damage_share:
            hidden = hidden * (torch.rand(hidden.shape, generator=generator).to(hidden.device) >= damage_share)
        output = self.decoder_out(hidden)
        return output if self.shape.start == "random" else output + code @ self.restore.T

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) -> (B, D), both in standard units."""
        return self.decode(self.encode(vectors))

    def num_parameters(self) -> int:
        """That are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def shape_of_equal_size(num_parameters: int, width: int, code: int, start: str = "random") -> Shape:
    """The hidden width at which an autoencoder has about so many trained parameters, at least one unit.

    P = H (2 D + 2 K + 2) + D + K, and 2 D K more with start = pca; with frozen_pca P = H (K + 1 + D) + D.

    Args:
        num_parameters: P.
        width, code: D and K.
        start: see `Shape`.
    """
    if start == "frozen_pca":
        hidden = (num_parameters - width) / (width + code + 1)
    else:
        fixed = width + code + (2 * width * code if start == "pca" else 0)
        hidden = (num_parameters - fixed) / (2 * width + 2 * code + 2)
    return Shape(width, code, max(1, round(hidden)), start)


def fit_autoencoder(
    shape: Shape,
    principal: Principal,
    train: Tensor,
    valid: Tensor,
    seed: int,
    num_epochs: int,
    damage_share: float = 0.0,
) -> Autoencoder:
    """Train a plain autoencoder on the squared error; the weights that were best on the validation split are kept.

    Does not touch torch's global random numbers. The same arguments give the same network on the same device.

    Args:
        shape: sizes and start.
        principal: see `Autoencoder`.
        train, valid: (N, D) in standard units.
        seed: of weights, order and damage.
        num_epochs: passes over `train`.
        damage_share: of the decoder's hidden units that are zero in every step of training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Autoencoder(shape, principal)
    model = model.to(train.device)
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(BATCH_SIZE, len(train))
    per_epoch = len(train) // batch_size
    total = num_epochs * per_epoch
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    every = max(1, total // VALIDATIONS)
    best, best_error = _copy(model), float(_error(model, valid))
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(train), generator=generator).to(train.device)
        position = step % per_epoch * batch_size
        batch = train[order[position : position + batch_size]]
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * _rate(step, total)
        loss = (model.decode(model.encode(batch), damage_share, generator) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == total:
            error = float(_error(model, valid))
            if error < best_error:
                best, best_error = _copy(model), error
    model.load_state_dict(best)
    return model.eval()


@torch.no_grad()
def fit_decoder(model: Autoencoder, train: Tensor, valid: Tensor) -> Autoencoder:
    """Fit the linear end of an autoencoder with a linear path in closed form, as the cube's read-out is; changed in place.

    Args:
        model: with start = pca.
        train, valid: (N, D) in standard units.
    """
    width, code, hidden = model.shape.width, model.shape.code, model.shape.hidden
    layer = Readout(1, code, code + hidden, width, True).to(train.device)
    layer.weight.copy_(torch.cat([model.restore, model.decoder_out.weight], 1))
    layer.bias.copy_(model.decoder_out.bias)
    codes = [model.encode(vectors) for vectors in (train, valid)]
    seen = tuple(torch.cat([z, functional.gelu(model.decoder_in(z))], 1).unsqueeze(1) for z in codes)
    fit_layer(layer, seen, (train, valid))
    on_code, on_hidden = layer.plain()
    model.restore.copy_(on_code)
    model.decoder_out.weight.copy_(on_hidden)
    model.decoder_out.bias.copy_(layer(torch.zeros(1, 1, code + hidden).to(train))[0])
    return model


def plain_outputs(
    config: Config, principal: Principal, num_parameters: int, train: Tensor, valid: Tensor, test: Tensor
) -> dict[str, Tensor]:
    """What each baseline makes of the test vectors, all in standard units: name to (N, D).

    mean; pca of the cube's width of code; autoencoder and pca_residual (a frozen PCA encoder with a network that decodes
    what PCA leaves), both with about as many trained parameters as the cube.

    Args:
        config: its code_size, seed and baseline_epochs.
        principal: components of `train`.
        num_parameters: of the cube, P.
        train, valid, test: (N, D) in standard units.
    """
    width, code = train.shape[1], config.code_size
    found = {"mean": torch.zeros_like(test), "pca": principal.reconstructed(test, code)}
    for name, start in (("autoencoder", "random"), ("pca_residual", "frozen_pca")):
        shape = shape_of_equal_size(num_parameters, width, code, start)
        model = fit_autoencoder(shape, principal, train, valid, config.seed, config.baseline_epochs)
        with torch.no_grad():
            found[name] = model(test)
    return found


def _rate(step: int, total: int) -> float:
    rise = max(1, round(WARM_UP_SHARE * total))
    return min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / total)) / 2


@torch.no_grad()
def _error(model: Autoencoder, vectors: Tensor) -> Tensor:
    return (model(vectors) - vectors).square().mean()


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}

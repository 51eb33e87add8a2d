"""The whole network: vector to code, code through the cube, back face to vector."""

# B batch, D numbers of a vector, K of a code, L side, C channels

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.cube import Cube, Pass, Watcher
from trainbook.workflows.cellular_cube.embedding_transformer import EmbeddingTransformer
from trainbook.workflows.cellular_cube.face import Face
from trainbook.workflows.cellular_cube.principal import Principal
from trainbook.workflows.cellular_cube.routers import InRouters, OutRouters


class Output(NamedTuple):
    """What the network gives for a batch.

    Attributes:
        vectors: (B, D), standardised: compare with `standardised` targets.
        code: (B, K), what lay on the front face.
        cost: (B,), information cost of the code in nats, 0 without a bottleneck.
        run: of the cube.
    """

    vectors: Tensor
    code: Tensor
    cost: Tensor
    run: Pass


class CellularCube(nn.Module):
    """Standardise, encode, pass through the cube, read the back face with one linear map of all its channels.

    Untrained it is PCA with K components: the transformer's and the read-out's linear maps are the components, and the cube
    carries the code unchanged. The other channels are read through random directions outside the components' span: they hold
    zeros at first, and the experts have a gradient for each of them from the first step.

    Args:
        config: of the run.
        principal: components of the training vectors.
        side: L, by default the config's.
    """

    def __init__(self, config: Config, principal: Principal, side: int = 0) -> None:
        super().__init__()
        side = side or config.side
        self.config, width, size = config, len(principal.mean), config.code_size
        self.register_buffer("mean", principal.mean.clone())
        self.register_buffer("scale", principal.scale.clone())
        self.transformer = EmbeddingTransformer(config, principal)
        layout = "cosine" if config.universal_width else config.face_layout
        self.face = Face(side, config.numbers_per_cell, layout, size)
        self.cube = Cube(config, side if side != config.side else 0)
        cells = config.universal_width or side**2
        self.readout = nn.Linear(cells * config.channels, width)
        self._start_readout(principal)
        self.routers_in = self.routers_out = None
        if config.router_tokens:
            self.routers_in = InRouters(size, side**2, config.router_tokens, config.channels)
            self.routers_out = OutRouters(side**2, config.router_tokens, config.channels, width)

    @torch.no_grad()
    def _start_readout(self, principal: Principal) -> None:
        config, size = self.config, self.config.code_size
        numbers, channels = config.numbers_per_cell, config.channels
        kept, rest = principal.components[:size], principal.components[size:]
        weight = self.readout.weight.view(len(principal.mean), -1, channels)
        others = weight.shape[1] * (channels - numbers)
        if len(rest):
            directions = torch.randn(others, len(rest)) * principal.variances[size:].sqrt() @ rest
        else:
            directions = torch.randn(others, len(principal.mean))
        weight[..., numbers:] = (directions / others**0.5).T.reshape(len(principal.mean), -1, channels - numbers)
        code = torch.eye(size)[: len(kept)]
        faces = self._seen(self.face(code).to(weight))  # where each number of the code is seen
        inverse = torch.linalg.pinv(faces.flatten(1).double()).to(weight)  # (cells F, K)
        weight[..., :numbers] = (inverse @ (kept * self.transformer.gain)).T.reshape(len(principal.mean), -1, numbers)
        self.readout.bias.zero_()

    def _seen(self, face: Tensor) -> Tensor:
        """What the read-out reads: all cells, or with a universal base the modes that every size of cube has."""
        return self.face.modes(face) if self.config.universal_width else face.flatten(1, 2)

    def standardised(self, vectors: Tensor) -> Tensor:
        """Vectors in units where predicting the mean has a squared error of 1."""
        return (vectors - self.mean) / self.scale

    def restored(self, vectors: Tensor) -> Tensor:
        """Standardised vectors in the teacher's units."""
        return vectors * self.scale + self.mean

    def forward(self, vectors: Tensor, watch: Watcher | None = None, prefix: int = 0) -> Output:
        """Reconstruct a batch.

        Args:
            vectors: (B, D), in the teacher's units.
            watch: see `Cube.forward`.
            prefix: keep only the first so many numbers of the code; 0 keeps all.
        """
        code, cost = self.transformer(self.standardised(vectors))
        if prefix:
            code = code * (torch.arange(code.shape[1], device=code.device) < prefix)
        decoded, run = self.decode(code, watch)
        return Output(decoded, code, cost, run)

    def decode(self, code: Tensor, watch: Watcher | None = None) -> tuple[Tensor, Pass]:
        """From codes (B, K) to standardised vectors (B, D)."""
        face = self.face(code)
        if self.routers_in is not None:
            written = self.routers_in(code).unflatten(1, face.shape[1:3])
            face = written + nn.functional.pad(face, (0, written.shape[-1] - face.shape[-1]))
        run = self.cube(face, watch)
        return self.read(run.back), run

    def read(self, back: Tensor) -> Tensor:
        """Standardised vectors from a back face (B, L, L, C)."""
        vectors = self.readout(self._seen(back).flatten(1))
        return vectors if self.routers_out is None else vectors + self.routers_out(back.flatten(1, 2))

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
from trainbook.workflows.cellular_cube.readout import Readout
from trainbook.workflows.cellular_cube.routers import InRouters, OutRouters


class Output(NamedTuple):
    """What the network gives for a batch.

    Attributes:
        vectors: (B, D), standardised: compare with `standardised` targets.
        code: (B, K), what lay on the front face.
        cost: (B,), information cost of the code in nats, 0 without a bottleneck.
        run: of the cube.
        further: head to (B, D of its teacher), standardised.
    """

    vectors: Tensor
    code: Tensor
    cost: Tensor
    run: Pass
    further: dict[str, Tensor]


class CellularCube(nn.Module):
    """Encode, lay the code and mixtures of it on the front face, pass through the cube, read the back face linearly.

    Untrained it is PCA with K components: the transformer's and the read-out's linear maps are the components, the cube carries
    the code unchanged, and its other channels, which the experts fill from the first step, are not read yet.

    Args:
        config: of the run.
        principal: components of the training vectors, in standard units.
        mean: (D,), of the raw training vectors.
        scale: of the raw training vectors: raw = scale standard + mean.
        side: L, by default the config's.
    """

    def __init__(self, config: Config, principal: Principal, mean: Tensor, scale: float, side: int = 0) -> None:
        super().__init__()
        side = side or config.side
        self.config, width, size = config, len(principal.mean), config.code_size
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", torch.as_tensor(scale, dtype=mean.dtype).clone())
        self.transformer = EmbeddingTransformer(config, principal)
        layout = "cosine" if config.universal_width else config.face_layout
        self.face = Face(side, config.numbers_per_cell, layout, size)
        self.cube = Cube(config, side if side != config.side else 0)
        cells = config.universal_width or side**2
        self.mixture = None
        if config.mixed_numbers:
            self.mixture = nn.Linear(size, cells * config.mixed_numbers, bias=False)
            nn.init.normal_(self.mixture.weight, std=size**-0.5)
            self.mixture_face = Face(side, config.mixed_numbers, layout, cells * config.mixed_numbers)
        self.readout = Readout(cells, config.numbers_per_cell, config.channels, width, config.fits_readout)
        self.routers_in = self.routers_out = None
        if config.router_tokens:
            self.routers_in = InRouters(size, side**2, config.router_tokens, config.channels)
            self.routers_out = OutRouters(side**2, config.router_tokens, config.channels, width)
        self.heads, self.agreement = nn.ModuleDict(), {}
        self.start_at_principal(principal)

    @torch.no_grad()
    def start_at_principal(self, principal: Principal) -> None:
        """Make the network PCA exactly, whatever it had learned: for the start, and where training did not improve on it."""
        self.transformer.start_at_principal(principal)
        self.cube.rule.leave_code_alone()
        if self.routers_in is not None:
            nn.init.zeros_(self.routers_in.outward.weight)
            nn.init.zeros_(self.routers_out.outward.weight)
        kept = principal.components[: self.config.code_size].to(self.readout.weight)
        self._start(self.readout, kept.T, torch.zeros_like(self.readout.bias))

    @torch.no_grad()
    def start_head(self, name: str, weight: Tensor, bias: Tensor, agreement: float) -> None:
        """Make a head, or set it back: a further read-out, which starts as a linear map of the PCA code.

        Args:
            name: of its teacher.
            weight, bias: (D of that teacher, numbers of the PCA code) and (D,).
            agreement: of that teacher with the main one, in [0, 1]; weighs its loss.
        """
        if name not in self.heads:
            main, width = self.readout, len(weight)
            head = Readout(main.cells, main.numbers, main.channels, width, main.with_surplus)
            self.heads[name] = head.to(main.weight.device)
        self.agreement[name] = agreement
        self._start(self.heads[name], weight, bias)

    def _start(self, readout: Readout, weight: Tensor, bias: Tensor) -> None:
        """Let a read-out be W c + b of the PCA code c, which the untrained cube carries."""
        codes = torch.eye(self.config.code_size, device=weight.device)[: weight.shape[1]]
        faces = self.seen(self.face(codes)).flatten(1)  # orthonormal rows: where each number of the code is seen
        readout.weight.zero_()[:, : readout.code_features] = (faces.T @ (weight.T * self.transformer.gain)).T
        readout.bias.copy_(bias)

    def seen(self, face: Tensor) -> Tensor:
        """What the read-out reads: all cells, or with a universal base the modes that every size of cube has."""
        return self.face.modes(face) if self.config.universal_width else face.flatten(1, 2)

    def restored(self, vectors: Tensor) -> Tensor:
        """Standardised vectors in the teacher's units."""
        return vectors * self.scale + self.mean

    def forward(self, vectors: Tensor, watch: Watcher | None = None, prefix: int = 0) -> Output:
        """Reconstruct a batch.

        Args:
            vectors: (B, D), standardised.
            watch: see `Cube.forward`.
            prefix: keep only the first so many numbers of the code; 0 keeps all.
        """
        code, cost = self.transformer(vectors)
        if prefix:
            code = code * (torch.arange(code.shape[1], device=code.device) < prefix)
        decoded, run = self.decode(code, watch)
        further = {name: head(self.seen(run.back)) for name, head in self.heads.items()}
        return Output(decoded, code, cost, run, further)

    def decode(self, code: Tensor, watch: Watcher | None = None) -> tuple[Tensor, Pass]:
        """From codes (B, K) to standardised vectors (B, D)."""
        run = self.cube(self.front(code), watch)
        return self.read(run.back), run

    def front(self, code: Tensor) -> Tensor:
        """What is written into the front face, (B, L, L, F), or all channels where there are routers."""
        face = self.face(code)
        if self.mixture is not None:
            face = torch.cat([face, self.mixture_face(self.mixture(code))], -1)
        if self.routers_in is None:
            return face
        written = self.routers_in(code).unflatten(1, face.shape[1:3])
        return written + nn.functional.pad(face, (0, written.shape[-1] - face.shape[-1]))

    def read(self, back: Tensor) -> Tensor:
        """Standardised vectors from a back face (B, L, L, C)."""
        vectors = self.readout(self.seen(back))
        return vectors if self.routers_out is None else vectors + self.routers_out(back.flatten(1, 2))

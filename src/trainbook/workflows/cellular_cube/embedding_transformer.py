"""From a sentence vector to the numbers on the cube's front face; every kind starts as PCA."""

# B batch, D numbers of a vector, K of a code

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainbook.workflows.cellular_cube.config import Config
from trainbook.workflows.cellular_cube.principal import Principal

STAGES = (512, 1024)  # of the hierarchical transformer, from the brief
CHUNKS, CHUNK_WIDTH = 12, 48  # of the attention transformer: pieces of the vector, and their width inside
AUTOENCODER_WIDTH = 512
START_LOG_VARIANCE = -4.0  # of the bottleneck's noise


class EmbeddingTransformer(nn.Module):
    """code = P e / g + r(e): P the principal components, g what gives the code unit mean square, r a network that starts at 0.

    linear: no r. hierarchical: 512, 1024, K with the vector let into every stage. attention: K queries over 12 pieces of the
    vector. autoencoder: a two-layer encoder, pretrained with a decoder of its own and then frozen. Norms stand inside only.

    Args:
        config: of the run.
        principal: components of the standardised vectors.
    """

    def __init__(self, config: Config, principal: Principal) -> None:
        super().__init__()
        size, width = config.code_size, len(principal.mean)
        self.kind = config.transformer
        self.linear = nn.Linear(width, size)
        self.register_buffer("gain", principal.variances[:size].sum().div(size).clamp(min=1e-12).sqrt())
        kinds = {"hierarchical": Hierarchical, "attention": ChunkAttention, "autoencoder": TwoLayers}
        self.residual = kinds[self.kind](width, size) if self.kind in kinds else None
        self.log_variance = nn.Linear(width, size) if config.bottleneck_weight else None
        self.start_at_principal(principal)

    @torch.no_grad()
    def start_at_principal(self, principal: Principal) -> None:
        """Make the code the first K components exactly, in units of their root mean square; numbers beyond D are 0."""
        kept = principal.components[: self.linear.out_features].to(self.linear.weight)
        self.linear.weight.zero_()[: len(kept)] = kept / self.gain
        self.linear.bias.zero_()
        if self.residual is not None:
            self.residual.start_at_zero()
        if self.log_variance is not None:
            nn.init.zeros_(self.log_variance.weight)
            nn.init.constant_(self.log_variance.bias, START_LOG_VARIANCE)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and their information cost.

        Args:
            vectors: (B, D), standardised.

        Returns:
            (B, K), with noise while training where there is a bottleneck; and (B,), sum_k KL(N(mu, sigma^2) | N(0, 1)) in nats.
        """
        code = self.linear(vectors)
        if self.residual is not None:
            code = code + self.residual(vectors)
        if self.log_variance is None:
            return code, code.new_zeros(len(code))
        log_variance = self.log_variance(vectors)
        cost = 0.5 * (code.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        if self.training:
            code = code + (log_variance / 2).exp() * torch.randn_like(code)
        return code, cost


class Hierarchical(nn.Module):
    """s1 = gelu(norm(W1 e)), s2 = gelu(norm(W2 s1 + R2 e)), r = W3 s2 + R3 e, the last two from 0."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        first, second = STAGES
        self.first, self.first_norm = nn.Linear(width, first), nn.LayerNorm(first)
        self.second, self.second_skip = nn.Linear(first, second), nn.Linear(width, second, bias=False)
        self.second_norm = nn.LayerNorm(second)
        self.third, self.third_skip = nn.Linear(second, size), nn.Linear(width, size, bias=False)

    def start_at_zero(self) -> None:
        """R = 0."""
        for parameter in (*self.third.parameters(), self.third_skip.weight):
            nn.init.zeros_(parameter)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) to (B, K)."""
        first = functional.gelu(self.first_norm(self.first(vectors)))
        second = functional.gelu(self.second_norm(self.second(first) + self.second_skip(vectors)))
        return self.third(second) + self.third_skip(vectors)


class ChunkAttention(nn.Module):
    """r_k = w_k . sum_c softmax_c(q_k . k_c / sqrt(d)) v_c over pieces c of the vector; w starts at 0."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.piece = -(-width // CHUNKS)
        self.embed = nn.Linear(self.piece, CHUNK_WIDTH)
        self.place = nn.Parameter(torch.randn(CHUNKS, CHUNK_WIDTH) * 0.5)
        self.keys, self.values = nn.Linear(CHUNK_WIDTH, CHUNK_WIDTH), nn.Linear(CHUNK_WIDTH, CHUNK_WIDTH)
        self.queries = nn.Parameter(torch.randn(size, CHUNK_WIDTH))
        self.outward = nn.Parameter(torch.zeros(size, CHUNK_WIDTH))

    def start_at_zero(self) -> None:
        """R = 0."""
        nn.init.zeros_(self.outward)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) to (B, K)."""
        pieces = functional.pad(vectors, (0, CHUNKS * self.piece - vectors.shape[1])).view(len(vectors), CHUNKS, self.piece)
        hidden = functional.gelu(self.embed(pieces) + self.place)
        weights = torch.softmax(self.queries @ self.keys(hidden).transpose(1, 2) / CHUNK_WIDTH**0.5, -1)
        return (self.outward * (weights @ self.values(hidden))).sum(-1)


class TwoLayers(nn.Module):
    """r = W2 gelu(W1 e), W2 from 0."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(width, AUTOENCODER_WIDTH), nn.Linear(AUTOENCODER_WIDTH, size)

    def start_at_zero(self) -> None:
        """R = 0."""
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) to (B, K)."""
        return self.outward(functional.gelu(self.inward(vectors)))

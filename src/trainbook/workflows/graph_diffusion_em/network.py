"""The denoiser unrolled into a network: rounds of four-head attention along a dense graph, trained by gradient."""

# B crops, T patches of a crop, d coefficients, W features, H heads

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import fold, pad, scaled_dot_product_attention, softplus, unfold

from trainbook.workflows.graph_diffusion_em.graph import HEADS
from trainbook.workflows.graph_diffusion_em.patches import PatchGrid, mean_columns, patch_basis

Arm = Literal["one_head", "four_heads", "four_identical", "four_random", "no_graph"]
ARMS: tuple[Arm, ...] = ("one_head", "four_heads", "four_identical", "four_random", "no_graph")
STRIDE = 2  # between patches
TILES = 64  # denoised at once


class Round(nn.Module):
    """One round: features, attention of all heads over all patches, and a restart of its own per head and coefficient.

    A_h = softmax_j(k_i . k_j - |k_j|^2 / 2 - a_h s_ij), which is the Gaussian kernel of the projections k = W_h u, its rows
    made to sum to one. c <- sum_h rho_ih [(1 - alpha_h) A_h c + alpha_h z], as in the E-step of `attention`.
    """

    def __init__(self, d: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.features = nn.Sequential(nn.Linear(2 * d, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.keys = nn.Linear(d + width, width, bias=False)  # W_h, one under the other: one head is four times as wide
        self.gate = nn.Linear(width, num_heads)
        self.restart = nn.Parameter(torch.zeros(num_heads, d))
        self.nearness = nn.Parameter(torch.full((num_heads,), -4.0))  # softplus of it is a_h, in 1 / pixels^2
        self.shrink = nn.Linear(width, d)

    def affinities(self, inputs: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Projections k, (B, H, T, W / H), and what is added to k_i . k_j, (B, H, T, T)."""
        k = self.keys(inputs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        bias = -0.5 * k.square().sum(-1).unsqueeze(2) - softplus(self.nearness).view(-1, 1, 1) * squares
        return k, bias

    def forward(self, z: Tensor, c: Tensor, squares: Tensor, with_graph: bool) -> tuple[Tensor, Tensor]:
        """New estimates and features; z noisy and c clean patches in units of the noise, (B, T, d); squares (T, T)."""
        inputs = torch.cat([compressed(z), compressed(c)], -1)
        e = self.features(inputs)
        if with_graph:
            k, bias = self.affinities(torch.cat([inputs[..., z.shape[-1] :], e], -1), squares)
            values = c.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
            means = scaled_dot_product_attention(k, k, values, attn_mask=bias, scale=1.0)  # (B, H, T, d)
        else:
            means = c.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        rho = self.gate(e).softmax(-1).transpose(1, 2).unsqueeze(-1)  # (B, H, T, 1)
        alpha = self.restart.sigmoid().unsqueeze(1)  # (H, 1, d)
        mixed = (rho * ((1 - alpha) * means + alpha * z.unsqueeze(1))).sum(1)
        return mixed * (2 * self.shrink(e).sigmoid()), e


class UnrolledDenoiser(nn.Module):
    """x = y + aggregate(M [c_R - z, e_R]), whose last layer M starts at zero: an untrained network changes nothing.

    Args:
        channels: 1 or 3.
        patch_size: p.
        width: W, features per patch.
        rounds: R.
        arm: four named heads (their keys start in a subspace of their own), or what they are compared with; all have the same
            number of parameters but for a few per head.
    """

    def __init__(self, channels: int, patch_size: int, width: int, rounds: int, arm: Arm = "four_heads") -> None:
        super().__init__()
        self.patch_size, self.with_graph = patch_size, arm != "no_graph"
        d = channels * patch_size**2
        self.register_buffer("basis", patch_basis(patch_size, channels).float(), persistent=False)
        self.register_buffer("means", mean_columns(patch_size, channels), persistent=False)
        num_heads = 1 if arm == "one_head" else len(HEADS)
        self.rounds = nn.ModuleList(Round(d, width, num_heads) for _ in range(rounds))
        self.last = nn.Linear(d + width, d)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        with torch.no_grad():
            for one in self.rounds:
                _start_heads(one, arm, patch_size, d)

    def forward(self, noisy: Tensor, sigma: float) -> Tensor:
        """Denoise crops, (B, C, S, S) -> the same shape; S - p must be even, sigma is in their units."""
        size = self.patch_size
        shape = noisy.shape[2:]
        patches = unfold(noisy, size, stride=STRIDE).transpose(1, 2) @ self.basis.T.to(noisy)
        z = patches / sigma
        level = z.mean(1, keepdim=True) * self.means  # brightness of the crop, which says nothing about noise
        z = z - level
        places = PatchGrid.of(*shape, size, STRIDE, noisy.device).positions().to(noisy)
        squares = (places.unsqueeze(1) - places).square().sum(-1)
        c = z
        for one in self.rounds:
            c, e = one(z, c, squares, self.with_graph)
        change = self.last(torch.cat([c - z, e], -1)) * sigma
        pixels = (change @ self.basis.to(change)).transpose(1, 2)
        counts = fold(torch.ones_like(pixels[:1]), shape, size, stride=STRIDE)  # of the patches over each pixel
        return noisy + fold(pixels, shape, size, stride=STRIDE) / counts

    @torch.no_grad()
    def denoise(self, noisy: Tensor, sigma: float, tile: int) -> Tensor:
        """Denoise a picture of any size in tiles that overlap by half, their middles counting most; (C, H, W)."""
        height, width = noisy.shape[1:]
        step = tile // 2
        grown = [max(tile, -(-length // step) * step) for length in (height, width)]
        padded = pad(noisy.unsqueeze(0), (0, grown[1] - width, 0, grown[0] - height), "replicate")[0]
        corners = [(i, j) for i in range(0, grown[0] - tile + 1, step) for j in range(0, grown[1] - tile + 1, step)]
        ramp = 1 - (torch.arange(tile, device=noisy.device) - (tile - 1) / 2).abs() / (tile / 2 + 0.5)
        window = ramp[:, None] * ramp
        total, mass = torch.zeros_like(padded), torch.zeros_like(padded[0])
        for begin in range(0, len(corners), TILES):
            part = corners[begin : begin + TILES]
            found = self(torch.stack([padded[:, i : i + tile, j : j + tile] for i, j in part]), sigma)
            for (i, j), one in zip(part, found, strict=True):
                total[:, i : i + tile, j : j + tile] += window * one
                mass[i : i + tile, j : j + tile] += window
        return (total / mass)[:, :height, :width]


def compressed(z: Tensor) -> Tensor:
    """Asinh z: linear in the noise, logarithmic in the edges."""
    return torch.asinh(z)


def _start_heads(one: Round, arm: Arm, size: int, d: int) -> None:
    """Where the keys of each head start; see `attention.Heads.start` for the subspaces of the named ones."""
    weight = one.keys.weight.view(one.num_heads, -1, one.keys.in_features)
    weight.mul_(0.5)
    if arm == "four_identical":
        weight.copy_(weight[:1].expand_as(weight).clone())
    if arm == "four_heads":
        frequency = torch.arange(size)
        band = (frequency[:, None] + frequency).flatten()
        inside = torch.zeros(len(HEADS), one.keys.in_features, dtype=torch.bool)
        inside[0, : size**2] = band >= size
        inside[1, : size**2] = (band > 0) & (band < size)
        inside[2, 0] = True
        inside[2, size**2 : d] = True
        weight.mul_(inside.unsqueeze(1).to(weight))
        one.nearness[3] = -2.0


def loss(model: nn.Module, noisy: Tensor, target: Tensor, sigma: float, target_is_noisy: bool) -> Tensor:
    """L = |x^ - x|^2 / (2 sigma^2 pixels): Gaussian negative log-likelihood up to a constant, 0.5 where nothing is removed.

    With a second noisy view as target (Noise2Noise) the expectation is 0.5 higher, which is taken off.
    """
    error = (model(noisy, sigma).float() - target).square().mean() / (2 * sigma**2)
    return error - 0.5 if target_is_noisy else error

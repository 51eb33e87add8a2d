"""The three experts of the cube's rule and the gate that weighs them; each answers with a change of the cell's state."""

# B batch, L side, C channels, P hardware numbers, H hidden units, r attention rank, V value width

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainbook.workflows.cellular_cube.sleep import EVERYWHERE, Everywhere

NAMES = ("local", "functional", "distant")
PLACE_DEVIATION = 4.0  # of what a cell's place adds to its queries and keys at first: neighbourhoods are told apart
START_GAIN = 0.3  # of experts whose answer is scaled; a cube is a deep network, whose layers should change little at first
NORM_EPSILON = 0.1  # of a mean square; without it a cell with one number in use would keep only that number's sign


def scaled_by_root_mean_square(x: Tensor) -> Tensor:
    """X / sqrt(mean_c x_c^2 + epsilon), over channels; a weight is left to the layer behind it."""
    return x * (x.square().mean(-1, keepdim=True) + NORM_EPSILON).rsqrt()


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over sentences and cells; its running statistics are those of all steps together."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return super().forward(x.reshape(-1, x.shape[-1])).view_as(x)


class LocalExpert(nn.Module):
    """Reflex: y = W2 [gelu(W1 f + U h) * (1 + G h)] with f = [x, three differences, mean of 3 x 3 x 3 cells].

    The hardware h shifts and scales the hidden units, so that cells with one rule can do different things.
    """

    def __init__(self, channels: int, hardware: int, hidden: int) -> None:
        super().__init__()
        self.inward = nn.Linear(5 * channels, hidden)
        self.place = nn.Linear(hardware, 2 * hidden, bias=False)
        self.outward = nn.Linear(hidden, channels)
        # Small, so that the units bend little over the data: of untrained cubes the smoother ones generalise better.
        nn.init.normal_(self.inward.weight, std=0.1 * (16 / channels) ** 0.5)
        nn.init.normal_(self.place.weight, std=0.5 / hardware**0.5)
        nn.init.normal_(self.outward.weight, std=0.5 / hidden**0.5)

    def forward(self, perceived: Tensor, hardware: Tensor) -> Tensor:
        """Perceived (B, L, L, L, 5C), hardware (L, L, L, P)."""
        shift, scale = self.place(hardware).chunk(2, -1)
        return self.outward(functional.gelu(self.inward(perceived) + shift, approximate="tanh") * (1 + scale))


class Attention(NamedTuple):
    """What the functional expert needs of every cell: queries, keys (B, L, L, L, r), values (B, L, L, L, V)."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class FunctionalExpert(nn.Module):
    """Messages and memory: linear attention over the functional band, then a recurrent cell.

    With phi = elu + 1: u_i = phi(q_i)^T S_i / phi(q_i)^T z_i, S_i = sum_{j in F(i)} phi(k_j) v_j^T, z_i = sum_j phi(k_j), which
    is exact attention over the band from r (V + 1) band sums; y_i = g * (GRU(u_i, x_i) - x_i). Queries, keys and values depend on
    the state and on the hardware.

    Source: Katharopoulos et al. (2020), Transformers are RNNs, equations 4 to 7.
    """

    def __init__(self, channels: int, hardware: int, rank: int, width: int) -> None:
        super().__init__()
        self.rank, self.width = rank, width
        self.state = nn.Linear(channels, 2 * rank + width, bias=False)
        self.place = nn.Linear(hardware, 2 * rank + 2 * width)
        nn.init.normal_(self.state.weight, std=0.25)
        nn.init.normal_(self.place.weight[: 2 * rank], std=PLACE_DEVIATION / hardware**0.5)
        nn.init.normal_(self.place.weight[2 * rank :], std=hardware**-0.5)
        nn.init.zeros_(self.place.bias)
        self.recurrent_input = nn.Linear(width, 3 * channels)
        self.recurrent_state = nn.Linear(channels, 3 * channels)
        nn.init.normal_(self.recurrent_input.weight, std=1.0 / width**0.5)
        self.gain = nn.Parameter(torch.full((channels,), START_GAIN))

    def attention(self, x: Tensor, hardware: Tensor) -> Attention:
        """Queries and keys after phi, and values, whose hardware also scales them."""
        state = self.state(x)
        place = self.place(hardware)
        values = state[..., 2 * self.rank :] * place[..., 2 * self.rank : -self.width]
        queries, keys = (functional.elu(state[..., : 2 * self.rank] + place[..., : 2 * self.rank]) + 1).split(self.rank, -1)
        return Attention(queries, keys, values)

    def messages(self, found: Attention, bands: nn.Module, cells: Everywhere = EVERYWHERE) -> Tensor:
        """(B, L, L, L, V), the attention's result for every cell; 0 for a cell without neighbours in the band."""
        keyed = found.keys.unsqueeze(-1) * functional.pad(found.values, (0, 1), value=1.0).unsqueeze(-2)
        (sums,) = bands.sums(keyed.flatten(-2), ("functional",), cells.planes)
        sums, queries = cells.of_planes(sums).unflatten(-1, keyed.shape[-2:]), cells.of_grid(found.queries)
        sums = (queries.unsqueeze(-1) * sums).sum(-2)  # a product of tiny matrices is slower
        return sums[..., :-1] / sums[..., -1:].clamp(min=1e-3)

    def forward(self, x: Tensor, hardware: Tensor, bands: nn.Module, cells: Everywhere = EVERYWHERE) -> Tensor:
        """X (B, L, L, L, C), hardware (L, L, L, P)."""
        message = self.messages(self.attention(x, hardware), bands, cells)
        x, counts = cells.of_grid(x), cells.of_table(bands.counts[..., 1:2])
        message = message * self.place(cells.of_table(hardware))[..., -self.width :] * counts.sqrt()
        reset_m, update_m, new_m = self.recurrent_input(message).chunk(3, -1)
        reset_x, update_x, new_x = self.recurrent_state(x).chunk(3, -1)
        update = torch.sigmoid(update_m + update_x)
        new = torch.tanh(new_m + torch.sigmoid(reset_m + reset_x) * new_x)
        return self.gain * (1 - update) * (new - x)


class DistantExpert(nn.Module):
    """Context as a differential equation: dx/dt = W2 tanh(W1 x + U m + b t + c) - lambda x on t in [0, 1], by midpoint steps.

    m is the mean of the distant band; y = g * (x(1) - x(0)).

    Source: Chen et al. (2018), Neural Ordinary Differential Equations, sections 2 and 4.
    """

    def __init__(self, channels: int, hardware: int, hidden: int, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.state = nn.Linear(channels, hidden, bias=False)
        self.context = nn.Linear(channels, hidden)
        self.place = nn.Linear(hardware, hidden, bias=False)
        self.time = nn.Parameter(torch.zeros(hidden))
        self.outward = nn.Linear(hidden, channels, bias=False)
        self.decay = nn.Parameter(torch.full((), 0.1))
        self.gain = nn.Parameter(torch.full((channels,), START_GAIN))

    def drift(self, x: Tensor, context: Tensor, time: float) -> Tensor:
        """dx/dt; `context` (B, L, L, L, hidden) is what does not change with t."""
        return self.outward(torch.tanh(self.state(x) + context + self.time * time)) - self.decay * x

    def flow(self, x: Tensor, context: Tensor) -> Tensor:
        """x(1) from x(0)."""
        size = 1 / self.num_steps
        for k in range(self.num_steps):
            middle = x + size / 2 * self.drift(x, context, k * size)
            x = x + size * self.drift(middle, context, (k + 0.5) * size)
        return x

    def divergence(self, x: Tensor, context: Tensor, time: float) -> Tensor:
        """The exact trace of d drift / d x: sum_k (1 - tanh^2 a_k) (W1 W2)_kk - lambda C.

        Its integral over t is minus the change of log-density along the flow, which makes the flow a continuous normalising
        flow: x(1) has log-density log p(x(0)) - integral of this.

        Args:
            x, context: as in `drift`.
            time: t.

        Returns:
            (B, L, L, L)
        """
        slope = 1 - torch.tanh(self.state(x) + context + self.time * time).square()
        products = (self.state.weight * self.outward.weight.T).sum(1)
        return slope @ products - self.decay * x.shape[-1]

    def outer(self, mean: Tensor, hardware: Tensor) -> Tensor:
        """What the drift is told of the distant cells and of the cell's place."""
        return self.context(mean) + self.place(hardware)

    def forward(self, x: Tensor, mean: Tensor, hardware: Tensor) -> Tensor:
        """X and the distant band's mean (B, L, L, L, C), hardware (L, L, L, P)."""
        return self.gain * (self.flow(x, self.outer(mean, hardware)) - x)


class Gate(nn.Module):
    """Weights of the experts in every cell: w = softmax(W2 gelu(W1 [x, m, h]) / tau), m the mean of all neighbours."""

    def __init__(self, channels: int, hardware: int, hidden: int, num_experts: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.inward = nn.Linear(2 * channels, hidden)
        self.place = nn.Linear(hardware, hidden, bias=False)
        self.outward = nn.Linear(hidden, num_experts)

    def forward(self, x: Tensor, mean: Tensor, hardware: Tensor) -> Tensor:
        """(B, L, L, L, experts), positive, summing to 1."""
        hidden = self.inward(torch.cat([x, mean], -1)) + self.place(hardware)
        return torch.softmax(self.outward(functional.gelu(hidden, approximate="tanh")) / self.temperature, -1)

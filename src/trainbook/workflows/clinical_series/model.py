"""A causal transformer over patches of a series, with a forecast and a risk at every patch."""

# B patients, L readings, V variables, S static features, T tokens, H patches forecast, D width

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainbook.workflows.clinical_series.config import Config


class PatchTransformer(nn.Module):
    """Patches become tokens; attention is causal, so what comes out at a token depends on it and earlier ones alone.

    A token sees its patch's values (0 where none was observed), what was observed, their mean and deviation, and the static
    features. To the attention's answers a linear one is added, from four numbers per variable: the last observed patch mean,
    the mean so far, the same with weights that rise (so that a trend shows), and the deviation so far; its weights
    are each token's own. What a regression can say need not be learned by attention.

    Args:
        config: width, heads, layers, patches.
        mean, deviation: (V,), of the training readings: values enter and forecasts leave in the variables' units.
        num_static: S.
    """

    def __init__(self, config: Config, mean: Tensor, deviation: Tensor, num_static: int) -> None:
        super().__init__()
        self.patch_samples, self.horizon = config.patch_samples, config.prediction_horizon
        self.gradient_checkpointing = config.gradient_checkpointing
        num_variables = len(mean)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("deviation", deviation.clone())
        later = torch.ones(config.num_tokens, config.num_tokens, dtype=torch.bool).triu(1)
        self.register_buffer("mask", later, persistent=False)  # true: not attended to
        self.embedding = nn.Linear(num_variables * (2 * config.patch_samples + 3) + num_static, config.width)
        self.positions = nn.Parameter(0.02 * torch.randn(config.num_tokens, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width, config.num_heads, 2 * config.width, config.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.forecast = nn.Linear(config.width, self.horizon * num_variables)
        self.risk = nn.Linear(config.width, 1)
        self.direct = nn.Parameter(torch.zeros(config.num_tokens, 4 * num_variables, self.horizon * num_variables + 1))

    def forward(self, values: Tensor, observed: Tensor, static: Tensor) -> tuple[Tensor, Tensor]:
        """Forecasts and log-odds of the outcome, from every patch on.

        Args:
            values: (B, L, V) in the variables' units; anything where nothing was observed.
            observed: (B, L, V), true where there is a reading.
            static: (B, S).

        Returns:
            (B, T, H, V) standardised patch means, and (B, T).
        """
        parts = (tensor.unflatten(1, (-1, self.patch_samples)) for tensor in (self.standardise(values), observed))
        x, seen = next(parts), next(parts)
        seen = seen.to(x.dtype)
        x = torch.where(seen > 0, x, 0)  # (B, T, samples, V)
        count = seen.sum(2)
        patch_mean = x.sum(2) / count.clamp(min=1)
        deviation = ((x - patch_mean.unsqueeze(2)).square() * seen).sum(2).div(count.clamp(min=1)).add(1e-6).sqrt()
        rising = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        sums = torch.stack([x.sum(2), x.sum(2) * rising, x.square().sum(2)]).cumsum(2)
        level, late, square = sums / torch.stack([count, count * rising, count]).cumsum(2).clamp(min=1)
        spread = (square - level.square()).clamp(min=1e-6).sqrt()
        summary = torch.cat([carried_forward(patch_mean, count > 0), level, late, spread], -1)
        features = [x.flatten(2), seen.flatten(2), patch_mean, deviation, count / self.patch_samples]
        h = torch.cat([*features, static.unsqueeze(1).expand(-1, x.shape[1], -1)], -1)
        h = self.dropout(self.embedding(h) + self.positions)  # (B, T, D)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                h = checkpoint(layer, h, self.mask, use_reentrant=False)
            else:
                h = layer(h, self.mask)
        h = self.norm(h)
        direct = torch.einsum("btf,tfo->bto", summary, self.direct)
        forecast = self.forecast(h) + direct[..., :-1]
        return forecast.unflatten(-1, (self.horizon, -1)), self.risk(h).squeeze(-1) + direct[..., -1]

    def standardise(self, values: Tensor) -> Tensor:
        """(..., V) in units of the training readings' deviation, from their mean."""
        return (values - self.mean) / self.deviation


def carried_forward(patch_mean: Tensor, is_observed: Tensor) -> Tensor:
    """The last observed patch mean at each patch, 0 before the first.

    Args:
        patch_mean: (B, T, V).
        is_observed: (B, T, V), boolean.
    """
    places = torch.arange(patch_mean.shape[1], device=patch_mean.device)[:, None]
    last = torch.where(is_observed, places, -1).cummax(1).values
    return torch.where(last >= 0, patch_mean.gather(1, last.clamp(min=0)), 0)

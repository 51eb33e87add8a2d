"""Diffusion along a graph, and the EM that learns how long to diffuse."""

# N nodes, d channels, L symmetric Laplacian with spectrum in [0, 2)

from typing import Literal

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor

Method = Literal["heat", "pagerank", "explicit"]
MAX_DEGREE = 1024


def response(eigenvalues: Tensor, method: Method, time: Tensor, num_steps: int = 0) -> Tensor:
    """What diffusion multiplies each graph frequency with, in (0, 1] for heat and pagerank.

    heat: e^{-t l}; pagerank: 1 / (1 + t l), restart probability 1 / (1 + t); explicit: (1 - t l / K)^K.

    Args:
        eigenvalues: l, (n,).
        method: which.
        time: t >= 0 per channel, (d,).
        num_steps: K, of the explicit method.

    Returns:
        (n, d)
    """
    product = eigenvalues.unsqueeze(1) * time
    if method == "heat":
        return (-product).exp()
    return 1 / (1 + product) if method == "pagerank" else (1 - product / num_steps) ** num_steps


def diffuse(
    laplacian: Tensor, x: Tensor, method: Method, time: Tensor | float, num_steps: int = 0, tolerance: float = 1e-6
) -> Tensor:
    """Diffuse signals on a graph for a time of their own per channel.

    heat: e^{-t L} x; pagerank: (I + t L)^{-1} x, the limit of approximate personalised PageRank; both by the Chebyshev series
    of their response on [0, 2], cut where what is left is below `tolerance` in the operator norm. explicit: K Euler steps
    x <- x - (t / K) L x, whose spectrum is in [0, 1] when t / K <= 1 / 2.

    Args:
        laplacian: (N, N), dense or sparse, spectrum in [0, 2].
        x: (N, d).
        method: which.
        time: t >= 0, (d,) or one for all.
        num_steps: K of the explicit method; 0 takes the least with t / K <= 1 / 2.
        tolerance: of the series.

    Source: Gasteiger et al. 2019, Diffusion improves graph learning, equation 1; Hammond et al. 2011, section 6 (Chebyshev).
    """
    time = torch.as_tensor(time, dtype=x.dtype, device=x.device).expand(x.shape[1])
    if method == "explicit":
        num_steps = num_steps or max(1, int((2 * time.max()).ceil()))
        for _ in range(num_steps):
            x = x - (time / num_steps) * (laplacian @ x)
        return x
    coefficients = chebyshev(method, time.double().cpu(), tolerance).to(x)  # (terms, d)
    before, now = x, laplacian @ x - x  # T_0 x and T_1(L - I) x
    total = coefficients[0] * x
    for index in range(1, len(coefficients)):
        total.addcmul_(coefficients[index], now)
        if index + 1 < len(coefficients):  # T_{n+1} = 2 (L - I) T_n - T_{n-1}
            before, now = now, torch.addmm(torch.add(before, now, alpha=2), laplacian, now, beta=-1, alpha=2)
    return total


def chebyshev(method: Method, time: Tensor, tolerance: float) -> Tensor:
    """Coefficients of the response in T_n(l - 1) over [0, 2], (terms, d) float64."""
    nodes = np.cos(np.pi * (np.arange(MAX_DEGREE) + 0.5) / MAX_DEGREE)
    values = response(torch.from_numpy(nodes + 1), method, time).numpy()
    coefficients = dct(values, axis=0) / MAX_DEGREE
    coefficients[0] /= 2
    left = np.abs(coefficients)[::-1].cumsum(0)[::-1].max(1)  # what is cut when a term is the first left out
    return torch.from_numpy(coefficients[: max(1, int((left > tolerance).sum()))])


def appnp(affinity: Tensor, x: Tensor, restart: float, num_steps: int) -> Tensor:
    """x_k <- (1 - a) A x_{k-1} + a x, whose limit is a (I - (1 - a) A)^{-1} x; off by at most (1 - a)^K |x| after K steps.

    Args:
        affinity: A with norm at most 1, (N, N).
        x: (N, d).
        restart: a in (0, 1].
        num_steps: K.

    Source: Klicpera et al. 2019, Predict then propagate, equation 4.
    """
    state = x
    for _ in range(num_steps):
        state = (1 - restart) * (affinity @ state) + restart * x
    return state


def diffusion_log_likelihood(eigenvalues: Tensor, spectrum: Tensor, stiffness: Tensor, sigma: float) -> Tensor:
    """Log N(y; 0, (kappa Q)^-1 + sigma^2 I) per channel, from the graph's spectrum alone; (d,).

    Args:
        eigenvalues: q_n > 0 of Q = L + e I, (N,).
        spectrum: y in the eigenbasis, (N, d).
        stiffness: kappa > 0, (d,).
        sigma: of the noise.
    """
    u = 1 / (stiffness * eigenvalues.unsqueeze(1)) + sigma**2
    return -0.5 * (spectrum.square() / u + (2 * torch.pi * u).log()).sum(0)


def stiffness_step(eigenvalues: Tensor, spectrum: Tensor, stiffness: Tensor, sigma: float) -> Tensor:
    """One step of EM for the stiffness of the prior x ~ N(0, (kappa Q)^-1) of signals seen in noise of known size.

    E: v_n = 1 / (kappa q_n + 1 / sigma^2), m_n = v_n y_n / sigma^2. M: kappa <- N / sum_n q_n (m_n^2 + v_n). The posterior mean
    is the pagerank filter 1 / (1 + sigma^2 kappa q): sigma^2 kappa is the learned diffusion time. Shapes as in
    `diffusion_log_likelihood`, which never falls.
    """
    q = eigenvalues.unsqueeze(1)
    variance = 1 / (stiffness * q + 1 / sigma**2)
    mean = variance * spectrum / sigma**2
    return len(eigenvalues) / (q * (mean.square() + variance)).sum(0)


def head_stiffness_step(laplacians: Tensor, y: Tensor, stiffness: Tensor, sigma: float, ridge: float) -> Tensor:
    """One generalised EM step for the stiffness of several heads, Q = e I + sum_h kappa_h L_h; the likelihood never falls.

    kappa_h <- kappa_h d tr(Q^{-1} L_h) / E[tr(X^T L_h X)]: log det Q is convex in log kappa, so its tangent bounds it from below.

    Args:
        laplacians: dense, (H, N, N).
        y: noisy signals, (N, d).
        stiffness: (H,).
        sigma: of the noise.
        ridge: e > 0.
    """
    eye = torch.eye(len(y), dtype=y.dtype, device=y.device)
    Q = ridge * eye + torch.einsum("h,hij->ij", stiffness, laplacians)
    covariance = torch.linalg.inv(Q + eye / sigma**2)
    mean = covariance @ y / sigma**2
    second = mean @ mean.T + y.shape[1] * covariance
    expected = torch.einsum("hij,ij->h", laplacians, second)
    return stiffness * y.shape[1] * torch.einsum("hij,ij->h", laplacians, torch.linalg.inv(Q)) / expected

"""Graph-diffusion EM: noisy pictures in, clean ones out, by a mixture of patches, a graph of similar ones, and attention.

A Gaussian mixture of clean patches is fitted by exact EM (the codebook); a noisy picture's patches get their posterior mean,
exchange what they know along a graph of similar patches (attention heads whose weights are posterior responsibilities), and are
polished in groups. The same graph, unrolled, is a network trained by gradient; its loss is 0.5 where nothing is removed.
"""

import lazy_loader

from trainbook.workflows.graph_diffusion_em.config import TARGETS, Config

__getattr__, _dir, _all = lazy_loader.attach(
    __name__,
    submod_attrs={
        "images": ["load_data"],
        "training": ["build", "train"],
        "evaluation": ["evaluate"],
        "pictures": ["draw", "draw_data"],
    },
)
__all__ = ["TARGETS", "Config", "build", "draw", "draw_data", "evaluate", "load_data", "train"]

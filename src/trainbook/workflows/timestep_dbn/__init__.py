"""Timestep-specific DBN: one conditional Boltzmann machine per reverse diffusion step, on binary image codes.

An image becomes bits on three resolutions (binary autoencoder); the bits are flipped step by step until nothing is
left of them (Bernoulli diffusion); one conditional RBM per (timestep, resolution) learns to undo one step (recovery
likelihood); sampling starts from fair coins and runs the steps backwards, coarse to fine.
"""

import lazy_loader

from trainbook.workflows.timestep_dbn.config import TARGETS, Config

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

"""Image diffusion: a class-conditional U-Net learns to remove noise, and draws images by fifty steps of guided DDIM.

Noise is added on a cosine schedule; the network predicts it, sometimes without being told the class, so that one network holds
the conditional and the unconditional model and guidance can push them apart. Samples are judged by features learned in the run.
"""

import lazy_loader

from trainbook.workflows.diffusion.config import TARGETS, Config

__getattr__, _dir, _all = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["load_data"],
        "training": ["build", "train"],
        "evaluation": ["evaluate"],
        "pictures": ["draw", "draw_data"],
    },
)
__all__ = ["TARGETS", "Config", "build", "draw", "draw_data", "evaluate", "load_data", "train"]

"""Cellular cube: sentence vectors pass through a three-dimensional cellular network, front face in, back face out.

A vector becomes a code on the front face of a cube of cells. All cells follow one rule, a mixture of three experts that see
near, middle and far neighbours; the back face is read out. Untrained the cube is exactly PCA of the same width, so whatever
training adds is measured against that, and against an autoencoder of equal size.
"""

import lazy_loader

from trainbook.workflows.cellular_cube.config import TARGETS, Config

__getattr__, _dir, _all = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["load_data"],
        "training": ["build", "train"],
        "evaluation": ["evaluate"],
        "pictures": ["draw", "draw_data"],
        "epoch_examples": ["export"],
    },
)
__all__ = ["TARGETS", "Config", "build", "draw", "draw_data", "evaluate", "export", "load_data", "train"]

"""NeRF: a scene learned from posed pictures as a radiance field, by differentiable volume rendering; an MLP beside a dense grid.

Pixels become rays, rays become samples, a field gives each sample a density and a colour, and compositing turns them back into
pixels. Held-out views are compared with the nearest training view and the mean colour.
"""

import lazy_loader

from trainbook.workflows.nerf.config import TARGETS, Config

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

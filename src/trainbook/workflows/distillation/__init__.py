"""Knowledge distillation (HPM-KD): small students of large teachers, six components, each judged by what it is worth.

Teachers are trained and frozen; students learn from labels alone (direct), from one teacher's softened answers (Hinton's
KD), or with HPM-KD: a progressive chain, a moving temperature, several teachers weighted image by image, searched settings,
a parallel pipeline and kept teacher answers. Every arm is trained with several seeds, compared seed by seed, and every
component is taken out once.
"""

import lazy_loader

from trainbook.workflows.distillation.config import TARGETS, Config

__getattr__, _dir, _all = lazy_loader.attach(
    __name__,
    submod_attrs={
        "images": ["load_data"],
        "training": ["build", "train"],
        "evaluation": ["evaluate"],
        "pictures": ["draw", "draw_data"],
        "tables": ["export"],
    },
)
__all__ = ["TARGETS", "Config", "build", "draw", "draw_data", "evaluate", "export", "load_data", "train"]

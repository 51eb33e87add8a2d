"""Clinical series: a causal transformer reads 24 h of bedside signals, forecasts 12 h and estimates the risk of death.

A patch of 60 minutes (values and what was observed) is a token; no token sees a later one, so every hour has its forecast and
its risk. The embedded series are generated, and labelled so: their generator is known, so the best possible answer is too.
Real stays come from PhysioNet 2012 or a CSV file.
"""

import lazy_loader

from trainbook.workflows.clinical_series.config import TARGETS, Config

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

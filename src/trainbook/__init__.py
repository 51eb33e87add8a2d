"""trainbook: thin notebooks that train real models, survive interruption, and report what a run measured.

Importing the package does not import torch; `start` does, when it is first used.
"""

import lazy_loader

from trainbook.errors import UserError
from trainbook.runtime import calm_threads

__version__ = "0.1.0"

calm_threads()  # before torch is loaded

__getattr__, _dir, _all = lazy_loader.attach(__name__, submod_attrs={"run": ["Run", "start"], "tuning": ["ConfigurationTuner"]})
__all__ = ["ConfigurationTuner", "Run", "UserError", "__version__", "start"]

"""LegalBERT: which licence, or which kind of contract clause, is this from? BERT with attention and max pooling, beside TF-IDF.

Embedded are real clauses of the licence texts that installed packages carry; contracts come from a file or LexGLUE. A small BERT
is trained from scratch with a WordPiece vocabulary learned in the run; where the hub is reachable, Legal-BERT's own weights are
the start. The report says where TF-IDF with a linear SVM wins.
"""

import lazy_loader

from trainbook.workflows.legal_bert.config import TARGETS, Config

__getattr__, _dir, _all = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["load_data"],
        "training": ["build", "train"],
        "evaluation": ["evaluate", "export"],
        "pictures": ["draw", "draw_data"],
    },
)
__all__ = ["TARGETS", "Config", "build", "draw", "draw_data", "evaluate", "export", "load_data", "train"]

"""Learned unsupervised rules: networks that learn features without labels by a meta-trained local rule.

``LearnedFeatures`` is the scikit-learn transformer; ``load(name)`` gives the rule and its meta-parameters.
"""

import importlib

from .network import ACTIVATIONS, Layer, Moments, Network, statistics
from .rule import FRONT_ENDS, RULES, TERMS, UnsupervisedRule, hand_set, unsupervised

__all__ = [
    "ACTIVATIONS",
    "FRONT_ENDS",
    "RULES",
    "TERMS",
    "Layer",
    "LearnedFeatures",
    "Moments",
    "Network",
    "UnsupervisedRule",
    "available",
    "hand_set",
    "load",
    "statistics",
    "unsupervised",
]

# Imported on first use: scikit-learn is no dependency of the package, and the store imports this one.
_LAZY = {
    "LearnedFeatures": (".estimator", "LearnedFeatures"),
    "available": ("..store", "available_unsupervised"),
    "load": ("..store", "load_unsupervised"),
}


def __getattr__(name: str):
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module, __name__), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

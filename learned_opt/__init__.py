"""Learned update rules as plain Optax transforms.

>>> import learned_opt
>>> optimizer = learned_opt.load("flagship", num_steps=1000)  # doctest: +SKIP
"""

import importlib

from . import layouts, local_sgd, mup, schedules, unsupervised
from .base import LearnedOptimizer, Params, Theta
from .directions import soap, soap_muon
from .muon import hidden_matrices
from .precision import bfloat16_params, bfloat16_state
from .reference import from_reference
from .rules import RULES
from .store import SavedRule, StoreError, available, load, load_rule, save

__version__ = "0.1.0"

__all__ = [
    "RULES",
    "LearnedOptimizer",
    "Params",
    "SavedRule",
    "StoreError",
    "Theta",
    "available",
    "bfloat16_params",
    "bfloat16_state",
    "from_reference",
    "hidden_matrices",
    "layouts",
    "load",
    "load_rule",
    "local_sgd",
    "mup",
    "save",
    "schedules",
    "self_tuning",
    "soap",
    "soap_muon",
    "unsupervised",
]

_LAZY = ("self_tuning",)  # imported on first use: it brings in Haiku


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

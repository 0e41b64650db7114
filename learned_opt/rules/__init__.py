"""The learned update rules, one a file, and ``RULES``: name -> factory.

A factory takes keyword arguments that JSON can hold and returns a :class:`learned_opt.base.LearnedOptimizer`. To add a
rule, write a module with the factory and a ``PAPER`` string, and add a row.
"""

from collections.abc import Callable

from ..base import LearnedOptimizer
from . import adafac_mlp, celo2, mlp, tuned

RULES: dict[str, Callable[..., LearnedOptimizer]] = {
    "adafac_mlp": adafac_mlp.adafac_mlp,
    "adam": tuned.adam,
    "celo2": celo2.celo2,
    "mlp": mlp.mlp,
    "nadamw": tuned.nadamw,
    "sgd": tuned.sgd,
    "sgdm": tuned.sgdm,
}

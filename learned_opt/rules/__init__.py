"""The learned update rules, one a file, and ``RULES``: name -> factory.

A factory takes keyword arguments that JSON can hold and returns a :class:`learned_opt.base.LearnedOptimizer`. To add a
rule, write a module with the factory and a ``PAPER`` string, and add a row; ``CONTRIBUTING.md`` has the steps.
"""

from collections.abc import Callable

from ..base import LearnedOptimizer
from . import (
    adafac_mlp,
    celo,
    celo2,
    celo2_soap,
    celo_adam,
    control,
    light,
    lstm,
    mlp,
    nn_adam,
    outer,
    rnn_mlp,
    scheduler,
    tuned,
    velo,
)

RULES: dict[str, Callable[..., LearnedOptimizer]] = {
    "adafac_mlp": adafac_mlp.adafac_mlp,
    "adam": tuned.adam,
    "celo": celo.celo,
    "celo2": celo2.celo2,
    "celo2_soap": celo2_soap.celo2_soap,
    "celo_adam": celo_adam.celo_adam,
    "control": control.control,
    "light": light.light,
    "lstm": lstm.lstm,
    "mlp": mlp.mlp,
    "nadamw": tuned.nadamw,
    "nn_adam": nn_adam.nn_adam,
    "outer": outer.outer,
    "rnn_mlp": rnn_mlp.rnn_mlp,
    "scheduler": scheduler.scheduler,
    "sgd": tuned.sgd,
    "sgdm": tuned.sgdm,
    "velo": velo.velo,
}

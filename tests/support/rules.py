"""Rules as the tests of what every rule promises take them."""

import inspect

import pytest

from learned_opt.rules import RULES

# What one piece of code answers for, whatever the rule, is tested by default on the rules that compile soon, new ones
# among them; `pytest -m slow` tests it on the others.
LONG = ("adafac_mlp", "celo", "control", "outer", "rnn_mlp", "scheduler", "velo")
SHORT_BY_DEFAULT = [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in sorted(RULES)]

_SIZES = {"lstm_size": 6, "bank_size": 3, "every": 1000}
_SUMS = 8  # hidden units up to which the default networks are written as sums, which compile slowly


def small(factory):
    """The rule with few memory cells, a small bank and a narrow network: what it promises does not hang on that.

    A basis is chosen at the first step alone, before it could depend on theta: meta-gradients take it for a constant.
    """
    parameters = inspect.signature(factory).parameters
    sizes = {name: size for name, size in _SIZES.items() if name in parameters}
    if "hidden_size" in parameters and parameters["hidden_size"].default <= _SUMS:
        sizes["hidden_size"] = 3
    return factory(**sizes)

"""The two kinds of learned rules, and all that the store and the commands do differently for them: one row each."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from .base import Theta
from .features import VERSION as FEATURES_VERSION
from .rules import RULES
from .unsupervised.rule import RULES as UNSUPERVISED
from .unsupervised.rule import VERSION as UNSUPERVISED_VERSION


class Kind(NamedTuple):
    """A kind of learned rules.

    Attributes:
        label: what a message calls one.
        rules: name -> factory.
        init: ``rule -> (key -> theta)``.
        version: of what trained weights mean to the code; saved rules record it.
        use: how a saved one is used, a call with ``{}`` for its folder.
    """

    label: str
    rules: Mapping[str, Callable[..., Any]]
    init: Callable[[Any], Callable[[jax.Array], Theta]]
    version: int
    use: str


OPTIMIZER = Kind("an optimizer", RULES, lambda rule: rule.init, FEATURES_VERSION, "learned_opt.load({!r})")
FEATURES = Kind(
    "an unsupervised rule",
    UNSUPERVISED,
    lambda rule: rule.init_theta,
    UNSUPERVISED_VERSION,
    "learned_opt.unsupervised.LearnedFeatures({!r})",
)
KINDS = (OPTIMIZER, FEATURES)
KNOWN: dict[str, Kind] = {name: kind for kind in KINDS for name in kind.rules}


def optimizes(rule: str) -> bool:
    """Whether a rule trains networks by itself: neither does the outer step of local SGD, which takes what workers did.

    >>> [optimizes(rule) for rule in ("control", "outer", "unsupervised")]
    [True, False, False]
    """
    return KNOWN.get(rule, OPTIMIZER) is OPTIMIZER and rule != "outer"

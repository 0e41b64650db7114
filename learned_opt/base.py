"""The one type of the package: a learned update rule.

A learned update rule is meta-parameters ``theta`` plus a pure function that turns ``theta`` into an Optax
transform. Because the rule *is* an Optax transform, whatever trains, ships, wraps or benchmarks it needs no
second interface.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

Params = Any  # a pytree of float arrays: the parameters of what is optimized
Theta = Any  # a pytree of float arrays: the meta-parameters of a rule


class LearnedOptimizer(NamedTuple):
    """A learned update rule.

    Attributes:
        init: ``key -> theta``, fresh meta-parameters.
        build: ``(theta, num_steps=None, layout=None) -> optax.GradientTransformationExtraArgs``, the rule at
            ``theta``. Its updates point downhill, ready for ``optax.apply_updates``. ``num_steps`` (an int or a traced
            int32 scalar) is the planned number of updates, for the rules that want it; ``layout`` says which axes of
            parameters are inputs, outputs and layers, see :func:`learned_opt.load`.
        needs: which optional inputs the rule cannot do without: ``"value"`` (the loss, passed as
            ``update(..., value=loss)``) and/or ``"num_steps"``. ``update`` raises a ``ValueError`` that names the
            missing one.
        learning_rate: for a rule with a free step size (its updates have unit RMS), the step size that
            :func:`learned_opt.load` multiplies them by when the user gives none. ``None`` for a rule that sets its own
            step size.
    """

    init: Callable[[jax.Array], Theta]
    build: Callable[..., optax.GradientTransformationExtraArgs]
    needs: tuple[str, ...] = ()
    learning_rate: float | None = None

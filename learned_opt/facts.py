"""What a rule needs and costs, read off the rule itself."""

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp

from .kinds import KNOWN, OPTIMIZER

_SIDE = 1024  # of the square matrix that the state is measured on


def rule_facts(rule: str, **kwargs: Any) -> dict[str, Any]:
    """The facts about a rule that its users ask for.

    Args:
        rule: a name in :data:`learned_opt.RULES`, or in :data:`learned_opt.unsupervised.RULES`.
        **kwargs: the factory's arguments.

    Returns:
        A dict of JSON values: ``rule``, ``summary``, ``paper``, ``meta_parameters`` and, for an optimizer, ``needs``,
        ``state_bytes_per_parameter`` (of a 1024 x 1024 float32 matrix) and ``default_learning_rate``.

    Example:
        >>> rule_facts("celo2")["meta_parameters"]
        347
    """
    kind = KNOWN[rule]
    factory = kind.rules[rule]
    made = factory(**kwargs)
    theta = jax.eval_shape(kind.init(made), jax.eval_shape(jax.random.key, 0))
    facts = {
        "rule": rule,
        "summary": (inspect.getdoc(factory) or "").partition("\n")[0],
        "paper": getattr(inspect.getmodule(factory), "PAPER", "unknown"),
        "meta_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(theta)),
    }
    if kind is not OPTIMIZER:
        return facts

    def initial_state(theta, matrix):
        return made.build(theta, num_steps=1000).init({"w": matrix})

    state = jax.eval_shape(initial_state, theta, jax.ShapeDtypeStruct((_SIDE, _SIDE), jnp.float32))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return facts | {
        "needs": list(made.needs),
        "state_bytes_per_parameter": round(size / _SIDE**2, 2),
        "default_learning_rate": made.learning_rate,
    }

"""Rules from the flat ``{name: array}`` dicts in which the field publishes its meta-parameters."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from .base import LearnedOptimizer, Theta
from .rules import RULES


def _celo2(leaves: dict[str, np.ndarray], **kwargs) -> tuple[dict, Theta]:
    stem = "ff_mod_stack/~/"
    blocks = sum(name.startswith(f"{stem}w0__") for name in leaves)
    theta = {name: leaves[stem + name] for name in ("b0", "w1", "b1", "w2", "b2")}
    theta["w0"] = np.concatenate([leaves[f"{stem}w0__{i}"] for i in range(blocks)], axis=-2)
    return {"hidden_size": theta["w1"].shape[0], **kwargs}, theta


_READERS = {"celo2": _celo2}


def from_reference(rule: str, leaves: Mapping[str, np.ndarray], **kwargs) -> tuple[LearnedOptimizer, Theta]:
    """A rule of this package at the meta-parameters of a reference implementation.

    Args:
        rule: a name in :data:`learned_opt.RULES`.
        leaves: the reference's parameters, ``name -> array``; names as ``path/to/leaf``, a leading ``theta/`` ignored.
        **kwargs: the rule's own keyword arguments; sizes are inferred from the arrays.

    Returns:
        ``(rule, theta)``.

    Raises:
        ValueError: if the rule has no reference, or the leaves are not its.
    """
    if rule not in _READERS:
        raise ValueError(
            f"no reference implementation is known for rule {rule!r}; known: {', '.join(sorted(_READERS))}"
        )
    flat = {name.removeprefix("theta/"): np.asarray(value) for name, value in leaves.items()}
    try:
        kwargs, theta = _READERS[rule](flat, **kwargs)
    except KeyError as error:
        raise ValueError(f"these are not the leaves of {rule!r}: {error.args[0]!r} is missing") from None
    return RULES[rule](**kwargs), {name: jnp.asarray(value) for name, value in theta.items()}

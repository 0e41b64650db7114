"""Rules from the flat ``{name: array}`` dicts in which the field publishes its meta-parameters."""

from collections.abc import Mapping

import jax
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


def _mlp(leaves: dict[str, np.ndarray], **kwargs) -> tuple[dict, Theta]:
    theta = {f"{name}{i}": leaves[f"mlp/~/linear_{i}/{name}"] for i in range(3) for name in ("w", "b")}
    return {"hidden_size": theta["w1"].shape[0], **kwargs}, theta


def _adafac_mlp(leaves: dict[str, np.ndarray], **kwargs) -> tuple[dict, Theta]:
    theta = {name: leaves[f"nn/~/{name}"] for name in ("w0", "b0", "w1", "b1", "w2", "b2")}
    theta |= {name: leaves[name] for name in ("momentum_decays", "rms_decays")}
    theta["factored_decays"] = leaves["adafactor_decays"]
    return {"hidden_size": theta["w1"].shape[0], **kwargs}, theta


_READERS = {"adafac_mlp": _adafac_mlp, "celo2": _celo2, "mlp": _mlp}


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
    made = RULES[rule](**kwargs)
    template = jax.eval_shape(made.init, jax.random.key(0))
    for (path, want), got in zip(jax.tree.leaves_with_path(template), jax.tree.leaves(theta), strict=True):
        if want.shape != got.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"these are not the leaves of {rule!r}: {name!r} would be {got.shape}, not {want.shape}")
    return made, jax.tree.map(jnp.asarray, theta)

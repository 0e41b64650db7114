"""Part of the parameters at a time: which leaf is in which fragment, and trees with the others masked."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

_NONE = -1  # the label of leaves that are no parameters: integers, flags, keys


def is_parameter(leaf: Any) -> bool:
    """Whether a leaf holds floating or complex numbers, which can be averaged."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def fragment_labels(fragments: int | Any, params: Any) -> tuple[list[int] | None, int]:
    """Return each leaf's fragment and the number of fragments; None in place of labels if all leaves are in one.

    Leaves that are no parameters (see :func:`is_parameter`) are in no fragment.
    """
    leaves = jax.tree.leaves(params)
    moving = [i for i, leaf in enumerate(leaves) if is_parameter(leaf)]
    if isinstance(fragments, int):
        if leaves and fragments > max(len(moving), 1):  # Optax's tools ask for the state of no leaves
            raise ValueError(
                f"fragments={fragments}, but the parameters have {len(moving)} leaves; a leaf is not split"
            )
        if fragments == 1 and len(moving) == len(leaves):
            return None, 1
        labels, filled = [_NONE] * len(leaves), [0] * fragments
        for i in sorted(moving, key=lambda i: -leaves[i].size):
            labels[i] = filled.index(min(filled))
            filled[labels[i]] += max(leaves[i].size, 1)
        return labels, fragments
    labels = jax.tree.leaves(fragments)
    count = max(labels, default=0) + 1
    trees: tuple[Any, Any] = (jax.tree.structure(fragments), jax.tree.structure(params))
    if trees[0] != trees[1] or sorted(set(labels)) != list(range(count)):
        raise ValueError(
            f"fragments must be an int, or one int 0..n-1 a leaf of the parameters, all used; got {fragments}"
        )
    if count == 1 and len(moving) == len(leaves):
        return None, 1
    return [label if i in moving else _NONE for i, label in enumerate(labels)], count


def pick(tree: Any, labels: list[int] | None, part: int) -> Any:
    """Return the tree with the other fragments' leaves masked, as ``optax.masked`` does."""
    if labels is None:
        return tree
    treedef: Any = jax.tree.structure(tree)
    chosen = [
        x if label == part else optax.MaskedNode() for x, label in zip(jax.tree.leaves(tree), labels, strict=True)
    ]
    return treedef.unflatten(chosen)


def merge(tree: Any, part: Any) -> Any:
    """Return the tree with the leaves that ``part`` has."""
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda new, old: old if masked(new) else new, part, tree, is_leaf=masked)

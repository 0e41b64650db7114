r"""Examples with hyperparameters of their own: the network runs on one example at a time, mapped by ``jax.vmap``.

So the axis of examples is known everywhere inside the network, whatever the network does with it: the examples of each
argument lie on the axis that ``in_axes`` says, as for ``jax.vmap``, and a module sees one example's input and one
example's delta. What takes statistics over the batch, a batch normalisation, takes them over the mapped axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .modules import EXAMPLES

Axes = Any  # an int, None, or a prefix tree of them


def _is_none(x: Any) -> bool:
    return x is None


def _axes(in_axes: Axes, args: tuple, kwargs: dict) -> list[int | None]:
    """Return for each leaf of (args, kwargs) the axis of its examples; None for what they share."""
    prefix = (in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args), dict.fromkeys(kwargs, 0))
    try:
        full = jax.tree.broadcast(prefix, (args, kwargs), is_leaf=_is_none)
    except ValueError as error:
        raise ValueError(f"lift: in_axes {in_axes!r} does not fit the {len(args)} arguments: {error}") from None
    chosen = jax.tree.leaves(full, is_leaf=_is_none)
    leaves = jax.tree.leaves((args, kwargs), is_leaf=_is_none)
    pairs = [(axis, leaf) for axis, leaf in zip(chosen, leaves, strict=True) if leaf is not None]
    return [axis if axis is not None and _rank(leaf) else None for axis, leaf in pairs]


def _rank(leaf: Any) -> int:
    return len(leaf.shape) if hasattr(leaf, "shape") else 0


def _named_leaves(args: tuple, kwargs: dict) -> list[tuple[str, Any]]:
    found = jax.tree_util.tree_leaves_with_path((args, kwargs))
    return [(f"argument {jax.tree_util.keystr(path[1:], simple=True, separator='/')}", leaf) for path, leaf in found]


def _size(name: str, leaf: Any, axis: int) -> int:
    if not -len(leaf.shape) <= axis < len(leaf.shape):
        raise ValueError(f"lift: {name} of shape {leaf.shape} has no axis {axis} for its examples: see in_axes")
    return leaf.shape[axis]


def over_examples(
    function: Callable[..., tuple[Any, Any]],
    delta: jax.Array,
    rngs: Any,
    args: tuple,
    kwargs: dict,
    in_axes: Axes,
    out_axes: Axes,
) -> tuple[Any, Any]:
    """Run a network's function on every example with its own delta.

    Args:
        function: ``(delta [H], rngs, args, kwargs) -> (outputs, state)`` of a batch of one example.
        delta: float [B, H].
        rngs: a pytree of PRNG keys; every example gets its own.
        args: the network's arguments.
        kwargs: likewise.
        in_axes: where ``args`` have their examples, as ``jax.vmap``'s; those of ``kwargs`` are on axis 0. Scalars, and
            what is no array, are shared.
        out_axes: where the outputs have their examples.

    Returns:
        Outputs of all examples, and the state, which they share.

    Raises:
        ValueError: if an argument, an output or the state is not what ``in_axes`` and ``out_axes`` say, by name.
    """
    count = delta.shape[0]
    leaves, tree = jax.tree.flatten((args, kwargs))
    axes = _axes(in_axes, args, kwargs)
    for (name, leaf), axis in zip(_named_leaves(args, kwargs), axes, strict=True):
        if axis is not None and _size(name, leaf, axis) != count:
            raise ValueError(
                f"lift: {name} of shape {leaf.shape} does not have the {count} examples that have hyperparameters of "
                f"their own on axis {axis}: say in in_axes where they are (None where examples share the argument), or "
                "make the hyperparameters per_example=False"
            )
    mapped = [leaf for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]

    def one(own: jax.Array, keys: Any, rows: list[Any]) -> tuple[Any, Any]:
        row = iter(rows)
        whole = [
            leaf if axis is None else jnp.expand_dims(next(row), axis) for leaf, axis in zip(leaves, axes, strict=True)
        ]
        out, state = function(own, keys, *jax.tree.unflatten(tree, whole))
        return _squeezed(out, out_axes), state

    keys = jax.tree.map(lambda key: jax.random.split(key, count), rngs)
    along = [axis for axis in axes if axis is not None]
    run = jax.vmap(one, in_axes=(0, 0, along), out_axes=(out_axes, None), axis_name=EXAMPLES)
    try:
        return run(delta, keys, mapped)
    except ValueError as error:
        if "out_axes" in str(error) and "None" in str(error):
            raise ValueError(
                "lift: the network's new state differs from example to example, so it cannot be one for the batch: "
                "make the hyperparameters per_example=False"
            ) from error
        raise


def _squeezed(out: Any, out_axes: Axes) -> Any:
    """Drop the axis of the one example from each output."""
    axes = jax.tree.leaves(jax.tree.broadcast(out_axes, out, is_leaf=_is_none), is_leaf=_is_none)
    leaves, tree = jax.tree.flatten(out)
    for leaf, axis in zip(leaves, axes, strict=True):
        if axis is None or not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != 1:
            raise ValueError(
                f"lift: an output of shape {leaf.shape} for one example does not have that one example on axis {axis}: "
                "say in out_axes where examples are, return one row an example (two views side by side, not one after "
                "the other), or make the hyperparameters per_example=False"
            )
    return jax.tree.unflatten(tree, [jnp.squeeze(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True)])


def check_apart(
    forward: Callable[..., Any], trees: Any, args: tuple, kwargs: dict, in_axes: Axes, out_axes: Axes
) -> None:
    """Check that a network's examples have nothing to do with each other, by running it on two examples twice.

    Weights and inputs are random numbers; between the two runs the second example changes, and the first example's
    outputs must not.

    Args:
        forward: ``(trees, args, kwargs) -> outputs`` without batch normalisation, whose coupling is known.
        trees: shapes of parameters and state.
        args: the network's arguments, or their shapes.
        kwargs: likewise.
        in_axes: as :func:`over_examples`'.
        out_axes: likewise.

    Raises:
        ValueError: if the first example's outputs depend on the second example, or outputs are not one row an example.
    """
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten((args, kwargs))
    axes = _axes(in_axes, args, kwargs)
    sizes = {
        name: _size(name, leaf, axis)
        for (name, leaf), axis in zip(_named_leaves(args, kwargs), axes, strict=True)
        if axis is not None
    }
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(
            f"lift: arguments differ in their number of examples ({listed}): say in in_axes where examples are, and "
            "None where they share an argument"
        )
    if not sizes:
        return

    def numbers(shape: tuple[int, ...], dtype: Any, centre: float = 0.5) -> Any:
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0, impl=str(dtype._impl)), shape)
        if jnp.issubdtype(dtype, jnp.inexact):
            return (centre + rng.uniform(-0.4, 0.4, shape)).astype(dtype)
        return rng.integers(0, 2, shape).astype(dtype)

    def shared(leaf: Any) -> Any:
        abstract = isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct)
        return numbers(leaf.shape, leaf.dtype) if abstract else leaf

    def some(leaf: Any, axis: int, count: int) -> Any:
        shape = list(leaf.shape)
        shape[axis] = count
        return numbers(tuple(shape), leaf.dtype)

    def changed(x: Any, axis: int) -> Any:  # 0 and 1 change places, in the second example
        if not isinstance(x, np.ndarray):
            return x
        second = np.arange(2).reshape((2,) + (1,) * (x.ndim - axis % x.ndim - 1)) == 1
        return np.where(second, ~x if x.dtype == bool else 1 - x, x).astype(x.dtype)

    @jax.jit
    def run(weights: Any, rows: list[Any]) -> Any:
        row = iter(rows)
        whole = [fixed if axis is None else next(row) for fixed, axis in zip(others, axes, strict=True)]
        return forward(weights, *jax.tree.unflatten(tree, whole))

    with jax.ensure_compile_time_eval():
        others = [shared(leaf) if axis is None else None for leaf, axis in zip(leaves, axes, strict=True)]
        mapped = [(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]
        weights = jax.tree.map(lambda s: numbers(s.shape, s.dtype, 0.0), trees)
        two = [some(leaf, axis, 2) for leaf, axis in mapped]
        try:
            three = jax.eval_shape(run, weights, [some(leaf, axis, 3) for leaf, axis in mapped])
            before = jax.device_get(run(weights, two))
            after = jax.device_get(run(weights, [changed(x, axis) for x, (_, axis) in zip(two, mapped, strict=True)]))
        except (TypeError, ValueError) as error:
            raise ValueError(
                "lift: the network does not run on two and three examples instead of those given. If an argument's "
                f"examples are elsewhere, or it is shared, say so in in_axes (now {in_axes!r}); pass coupled=True if "
                f"the network needs its batch whole. The error was: {error}"
            ) from error
    along = jax.tree.leaves(jax.tree.broadcast(out_axes, before, is_leaf=_is_none), is_leaf=_is_none)
    for a, b, c, axis in zip(*(jax.tree.leaves(tree) for tree in (before, after, three)), along, strict=True):
        if axis is None or not -a.ndim <= axis < a.ndim or (a.shape[axis], c.shape[axis]) != (2, 3):
            raise ValueError(
                f"lift: an output of shape {a.shape} for two examples and {c.shape} for three does not have them on "
                f"axis {axis}: say in out_axes where they are, return one row an example (two views side by side, not "
                "one after the other), or pass coupled=True and make the hyperparameters per_example=False"
            )
        first, again = (np.take(x, 0, axis).astype(np.float64) for x in (a, b))
        if not np.allclose(first, again, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"lift: an example's output (of shape {a.shape} for two examples) depends on the other example. Either "
                "an argument's examples are not where in_axes says, or the network mixes the examples of a batch; then "
                "they have no hyperparameters of their own: pass coupled=True, and make them per_example=False"
            )

"""Which axes of a parameter are inputs of its layer, which are outputs, and which index layers.

A layout is a function of a parameter's path and shape. Its answer is Optax's type for Muon, so that one function serves
``optax.contrib.muon`` and the rules of this package.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers

Layout = Callable[[str, tuple[int, ...]], MuonDimensionNumbers]

_HEADS = re.compile(r"(^|/)(query|key|value)/(kernel|bias)$")
_TABLE = re.compile(r"(?<![a-z])(embed(ding|der)?s?|positions?)(_?(table|matrix))?(/value|/weight)?$")


def outputs_last(path: str, shape: tuple[int, ...]) -> MuonDimensionNumbers:
    """The default, Haiku's and Flax's layout: the last axis is the layer's outputs, all others are its inputs.

    Of Flax's attention the queries', keys' and values' kernels ``[inputs, heads, size]`` have two axes of outputs, and
    their biases ``[heads, size]`` no inputs. A kernel of that name and rank which is something else, such as a stack of
    plain matrices, wants :func:`stacked`.

    Args:
        path: the parameter's names, joined by ``/``.
        shape: its shape.

    Returns:
        ``reduction_axis`` holds the axes of the inputs, ``output_axis`` those of the outputs; what is in neither
        indexes separate tensors. A vector has no inputs.

    Example:
        >>> outputs_last("conv/w", (3, 3, 64, 128))
        MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,))
        >>> outputs_last("attention/query/kernel", (512, 8, 64))
        MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
    """
    rank = len(shape)
    found = _HEADS.search(path.removesuffix("/value"))  # NNX keeps an array under "value" of its parameter
    of_heads = found is not None and rank == (3 if found[3] == "kernel" else 2)
    inputs = max(rank - 1 - of_heads, 0)
    return MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, rank)))


def outputs_first(path: str, shape: tuple[int, ...]) -> MuonDimensionNumbers:
    """Equinox's layout: weights are ``[outputs, inputs, *window]``, biases have no inputs.

    Tables of embeddings (:func:`is_table`) are ``[tokens, width]``, as in the other libraries. A linear layer of such a
    name wants a function of your own.

    Args:
        path: as for :func:`outputs_last`, as the next one.
        shape: see there.

    Returns:
        See there.

    Example:
        >>> outputs_first("layers/0/weight", (128, 64))
        MuonDimensionNumbers(reduction_axis=(1,), output_axis=(0,))
    """
    axes = tuple(range(len(shape)))
    if len(shape) == 2 and is_table(path, shape):
        return MuonDimensionNumbers((0,), (1,))
    if path.rpartition("/")[2].startswith("bias"):  # of a convolution: [outputs, 1, 1]
        return MuonDimensionNumbers((), axes)
    return MuonDimensionNumbers(axes[2:] + axes[1:2], axes[:1])  # the window first, as elsewhere


def stacked(layers: Callable[[str], Any], layout: Layout = outputs_last) -> Layout:
    """A layout in which some parameters are stacks, whose first axis indexes layers, as a scanned network has them.

    Args:
        layers: of a path, whether that parameter is a stack.
        layout: of all else, and of one layer of a stack.

    Returns:
        A layout.

    Example:
        >>> layout = stacked(lambda path: path.startswith("layers/"))
        >>> layout("layers/w", (12, 64, 128))
        MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    """

    def of(path, shape):
        if not layers(path):
            return layout(path, shape)
        inputs, outputs = _axes(layout(path, shape[1:]), len(shape) - 1)
        return MuonDimensionNumbers(tuple(a + 1 for a in inputs), tuple(a + 1 for a in outputs))

    return of


def fan_in(shape: tuple[int, ...]) -> int:
    """The number of inputs of a tensor whose last axis is its outputs: 1 for a vector."""
    return math.prod(shape[:-1])


class View(NamedTuple):
    """How a parameter is seen: layers first, then inputs, then the outputs as one axis.

    Attributes:
        order: the parameter's axes in that order.
        layers: how many of them index layers.
        shape: the shape that is seen.
        own: the parameter's own shape.
        table: whether it is a matrix of embeddings (:func:`is_table`).
    """

    order: tuple[int, ...]
    layers: int
    shape: tuple[int, ...]
    own: tuple[int, ...]
    table: bool


def view_of(layout: Layout, path: tuple, leaf: Any) -> View:
    """How a layout sees a parameter.

    Raises:
        ValueError: what it gives are no axes of that parameter, or one of them twice.
    """
    name, own = name_of(path), jnp.shape(leaf)
    given = layout(name, own)
    try:
        inputs, outputs = _axes(given, len(own))
    except (TypeError, ValueError, IndexError):
        raise ValueError(f"the layout gives {given!r} for {name!r} of shape {own}") from None
    layers = tuple(axis for axis in range(len(own)) if axis not in inputs + outputs)
    shape = [own[axis] for axis in layers + inputs]
    if outputs:
        shape.append(math.prod(own[axis] for axis in outputs))
    return View(layers + inputs + outputs, len(layers), tuple(shape), own, is_table(name, tuple(shape)[len(layers) :]))


def is_table(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is by its name a table of embeddings, of tokens or of positions.

    The name ends in one of the words embed, embedding, embedder, position, their plurals, or one of these and table or
    matrix: the parameter's own, or that of the module whose ``weight`` it is, as in Equinox. There a linear layer of
    such a name is taken for a table too.

    Args:
        path: the parameter's names, joined by ``/``.
        shape: its shape, or that of one layer of a stack: two axes, after any of length 1.

    Returns:
        The answer.

    Example:
        >>> is_table("encoder/token_embed/embedding", (512, 64)), is_table("patch_embed/kernel", (48, 64))
        (True, False)
    """
    matrix = len(shape) >= 2 and math.prod(shape[:-2]) == 1
    return matrix and _TABLE.search(path.lower()) is not None


def seen(x: jax.Array, view: View) -> jax.Array:
    """A parameter, or what has its shape, as a rule sees it."""
    return x.transpose(view.order).reshape(view.shape)


def unseen(x: jax.Array, view: View) -> jax.Array:
    """The inverse of :func:`seen`."""
    return x.reshape([view.own[axis] for axis in view.order]).transpose(np.argsort(view.order))


def name_of(path: tuple) -> str:
    """The names of a path, joined by ``/``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _axes(given: MuonDimensionNumbers, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Inputs and outputs, none negative.

    Raises:
        IndexError, TypeError, ValueError: they are no axes of a tensor of that rank, or not distinct.
    """
    inputs, outputs = (
        tuple(range(rank)[axis] for axis in np.atleast_1d(np.asarray(axes, int)).tolist()) for axes in given
    )
    if len({*inputs, *outputs}) != len(inputs + outputs):
        raise ValueError("an axis twice")
    return inputs, outputs

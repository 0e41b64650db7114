"""Which tensors Muon is for: matrices and kernels between layers."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from .layouts import Layout, name_of, outputs_last

# As words: no heads of attention; and "output" only of what holds the parameter: no block's output/dense.
_LAST = re.compile(r"(?<![a-z])((?<!multi_)head|output(?![a-z])[^/]*(/[^/]*)?$)(?![a-z])")


def hidden_matrices(params: Any, layout: Layout = outputs_last) -> Any:
    """Say to ``optax.contrib.muon`` which tensors to orthogonalise: those between layers, convolutions too.

    Left alone, it orthogonalises every matrix, embeddings and the last layer among them, and leaves the kernels of
    convolutions to AdamW. Its authors do neither.

    Args:
        params: the parameters, a tree whose names say what a tensor is: see :func:`is_hidden`.
        layout: which axes are inputs, outputs and layers, as for :func:`learned_opt.load`. Set it by
            ``functools.partial``.

    Returns:
        A tree like ``params``: dimension numbers for the tensors to orthogonalise, None for those of AdamW.

    Example:
        >>> from optax.contrib import muon
        >>> tx = muon(0.02, muon_weight_dimension_numbers=hidden_matrices, consistent_rms=0.2)
        >>> state = tx.init({"conv": jnp.zeros((3, 3, 8, 16)), "output": jnp.zeros((16, 10))})

    Reference: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def numbers(path, leaf):
        return layout(name_of(path), jnp.shape(leaf)) if is_hidden(path, leaf, layout) else None

    return jax.tree_util.tree_map_with_path(numbers, params)


def is_hidden(path: tuple, leaf: Any, layout: Layout = outputs_last) -> bool:
    """Whether a tensor is a matrix or kernel between layers: neither a vector nor an embedding nor the last layer.

    Parameters that a Haiku function makes outside its layers (in ``"~"``) are embeddings; so is what has ``embed`` or
    ``positions`` in its name; the last layer has the word ``head``, or ``output`` in the name of the parameter or of
    the layer that holds it. What the layout gives no inputs is a vector, and so is what is called ``bias``.
    """
    name = name_of(path).lower()
    vector = not layout(name_of(path), jnp.shape(leaf)).reduction_axis or name.endswith("bias")
    embedding = name.startswith("~") or "embed" in name or "positions" in name
    return not vector and not embedding and not _LAST.search(name)

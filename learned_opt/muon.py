"""Which tensors Muon is for: matrices and kernels between layers."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

_LAST = re.compile(r"(?<![a-z])(output|(?<!multi_)head)(?![a-z])")  # as words: no heads of attention


def hidden_matrices(params: Any) -> Any:
    """Say to ``optax.contrib.muon`` which tensors to orthogonalise: those between layers, convolutions too.

    Left alone, it orthogonalises every matrix, embeddings and the last layer among them, and leaves the kernels of
    convolutions to AdamW. Its authors do neither.

    Args:
        params: the parameters, a tree whose names say what a tensor is: see :func:`is_hidden`.

    Returns:
        A tree like ``params``: dimension numbers for the tensors to orthogonalise, None for those of AdamW.

    Example:
        >>> from optax.contrib import muon
        >>> tx = muon(0.02, muon_weight_dimension_numbers=hidden_matrices, consistent_rms=0.2)
        >>> state = tx.init({"conv": jnp.zeros((3, 3, 8, 16)), "output": jnp.zeros((16, 10))})

    Reference: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: as_matrix(leaf) if is_hidden(path, leaf) else None, params
    )


def is_hidden(path: tuple, leaf: Any) -> bool:
    """Whether a tensor is a matrix or kernel between layers: neither a vector nor an embedding nor the last layer.

    Parameters that a Haiku function makes outside its layers (in ``"~"``) are embeddings; so is what has ``embed`` or
    ``positions`` in its name; the last layer has the word ``output`` or ``head``.
    """
    name = jax.tree_util.keystr(path, simple=True, separator="/").lower()
    embedding = name.startswith("~") or "embed" in name or "positions" in name
    return jnp.ndim(leaf) >= 2 and not embedding and not _LAST.search(name)


def as_matrix(kernel: jax.Array) -> MuonDimensionNumbers:
    """Outputs are the last axis, inputs all others."""
    return MuonDimensionNumbers(tuple(range(kernel.ndim - 1)), kernel.ndim - 1)

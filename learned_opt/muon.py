"""Which tensors Muon is for: matrices and kernels between layers."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

# As words: no heads of attention; and "output" only of what holds the parameter: no block's output/dense.
_LAST = re.compile(r"(?<![a-z])((?<!multi_)head|output(?![a-z])[^/]*(/[^/]*)?$)(?![a-z])")
_HEADS = re.compile(r"(^|/)(query|key|value)/kernel$")


def hidden_matrices(params: Any) -> Any:
    """Say to ``optax.contrib.muon`` which tensors to orthogonalise: those between layers, convolutions too.

    Left alone, it orthogonalises every matrix, embeddings and the last layer among them, and leaves the kernels of
    convolutions to AdamW. Its authors do neither. Layers that are stacked, as for a scan, would be taken for one
    matrix: give those dimension numbers of your own.

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
        lambda path, leaf: as_matrix(path, leaf) if is_hidden(path, leaf) else None, params
    )


def is_hidden(path: tuple, leaf: Any) -> bool:
    """Whether a tensor is a matrix or kernel between layers: neither a vector nor an embedding nor the last layer.

    Parameters that a Haiku function makes outside its layers (in ``"~"``) are embeddings; so is what has ``embed`` or
    ``positions`` in its name; the last layer has the word ``head``, or ``output`` in the name of the parameter or of
    the layer that holds it. What is called ``bias`` is a vector, whatever its rank: Flax's attention has one a head.
    """
    name = _name(path)
    embedding = name.startswith("~") or "embed" in name or "positions" in name
    return jnp.ndim(leaf) >= 2 and not embedding and not name.endswith("bias") and not _LAST.search(name)


def as_matrix(path: tuple, kernel: jax.Array) -> MuonDimensionNumbers:
    """Outputs are the last axis, inputs all others; of Flax's queries, keys and values outputs are heads and size."""
    inputs = 1 if _HEADS.search(_name(path)) and kernel.ndim == 3 else kernel.ndim - 1
    return MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, kernel.ndim)))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").lower()

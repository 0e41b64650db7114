"""SOAP, a baseline of the benchmark that Optax does not have: Adam in the eigenbasis of Shampoo's preconditioner."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt.rules.eigenbasis import as_matrix, follow, rotate, rotate_back, start


class SoapState(NamedTuple):
    """What SOAP carries; trees over the parameters' leaves, as matrices."""

    step: jax.Array
    mean: Any  # of gradients in the eigenbasis
    square: Any  # of gradients in the eigenbasis
    sides: Any  # statistics and bases


def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    every: int = 10,
    max_dim: int = 1024,
) -> optax.GradientTransformation:
    r"""Adam in the eigenbasis of Shampoo's preconditioner.

    For a matrix with gradient :math:`G`, :math:`L \leftarrow \beta_2 L + (1 - \beta_2) G G^\top` and likewise
    :math:`R`; with their eigenvectors :math:`Q_L, Q_R` the update is
    :math:`-\eta\, Q_L\, \mathrm{Adam}(Q_L^\top G Q_R)\, Q_R^\top`; the mean of gradients turns with the basis. The
    eigenvectors come from an eigendecomposition at the first update and from one step of the power method and a QR
    decomposition every few updates after it. Tensors of higher rank are matrices of their last axis against the
    others; vectors get Adam.

    Args:
        learning_rate: :math:`\eta`.
        b1: decay of the mean of gradients.
        b2: decay of the squares and of :math:`L` and :math:`R`.
        eps: added to the root of the squares.
        weight_decay: decoupled, as in AdamW.
        every: updates between two corrections of the eigenvectors.
        max_dim: a longer side of a matrix is not rotated.

    Returns:
        An Optax transform.

    Example:
        >>> params = {"w": jnp.ones((3, 2))}
        >>> transform = soap(0.1)
        >>> updates, _ = transform.update(params, transform.init(params), params)
        >>> updates["w"].shape
        (3, 2)

    Reference: Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", 2024, arXiv:2409.11321.
    """

    def init_fn(params):
        flat = jax.tree.map(as_matrix, params)
        sides = jax.tree.map(lambda x: start(x, max_dim, x.dtype), flat)
        return SoapState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, flat), jax.tree.map(jnp.zeros_like, flat), sides
        )

    def update_fn(updates, state, params=None):
        del params
        step = state.step + 1
        grads, tree = jax.tree.flatten(updates)
        carried = [tree.flatten_up_to(part) for part in state[1:]]  # type: ignore[attr-defined]
        results = [_leaf(g, step, b1, b2, eps, every, *parts) for g, *parts in zip(grads, *carried, strict=True)]
        columns = zip(*results, strict=True) if results else [()] * 4
        updates, *parts = (jax.tree.unflatten(tree, column) for column in columns)
        return updates, SoapState(step, *parts)

    return optax.chain(
        optax.GradientTransformation(init_fn, update_fn),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _leaf(grad, step, b1, b2, eps, every, mean, square, sides):
    """One leaf's Adam direction and its new state."""
    g = as_matrix(grad)
    sides, moved, turned = follow(sides, g, step, decay=b2, every=every)
    g = rotate(g, sides)
    mean = b1 * turned(mean) + (1 - b1) * g
    square = b2 * moved(square) + (1 - b2) * jnp.square(g)
    root = jnp.sqrt(square / (1 - b2**step)) + eps
    direction = rotate_back(mean / (1 - b1**step) / root, sides)
    return direction.reshape(grad.shape), mean, square, sides

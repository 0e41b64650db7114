"""SOAP, a baseline of the benchmark that Optax does not have: Adam in the eigenbasis of Shampoo's preconditioner."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SoapState(NamedTuple):
    """What SOAP carries; trees over the parameters' leaves."""

    step: jax.Array
    mean: Any  # of gradients, in the parameters' own coordinates
    square: Any  # of gradients in the eigenbasis
    left: Any  # [m, m]: running mean of G G'; a scalar where that side is not rotated
    right: Any  # [n, n]: running mean of G' G, likewise
    left_basis: Any  # its eigenvectors, approximately
    right_basis: Any


def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    every: int = 10,
    max_dim: int = 256,
) -> optax.GradientTransformation:
    r"""Adam in the eigenbasis of Shampoo's preconditioner.

    For a matrix with gradient :math:`G`, :math:`L \leftarrow \beta_2 L + (1 - \beta_2) G G^\top` and likewise
    :math:`R`; with their eigenvectors :math:`Q_L, Q_R` the update is
    :math:`-\eta\, Q_L\, \mathrm{Adam}(Q_L^\top G Q_R)\, Q_R^\top`, where the mean of gradients is kept in the matrix's
    own coordinates. The eigenvectors come from an eigendecomposition at the first update and from one step of the power
    method and a QR decomposition every few updates after it. Tensors of higher rank are matrices of their last axis
    against the others; vectors get Adam.

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

    def sides(leaf) -> tuple[int, int]:
        """The rotated sides of a leaf as a matrix, 0 where a side is not rotated."""
        if leaf.ndim < 2:
            return 0, 0
        shape = math.prod(leaf.shape[:-1]), leaf.shape[-1]
        return tuple(side if side <= max_dim else 0 for side in shape)  # type: ignore[return-value]

    def init_fn(params):
        leaves, tree = jax.tree.flatten(params)

        def of(make):
            return jax.tree.unflatten(tree, [make(leaf) for leaf in leaves])

        def square_of(side, make):
            return of(lambda leaf: make(sides(leaf)[side], leaf.dtype) if sides(leaf)[side] else jnp.zeros(()))

        zeros, eye = lambda n, dtype: jnp.zeros((n, n), dtype), lambda n, dtype: jnp.eye(n, dtype=dtype)
        return SoapState(
            step=jnp.zeros((), jnp.int32),
            mean=of(jnp.zeros_like),
            square=of(jnp.zeros_like),
            left=square_of(0, zeros),
            right=square_of(1, zeros),
            left_basis=square_of(0, eye),
            right_basis=square_of(1, eye),
        )

    def update_fn(updates, state, params=None):
        del params
        step = state.step + 1
        grads, tree = jax.tree.flatten(updates)
        carried = [jax.tree.leaves(part) for part in state[1:]]
        results = [_leaf(g, step, b1, b2, eps, every, *parts) for g, *parts in zip(grads, *carried, strict=True)]
        columns = zip(*results, strict=True) if results else [()] * 7
        updates, *parts = (jax.tree.unflatten(tree, column) for column in columns)
        return updates, SoapState(step, *parts)

    return optax.chain(
        optax.GradientTransformation(init_fn, update_fn),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _leaf(grad, step, b1, b2, eps, every, mean, square, left, right, left_basis, right_basis):
    """One leaf's Adam direction and its new state; a scalar stands for a side that is not rotated."""
    matrix = grad.reshape(-1, grad.shape[-1]) if grad.ndim > 1 else grad
    squares = square.reshape(matrix.shape)
    if left.ndim:
        left = b2 * left + (1 - b2) * (matrix @ matrix.T)
        left_basis, squares = _correct(left, left_basis, squares, 0, step, every)
    if right.ndim:
        right = b2 * right + (1 - b2) * (matrix.T @ matrix)
        right_basis, squares = _correct(right, right_basis, squares, 1, step, every)

    def rotate(x, back=False):
        if left.ndim:
            x = (left_basis if back else left_basis.T) @ x
        return x @ (right_basis.T if back else right_basis) if right.ndim else x

    mean = b1 * mean + (1 - b1) * grad
    squares = b2 * squares + (1 - b2) * jnp.square(rotate(matrix))
    root = jnp.sqrt(squares / (1 - b2**step)) + eps
    direction = rotate(rotate(mean.reshape(matrix.shape) / (1 - b1**step)) / root, back=True)
    return direction.reshape(grad.shape), mean, squares.reshape(square.shape), left, right, left_basis, right_basis


def _correct(statistic, basis, squares, axis, step, every):
    """The eigenvectors, largest first, and the squares in their order: corrected now and then, else as they were."""

    def decompose():
        return jnp.linalg.eigh(statistic)[1][:, ::-1], squares

    def iterate():
        turned = statistic @ basis
        # The power method pulls the first columns towards the largest eigenvalues: they must be there already, or
        # directions of little curvature would inherit the steps of those of much.
        order = jnp.argsort(-jnp.sum(basis * turned, axis=0))
        return jnp.linalg.qr(turned[:, order])[0], jnp.take(squares, order, axis=axis)

    def keep():
        return basis, squares

    return jax.lax.cond(step == 1, decompose, lambda: jax.lax.cond(step % every == 1 % every, iterate, keep))

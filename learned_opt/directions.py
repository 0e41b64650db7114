"""SOAP, and SOAP followed by Newton-Schulz: the hand-made directions of the learned rules, for Optax."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import eigenbasis
from .features import compute_dtype
from .layouts import Layout
from .loaded import Mask, check_rate, decay_weights
from .newton_schulz import newton_schulz
from .tensors import each, rule_transform


class AdamInBasis(NamedTuple):
    """What SOAP accumulates of a tensor.

    Attributes:
        m: mean of the gradients in the eigenbasis; a matrix for a tensor of rank >= 2.
        v: mean of their squares.
        sides: the matrix's statistics and bases.
    """

    m: jax.Array
    v: jax.Array
    sides: eigenbasis.Sides


def scale_by_soap(
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    every: int = 10,
    max_dim: int = 10_000,
    max_ratio: float = math.inf,
    orthogonalize: bool = False,
    layout: Layout | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of :func:`soap` (or :func:`soap_muon`), downhill, without learning rate and weight decay.

    Args:
        b1: as for :func:`soap`, as the others are.
        b2: see there.
        eps: see there.
        every: see there.
        max_dim: see there.
        max_ratio: see there.
        orthogonalize: take five Newton-Schulz steps from the direction of tensors of rank >= 2, and bring it to unit
            RMS.
        layout: see there.

    Returns:
        An Optax transform; its state is a :class:`learned_opt.tensors.RuleState`.
    """
    if every < 1:
        raise ValueError(f"soap needs every >= 1, got {every}")

    def start(p):
        matrix, dtype = eigenbasis.as_matrix(p), compute_dtype(p.dtype)
        m, v = (jnp.zeros_like(matrix, dtype) for _ in range(2))
        return AdamInBasis(m, v, eigenbasis.start(matrix, max_dim=max_dim, max_ratio=max_ratio, dtype=dtype))

    def step(count, gradient, p, state):
        del p
        m, v, sides = state
        g, first = eigenbasis.as_matrix(gradient), count == 0
        seen = eigenbasis.rotate(g, sides)
        m = jnp.where(first, m, b1 * m + (1 - b1) * seen)
        v = jnp.where(first, v, b2 * v + (1 - b2) * seen * seen)
        t = jnp.maximum(count, 1).astype(g.dtype)
        u = eigenbasis.rotate_back(m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps), sides)
        if orthogonalize and u.ndim == 2:
            u = newton_schulz(u)
            u = u * jax.lax.rsqrt(jnp.mean(u * u) + 1e-30)
        return -u.reshape(gradient.shape), AdamInBasis(m, v, eigenbasis.observe(sides, g, b2))

    def update(groups, count, shared, value):
        del value
        results = each(functools.partial(step, count), groups)
        stacks = [eigenbasis.Stack(x.sides, x.m, x.v) for _, x in results]
        tensors = [AdamInBasis(x.turning, x.squares, x.sides) for x in eigenbasis.correct(count, stacks, every=every)]
        return [(u, new) for (u, _), new in zip(results, tensors, strict=True)], shared

    return rule_transform("soap", start=start, update=update, rest=orthogonalize, reads_params=False, layout=layout)


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    every: int = 10,
    max_dim: int = 10_000,
    max_ratio: float = math.inf,
    layout: Layout | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

    With :math:`Q_L, Q_R` the eigenvectors of running means (decay ``b2``) of :math:`G G^\top` and :math:`G^\top G`,

    .. math::
        G' = Q_L^\top G\, Q_R, \quad M \leftarrow \beta_1 M + (1 - \beta_1) G', \quad
        V \leftarrow \beta_2 V + (1 - \beta_2) G'^2, \quad
        u = -\eta\, Q_L \frac{\hat M}{\sqrt{\hat V} + \epsilon} Q_R^\top

    with :math:`M` turned whenever the basis is. The first update only starts the statistics and moves nothing, as
    published: in its own eigenbasis all but a diagonal of a gradient is rounding noise.

    Differences from the published algorithm, with ``every=1`` or one matrix of a shape none in value: the bases of the
    matrices of one shape are corrected in turns, each once in ``every`` updates, instead of all at once; a matrix's
    basis is the identity until its first turn. Tensors of higher rank are matrices of their outputs against all
    inputs. Vectors get Adam. :math:`\epsilon` is added to the bias-corrected root, as in Adam.

    Args:
        learning_rate: :math:`\eta`, a float or an Optax schedule.
        b1: decay of the mean of gradients.
        b2: decay of the squares and of the statistics.
        eps: :math:`\epsilon`.
        weight_decay: decoupled, as in AdamW.
        mask: which parameters decay, as in ``optax.adamw``.
        every: updates between two corrections of a basis, by one step of the power method and a QR decomposition.
        max_dim: a longer side of a matrix is not rotated.
        max_ratio: nor is one of more than so many times the other side; 2 makes SOAP one-sided where the longer side
            costs most.
        layout: which axes are inputs, which outputs and which index layers, :func:`~learned_opt.layouts.outputs_last`
            by default; :func:`~learned_opt.layouts.outputs_first` for Equinox.

    Returns:
        An Optax transform. State: two numbers a parameter, and two ``n x n`` matrices a side of ``n`` rows.

    Raises:
        ValueError: if ``every`` is below 1.

    Example:
        >>> params = {"w": jnp.ones((3, 2))}
        >>> tx = soap(0.1)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(updates["w"].shape)
        (3, 2)

    Reference:
        Vyas et al., "SOAP: Improving and stabilizing Shampoo using Adam", 2024, arXiv:2409.11321.
    """
    basis = {"every": every, "max_dim": max_dim, "max_ratio": max_ratio, "layout": layout}
    return _with_rate(learning_rate, weight_decay, mask, b1=b1, b2=b2, eps=eps, **basis)


def soap_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    every: int = 10,
    max_dim: int = 10_000,
    max_ratio: float = math.inf,
    layout: Layout | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP followed by Newton-Schulz: :math:`u = -\eta\, \mathrm{NS}(u_\mathrm{SOAP})` at unit RMS.

    The direction of :func:`soap` of every tensor of rank >= 2 goes through five Newton-Schulz steps towards the nearest
    orthogonal matrix, as Muon's momentum does, and is brought to unit RMS; vectors get Adam. What has no gradient rests
    (:func:`learned_opt.tensors.rule_transform`).

    Args:
        learning_rate: :math:`\eta`, a float or an Optax schedule: the root mean square of a matrix's step.
        b1: as for :func:`soap`, as the others are.
        b2: see there.
        eps: see there.
        weight_decay: see there.
        mask: see there.
        every: see there.
        max_dim: see there.
        max_ratio: see there.
        layout: see there.

    Returns:
        An Optax transform; its state is that of :func:`soap` and a byte a parameter.

    Raises:
        ValueError: if ``every`` is below 1.

    Example:
        >>> params = {"w": jnp.ones((3, 2))}
        >>> tx = soap_muon(0.1)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> print(updates["w"].shape)
        (3, 2)
    """
    basis = {"every": every, "max_dim": max_dim, "max_ratio": max_ratio, "layout": layout}
    return _with_rate(learning_rate, weight_decay, mask, b1=b1, b2=b2, eps=eps, orthogonalize=True, **basis)


def _with_rate(learning_rate, weight_decay, mask, **direction: Any) -> optax.GradientTransformationExtraArgs:
    check_rate("learning_rate", learning_rate)
    check_rate("weight_decay", weight_decay)
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)
    decay = decay_weights(weight_decay, mask) if decays else optax.identity()
    rate = optax.scale_by_learning_rate(learning_rate, flip_sign=False)
    return optax.with_extra_args_support(optax.chain(scale_by_soap(**direction), decay, rate))

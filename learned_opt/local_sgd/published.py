"""Methods of local training as published: :func:`~learned_opt.local_sgd.local_sgd` with their constants.

Each takes the worker's transform, so that its step size can be tuned, and any other option of ``local_sgd``. Constants
are those of the papers, for language models: elsewhere they too are to be tuned.
"""

from typing import Any

import optax

from .. import communication, schedules
from .transform import LocalSGD, local_sgd


def diloco(
    inner: optax.GradientTransformation,
    *,
    sync_every: Any = 500,
    learning_rate: optax.ScalarOrSchedule = 0.7,
    momentum: float = 0.9,
    **options: Any,
) -> LocalSGD:
    r"""DiLoCo: AdamW inside, Nesterov momentum on the mean delta.

    .. math:: v \leftarrow \mu v + d, \qquad x_0 \leftarrow x_0 - \eta (d + \mu v)

    Args:
        inner: as published, ``optax.adamw(schedule, weight_decay=0.1)``; its state is kept.
        sync_every: H.
        learning_rate: :math:`\eta`.
        momentum: :math:`\mu`.
        **options: of :func:`~learned_opt.local_sgd.local_sgd`. ``fragments=n``, ``sync_every=H // n``, ``overlap=tau``
            and ``mixing=0.5`` is Streaming DiLoCo.

    Returns:
        An Optax transform, as ``local_sgd``.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = diloco(optax.adamw(1e-3, weight_decay=0.1), sync_every=64, compression="int8")
        >>> state = tx.init({"w": jnp.zeros((4, 3))})

    Reference:
        Douillard et al., "DiLoCo: distributed low-communication training of language models", 2023 (arXiv:2311.08105).
    """
    outer = optax.sgd(learning_rate, momentum=momentum, nesterov=True)
    return local_sgd(inner, outer, sync_every=sync_every, **options)


def muloco(
    inner: optax.GradientTransformation,
    *,
    sync_every: Any = 30,
    learning_rate: optax.ScalarOrSchedule = 0.7,
    momentum: float = 0.6,
    **options: Any,
) -> LocalSGD:
    """MuLoCo: :func:`diloco` with Muon inside, and less outer momentum.

    The outer constants are the authors' defaults for one worker (``axis_name`` of size 1); for more, they tune them.

    Args:
        inner: as published, Muon for hidden matrices and AdamW for the rest:
            ``optax.contrib.muon(schedule, muon_weight_dimension_numbers=learned_opt.hidden_matrices)``.
        sync_every: H.
        learning_rate: of the outer step.
        momentum: of the outer step.
        **options: of :func:`~learned_opt.local_sgd.local_sgd`.

    Returns:
        An Optax transform, as ``local_sgd``.

    Example:
        >>> import jax.numpy as jnp
        >>> from learned_opt import hidden_matrices
        >>> tx = muloco(optax.contrib.muon(0.02, muon_weight_dimension_numbers=hidden_matrices))
        >>> state = tx.init({"w": jnp.zeros((4, 3))})

    Reference:
        Thérien, Huang, Defazio, Rish, Belilovsky, "MuLoCo: Muon is a practical inner optimizer for DiLoCo", 2025
        (arXiv:2505.23725), and the authors' ``muloco-1``.
    """
    return diloco(inner, sync_every=sync_every, learning_rate=learning_rate, momentum=momentum, **options)


def sparseloco(
    inner: optax.GradientTransformation,
    *,
    sync_every: Any = 30,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    k: int = 64,
    chunk: int = 4096,
    bits: int = 2,
    decay: float = 0.95,
    **options: Any,
) -> LocalSGD:
    r"""SparseLoCo: 1 to 3 % of the entries at 2 bits; what was not sent, decayed, takes the outer momentum's place.

    .. math:: e_i \leftarrow \beta e_i + d_i, \quad \hat d_i = Q(\mathrm{top}_k(e_i)), \quad
        e_i \leftarrow e_i - \hat d_i, \quad x_0 \leftarrow x_0 - \eta\, \mathrm{mean}_i\, \hat d_i

    Args:
        inner: as published, ``optax.adamw``.
        sync_every: H; 15 to 250 in the paper.
        learning_rate: :math:`\eta`.
        k: entries sent of each chunk; 64 of 4096 are 1.6 %.
        chunk: see :func:`learned_opt.communication.chunked_top_k`, whose quantiser (means of equal intervals) stands
            for the authors'.
        bits: likewise.
        decay: :math:`\beta`.
        **options: of :func:`~learned_opt.local_sgd.local_sgd`.

    Returns:
        An Optax transform, as ``local_sgd``.

    Example:
        >>> import jax.numpy as jnp
        >>> tx = sparseloco(optax.adamw(1e-3), sync_every=15, k=128)
        >>> state = tx.init({"w": jnp.zeros((4, 3))})

    Reference:
        Sarfi, Thérien, Lidin, Belilovsky, "Communication efficient LLM pre-training with SparseLoCo", 2025
        (arXiv:2508.15706).
    """
    code = communication.chunked_top_k(k, chunk, bits=bits)
    outer = optax.sgd(learning_rate)
    return local_sgd(inner, outer, sync_every=sync_every, compression=code, error_feedback=decay, **options)


def post_local(
    inner: optax.GradientTransformation, *, switch_step: int, sync_every: int = 16, **options: Any
) -> LocalSGD:
    """Post-local SGD: averaging after every step first, and every H steps from ``switch_step`` on.

    Args:
        inner: as published, SGD with Nesterov momentum.
        switch_step: as published, when the learning rate first falls.
        sync_every: H.
        **options: of :func:`~learned_opt.local_sgd.local_sgd`.

    Returns:
        An Optax transform, as ``local_sgd``.

    Reference:
        Lin, Stich, Patel, Jaggi, "Don't use large mini-batches, use local SGD", 2020.
    """
    return local_sgd(inner, sync_every=schedules.post_local(switch_step, sync_every), **options)

r"""What a self-tuning network's parts descend: pure functions of a perturbation that is passed in.

With z standard normal, :math:`\sigma` the scale of the perturbations, and hyperparameters :math:`\ell`:

* elementary: :math:`L_T(p, \ell)`;
* response: :math:`L_T(p + \Phi\sigma z, \ell + \sigma z)`, the network linearised in :math:`\sigma z`;
* joint, the original form: :math:`L_T(p + \Phi(\ell + \sigma z), \ell + \sigma z)`;
* validation: :math:`L_V` at the parameters that respond to :math:`\ell + \sigma z`, less :math:`\tau` times
  the entropy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .hyperparameters import Specs, tuned, values
from .response import BestResponse

Batch = Any
NetState = Any
Weights = Any  # an Optax transform, or a function of the hyperparameters to one


class Hyper(NamedTuple):
    """The tuned hyperparameters' distribution.

    Attributes:
        mean: float [H], l on the whole line.
        scale: float [H], the inverse softplus of the perturbations' standard deviation.
    """

    mean: jax.Array
    scale: jax.Array


class Objectives(NamedTuple):
    """The losses; ``noise`` is z, floats [H] or [B, H].

    Attributes:
        noise: ``(key, batch) -> z``, rows only if a hyperparameter is tuned per example; 0 for those that are not tuned
            by the response.
        elementary: ``(params, net_state, mean, key, batch) -> (loss, net_state)``.
        response: ``(response, params, net_state, mean, sigma, noise, key, batch) -> (loss, training loss)``; the two
            differ where the bias of a finite sigma is corrected.
        joint: ``((params, response), net_state, mean, sigma, noise, key, batch) -> (loss, net_state)``.
        validation: ``(hyper, params, response, net_state, anchor, factor, noise, batch) -> loss``; ``anchor`` is where
            ``params`` stand, ``factor`` multiplies sigma.
        judged: ``(params, net_state, batch) -> loss``, the validation loss of given parameters.
    """

    noise: Callable[..., jax.Array]
    elementary: Callable[..., tuple[jax.Array, NetState]]
    response: Callable[..., tuple[jax.Array, jax.Array]]
    joint: Callable[..., tuple[jax.Array, NetState]]
    validation: Callable[..., jax.Array]
    judged: Callable[..., jax.Array]


def leading_size(batch: Batch) -> int:
    """The number of examples: the leading axis of a batch's first array."""
    return jax.tree.leaves(batch)[0].shape[0]


def transform_at(weights: Weights, specs: Specs, point: jax.Array) -> optax.GradientTransformationExtraArgs:
    """The weights' transform at a point of the hyperparameters, where it is a function of them."""
    made = weights(values(specs, point)) if callable(weights) else weights
    return optax.with_extra_args_support(made)


def bias_weights(noise: jax.Array, responding: int) -> jax.Array:
    r"""Weights of the examples that remove the leading bias of a response fitted at a finite scale.

    The fitted response solves :math:`E[z\,\nabla L(\sigma z)] = 0`, which differs from that at scale 0 by the third
    derivatives times :math:`E[z_a z_b z_c z_d]`. With weight :math:`c(z) = (R + 4 - |z|^2)/2`, where R of the H
    hyperparameters respond, :math:`E[c\,zz^\top] = I` and all :math:`E[c\,z_a z_b z_c z_d] = 0`, so that the bias is
    of order sigma^4.

    Args:
        noise: z, floats [H] or [B, H]; 0 where nothing responds.
        responding: R.

    Returns:
        Floats [] or [B].
    """
    return (responding + 4 - jnp.sum(noise**2, axis=-1)) / 2


def make_objectives(
    specs: Specs,
    train_loss: Callable[..., Any],
    valid_loss: Callable[..., Any],
    *,
    centred: bool = True,
    stateful: bool = False,
    entropy: float = 0.0,
    correct_bias: bool = False,
    batch_size: Callable[[Batch], int] = leading_size,
) -> Objectives:
    r"""The objectives of a self-tuning network.

    Args:
        specs: the hyperparameters, H of them tuned.
        train_loss: ``(params, hparams, key, batch) -> loss``, a scalar or one loss an example [B]. ``params`` may be a
            :class:`BestResponse`; ``hparams`` is like ``specs``, see :func:`~learned_opt.self_tuning.values`.
        valid_loss: ``(params, batch) -> loss``, scalar or [B]: no dropout, no augmentation, no regulariser.
        centred: Delta-STN: parameters stand at the current hyperparameters and the response is linearised there.
            ``False`` is the original STN, whose response is to l itself.
        stateful: the losses take and return the network's state: ``train_loss(params, net_state, hparams, key, batch)
            -> (loss, net_state)``, ``valid_loss(params, net_state, batch) -> loss``.
        entropy: :math:`\tau`, weight of the perturbations' entropy :math:`\sum_h \log\sigma_h`.
        correct_bias: weight the response's examples by :func:`bias_weights`.
        batch_size: how many examples a batch has.

    Returns:
        :class:`Objectives`.

    Raises:
        ValueError: with ``correct_bias``, while tracing, if hyperparameters are per example and the losses are not.

    Reference:
        MacKay et al., "Self-Tuning Networks", 2019; Bae & Grosse, "Delta-STN", 2020.
    """
    own = jnp.asarray([spec.own for spec in tuned(specs)])
    any_own = any(spec.own for spec in tuned(specs))
    responds = jnp.asarray([spec.by == "response" for spec in tuned(specs)])

    def noise(key: jax.Array, batch: Batch) -> jax.Array:
        dtype = jnp.result_type(float)
        if not any_own:
            return jnp.where(responds, jax.random.normal(key, (own.size,), dtype), 0)
        z = jax.random.normal(key, (batch_size(batch), own.size), dtype)
        return jnp.where(responds[None], jnp.where(own[None], z, z[:1]), 0)

    def train(params, net_state, point, key, batch) -> tuple[jax.Array, NetState]:
        hparams = values(specs, point)
        if stateful:
            return train_loss(params, net_state, hparams, key, batch)
        return train_loss(params, hparams, key, batch), net_state

    def shifted(mean: jax.Array, step: jax.Array) -> jax.Array:
        return (mean if step.ndim == 1 else mean[None]) + step

    def spread(sigma: jax.Array, z: jax.Array) -> jax.Array:
        return (sigma if z.ndim == 1 else sigma[None]) * z

    def elementary(params, net_state, mean, key, batch):
        point = jnp.broadcast_to(mean, (batch_size(batch), own.size)) if any_own else mean
        loss, net_state = train(params, net_state, point, key, batch)
        return jnp.mean(loss), net_state

    def response(response, params, net_state, mean, sigma, z, key, batch):
        step = spread(sigma, z)
        best = BestResponse(params, response, step, linear=True)
        loss, _ = train(best, net_state, shifted(mean, step), key, batch)
        plain = jnp.mean(loss)
        if correct_bias:
            weights = bias_weights(z, sum(spec.by == "response" for spec in tuned(specs)))
            if weights.ndim and not jnp.ndim(loss):
                raise ValueError(
                    "correct_bias: with per-example hyperparameters train_loss must return one loss an example"
                )
            loss = weights * loss
        return jnp.mean(loss), plain

    def joint(both, net_state, mean, sigma, z, key, batch):
        point = shifted(mean, spread(sigma, z))
        loss, net_state = train(BestResponse(both[0], both[1], point), net_state, point, key, batch)
        return jnp.mean(loss), net_state

    def validation(hyper, params, response, net_state, anchor, factor, z, batch):
        sigma = jax.nn.softplus(hyper.scale)
        point = shifted(hyper.mean, spread(sigma * factor, z))
        delta = shifted(-anchor, point) if centred else point
        delta = jnp.where(responds if delta.ndim == 1 else responds[None], delta, 0)
        best = BestResponse(params, response, delta, linear=centred)
        return judged(best, net_state, batch) - entropy * jnp.sum(jnp.where(responds, jnp.log(sigma), 0))

    def judged(params, net_state, batch):
        return jnp.mean(valid_loss(params, net_state, batch) if stateful else valid_loss(params, batch))

    return Objectives(noise, elementary, response, joint, validation, judged)

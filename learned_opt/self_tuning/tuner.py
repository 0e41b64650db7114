r"""The tuner: a network's weights, its response and its hyperparameters, trained together in one run."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .hypergradient import Trace, advance, along_trace, start_trace
from .hyperparameters import Specs, names, span, start, tuned
from .objectives import Batch, Hyper, NetState, Weights, leading_size, make_objectives, transform_at
from .response import BestResponse, Params, Response

Data = Any
METHODS = ("delta_stn", "stn")


class Best(NamedTuple):
    """The best weights so far by the validation loss, with the hyperparameters that they belong to.

    Attributes:
        loss: float, the validation loss of ``params`` on the batch of their cycle.
        params: the elementary parameters.
        response: their response.
        net_state: the network's state.
        hyper: the hyperparameters at which ``params`` stand.
        weights_opt: optimizer state of ``params``: a run that goes back to them goes on with it.
        response_opt: optimizer state of ``response``.
        hyper_opt: optimizer state of ``hyper``.
    """

    loss: jax.Array
    params: Params
    response: Response
    net_state: NetState
    hyper: Hyper
    weights_opt: optax.OptState
    response_opt: optax.OptState
    hyper_opt: optax.OptState


class TunerState(NamedTuple):
    """All of a run's state: arrays only, to be checkpointed as one.

    Attributes:
        params: the elementary parameters.
        response: of :attr:`LiftedNetwork.init_response` or :func:`dense_response`.
        net_state: the network's state; ``()`` without one.
        hyper: the hyperparameters.
        weights_opt: optimizer state of ``params``.
        response_opt: optimizer state of ``response``.
        hyper_opt: optimizer state of ``hyper``.
        best: the best so far.
        reference: float, the first cycle's validation loss, NaN before it.
        damping: float in (0, 1], what updates of parameters and response are multiplied by.
        trace: how parameters and ``weights_opt`` depend on the hyperparameters that are tuned by hypergradient; empty
            where none is.
        cycle: int32, cycles done.
    """

    params: Params
    response: Response
    net_state: NetState
    hyper: Hyper
    weights_opt: optax.OptState
    response_opt: optax.OptState
    hyper_opt: optax.OptState
    best: Best
    reference: jax.Array
    damping: jax.Array
    trace: Trace
    cycle: jax.Array


class CycleInfo(NamedTuple):
    """What a cycle reports; :attr:`Tuner.run` stacks it.

    Attributes:
        mean: float [H], the hyperparameters l that the cycle's training steps used.
        sigma: float [H], the perturbations' standard deviations there.
        train_loss: float, mean elementary loss of the training steps.
        response_loss: float, mean loss of the perturbed ones.
        valid_loss: float, the validation loss of the elementary parameters after them, unperturbed.
        skipped: int32, updates left out because a loss or gradient was not finite.
        rolled_back: bool, whether the run diverged and went back to the best so far.
    """

    mean: jax.Array
    sigma: jax.Array
    train_loss: jax.Array
    response_loss: jax.Array
    valid_loss: jax.Array
    skipped: jax.Array
    rolled_back: jax.Array


class Tuner(NamedTuple):
    """A self-tuning run, as pure functions.

    Attributes:
        init: ``(params, response, net_state=()) -> TunerState``.
        cycle: ``(state, key, data) -> (state, CycleInfo)``: training steps, then validation steps.
        run: ``(state, key, data, num_cycles) -> (state, CycleInfo stacked)``: cycles as one compiled scan. The key of a
            cycle is ``fold_in(key, state.cycle)``: a run resumed from a checkpoint with the same key goes on as it
            would have.
    """

    init: Callable[..., TunerState]
    cycle: Callable[..., tuple[TunerState, CycleInfo]]
    run: Callable[..., tuple[TunerState, CycleInfo]]


def _carried(state: TunerState | Best) -> dict[str, Any]:
    """What a run trains, and its best keeps."""
    return {name: getattr(state, name) for name in Best._fields if name != "loss"}


def copied(tree: Any) -> Any:
    """Copies of a state's arrays: were two of them one buffer, or one the caller's, it could not be donated."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def balanced(noise: jax.Array) -> tuple[jax.Array, ...]:
    """Perturbations like ``noise`` whose sum is 0: the second half of the rows mirrors the first, one vector both ways.

    Of an odd number of rows one is left over. What the rows' gradients have in common then adds no noise to that of the
    validation loss; with one vector both ways that is all of its first-order part.
    """
    if noise.ndim == 1:
        return noise, -noise
    half = noise[: (len(noise) + 1) // 2]
    return (jnp.concatenate([half, -half])[: len(noise)],)


def _finite(loss: jax.Array, grads: Any) -> jax.Array:
    return jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads, squared=True))


def tuner(
    specs: Specs,
    train_loss: Callable[..., Any],
    valid_loss: Callable[..., Any],
    train_batch: Callable[[Data, jax.Array], Batch],
    valid_batch: Callable[[Data, jax.Array], Batch],
    *,
    weights: Weights,
    response: optax.GradientTransformation | None = None,
    hyper: optax.GradientTransformation | None = None,
    method: str = "delta_stn",
    train_steps: int = 5,
    valid_steps: int = 1,
    warmup: int = 0,
    entropy: float = 1e-2,
    tune_scale: bool = True,
    scale_range: tuple[float, float] = (1e-3, 3.0),
    anneal: Callable[[jax.Array], Any] | None = None,
    correct_bias: bool = False,
    response_batch: Callable[[Batch], Batch] | None = None,
    trust: float | None = 1.0,
    guard: float | None = 10.0,
    memory: float = 0.9,
    stateful: bool = False,
    batch_size: Callable[[Batch], int] = leading_size,
) -> Tuner:
    r"""Tune hyperparameters by the gradient of the validation loss through the weights' best response.

    A cycle takes training steps and then validation steps. With z standard normal, in Delta-STN:

    .. math:: p \leftarrow p - \nabla_p L_T(p, \ell), \quad
              \Phi \leftarrow \Phi - \nabla_\Phi L_T(f(p) + J_f\Phi\sigma z,\ \ell + \sigma z), \quad
              (\ell, \sigma) \leftarrow (\ell, \sigma) - \nabla\, [L_V(f(p) + J_f\Phi(\ell - \ell_0 + \sigma z))
              - \tau \textstyle\sum_h \log\sigma_h]

    Args:
        specs: the hyperparameters, H of them tuned.
        train_loss: ``(params, hparams, key, batch) -> loss``, a scalar or one an example [B]. ``params`` may be a
            :class:`BestResponse`: pass it to a lifted network's ``apply``, and to
            :func:`~learned_opt.self_tuning.squared_norm`. Floats in ``hparams`` are [B] where tuned per example,
            scalars else.
        valid_loss: ``(params, batch) -> loss``, without dropout, augmentation and regularisers.
        train_batch: ``(data, key) -> batch``, drawn inside the scan.
        valid_batch: ``(data, key) -> batch``.
        weights: the parameters' Optax transform, a learned rule too; it is given ``value=``. Where hyperparameters are
            tuned by hypergradient, a function of the hyperparameters to it:
            ``lambda h: optax.adam(h["learning_rate"])``.
        response: the response's; by default as ``weights``.
        hyper: that of :class:`Hyper`; by default ``optax.adam(0.01)``.
        method: ``"delta_stn"``, or ``"stn"``, the original: parameters and response step jointly on the perturbed loss,
            uncentred and not linearised.
        train_steps: training steps a cycle.
        valid_steps: validation steps a cycle.
        warmup: cycles before the first validation step.
        entropy: :math:`\tau`, weight of the entropy bonus, in the loss's units. Too little lets sigma shrink until the
            response is fitted to noise.
        tune_scale: whether sigma is tuned; else it stays at the specs' ``scale``.
        scale_range: lowest and highest sigma.
        anneal: ``cycle -> factor`` of sigma, such as an Optax schedule.
        correct_bias: remove the leading bias of a finite sigma from the response (Delta-STN); noisier, see
            :func:`~learned_opt.self_tuning.bias_weights`.
        response_batch: ``batch -> batch``, the part of it that the response is trained on (Delta-STN); all by default.
        trust: most that l moves in a validation step, in units of sigma: beyond it nothing was fitted. None: unbounded.
        guard: go back to the best so far, and halve the parameters' updates (a damping that recovers slowly), when a
            loss is not finite or exceeds the best by ``guard`` times (abs(first) + abs(best)). None: never.
        memory: in [0, 1], how much of the past steps' effect each step keeps, for hyperparameters tuned by
            hypergradient, see :mod:`~learned_opt.self_tuning.hypergradient`.
        stateful: the losses carry the network's state, see :func:`~learned_opt.self_tuning.make_objectives`.
        batch_size: how many examples a batch has; the first array's leading axis by default.

    Returns:
        A :class:`Tuner`. It can be differentiated through (with ``trust=None, guard=None``, smoothly).

    Raises:
        ValueError: if an option is out of range or the method unknown.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from learned_opt import self_tuning as st
        >>> predict = st.dense_lift(lambda w, x: x @ w)
        >>> def train_loss(w, hparams, key, batch):
        ...     x, t = batch
        ...     return 0.5 * (predict(w, x) - t) ** 2 + 0.5 * hparams["l2"] * st.squared_norm(w)
        >>> def valid_loss(w, batch):
        ...     return 0.5 * (predict(w, batch[0]) - batch[1]) ** 2
        >>> data = (jnp.eye(4), jnp.ones(4))
        >>> made = st.tuner({"l2": st.log(1.0)}, train_loss, valid_loss, lambda d, k: d, lambda d, k: d,
        ...                 weights=optax.adam(0.1))
        >>> state = made.init(jnp.zeros(4), st.dense_response(jnp.zeros(4), 1))
        >>> state, info = made.run(state, jax.random.key(0), data, 3)
        >>> info.mean.shape
        (3, 1)

    Reference:
        MacKay et al., "Self-Tuning Networks", 2019; Bae & Grosse, "Delta-STN", 2020.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    for name, steps in (("train_steps", train_steps), ("valid_steps", valid_steps)):
        if steps < 1:
            raise ValueError(f"{name} must be at least 1, got {steps}")
    if not 0 < scale_range[0] < scale_range[1]:
        raise ValueError(f"scale_range must be (low, high) with 0 < low < high, got {scale_range}")
    for name, bound in (("trust", trust), ("guard", guard)):
        if bound is not None and not bound > 0:
            raise ValueError(f"{name} must be above 0, or None, got {bound}")
    centred = method == "delta_stn"
    if not centred and (correct_bias or response_batch is not None):
        raise ValueError("correct_bias and response_batch belong to method='delta_stn'")
    if not 0 <= memory <= 1:
        raise ValueError(f"memory must lie in [0, 1], got {memory}")
    through = [i for i, spec in enumerate(tuned(specs)) if spec.by == "hypergradient"]
    if through:
        chosen = ", ".join(names(specs)[i] for i in through)
        if not callable(weights):
            raise ValueError(
                f"{chosen}: tuned by hypergradient, so weights must be a function of the hyperparameters to an Optax "
                "transform, such as lambda h: optax.adam(h['learning_rate'])"
            )
        if not centred:
            raise ValueError(f"{chosen}: hypergradients belong to method='delta_stn'")
    responds = len(through) < len(tuned(specs))

    training = functools.partial(transform_at, weights, specs)

    def responding(mean: jax.Array) -> optax.GradientTransformationExtraArgs:
        return training(mean) if response is None else optax.with_extra_args_support(response)

    tuning = optax.with_extra_args_support(optax.adam(0.01) if hyper is None else hyper)
    objectives = make_objectives(
        specs,
        train_loss,
        valid_loss,
        centred=centred,
        stateful=stateful,
        entropy=entropy,
        correct_bias=correct_bias,
        batch_size=batch_size,
    )

    def init(params: Params, response: Response, net_state: NetState = ()) -> TunerState:
        point = Hyper(*start(specs))
        infinite = jnp.full((), jnp.inf, point.mean.dtype)
        best = Best(
            loss=infinite,
            params=params,
            response=response,
            net_state=net_state,
            hyper=point,
            weights_opt=training(point.mean).init(params),
            response_opt=responding(point.mean).init(response),
            hyper_opt=tuning.init(point),
        )
        state = TunerState(
            **_carried(best),
            best=best,
            reference=jnp.full((), jnp.nan, point.mean.dtype),
            damping=jnp.ones((), point.mean.dtype),
            trace=[],
            cycle=jnp.zeros((), jnp.int32),
        )
        if through:
            state = state._replace(trace=start_trace((state.params, state.weights_opt), len(through)))
        return copied(state)

    def factor(cycle: jax.Array) -> Any:
        return 1.0 if anneal is None else anneal(cycle)

    def descend(transform, grads, opt_state, point, loss, damping):
        updates, opt_state = transform.update(grads, opt_state, point, value=loss)
        damped = jax.tree.map(lambda u: u * damping.astype(u.dtype), updates)
        return optax.apply_updates(point, damped), opt_state

    def train_step(state: TunerState, key: jax.Array, data: Data):
        k_batch, k_noise, k_loss = jax.random.split(key, 3)
        batch = train_batch(data, k_batch)
        mean = state.hyper.mean
        sigma = jax.nn.softplus(state.hyper.scale) * factor(state.cycle)
        if centred:
            # The same key for both: where hyperparameters do not enter the network, it is computed once.
            part = batch if response_batch is None else response_batch(batch)

            def elementary(moving: tuple[Params, optax.OptState], mean: jax.Array):
                (loss, net_state), grads = jax.value_and_grad(objectives.elementary, has_aux=True)(
                    moving[0], state.net_state, mean, k_loss, batch
                )
                new = descend(training(mean), grads, moving[1], moving[0], loss, state.damping)
                return new, (loss, net_state, grads)

            moving, trace = (state.params, state.weights_opt), state.trace
            if through:
                directions = jnp.eye(len(mean), dtype=mean.dtype)[jnp.asarray(through)]
                (params, weights_opt), (loss, net_state, grads), trace = advance(
                    elementary, moving, mean, trace, directions, memory
                )
            else:
                (params, weights_opt), (loss, net_state, grads) = elementary(moving, mean)
            if responds:
                (_, perturbed), response_grads = jax.value_and_grad(objectives.response, has_aux=True)(
                    *(state.response, state.params, state.net_state, mean, sigma),
                    *(objectives.noise(k_noise, part), k_loss, part),
                )
            else:
                perturbed, response_grads = loss, None
        else:
            (loss, net_state), (grads, response_grads) = jax.value_and_grad(objectives.joint, has_aux=True)(
                *((state.params, state.response), state.net_state, mean, sigma),
                *(objectives.noise(k_noise, batch), k_loss, batch),
            )
            perturbed, trace = loss, state.trace
            params, weights_opt = descend(training(mean), grads, state.weights_opt, state.params, loss, state.damping)
        response, response_opt = state.response, state.response_opt
        if response_grads is not None:
            response, response_opt = descend(
                responding(mean), response_grads, response_opt, response, perturbed, state.damping
            )
        good, good_response = _finite(loss, grads), _finite(perturbed, response_grads)
        params, net_state, weights_opt = optax.tree.where(
            good, (params, net_state, weights_opt), (state.params, state.net_state, state.weights_opt)
        )
        trace = optax.tree.where(good & _finite(loss, trace), trace, jax.tree.map(jnp.zeros_like, trace))
        response, response_opt = optax.tree.where(
            good_response, (response, response_opt), (state.response, state.response_opt)
        )
        state = state._replace(
            params=params,
            net_state=net_state,
            weights_opt=weights_opt,
            response=response,
            response_opt=response_opt,
            trace=trace,
        )
        return state, (loss, perturbed, ~(good & good_response))

    def valid_step(state: TunerState, key: jax.Array, data: Data, anchor: jax.Array):
        k_batch, k_noise = jax.random.split(key)
        batch = valid_batch(data, k_batch)
        old, scaling = state.hyper, factor(state.cycle)
        noise = balanced(objectives.noise(k_noise, batch))

        def validation(point: Hyper) -> jax.Array:
            if not responds:
                return objectives.judged(state.params, state.net_state, batch)
            fixed = (state.params, state.response, state.net_state, anchor, scaling)
            return jnp.mean(jnp.stack([objectives.validation(point, *fixed, z, batch) for z in noise]))

        loss, grads = jax.value_and_grad(validation)(old)
        if through:
            slope = jax.grad(objectives.judged)(state.params, state.net_state, batch)
            here = along_trace(slope, state.trace).astype(old.mean.dtype)
            grads = grads._replace(mean=grads.mean.at[jnp.asarray(through)].set(here))
        updates, hyper_opt = tuning.update(grads, state.hyper_opt, old, value=loss)
        step = updates.mean
        if trust is not None:
            reach = trust * jax.nn.softplus(old.scale) * scaling
            step = jnp.clip(step, -reach, reach)
        low, high = (jnp.log(jnp.expm1(jnp.asarray(s, step.dtype))) for s in scale_range)
        scale = jnp.clip(old.scale + updates.scale, low, high) if tune_scale else old.scale
        scale = scale.at[jnp.asarray(through)].set(old.scale[jnp.asarray(through)]) if through else scale
        good = _finite(loss, (grads, step, scale))
        mean = jnp.clip(old.mean + step, *span(specs))
        new = optax.tree.where(good, (Hyper(mean, scale), hyper_opt), (old, state.hyper_opt))
        return state._replace(hyper=new[0], hyper_opt=new[1]), ~good

    def guarded(state: TunerState, best: Best, reference: jax.Array, bad: jax.Array) -> TunerState:
        back = TunerState(
            **_carried(best),
            best=best,
            reference=reference,
            damping=0.5 * state.damping,
            trace=jax.tree.map(jnp.zeros_like, state.trace),
            cycle=state.cycle,
        )
        onward = state._replace(damping=jnp.minimum(1.0, 1.02 * state.damping), best=best, reference=reference)
        return optax.tree.where(bad, back, onward)

    def cycle(state: TunerState, key: jax.Array, data: Data) -> tuple[TunerState, CycleInfo]:
        k_train, k_valid, k_check = jax.random.split(key, 3)
        begin = state
        state, (losses, perturbed, skipped) = jax.lax.scan(
            lambda s, k: train_step(s, k, data), state, jax.random.split(k_train, train_steps)
        )
        batch = valid_batch(data, k_check)
        # The original form's elementary parameters alone are no network: those that respond to the mean are.
        judged = state.params if centred else BestResponse(state.params, state.response, begin.hyper.mean)
        valid = objectives.judged(judged, state.net_state, batch).astype(state.reference.dtype)
        trained, better = state, valid < state.best.loss
        reference = jnp.where(jnp.isfinite(state.reference), state.reference, valid)

        def tune(state: TunerState) -> tuple[TunerState, jax.Array]:
            keys = jax.random.split(k_valid, valid_steps)
            state, failed = jax.lax.scan(lambda s, k: valid_step(s, k, data, begin.hyper.mean), state, keys)
            return state, jnp.sum(failed, dtype=jnp.int32)

        idle = jnp.zeros((), jnp.int32)
        if warmup:
            state, failed = jax.lax.cond(state.cycle >= warmup, tune, lambda s: (s, idle), state)
        else:
            state, failed = tune(state)
        bad = jnp.zeros((), bool)
        if guard is not None:
            lowest = jnp.where(better, valid, state.best.loss)
            excess = jnp.maximum(valid, valid + perturbed[-1] - losses[-1])
            limit = lowest + guard * (jnp.abs(reference) + jnp.abs(lowest))
            bad = ~(jnp.isfinite(excess) & jnp.isfinite(losses[-1])) | (jnp.isfinite(limit) & (excess > limit))
        # never a diverged state: in the centred form a response can diverge while the parameters' loss falls
        best = optax.tree.where(better & ~bad, Best(valid, **_carried(trained)), state.best)
        if guard is not None:
            state = guarded(state, best, reference, bad)
        else:
            state = state._replace(best=best, reference=reference)
        info = CycleInfo(
            mean=begin.hyper.mean,
            sigma=jax.nn.softplus(begin.hyper.scale) * factor(begin.cycle),
            train_loss=jnp.mean(losses),
            response_loss=jnp.mean(perturbed),
            valid_loss=valid,
            skipped=jnp.sum(skipped, dtype=jnp.int32) + failed,
            rolled_back=bad,
        )
        return state._replace(cycle=begin.cycle + 1), info

    @functools.partial(jax.jit, static_argnames="num_cycles")
    def run(state: TunerState, key: jax.Array, data: Data, num_cycles: int) -> tuple[TunerState, CycleInfo]:
        def body(state: TunerState, _: None) -> tuple[TunerState, CycleInfo]:
            return cycle(state, jax.random.fold_in(key, state.cycle), data)

        return jax.lax.scan(body, state, None, length=num_cycles)

    return Tuner(init, cycle, run)

"""Every public state may be donated from the start: no two of its arrays, nor one and a parameter, share a buffer."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import learned_opt
from learned_opt import communication, schedules, self_tuning, unsupervised
from learned_opt.local_sgd import local_sgd, spread_workers, worker_axes
from learned_opt.mup import scale_by_width


def params():
    return {"w": jnp.linspace(-1, 1, 12).reshape(4, 3), "b": jnp.zeros(3), "s": jnp.float32(0.5)}


def of(transform):
    def case():
        start = params()
        return start, transform().init(start)

    return case


def of_rule(name):
    factory = learned_opt.RULES[name]
    small = {"lstm_size": 6, "bank_size": 3}
    kwargs = {name: small[name] for name in small.keys() & inspect.signature(factory).parameters.keys()}

    def build():
        rule = factory(**kwargs)
        return rule.build(rule.init(jax.random.key(0)), num_steps=10)

    return of(build)


def of_workers():
    opt = local_sgd(optax.adam(0.1), sync_every=2)
    state = opt.init(params())
    return spread_workers((params(), state), 4, (0, worker_axes(state)))


def of_tuner():
    tuner = self_tuning.tuner(
        {"l2": self_tuning.log(0.5, per_example=False, scale=0.1)},
        lambda w, hparams, key, batch: jnp.sum(w),
        lambda w, batch: jnp.sum(w),
        lambda data, key: data,
        lambda data, key: data,
        weights=optax.adam(0.1),
    )
    w = jnp.zeros(4)
    response = self_tuning.dense_response(w, 1)
    return (w, response), tuner.init(w, response)


def of_replay():
    schedule = self_tuning.constant({"l2": self_tuning.log(0.5)}, [0.0])
    w = jnp.zeros(4)
    return w, self_tuning.replay(schedule, lambda *args: 0.0, lambda data, key: data, optax.adam(0.1)).init(w)


def of_features():
    rule = unsupervised.unsupervised()
    return rule.init_theta(jax.random.key(0)), rule.init(jax.random.key(1), (6, 5, 4))


def statistic(anchor):
    return anchor["w"], anchor["w"]


NAMES = learned_opt.available()
DILOCO = optax.sgd(0.7, momentum=0.9, nesterov=True)
CASES = {
    **{f"rule {name}": of_rule(name) for name in learned_opt.RULES},
    **{f"load {name}": of(lambda name=name: learned_opt.load(name, num_steps=10, weight_decay=0.1)) for name in NAMES},
    "local_sgd": of(lambda: local_sgd(optax.adam(0.1), sync_every=2)),
    "local_sgd, DiLoCo": of(lambda: local_sgd(optax.adamw(0.1), DILOCO, sync_every=2, statistic=statistic)),
    "local_sgd, int8": of(lambda: local_sgd(optax.sgd(0.1), DILOCO, sync_every=2, compression="int8")),
    "local_sgd, fragments": of(
        lambda: local_sgd(
            optax.MultiSteps(optax.sgd(0.1), 2),
            DILOCO,
            sync_every=schedules.micro_steps(schedules.adacomm(8), 2),
            fragments=2,
            compression=communication.top_k(0.1),
        )
    ),
    "local_sgd, workers": of_workers,
    "bfloat16_state": of(lambda: learned_opt.bfloat16_state(optax.adam(0.1), min_size=1)),
    "bfloat16_params": of(lambda: optax.chain(optax.adam(0.1), learned_opt.bfloat16_params())),
    "mup": of(lambda: optax.chain(optax.adam(0.1), scale_by_width(jax.eval_shape(params)))),
    "self_tuning": of_tuner,
    "self_tuning, replay": of_replay,
    "unsupervised": of_features,
}


@pytest.mark.parametrize("case", CASES)
def test_no_two_leaves_share_a_buffer(case):
    leaves = [leaf for leaf in jax.tree.leaves(CASES[case]()) if isinstance(leaf, jax.Array) and leaf.size]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(pointers)) == len(pointers)


def test_a_state_of_local_sgd_is_donated():
    opt = local_sgd(optax.adam(0.1), DILOCO, sync_every=2)
    one, state = params(), opt.init(params())
    axes = worker_axes(state)
    step = jax.vmap(lambda p, s: opt.update(p, s, p), in_axes=(0, axes), out_axes=(0, axes), axis_name="workers")
    step = jax.jit(step, donate_argnums=(0, 1))
    one, state = spread_workers(one, 2), spread_workers(state, 2, axes)
    for _ in range(3):
        one, state = step(one, state)
    assert int(state.round) == 1

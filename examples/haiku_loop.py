"""A pretrained rule in a Haiku training loop: two lines differ from Adam."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import learned_opt

network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 32, 1])(x)))
x = jax.random.normal(jax.random.key(0), (256, 4))
y = jnp.sin(x).sum(axis=1, keepdims=True)


def loss_fn(params):
    return jnp.mean((network.apply(params, x) - y) ** 2)


steps = 200
optimizer = optax.chain(optax.clip_by_global_norm(1.0), learned_opt.load("flagship", num_steps=steps))


@jax.jit
def step(params, state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


params = network.init(jax.random.key(1), x)
state = optimizer.init(params)
print(f"loss before: {loss_fn(params):.4f}")
for _ in range(steps):
    params, state, loss = step(params, state)
print(f"loss after {steps} steps: {loss_fn(params):.4f}")

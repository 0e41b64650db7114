"""A pretrained rule in an Equinox training loop."""

import equinox as eqx
import jax
import jax.numpy as jnp

import learned_opt

x = jax.random.normal(jax.random.key(0), (256, 4))
y = jnp.sin(x).sum(axis=1, keepdims=True)


def loss_fn(model):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


steps = 200
model = eqx.nn.MLP(4, 1, 32, 2, key=jax.random.key(1))
optimizer = learned_opt.load(
    "flagship", num_steps=steps, layout=learned_opt.layouts.outputs_first
)  # as Equinox has them
state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def step(model, state):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
    updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


print(f"loss before: {loss_fn(model):.4f}")
for _ in range(steps):
    model, state, loss = step(model, state)
print(f"loss after {steps} steps: {loss_fn(model):.4f}")

"""A pretrained rule in a Flax NNX training loop."""

import jax
import jax.numpy as jnp
from flax import nnx

import learned_opt


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 32, rngs=rngs)
        self.output = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        return self.output(jax.nn.relu(self.hidden(x)))


x = jax.random.normal(jax.random.key(0), (256, 4))
y = jnp.sin(x).sum(axis=1, keepdims=True)


def loss_fn(model):
    return jnp.mean((model(x) - y) ** 2)


steps = 200
model = Network(nnx.Rngs(1))
optimizer = nnx.Optimizer(model, learned_opt.load("flagship", num_steps=steps), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


print(f"loss before: {loss_fn(model):.4f}")
for _ in range(steps):
    step(model, optimizer)
print(f"loss after {steps} steps: {loss_fn(model):.4f}")

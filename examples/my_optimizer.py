"""An optimizer of your own in the benchmark: `learned-opt bench --optimizer examples/my_optimizer.py:make`."""

import jax
import jax.numpy as jnp
import optax


def make(learning_rate=1e-3, num_steps=None) -> optax.GradientTransformation:
    """Signs of the momentum, decayed linearly to 0.

    The benchmark tunes `learning_rate` about its default value, seven half-decades, and reports the default beside it.
    It gives the planned number of updates as `num_steps`. Leave out a parameter that your optimizer does not have.
    """
    schedule = optax.linear_schedule(learning_rate, 0.0, num_steps)
    signs = optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))
    return optax.chain(optax.trace(decay=0.9), signs, optax.scale_by_learning_rate(schedule))

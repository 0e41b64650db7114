r"""Step sizes that carry over to wider networks: maximal update parametrisation for any Optax transform.

With updates whose entries stay of one size whatever the width (Adam's, and those of most learned rules), the effect of
a weight matrix's update on its outputs grows with the number of its inputs. :func:`scale_by_width` divides it by just
that growth, so that a step size tuned (or a rule meta-trained) at one width serves all widths (Yang et al. 2022,
Tensor programs V, arXiv:2203.03466).

It is the optimizer's part of the parametrisation. The model's part: initial weights of standard deviation
``1/sqrt(fan_in)``; those of the output layer zero, or smaller by ``sqrt(width ratio)`` than that; attention logits
divided by the size of a head instead of its root.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .layouts import Layout, fan_in, name_of, outputs_last, view_of

Tree = Any


def width_multipliers(params: Tree, base: Tree, *, layout: Layout = outputs_last) -> Tree:
    r"""How much smaller each tensor's update has to be than in a narrower model.

    :math:`\mathrm{fan\_in}(\mathrm{base}) / \mathrm{fan\_in}(\mathrm{params})`, the column "Adam LR" of table 3 of the
    paper: 1 for biases and for the input layer, whose fan-in does not grow, and one over the width ratio for hidden
    and output matrices.

    Args:
        params: the model's parameters, a pytree of anything with a ``shape``.
        base: those of the model whose step size is to carry over, the same tree with other sizes; for example
            ``jax.eval_shape`` of its ``init``. Tensors that only ``base`` has are ignored.
        layout: which axes are inputs, as for :func:`learned_opt.load`: the fan-in is their product.

    Returns:
        A tree of floats with the structure of ``params``.

    Raises:
        ValueError: if a tensor of ``params`` is not in ``base``, or is of another rank there, or an axis of inputs is
            empty.

    Example:
        >>> def shapes(width):
        ...     return {"in": jnp.zeros((4, width)), "hidden": jnp.zeros((width, width)), "out": jnp.zeros((width, 2))}
        >>> width_multipliers(shapes(64), shapes(16))
        {'hidden': 0.25, 'in': 1.0, 'out': 0.25}
    """
    narrow = {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(base)}

    def inputs(path, leaf):
        view = view_of(layout, path, leaf)
        return fan_in(view.shape[view.layers :])

    def multiplier(path, leaf):
        name = name_of(path)
        if name not in narrow:
            raise ValueError(f"the base model has no tensor {name!r}; it has {', '.join(sorted(narrow)) or 'none'}")
        shape, other = jnp.shape(leaf), jnp.shape(narrow[name])
        if len(other) != len(shape):
            raise ValueError(f"{name!r} has shape {shape}, but {other} in the base model: not the same rank")
        wide_inputs, base_inputs = inputs(path, leaf), inputs(path, narrow[name])
        if wide_inputs < 1 or base_inputs < 1:
            raise ValueError(f"{name!r} has a fan-in of {wide_inputs}, and of {base_inputs} in the base model")
        return base_inputs / wide_inputs

    return jax.tree.map_with_path(multiplier, params)


def scale_by_width(base: Tree, *, layout: Layout = outputs_last) -> optax.GradientTransformation:
    """Multiply each tensor's update by its :func:`width_multipliers`; to be chained after any optimizer.

    For optimizers whose updates' entries do not depend on the width: Adam and the rules ``adam``, ``nadamw``,
    ``celo_adam``, ``nn_adam``, ``lstm``, ``mlp``, ``rnn_mlp``, ``adafac_mlp`` and ``celo2``. Not for ``sgd`` and
    ``sgdm``, whose table differs. Hidden matrices want the root of the multiplier under ``velo``, ``celo`` and
    ``light``, whose updates are relative to the tensor's own size, which falls with the root of the fan-in already; and
    under what orthogonalises at unit RMS (``celo2_soap``, which is ``flagship-1``, ``celo2(orthogonalize=True)``,
    ``soap_muon``, ``outer``), whose updates change outputs with the root of the width. ``control`` (``flagship``),
    which does both, wants none.

    What comes before it in the chain is scaled with it, decoupled weight decay too.

    Args:
        base: as for :func:`width_multipliers`, as the next one.
        layout: see there.

    Returns:
        An Optax transform without state.

    Raises:
        ValueError: as :func:`width_multipliers`, at ``init`` and ``update``.

    Example:
        >>> base = {"w": jnp.zeros((16, 16)), "b": jnp.zeros(16)}
        >>> params = {"w": jnp.zeros((64, 64)), "b": jnp.zeros(64)}
        >>> tx = optax.chain(optax.adam(1e-2), scale_by_width(base))
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))
        >>> [f"{updates[name].flatten()[0]:.4f}" for name in "wb"]
        ['-0.0025', '-0.0100']
    """

    def init_fn(params):
        width_multipliers(params, base, layout=layout)  # complain early
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        del params
        multipliers = width_multipliers(updates, base, layout=layout)
        return jax.tree.map(lambda u, k: k * u, updates, multipliers), state

    return optax.GradientTransformation(init_fn, update_fn)

"""Multilayer perceptrons whose width, depth, activation and initial scale are drawn from the task's cfg.

A single choice costs nothing; several are one set of array shapes, the largest, of which masks leave the part in use.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from ..base import Cfg

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "swish": jax.nn.silu,
    "elu": jax.nn.elu,
    "sigmoid": jax.nn.sigmoid,
}


class MlpSpec(NamedTuple):
    """What may be drawn for a multilayer perceptron; see :func:`mlp_spec`.

    Attributes:
        width: choices of the hidden layers' width.
        depth: choices of the number of hidden layers.
        activation: choices of :data:`ACTIVATIONS`.
        init_scale: lowest and highest factor of the initial weights, drawn log-uniformly.
    """

    width: tuple[int, ...]
    depth: tuple[int, ...]
    activation: tuple[str, ...]
    init_scale: tuple[float, float]


def mlp_spec(
    width: int | tuple[int, ...] = 32,
    depth: int | tuple[int, ...] = 1,
    activation: str | tuple[str, ...] = "relu",
    init_scale: float | tuple[float, float] = 1.0,
) -> MlpSpec:
    """Check and complete the description of a multilayer perceptron.

    Args:
        width: hidden width, or the choices that a task draws from.
        depth: number of hidden layers, or the choices. 0 alone is a linear model.
        activation: a key of :data:`ACTIVATIONS`, or the choices.
        init_scale: factor of the initial weights, whose standard deviation is ``init_scale / sqrt(fan_in)`` (a normal
            distribution truncated at twice that); or ``(low, high)``, drawn log-uniformly.

    Returns:
        The spec.

    Raises:
        ValueError: a size is too small, an activation unknown or a scale not positive.

    Example:
        >>> mlp_spec(width=(16, 32)).width
        (16, 32)
    """
    spec = MlpSpec(
        width if isinstance(width, tuple) else (width,),
        depth if isinstance(depth, tuple) else (depth,),
        activation if isinstance(activation, tuple) else (activation,),
        init_scale if isinstance(init_scale, tuple) else (init_scale, init_scale),
    )
    if not all(spec[:3]) or min(spec.width) < 1 or min(spec.depth) < (len(spec.depth) > 1):
        raise ValueError(f"width {width} and depth {depth}: widths start at 1, depths at 1 (0 as the only choice)")
    if unknown := [name for name in spec.activation if name not in ACTIVATIONS]:
        raise ValueError(f"unknown activation {unknown[0]!r}; known: {', '.join(ACTIVATIONS)}")
    if len(spec.init_scale) != 2 or not 0 < spec.init_scale[0] <= spec.init_scale[1]:
        raise ValueError(f"init_scale {init_scale}: one positive number, or (low, high)")
    return spec


def log_uniform(key: jax.Array, low: float, high: float) -> jax.Array:
    """Draw a number whose logarithm is uniform between those of ``low`` and ``high``; nothing where they are one."""
    if low == high:
        return jnp.asarray(low, jnp.result_type(float))
    return jnp.exp(jax.random.uniform(key, minval=float(np.log(low)), maxval=float(np.log(high))))


def sample_mlp(spec: MlpSpec, key: jax.Array) -> Cfg:
    """Draw what the spec leaves open: ``{}`` where it leaves nothing.

    Args:
        spec: the choices.
        key: PRNG key.

    Returns:
        A dict of scalars, of ``width`` and ``depth`` (int32), ``activation`` (int32, which of the choices) and
        ``init_scale`` those that have more than one choice.
    """
    uniform = jax.random.uniform(key, (4,))  # one draw for all four: every other one costs compile time
    cfg = {}
    for position, name in enumerate(("width", "depth", "activation")):
        choices = getattr(spec, name)
        if len(choices) > 1:
            numbers = np.arange(len(choices)) if name == "activation" else np.asarray(choices)
            which = jnp.minimum((uniform[position] * len(choices)).astype(jnp.int32), len(choices) - 1)
            cfg[name] = jnp.asarray(numbers, jnp.int32)[which]
    low, high = spec.init_scale
    if low < high:
        cfg["init_scale"] = low * jnp.exp(uniform[3] * float(np.log(high / low)))
    return cfg


def transform(net: Callable[[jax.Array], jax.Array]) -> tuple[Callable, Callable]:
    """Make pure functions ``init: (key, x) -> params`` and ``apply: (params, x) -> outputs`` of a Haiku function.

    All truncated-normal parameters are cut from one flat draw: a draw for each tensor, as Haiku has it, multiplies the
    compile time of whatever holds ``init`` (measured: twelvefold for the weights of a perceptron of two layers).

    Args:
        net: a function of arrays that calls Haiku modules.

    Returns:
        ``init`` and ``apply``.
    """
    network: Any = hk.without_apply_rng(hk.transform(net))

    def init(key: jax.Array, x: jax.Array):
        shapes = jax.eval_shape(network.init, key, x)
        total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        noise = jax.random.truncated_normal(key, -2, 2, (total,), jnp.result_type(float))
        used = 0

        def creator(next_creator, shape, dtype, initialiser, context):
            nonlocal used
            if not isinstance(initialiser, hk.initializers.TruncatedNormal):
                return next_creator(shape, dtype, initialiser)
            start, used = used, used + math.prod(shape)
            return (noise[start:used].reshape(shape) * initialiser.stddev).astype(dtype)

        def created(x: jax.Array) -> jax.Array:
            with hk.custom_creator(creator):
                return net(x)

        pooled: Any = hk.transform(created)
        return pooled.init(key, x)

    return init, network.apply


def activate(spec: MlpSpec, cfg: Cfg, x: jax.Array) -> jax.Array:
    """Apply the activation that ``cfg`` names, or the only one there is."""
    functions = [ACTIVATIONS[name] for name in spec.activation]
    return functions[0](x) if len(functions) == 1 else jax.lax.switch(cfg["activation"], functions, x)


def scaled_normal(scale: jax.Array | float, fan_in: jax.Array | int) -> hk.initializers.Initializer:
    """Haiku initialiser: normal times ``scale / sqrt(fan_in)``, truncated at twice that; both may be traced."""
    return hk.initializers.TruncatedNormal(scale * jax.lax.rsqrt(jnp.asarray(fan_in, jnp.result_type(float))))


def mlp(spec: MlpSpec, cfg: Cfg, outputs: int, x: jax.Array) -> jax.Array:
    """Run the perceptron, inside ``hk.transform``: the hidden layers ``hidden_0`` ..., then the linear ``output``.

    Units beyond the drawn width are multiplied by 0 and layers beyond the drawn depth passed by, so that their weights
    and those that read them have gradient exactly 0.

    Args:
        spec: the choices.
        cfg: a draw of :func:`sample_mlp`, traced or not.
        outputs: number of outputs.
        x: float ``[..., inputs]``.

    Returns:
        float ``[..., outputs]``.
    """
    scale = cfg.get("init_scale", spec.init_scale[0])
    size, fan_in = max(spec.width), x.shape[-1]
    for layer in range(max(spec.depth)):
        hidden = hk.Linear(size, w_init=scaled_normal(scale, fan_in), name=f"hidden_{layer}")(x)
        hidden = activate(spec, cfg, hidden)
        if "width" in cfg:
            mask = (jnp.arange(size) < cfg["width"]).astype(hidden.dtype)
            hidden = hidden * jnp.broadcast_to(mask, hidden.shape)
        x = jnp.where(layer < cfg["depth"], hidden, x) if layer >= min(spec.depth) else hidden
        fan_in = cfg.get("width", size)
    return hk.Linear(outputs, w_init=scaled_normal(scale, fan_in), name="output")(x)


def residual(
    x: jax.Array, outputs: int, channels: Sequence[int], blocks: int, conv: Callable[..., jax.Array], scale: Any = 1.0
) -> jax.Array:
    """Run the residual network, inside ``hk.transform``: normalisation first, group normalisation, global mean.

    A ``stem`` of stride 2; in each stage blocks of two 3x3 convolutions, the first of all stages but the first with
    stride 2; a linear ``output``.

    Args:
        x: images ``[batch, h, w, c]``.
        outputs: classes.
        channels: of each stage.
        blocks: a stage.
        conv: ``(x, channels, stride, kernel, name) -> y`` calls a convolution.
        scale: factor of the last layer's initial weights, whose standard deviation is ``scale / sqrt(fan_in)``.

    Returns:
        Logits ``[batch, outputs]``.

    Reference: He et al., "Identity mappings in deep residual networks", 2016; Wu & He, "Group normalization", 2018.
    """

    def norm(x, name):
        return jax.nn.relu(hk.GroupNorm(math.gcd(8, x.shape[-1]), name=name)(x))

    x = conv(x, channels[0], 2, 3, "stem")
    for stage, size in enumerate(channels):
        for block in range(blocks):
            stride, label = (2 if stage and not block else 1), f"{stage}_{block}"
            y = norm(x, f"norm_{label}_0")
            way = conv(y, size, stride, 1, f"way_{label}") if stride > 1 or x.shape[-1] != size else x
            y = norm(conv(y, size, stride, 3, f"conv_{label}_0"), f"norm_{label}_1")
            x = way + conv(y, size, 1, 3, f"conv_{label}_1")
    x = norm(x, "norm_output").mean(axis=(1, 2))
    return hk.Linear(outputs, w_init=scaled_normal(scale, x.shape[-1]), name="output")(x)

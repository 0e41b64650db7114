"""Families that need no data, quadratics and Rosenbrock functions; and the change of scale of any parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from ..base import Cfg, Data, Task, TaskFamily
from .networks import log_uniform


def quadratic(
    *,
    dim: int = 32,
    condition: tuple[float, float] = (1.0, 100.0),
    noise: float = 0.0,
) -> TaskFamily:
    """Minimise random quadratics, ``f(x) = 1/2 (x - m)' Q' diag(e) Q (x - m)``, ``Q`` a random rotation.

    The largest eigenvalue is 1, the smallest ``1 / c``, the others log-uniform in between; the condition number ``c``
    is log-uniform; ``m`` and the start are standard normal. ``Q`` is two rounds of random signs and a cosine transform:
    orthogonal, it mixes all the coordinates, and unlike a QR decomposition it is cheap to draw inside a compiled loop.

    Args:
        dim: number of parameters.
        condition: lowest and highest condition number.
        noise: standard deviation of a random slope ``z' x`` added to the loss, ``z`` drawn a batch: gradient noise.

    Returns:
        The family. ``params``: ``{"x": [dim]}``; ``aux``: ``excess``, the loss without the noise.

    Raises:
        ValueError: an impossible size or range.

    Example:
        >>> family = quadratic(dim=4)
        >>> task = family.task(family.data, family.sample(jax.random.key(0)))
        >>> task.init(jax.random.key(1))["x"].shape
        (4,)
    """
    low, high = condition
    if dim < 2 or not 1 <= low <= high or noise < 0:
        raise ValueError(f"dim {dim} (from 2), condition {condition} (1 <= low <= high), noise {noise} (from 0)")

    def sample(key: jax.Array) -> Cfg:
        number_key, spectrum_key, signs_key, centre_key = jax.random.split(key, 4)
        log_condition = jnp.log(log_uniform(number_key, low, high))
        inner = jax.random.uniform(spectrum_key, (dim - 2,))
        position = jnp.concatenate([jnp.zeros((1,), inner.dtype), inner, jnp.ones((1,), inner.dtype)])
        return {
            "eigenvalues": jnp.exp(-log_condition * position),
            "signs": jax.random.rademacher(signs_key, (2 * dim,), inner.dtype).reshape(2, dim),
            "centre": jax.random.normal(centre_key, (dim,)),
        }

    def task(data: Data, cfg: Cfg) -> Task:
        del data

        def init(key):
            return {"x": jax.random.normal(key, (dim,))}

        def loss(params, key, batch):
            del key
            rotated = params["x"] - cfg["centre"]
            for signs in cfg["signs"]:
                rotated = _cosines(dim) @ (signs * rotated)
            excess = 0.5 * jnp.sum(cfg["eigenvalues"] * jnp.square(rotated))
            return excess + _slope(batch, params), {"excess": excess}

        return Task(init, _noise_batch(dim, noise), loss)

    return TaskFamily({}, sample, task)


def _cosines(dim: int) -> jax.Array:
    """The orthogonal matrix of the discrete cosine transform (DCT-II), ``[dim, dim]``."""
    row, column = np.arange(dim)[:, None], np.arange(dim)[None, :]
    matrix = np.sqrt(2 / dim) * np.cos(np.pi / dim * (column + 0.5) * row)
    matrix[0] /= np.sqrt(2)
    return jnp.asarray(matrix, jnp.result_type(float))


def rosenbrock(
    *,
    dim: int = 8,
    steepness: tuple[float, float] = (1.0, 100.0),
    noise: float = 0.0,
) -> TaskFamily:
    """Minimise Rosenbrock functions, ``f(x) = mean_i b (x_{i+1} - x_i^2)^2 + (1 - x_i)^2``, minimum 0 at ones.

    Args:
        dim: number of parameters.
        steepness: lowest and highest ``b``, drawn log-uniformly; 100 is the classic.
        noise: standard deviation of a random slope added to the loss, drawn a batch.

    Returns:
        The family. ``params``: ``{"x": [dim]}``, from a normal distribution of deviation 1/2; ``aux``: ``excess``.

    Raises:
        ValueError: an impossible size or range.

    Example:
        >>> family = rosenbrock(dim=4)
        >>> task = family.task(family.data, family.sample(jax.random.key(0)))
        >>> loss, _ = task.loss({"x": jnp.ones(4)}, None, task.batch(jax.random.key(1), "train"))
        >>> float(loss)
        0.0

    Reference: Rosenbrock, "An automatic method for finding the greatest or least value of a function", 1960.
    """
    low, high = steepness
    if dim < 2 or not 0 < low <= high or noise < 0:
        raise ValueError(f"dim {dim} (from 2), steepness {steepness} (0 < low <= high), noise {noise} (from 0)")

    def sample(key: jax.Array) -> Cfg:
        return {"steepness": log_uniform(key, low, high)}

    def task(data: Data, cfg: Cfg) -> Task:
        del data

        def init(key):
            return {"x": 0.5 * jax.random.normal(key, (dim,))}

        def loss(params, key, batch):
            del key
            x = params["x"]
            excess = jnp.mean(cfg["steepness"] * jnp.square(x[1:] - jnp.square(x[:-1])) + jnp.square(1 - x[:-1]))
            return excess + _slope(batch, params), {"excess": excess}

        return Task(init, _noise_batch(dim, noise), loss)

    return TaskFamily({}, sample, task)


def _noise_batch(dim: int, noise: float):
    def batch(key, split):
        del split
        return {"slope": noise * jax.random.normal(key, (dim,))} if noise else {}

    return batch


def _slope(batch, params) -> jax.Array | float:
    return jnp.vdot(batch["slope"].astype(params["x"].dtype), params["x"]) if batch else 0.0


def reparametrise(
    family: TaskFamily,
    low: float = 1e-3,
    high: float = 1e3,
    per_tensor: bool = False,
) -> TaskFamily:
    """Change the scale of a family's parameters: train ``q = p / s`` with the loss ``f(s q)``, ``s`` log-uniform.

    What the network computes stays the same while its parameters and gradients change by ``s``, in opposite
    directions: a rule meta-trained so must take its step sizes from the parameters' own scale.

    One ``s`` for the whole task is the published form, and a rule whose one step size is tuned afterwards can live with
    it. One for each tensor is the stronger augmentation: the tensors of one task then differ in scale by up to
    ``high / low``, so that no single step size serves them all and the rule must look at each tensor's own scale.

    Args:
        family: any family.
        low: least ``s``.
        high: greatest ``s``.
        per_tensor: draw one ``s`` for each parameter tensor instead of one a task.

    Returns:
        The family; its cfg is ``{"family": the original's, "scale": s}``, ``s`` a scalar or a tree of the parameters'
        structure.

    Raises:
        ValueError: not ``0 < low <= high``.

    Example:
        >>> family = reparametrise(rosenbrock(dim=2), low=10.0, high=10.0)
        >>> task = family.task(family.data, family.sample(jax.random.key(0)))
        >>> float(task.loss({"x": jnp.full(2, 0.1)}, None, {})[0])  # p = (1, 1)
        0.0

    Reference: Moudgil et al., "Celo: training versatile learned optimizers on a compute diet", 2025.
    """
    if not 0 < low <= high:
        raise ValueError(f"low {low} and high {high}: 0 < low <= high")

    def sample(key: jax.Array) -> Cfg:
        family_key, scale_key = jax.random.split(key)
        cfg = family.sample(family_key)
        if not per_tensor:
            return {"family": cfg, "scale": log_uniform(scale_key, low, high)}
        shapes = jax.eval_shape(lambda data, cfg: family.task(data, cfg).init(jax.random.key(0)), family.data, cfg)
        leaves, structure = jax.tree.flatten(shapes)
        keys = jax.random.split(scale_key, len(leaves))
        return {"family": cfg, "scale": jax.tree.unflatten(structure, [log_uniform(k, low, high) for k in keys])}

    def task(data: Data, cfg: Cfg) -> Task:
        original = family.task(data, cfg["family"])

        def rescale(params, power):
            scale = cfg["scale"] if per_tensor else jax.tree.map(lambda _: cfg["scale"], params)
            return jax.tree.map(lambda p, s: p * (s**power).astype(p.dtype), params, scale)

        def init(key):
            return rescale(original.init(key), -1)

        def loss(params, key, batch):
            return original.loss(rescale(params, 1), key, batch)

        return Task(init, original.batch, loss)

    return TaskFamily(family.data, sample, task)

"""Networks that people train, in plain JAX, to time optimizers on: a transformer over characters and a ResNet."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Model(NamedTuple):
    """``init(key) -> params``, ``batch(key) -> batch``, ``loss(params, batch) -> scalar``."""

    init: object
    batch: object
    loss: object


def transformer(layers: int, width: int, *, length: int = 64, batch_size: int = 16, vocabulary: int = 96) -> Model:
    """A decoder with pre-norm blocks, sixteen tensors a layer, all of them parameters of their own."""
    heads = max(1, width // 32)

    def init(key):
        keys = iter(jax.random.split(key, 2 + 6 * layers))

        def dense(n, m):
            return {"w": jax.random.normal(next(keys), (n, m)) / jnp.sqrt(n), "b": jnp.zeros(m)}

        def norm():
            return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

        params = {"embed": 0.02 * jax.random.normal(next(keys), (vocabulary, width)), "norm": norm()}
        for i in range(layers):
            block = {name: dense(width, width) for name in ("query", "key", "value", "out")}
            params[f"block{i}"] = block | {
                "norm1": norm(),
                "norm2": norm(),
                "up": dense(width, 4 * width),
                "down": dense(4 * width, width),
            }
        return params

    def norm(p, x):
        x = (x - jnp.mean(x, -1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5)
        return x * p["scale"] + p["bias"]

    def dense(p, x):
        return x @ p["w"] + p["b"]

    def loss(params, tokens):
        x = params["embed"][tokens[:, :-1]]
        b, t, _ = x.shape
        mask = jnp.tril(jnp.ones((t, t), bool))
        for i in range(layers):
            p = params[f"block{i}"]
            h = norm(p["norm1"], x)
            q, k, v = (dense(p[n], h).reshape(b, t, heads, -1) for n in ("query", "key", "value"))
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
            weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
            x = x + dense(p["out"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, -1))
            x = x + dense(p["down"], jax.nn.gelu(dense(p["up"], norm(p["norm2"], x))))
        logits = norm(params["norm"], x) @ params["embed"].T
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1))

    def batch(key):
        return jax.random.randint(key, (batch_size, length + 1), 0, vocabulary)

    return Model(init, batch, loss)


def resnet(width: int = 32, *, blocks: int = 2, batch_size: int = 64) -> Model:
    """A ResNet for 32 x 32 images: three stages of ``blocks`` residual blocks, widths ``width`` to ``4 width``."""
    stages = (width, 2 * width, 4 * width)

    def init(key):
        keys = iter(jax.random.split(key, 4 + 9 * blocks))

        def conv(size, n, m):
            return jax.random.normal(next(keys), (size, size, n, m)) * jnp.sqrt(2 / (size * size * n))

        params, n = {"stem": conv(3, 3, width)}, width
        for s, m in enumerate(stages):
            for b in range(blocks):
                first = n if b == 0 else m
                block = {"conv1": conv(3, first, m), "conv2": 0.1 * conv(3, m, m)}
                block |= {
                    f"{part}{i}": jnp.full(m, float(part == "scale")) for i in (1, 2) for part in ("scale", "bias")
                }
                if first != m:
                    block["skip"] = conv(1, first, m)
                params[f"stage{s}block{b}"] = block
            n = m
        head = {"w": jax.random.normal(next(keys), (n, 10)) / jnp.sqrt(n), "b": jnp.zeros(10)}
        return params | {"head": head}

    def conv(w, x, stride=1):
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def norm(p, i, x):
        x = (x - jnp.mean(x, (0, 1, 2))) * jax.lax.rsqrt(jnp.var(x, (0, 1, 2)) + 1e-5)
        return x * p[f"scale{i}"] + p[f"bias{i}"]

    def loss(params, batch):
        images, labels = batch
        x = conv(params["stem"], images)
        for s in range(len(stages)):
            for b in range(blocks):
                p, stride = params[f"stage{s}block{b}"], 2 if s and b == 0 else 1
                h = jax.nn.relu(norm(p, 1, conv(p["conv1"], x, stride)))
                skip = conv(p["skip"], x, stride) if "skip" in p else x
                x = jax.nn.relu(skip + norm(p, 2, conv(p["conv2"], h)))
        logits = jnp.mean(x, (1, 2)) @ params["head"]["w"] + params["head"]["b"]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1))

    def batch(key):
        images, labels = jax.random.split(key)
        return jax.random.normal(images, (batch_size, 32, 32, 3)), jax.random.randint(labels, (batch_size,), 0, 10)

    return Model(init, batch, loss)

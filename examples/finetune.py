"""Fine-tune a pretrained rule on your own task: a few hundred meta-steps, save, load."""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import learned_opt
from meta_train.train.estimators import pes
from meta_train.train.learners import task_learner
from meta_train.train.trainer import make_mesh, make_trainer
from tasks.base import Task, TaskFamily

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--meta-steps", type=int, default=200)
meta_steps = parser.parse_args().meta_steps


def my_task(data, cfg):
    """Regression on sine waves; ``cfg`` is the wave's frequency."""

    def init(key):
        k1, k2 = jax.random.split(key)
        return {"w1": jax.random.normal(k1, (1, 16)), "b1": jnp.zeros(16), "w2": jax.random.normal(k2, (16, 1)) / 4}

    def loss(params, key, batch):
        prediction = jnp.tanh(batch @ params["w1"] + params["b1"][None]) @ params["w2"]
        return jnp.mean((prediction - jnp.sin(cfg * batch)) ** 2), {}

    return Task(init=init, batch=lambda key, split: jax.random.uniform(key, (32, 1), minval=-2, maxval=2), loss=loss)


family = TaskFamily(data=(), sample=lambda key: jax.random.uniform(key, minval=1.0, maxval=3.0), task=my_task)

saved = learned_opt.load_rule("flagship-1")
trainer = make_trainer(
    init_theta=lambda key: saved.theta,
    estimators=lambda data: [pes(task_learner(saved.rule, family, lengths=(100, 200), multiple_of=20), unroll=20)],
    outer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4)),
    particles=8,
    mesh=make_mesh(jax.devices()[:1]),
)
state = trainer.init(jax.random.PRNGKey(0), ())
for step in range(meta_steps):
    state, info = trainer.meta_step(state, ())
    if step % 50 == 0 or step == meta_steps - 1:
        print(f"meta-step {step}: meta-loss {info.loss:.4f}")

folder = learned_opt.save(
    Path(tempfile.mkdtemp()) / "mine",
    saved.name,
    state.theta,
    kwargs=saved.kwargs,
    learning_rate=saved.learning_rate,
)
optimizer = learned_opt.load(folder)
print(f"saved and loaded again: {folder.name}")

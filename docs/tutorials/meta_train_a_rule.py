"""Meta-train a rule from scratch on tasks of your own, and draw what it learned.

Run it as a script, or cell by cell in an editor that knows `# %%`.
"""

# %% [markdown]
# ## Tasks
# A family draws a task, here a quadratic bowl of ten dimensions with its own curvatures and minimum. `data` would hold
# a data set; this family has none.

# %%
import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import learned_opt
from meta_train.train.estimators import pes
from meta_train.train.learners import task_learner
from meta_train.train.trainer import make_mesh, make_trainer
from tasks.base import Task, TaskFamily

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--meta-steps", type=int, default=300)
parser.add_argument("--picture", type=Path, default=Path(__file__).with_name("meta_train_a_rule.png"))
options = parser.parse_args()


def draw(key):
    """A task's curvatures, from 0.1 to 10, and its minimum."""
    k1, k2 = jax.random.split(key)
    return {"curvature": 10 ** jax.random.uniform(k1, (10,), minval=-1, maxval=1), "at": jax.random.normal(k2, (10,))}


def bowl(data, cfg):
    """The task that ``cfg`` describes."""
    del data

    def loss(params, key, batch):
        del key, batch
        return 0.5 * jnp.mean(cfg["curvature"] * (params - cfg["at"]) ** 2), {}

    return Task(init=lambda key: jnp.zeros(10), batch=lambda key, split: (), loss=loss)


family = TaskFamily(data=(), sample=draw, task=bowl)

# %% [markdown]
# ## A rule, a learner, an estimator, a trainer
# The rule is a small network for each parameter. The learner runs it on a task from the family; PES estimates the
# gradient of the mean loss from windows of 10 steps; the trainer takes the outer steps.

# %%
rule = learned_opt.RULES["adafac_mlp"]()
learner = task_learner(rule, family, lengths=(50, 50), multiple_of=10)
trainer = make_trainer(
    init_theta=rule.init,
    estimators=lambda data: [pes(learner, unroll=10, sigma=0.01)],
    outer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    particles=16,
    mesh=make_mesh(jax.devices()[:1]),
)
state = trainer.init(jax.random.PRNGKey(0), ())
fresh, meta_losses = jax.tree.map(jnp.copy, state.theta), []  # a meta-step takes the state's memory over
for _ in range(options.meta_steps):
    state, info = trainer.meta_step(state, ())
    meta_losses.append(float(info.loss))
print(f"meta-loss: {meta_losses[0]:.3f} at first, {meta_losses[-1]:.3f} at last")

# %% [markdown]
# ## What it learned
# New tasks of the family, 50 steps with the fresh theta, with the trained one, and with Adam at 0.1.


# %%
def losses_of(optimizer, key):
    """The losses of 50 steps on a new task."""
    task = family.task((), family.sample(key))

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: task.loss(p, key, ())[0])(params)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    params = task.init(key)
    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=50)[1]


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(meta_losses, color="#7a3fb0")
left.set(xlabel="meta-step", ylabel="meta-loss")
contenders = {
    "Adam, 0.1": optax.with_extra_args_support(optax.adam(0.1)),
    "fresh rule": rule.build(fresh),
    "trained rule": rule.build(state.theta),
}
for name, optimizer in contenders.items():
    losses = jax.jit(jax.vmap(lambda key, optimizer=optimizer: losses_of(optimizer, key)))(
        jax.random.split(jax.random.key(7), 64)
    )
    right.plot(jnp.median(losses, axis=0), label=name)
    print(f"{name}: median loss after 50 steps {jnp.median(losses[:, -1]):.4f}")
right.set(xlabel="step", ylabel="loss, median of 64 tasks", yscale="log")
right.legend(frameon=False)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
figure.savefig(options.picture, dpi=120)

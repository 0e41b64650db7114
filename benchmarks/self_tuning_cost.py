"""What a self-tuning training step costs, against a plain one: time, memory of parameters, temporary memory.

Each network takes training steps (loss, gradients, Adam) of these forms, in turns, and the median of each is compared
(of processor time on a CPU, which others may use meanwhile):

    plain                  the network alone, with dropout
    STN                    the original's joint step
    response               Delta-STN's step of the response alone, linearised
    Delta-STN              its whole step: elementary and response
    Delta-STN, half batch  the same with the response on half the batch

with 8 hyperparameters, each example's own or the batch's.

    python benchmarks/self_tuning_cost.py        # writes reports/self_tuning/cost_<backend>.csv
"""

import argparse
import csv
import itertools
import time
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables

from learned_opt import self_tuning as st

REPORT = Path(__file__).parents[1] / "reports" / "self_tuning"
H, CLASSES = 8, 10


def dropout(x, rate):
    return st.regularisers.dropout(hk.next_rng_key(), x, rate)


def mlp(x, rates):
    x = x.reshape(len(x), -1)
    for rate in rates[:3]:
        x = dropout(jax.nn.relu(hk.Linear(512)(x)), rate)
    return hk.Linear(CLASSES)(x)


def cnn(x, rates):
    for channels, rate in zip((32, 64, 64), rates, strict=False):
        x = dropout(hk.max_pool(jax.nn.relu(hk.Conv2D(channels, 3)(x)), 2, 2, "SAME"), rate)
    x = dropout(jax.nn.relu(hk.Linear(128)(x.reshape(len(x), -1))), rates[3])
    return hk.Linear(CLASSES)(x)


def lstm(x, rates):
    x = jnp.swapaxes(x[..., 0], 0, 1)  # rows of an image as a sequence, [T, B, D]
    core = hk.LSTM(256)
    x, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
    return hk.Linear(CLASSES)(dropout(x[-1], rates[0]))


NETWORKS = {"mlp": mlp, "cnn": cnn, "lstm": lstm}


def make_steps(function, batch, per_example):
    """Return {form: step} with one signature, (carry, key) -> carry, the start, and the ratio of parameters."""
    net = st.lift(hk.transform(function))
    specs = [st.logit(0.3, per_example=per_example) for _ in range(H)]

    def train_loss(params, hparams, key, batch):
        logits = net.apply(params, key, batch[0], hparams)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])

    made = st.make_objectives(specs, train_loss, None)
    joint = st.make_objectives(specs, train_loss, None, centred=False)
    mean, _ = st.start(specs)
    sigma = jnp.full(H, 0.5)
    adam = optax.adam(1e-3)
    half = jax.tree.map(lambda x: x[: len(x) // 2], batch)

    def stepped(tree, state, grads):
        updates, state = adam.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    def elementary(carry, key):
        grads = jax.grad(lambda p: made.elementary(p, (), mean, key, batch)[0])(carry[0])
        return (*stepped(carry[0], carry[1], grads), *carry[2:])

    def plain(carry, key):
        def loss(params):
            rates = [0.3] * H
            logits = net.apply(params, key, batch[0], rates)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

        return (*stepped(carry[0], carry[1], jax.grad(loss)(carry[0])), *carry[2:])

    def response(carry, key, part=batch):
        noise = made.noise(key, part)
        grads, _ = jax.grad(made.response, has_aux=True)(carry[2], carry[0], (), mean, sigma, noise, key, part)
        return (*carry[:2], *stepped(carry[2], carry[3], grads))

    def delta(carry, key, part=batch):
        after = elementary(carry, key)
        return (*after[:2], *response(carry, key, part)[2:])

    def stn(carry, key):
        loss = lambda both: joint.joint(both, (), mean, sigma, joint.noise(key, batch), key, batch)[0]  # noqa: E731
        grads, response_grads = jax.grad(loss)((carry[0], carry[2]))
        return (*stepped(carry[0], carry[1], grads), *stepped(carry[2], carry[3], response_grads))

    params = net.init(jax.random.key(0), batch[0], [0.3] * H)
    start = net.init_response(jax.random.key(1), H, batch[0], [0.3] * H)
    carry = (params, adam.init(params), start, adam.init(start))
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    steps = {
        "plain": plain,
        "STN": stn,
        "response": response,
        "Delta-STN": delta,
        "Delta-STN, half batch": lambda carry, key: delta(carry, key, half),
    }
    return steps, carry, 1 + size(start) / size(params)


def measure(steps, carry, rounds):
    """Return the median seconds a step and the temporary bytes of each form, the forms taking turns."""
    key = jax.random.key(2)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    compiled = {name: jax.jit(step).lower(carry, key).compile() for name, step in steps.items()}
    seconds = {name: [] for name in compiled}
    for turn, (name, run) in itertools.product(range(rounds + 1), compiled.items()):
        begin = clock()
        jax.block_until_ready(run(carry, key))
        if turn:
            seconds[name].append(clock() - begin)
    memory = {name: run.memory_analysis().temp_size_in_bytes for name, run in compiled.items()}
    return {name: float(np.median(times)) for name, times in seconds.items()}, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), help="measure these")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--to", type=Path, default=REPORT)
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    batch = (jax.random.normal(jax.random.key(3), (args.batch, 28, 28, 1)), jnp.arange(args.batch) % CLASSES)
    path = args.to / f"cost_{jax.default_backend()}.csv"
    rows = []
    if path.exists():
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["network"] not in args.networks]
    print("network  hyperparameters  form                    ms   times plain  parameters  temporaries")
    for name in args.networks:
        for per_example in (True, False):
            own = "each example" if per_example else "batch"
            steps, carry, parameters = make_steps(NETWORKS[name], batch, per_example)
            seconds, memory = measure(steps, carry, args.rounds)
            for form in steps:
                ratio, more = seconds[form] / seconds["plain"], parameters if form != "plain" else 1.0
                temporaries = memory[form] / memory["plain"]
                rows.append({
                    "network": name, "batch": args.batch, "hyperparameters": own, "form": form,
                    "ms": round(1e3 * seconds[form], 3), "times_plain": round(ratio, 2),
                    "parameters": round(more, 3), "temporaries": round(temporaries, 2),
                })  # fmt: skip
                print(f"{name:8s} {own:16s} {form:22s} {1e3 * seconds[form]:7.2f} {ratio:9.2f} {more:13.2f}"
                      f" {temporaries:11.2f}", flush=True)  # fmt: skip
    tables.write(path, rows)


if __name__ == "__main__":
    main()

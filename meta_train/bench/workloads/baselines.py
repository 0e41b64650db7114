"""The optimizers to beat on workloads, each with its source, its one setting for all and its search space."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from learned_opt.directions import scale_by_soap
from learned_opt.features import unit_rms
from learned_opt.layouts import name_of, outputs_last
from learned_opt.muon import hidden_matrices, is_hidden

from ...errors import UserError
from .optimizers import DECAY, SOAP_RATE, WARMUP, Optimizer, Range, Settings, assembled, not_vectors, schedule

_MUON_RMS = 0.2  # of an orthogonalised update, as of Adam's: one rate for both (Liu et al. 2025, arXiv:2502.16982)
_BETAS = {"one_minus_b1": Range(0.02, 0.3), "one_minus_b2": Range(1e-3, 0.2)}
_ADAM = {"learning_rate": Range(3e-4, 1e-2), **_BETAS, **DECAY, **WARMUP}
# Rates of the ruleset "nothing set": reports/workloads/rates.csv. NAdamW's relatives take over its own.
_ADAM_SETTING = {
    "learning_rate": 4e-3,
    "one_minus_b1": 0.1,
    "one_minus_b2": 0.01,
    "weight_decay": 0.05,
    "warmup": 0.05,
}
_SOAP_SETTING = {**_ADAM_SETTING, "learning_rate": SOAP_RATE, "one_minus_b1": 0.05, "one_minus_b2": 0.05}


def baselines() -> list[Optimizer]:
    """The optimizers to beat; the first is the reference."""

    def along(name, direction, setting, space, source):
        return Optimizer(name, lambda s, num_steps: assembled(direction(s), s, num_steps), setting, space, source)

    def adam_like(name, direction, source):
        return along(name, direction, _ADAM_SETTING, _ADAM, source)

    def prodigy(s, num_steps):
        return optax.contrib.prodigy(
            schedule(s, num_steps),
            betas=tuple(_betas(s).values()),
            weight_decay=s["weight_decay"],
            safeguard_warmup=True,
        )

    def schedule_free(s, num_steps):
        rate = s["learning_rate"] * jnp.ones(())
        return optax.contrib.schedule_free_adamw(
            rate, warmup_steps=max(num_steps // 20, 1), **_betas(s), weight_decay=s["weight_decay"]
        )

    no_warmup = {key: value for key, value in _ADAM_SETTING.items() if key != "warmup"}
    return [
        adam_like("nadamw", lambda s: optax.scale_by_adam(**_betas(s), nesterov=True), "Dozat 2016; optax"),
        adam_like("adamw", lambda s: optax.scale_by_adam(**_betas(s)), "Loshchilov & Hutter 2019; optax"),
        adam_like(
            "cautious-adamw",
            lambda s: cautious(optax.scale_by_adam(**_betas(s))),
            "Liang et al. 2024, arXiv:2411.16085; here",
        ),
        along(
            "ademamix",
            lambda s: optax.contrib.scale_by_ademamix(**_betas(s), b3=0.999, alpha=s["alpha"]),
            {**_ADAM_SETTING, "alpha": 5.0},
            {**_ADAM, "alpha": Range(1.0, 10.0)},
            "Pagliardini et al. 2024, arXiv:2409.03137; optax.contrib",
        ),
        adam_like(
            "adopt",
            lambda s: optax.contrib.scale_by_adopt(**_betas(s)),
            "Taniguchi et al. 2024, arXiv:2411.02853; optax.contrib",
        ),
        Optimizer(
            "muon",
            _muon,
            {"learning_rate": 0.01, "one_minus_b1": 0.05, "weight_decay": 0.05, "warmup": 0.05},
            {"learning_rate": Range(1e-3, 0.1), "one_minus_b1": Range(0.02, 0.3), **DECAY, **WARMUP},
            "Jordan 2024, hidden matrices alone, AdamW for the rest; optax.contrib",
        ),
        along(
            "soap",
            soap_direction,
            _SOAP_SETTING,
            {**_ADAM, "learning_rate": Range(3e-4, 3e-2)},
            "Vyas et al. 2024, arXiv:2409.11321; here",
        ),
        along(
            "soap-muon",
            soap_muon_direction,
            {**_SOAP_SETTING, "learning_rate": 0.01},
            {**_ADAM, "learning_rate": Range(1e-3, 0.1)},
            "SOAP, then Newton-Schulz, hidden matrices alone, Adam for the rest; here",
        ),
        along(
            "normuon",
            normuon_direction,
            {**_SOAP_SETTING, "learning_rate": 0.01},
            {**_ADAM, "learning_rate": Range(1e-3, 0.1)},
            "Li et al. 2025, arXiv:2510.05491, hidden matrices alone, Adam for the rest; here",
        ),
        along(
            "kron",
            lambda s: _kron(),
            {"learning_rate": 1e-3, "weight_decay": 0.05, "warmup": 0.05},
            {"learning_rate": Range(1e-4, 1e-2), **DECAY, **WARMUP},
            "Li 2018, arXiv:1512.04202 (PSGD); rollfast",
        ),
        Optimizer(
            "prodigy",
            prodigy,
            {**_ADAM_SETTING, "learning_rate": 1.0},
            {**_ADAM, "learning_rate": Range(0.1, 10.0)},
            "Mishchenko & Defazio 2023, arXiv:2306.06101; optax.contrib",
        ),
        Optimizer(
            "schedule-free-adamw",
            schedule_free,
            {**no_warmup, "learning_rate": 5e-3},
            {key: space for key, space in {**_ADAM, "learning_rate": Range(1e-3, 3e-2)}.items() if key != "warmup"},
            "Defazio et al. 2024, arXiv:2405.15682; optax.contrib",
            evaluate=optax.contrib.schedule_free_eval_params,
        ),
    ]


def soap_direction(s: Settings) -> optax.GradientTransformation:
    """SOAP's direction, uphill; a side of 8,192 words, whose basis takes 16 s a step on one core, is not turned."""
    return optax.chain(scale_by_soap(**_betas(s), max_dim=4096), optax.scale(-1.0))


def soap_muon_direction(s: Settings) -> optax.GradientTransformation:
    """SOAP's direction, five Newton-Schulz steps from it, at an RMS of 0.2; uphill."""
    soap = scale_by_soap(**_betas(s), max_dim=4096, orthogonalize=True)
    return hidden_alone(optax.chain(soap, optax.scale(-_MUON_RMS)), s)


def normuon_direction(s: Settings) -> optax.GradientTransformation:
    """Muon's direction, every output's row over the root of its mean square, at an RMS of 0.2; uphill.

    The rows are normalised after the Newton-Schulz steps, by a running mean with memory ``1 - one_minus_b2``.
    """
    b1, b2 = _betas(s).values()

    def mean_square(u):
        return jnp.mean(u * u, range(u.ndim - 1), keepdims=True)

    def init_fn(params):
        return jax.tree.map(lambda p: jnp.zeros_like(mean_square(p)), params), jnp.zeros((), jnp.int32)

    def update_fn(updates, state, params=None):
        del params
        seen, count = state
        seen = jax.tree.map(lambda v, u: b2 * v + (1 - b2) * mean_square(u), seen, updates)
        corrected = 1 - b2 ** (count + 1)
        rows = jax.tree.map(lambda u, v: u / (jnp.sqrt(v / corrected) + 1e-8), updates, seen)
        return jax.tree.map(lambda u: _MUON_RMS * unit_rms(u, 1e-16, tuple(range(u.ndim))), rows), (seen, count + 1)

    def matrices(params):  # of what `hidden_alone` leaves
        return jax.tree_util.tree_map_with_path(lambda path, p: outputs_last(name_of(path), p.shape), params)

    muon = optax.contrib.scale_by_muon(beta=b1, weight_dimension_numbers=matrices)
    return hidden_alone(optax.chain(muon, optax.GradientTransformation(init_fn, update_fn)), s)


def hidden_alone(direction: optax.GradientTransformation, s: Settings) -> optax.GradientTransformation:
    """A direction for the tensors of :func:`~learned_opt.muon.is_hidden`, Adam's for the others."""

    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda path, p: "hidden" if is_hidden(path, p) else "rest", params)

    return optax.partition({"hidden": direction, "rest": optax.scale_by_adam(**_betas(s))}, labels)


def _kron() -> optax.GradientTransformation:
    try:
        from rollfast.optim.psgd import scale_by_kron
    except ImportError:
        raise UserError("the baseline kron needs rollfast: pip install rollfast") from None
    kron = scale_by_kron(max_size_triangular=4096)

    def init_fn(params):
        with contextlib.redirect_stdout(None):  # it prints how large its state is
            return kron.init(params)

    def update_fn(updates, state, params=None):
        with jax.numpy_rank_promotion("allow"):
            return kron.update(updates, state, params)

    return optax.GradientTransformation(init_fn, update_fn)


def cautious(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    r"""Keeps the coordinates of a direction that agree in sign with the gradient, and makes up for the others.

    :math:`u \leftarrow u \odot m / \max(\bar m, 10^{-3})` with :math:`m = [u \odot g > 0]`.

    Args:
        inner: gives directions uphill.

    Returns:
        An Optax transform with the inner one's state.

    Reference: Liang et al., "Cautious optimizers: improving training with one line of code", 2024, arXiv:2411.16085.
    """

    def update_fn(updates, state, params=None):
        directions, state = inner.update(updates, state, params)

        def masked(u, g):
            agree = (u * g > 0).astype(u.dtype)
            return u * agree / jnp.maximum(agree.mean(), 1e-3)

        return jax.tree.map(masked, directions, updates), state

    return optax.GradientTransformation(inner.init, update_fn)


def _muon(s: Settings, num_steps: int) -> optax.GradientTransformation:
    """One rate for both halves: the orthogonalised updates are scaled to the RMS of Adam's (Liu et al. 2025)."""
    return optax.contrib.muon(
        schedule(s, num_steps),
        beta=1 - s["one_minus_b1"],
        weight_decay=s["weight_decay"],
        weight_decay_mask=not_vectors,
        adam_b2=0.99,
        muon_weight_dimension_numbers=hidden_matrices,
        consistent_rms=_MUON_RMS,
    )


def _betas(s: Settings) -> dict[str, Any]:
    return {"b1": 1 - s["one_minus_b1"], "b2": 1 - s["one_minus_b2"]}

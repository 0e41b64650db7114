"""Rules from the flat ``{name: array}`` dicts in which the field publishes its meta-parameters."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .base import LearnedOptimizer, Theta
from .rules import RULES


def _celo2(leaves: dict[str, np.ndarray], **kwargs) -> tuple[dict, Theta]:
    stem = "ff_mod_stack/~/"
    blocks = sum(name.startswith(f"{stem}w0__") for name in leaves)
    theta = {name: leaves[stem + name] for name in ("b0", "w1", "b1", "w2", "b2")}
    theta["w0"] = np.concatenate([leaves[f"{stem}w0__{i}"] for i in range(blocks)], axis=-2)
    return {"hidden_size": theta["w1"].shape[-1], "published": True, **kwargs}, theta


def _mlp(leaves: dict[str, np.ndarray], **kwargs) -> tuple[dict, Theta]:
    theta = {f"{name}{i}": leaves[f"mlp/~/linear_{i}/{name}"] for i in range(3) for name in ("w", "b")}
    return {"hidden_size": theta["w1"].shape[0], "published": True, **kwargs}, theta


def _adafac_mlp(leaves: dict[str, np.ndarray], **kwargs) -> tuple[dict, Theta]:
    theta = {name: leaves[f"nn/~/{name}"] for name in ("w0", "b0", "w1", "b1", "w2", "b2")}
    theta |= {name: leaves[name] for name in ("momentum_decays", "rms_decays")}
    theta["factored_decays"] = leaves["adafactor_decays"]
    return {"hidden_size": theta["w1"].shape[0], "published": True, **kwargs}, theta


def _linear(leaves: dict[str, np.ndarray], name: str) -> Theta:
    return {"w": leaves[f"{name}/w"], "b": leaves[f"{name}/b"]}


def _lstm(leaves: dict[str, np.ndarray]) -> Theta:
    memory = {name: leaves[f"lstm_init_state/{name}"].reshape(-1) for name in ("hidden", "cell")}
    return _linear(leaves, "rnn_params/rnn/linear") | memory


def _around_the_lstm(leaves: dict[str, np.ndarray]) -> Theta:
    """The LSTM of HyperV2 and Celo and the layers around it."""
    layers = {"unused": "linear", "pooled": "linear_1", "own": "linear_2", "step_size": "step_size"}
    theta = {name: _linear(leaves, f"rnn_params/{theirs}") for name, theirs in layers.items()}
    return theta | {"lstm": _lstm(leaves)}


def _celo_adam(leaves: dict[str, np.ndarray], **kwargs) -> tuple[dict, Theta]:
    theta = _around_the_lstm(leaves)
    return {"lstm_size": theta["lstm"]["hidden"].size, **kwargs}, theta


def _celo(leaves: dict[str, np.ndarray], **kwargs) -> tuple[dict, Theta]:
    kwargs, scheduler = _celo_adam(leaves, **kwargs)
    _, bank = _celo2(leaves)
    scheduler["controls"] = _linear(leaves, "rnn_params/rnn_to_controls")
    sizes = {"bank_size": bank["w1"].shape[0], "hidden_size": bank["w1"].shape[-1], "published": True}
    return sizes | kwargs, {"bank": bank, "scheduler": scheduler}


def _velo(leaves: dict[str, np.ndarray], **kwargs) -> tuple[dict, Theta]:
    kwargs, theta = _celo(leaves, **kwargs)
    # the horizon is what the reference has unless told otherwise
    return {"loss_horizon": 10, **kwargs}, {"bank": theta["bank"], **theta["scheduler"]}


def _nn_adam(leaves: dict[str, np.ndarray], **kwargs) -> tuple[dict, Theta]:
    names = ("per_layer_lr", "per_layer_beta1", "per_layer_beta2", "per_layer_epsilon")
    theta = {"controls": np.stack([leaves[name] for name in names]), "lstm": _lstm(leaves)}
    theta["to_controls"] = _linear(leaves, "rnn_to_controls_params/rnn_to_controls")
    return {"lstm_size": theta["lstm"]["hidden"].size, **kwargs}, theta


def _rnn_mlp(leaves: dict[str, np.ndarray], **kwargs) -> tuple[dict, Theta]:
    layers = [_linear(leaves, f"ffmod_params/mlp/~/linear_{i}") for i in range(3)]
    theta = {"lstm": _lstm(leaves), "mlp": {f"{k}{i}": x for i, layer in enumerate(layers) for k, x in layer.items()}}
    theta["to_mlp"] = _linear(leaves, "rnn_to_ff_params/rnn_to_ff")
    theta["to_all"] = _linear(leaves, "rnn_to_in_params/rnn_to_in")
    theta |= {name: leaves[f"initial_{name}"] for name in ("from_lstm", "from_mlp")}
    sizes = {"lstm_size": theta["lstm"]["hidden"].size, "hidden_size": theta["mlp"]["w1"].shape[0]}
    return sizes | {"published": True, **kwargs}, theta


_READERS: dict[str, Callable[..., tuple[dict, Theta]]] = {
    "adafac_mlp": _adafac_mlp,
    "celo": _celo,
    "celo2": _celo2,
    "celo_adam": _celo_adam,
    "mlp": _mlp,
    "nn_adam": _nn_adam,
    "rnn_mlp": _rnn_mlp,
    "velo": _velo,
}


def from_reference(rule: str, leaves: Mapping[str, np.ndarray], **kwargs) -> tuple[LearnedOptimizer, Theta]:
    """A rule of this package at the meta-parameters of a reference implementation.

    Args:
        rule: a name in :data:`learned_opt.RULES`.
        leaves: the reference's parameters, ``name -> array``; names as ``path/to/leaf``. Where some begin with
            ``theta/`` or ``params/``, only those count, without it.
        **kwargs: the rule's own keyword arguments; sizes are inferred from the arrays. ``published`` is true unless it
            is given: ``published=False`` is the form in which what has no gradient rests.

    Returns:
        ``(rule, theta)``.

    Raises:
        ValueError: if the rule has no reference, or the leaves are not its.
    """
    kwargs, theta = read_reference(rule, leaves, **kwargs)
    return RULES[rule](**kwargs), theta


def check_known(rule: str) -> None:
    """Raises a ``ValueError`` that names the rules with a reference implementation, if ``rule`` is none of them."""
    if rule not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise ValueError(f"no reference implementation is known for rule {rule!r}; known: {known}")


def read_reference(rule: str, leaves: Mapping[str, np.ndarray], /, **kwargs) -> tuple[dict, Theta]:
    """As :func:`from_reference`, but returns ``(the factory's arguments, theta)``: what :func:`learned_opt.save` takes.

    Args:
        rule: see there, as for the others.
        leaves: see there.
        **kwargs: see there.
    """
    check_known(rule)
    flat = {name: np.asarray(value) for name, value in leaves.items()}
    for stem in ("params/", "theta/"):
        if any(name.startswith(stem) for name in flat):
            flat = {name.removeprefix(stem): value for name, value in flat.items() if name.startswith(stem)}
    try:
        kwargs, theta = _READERS[rule](flat, **kwargs)
    except KeyError as error:
        raise ValueError(f"these are not the leaves of {rule!r}: {error.args[0]!r} is missing") from None
    except TypeError as error:
        raise ValueError(f"{rule!r} cannot be read with {sorted(kwargs)}: {error}") from None
    except (AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"these are not the leaves of {rule!r}: {error}") from None
    try:
        template = jax.eval_shape(RULES[rule](**kwargs).init, jax.random.key(0))
    except TypeError as error:
        raise ValueError(f"the rule {rule!r} cannot be made with {kwargs}: {error}") from None
    for (path, want), got in zip(jax.tree.leaves_with_path(template), jax.tree.leaves(theta), strict=True):
        if want.shape != got.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"these are not the leaves of {rule!r}: {name!r} would be {got.shape}, not {want.shape}")
    return kwargs, jax.tree.map(jnp.asarray, theta)

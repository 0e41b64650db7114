"""What one optimization step costs: every contender timed alone, turn by turn with Adam and with next to no update."""

import platform
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax

from .contenders import Contender

ROUNDS = 5
_SECONDS = 0.05  # of one turn, about
_LEAST, _MOST = 100, 20_000  # steps of one turn: at least ten periods of SOAP's basis
FLOOR = Contender("gradient", lambda rate, num_steps: optax.sgd(rate), ())  # what a step costs without an optimizer


class Timing(NamedTuple):
    """Milliseconds of one optimization step, batch, gradient and update, on one task.

    Attributes:
        step: the contender's.
        reference: Adam's, measured in the same turns.
        gradient: plain SGD's, measured in the same turns: what the batch and the gradient cost, and next to no update.
    """

    step: float
    reference: float
    gradient: float


def take_turns(seconds: Mapping[str, Callable[[int], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """Times compiled loops one after another, a turn of each, several rounds.

    Whatever else slows the machine down for a while so meets them all alike.

    Args:
        seconds: a name to a function that runs so many steps and says how long they took.
        rounds: how many.

    Returns:
        Milliseconds a step, the median over the rounds.
    """
    numbers = {}
    for name, run in seconds.items():
        about = min(run(_LEAST) for _ in range(3))  # the first call is slower, and another process may interrupt one
        numbers[name] = min(max(int(_SECONDS * _LEAST / max(about, 1e-9)), _LEAST), _MOST)
    turns = [{name: 1000 * run(numbers[name]) / numbers[name] for name, run in seconds.items()} for _ in range(rounds)]
    return {name: float(np.median([turn[name] for turn in turns])) for name in seconds}


def machine() -> str:
    """What times depend on besides the program: the devices and the host, by its name."""
    return f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}, {platform.node()}"

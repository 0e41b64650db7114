"""Self-tuning networks: any Haiku or Flax model tunes its own hyperparameters in one run."""

from . import augmentations, regularisers
from .dense import dense_lift, dense_response
from .hyperparameters import (
    Hyperparameter,
    describe,
    draw,
    from_json,
    interval,
    log,
    logit,
    names,
    positive,
    real,
    start,
    to_json,
    values,
)
from .modules import Gated
from .objectives import Hyper, Objectives, bias_weights, make_objectives
from .population import Population, PopulationState, RoundInfo, population
from .regularisers import squared_norm
from .response import BestResponse, LiftedNetwork, lift, materialise, to_dense
from .schedule import (
    Replay,
    ReplayState,
    Schedule,
    constant,
    from_run,
    interpolate,
    optax_schedules,
    plot,
    replay,
    schedule_from_json,
    schedule_to_json,
)
from .tuner import Best, CycleInfo, Tuner, TunerState, tuner

__all__ = [
    "Best",
    "BestResponse",
    "CycleInfo",
    "Gated",
    "Hyper",
    "Hyperparameter",
    "LiftedNetwork",
    "Objectives",
    "Population",
    "PopulationState",
    "Replay",
    "ReplayState",
    "RoundInfo",
    "Schedule",
    "Tuner",
    "TunerState",
    "augmentations",
    "bias_weights",
    "constant",
    "dense_lift",
    "dense_response",
    "describe",
    "draw",
    "from_json",
    "from_run",
    "interpolate",
    "interval",
    "lift",
    "log",
    "logit",
    "make_objectives",
    "materialise",
    "names",
    "optax_schedules",
    "plot",
    "population",
    "positive",
    "real",
    "regularisers",
    "replay",
    "schedule_from_json",
    "schedule_to_json",
    "squared_norm",
    "start",
    "to_dense",
    "to_json",
    "tuner",
    "values",
]

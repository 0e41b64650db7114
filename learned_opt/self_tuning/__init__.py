"""Self-tuning networks: any Haiku model tunes its own hyperparameters in one run."""

from . import regularisers
from .dense import dense_lift, dense_response
from .hyperparameters import (
    Hyperparameter,
    describe,
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
from .regularisers import squared_norm
from .response import BestResponse, LiftedNetwork, lift, materialise, to_dense
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
    "Tuner",
    "TunerState",
    "bias_weights",
    "dense_lift",
    "dense_response",
    "describe",
    "from_json",
    "interval",
    "lift",
    "log",
    "logit",
    "make_objectives",
    "materialise",
    "names",
    "positive",
    "real",
    "regularisers",
    "squared_norm",
    "start",
    "to_dense",
    "to_json",
    "tuner",
    "values",
]

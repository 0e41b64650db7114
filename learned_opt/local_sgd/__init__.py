"""Local SGD for any Optax transform: delays, outer steps, compression, fragments, real processes."""

from .hosts import Watchdog, load_anchor, load_tree, save_anchor, save_tree
from .published import diloco, muloco, post_local, sparseloco
from .transform import LocalSGDState, local_sgd
from .workers import map_workers, spread_workers, worker_axes, worker_specs

__all__ = [
    "LocalSGDState",
    "Watchdog",
    "diloco",
    "load_anchor",
    "load_tree",
    "local_sgd",
    "map_workers",
    "muloco",
    "post_local",
    "save_anchor",
    "save_tree",
    "sparseloco",
    "spread_workers",
    "worker_axes",
    "worker_specs",
]

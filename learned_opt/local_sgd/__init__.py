"""Local SGD for any Optax transform: delays, outer steps, compression, fragments, overlap, real processes."""

from .hosts import Watchdog, check_anchor, load_anchor, load_tree, newest_anchor, save_anchor, save_tree
from .link import Link
from .nesterov import add_nesterov
from .one_worker import ema_nesterov, lookahead
from .published import diloco, muloco, post_local, sparseloco
from .transform import LocalSGDState, local_sgd
from .workers import map_workers, rescue, spread_workers, worker_axes, worker_specs

__all__ = [
    "Link",
    "LocalSGDState",
    "Watchdog",
    "add_nesterov",
    "check_anchor",
    "diloco",
    "ema_nesterov",
    "load_anchor",
    "load_tree",
    "local_sgd",
    "lookahead",
    "map_workers",
    "muloco",
    "newest_anchor",
    "post_local",
    "rescue",
    "save_anchor",
    "save_tree",
    "sparseloco",
    "spread_workers",
    "worker_axes",
    "worker_specs",
]

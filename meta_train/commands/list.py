"""``learned-opt list``: what there is."""

import argparse

import learned_opt
from learned_opt import store
from learned_opt.kinds import FEATURES, OPTIMIZER
from tasks import suites
from tasks.families import representation
from tasks.workloads import SUITES

from ..train import config as configs
from ..train.estimators import ESTIMATORS
from . import shared


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    everything = {
        "rules": sorted(OPTIMIZER.rules),
        "pretrained": list(learned_opt.available()),
        "suites": {"train": sorted(suites.TRAIN), "held_out": sorted(suites.HELD_OUT), "workloads": sorted(SUITES)},
        "estimators": sorted(ESTIMATORS),
        "presets": list(configs.PRESETS),
        "unsupervised": {
            "rules": sorted(FEATURES.rules),
            "pretrained": list(store.available_unsupervised()),
            "suites": sorted(representation.SUITES),
        },
    }
    chosen = {arguments.kind: everything[arguments.kind]} if arguments.kind else everything
    if arguments.json:
        shared.print_json(chosen)
        return 0
    for kind, names in chosen.items():
        if isinstance(names, dict):
            for sub, inner in names.items():
                print(f"{kind} ({sub}): {', '.join(inner) or 'none'}")
        else:
            print(f"{kind}: {', '.join(names) or 'none'}")
    return 0

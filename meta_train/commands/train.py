"""``learned-opt train``: meta-train a rule, then benchmark it."""

import argparse
import shlex
import socket
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from learned_opt.kinds import optimizes

from .. import xla_flags
from ..bench import benchmark
from ..bench.tournament import Plan
from ..errors import UsageError
from ..train import config as configs
from ..train import loop
from ..train.config import Config
from . import shared

_PROCESSES = ("coordinator", "num_processes", "process_id")  # any of them makes this one of several processes


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    config = _config(arguments)
    if config.bench_suite:  # a mistake there must not wait for the end of the run
        if not optimizes(config.rule):
            raise UsageError(f"{config.rule!r} is no optimizer, so there is nothing to benchmark: --set bench_suite=")
        benchmark.choose_tasks(config.bench_suite)
    workdir = arguments.workdir or Path("runs") / f"{arguments.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    shared.use_cores(arguments.devices, config.particles // max(arguments.num_processes or 1, 1))
    xla_flags.widest_vectors()
    xla_flags.no_softmax_kernels()
    shared.keep_compiled()
    several = arguments.distributed or any(getattr(arguments, name) is not None for name in _PROCESSES)
    if several:
        _join(arguments)
    console = Console(stderr=True)
    leader = jax.process_index() == 0
    outcome = loop.run(config, workdir, resume=arguments.resume, console=console)
    if several:  # the others must not wait for the leader's benchmark: after five minutes JAX would abort all
        jax.distributed.shutdown()
    result: dict[str, Any] = {"workdir": str(workdir), "meta_steps": outcome.step, "finished": outcome.finished}
    if not outcome.finished:
        again = f"learned-opt train --resume --workdir {shlex.quote(str(workdir))}"
        console.print(
            f"stopped at meta-step {outcome.step}, saved; go on with: {again}", soft_wrap=True, highlight=False
        )
    elif leader and config.bench_suite:
        shown = None if arguments.json else console
        contenders = [str(workdir / "rule")]
        chosen = benchmark.choose_contenders(benchmark.FEW, contenders)
        plan = Plan(config.bench_steps, config.bench_seeds)
        entries = benchmark.choose_tasks(config.bench_suite)
        result["bench"] = benchmark.run(config.bench_suite, entries, chosen, plan, workdir / "bench", shown)
    if leader and outcome.finished and not arguments.json:
        keep = f"learned-opt export {shlex.quote(str(workdir))} NAME"
        print(f"use it:    {shared.use(config.rule, workdir / 'rule')}\nkeep it:   {keep}")
    if leader and arguments.json:
        shared.print_json(result)
    return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by  # as a shell counts a process that it ended


def _config(arguments: argparse.Namespace) -> Config:
    """The preset, or the run to resume, with what the command line changes."""
    if arguments.resume:
        if arguments.workdir is None:
            raise UsageError("--resume needs --workdir, the folder of the run to go on with")
        config = configs.read(arguments.workdir / "config.json")
    else:
        config = configs.preset(arguments.preset)
    settings = dict(shared.pairs(arguments.set))
    if arguments.rule not in (None, config.rule):  # the arguments of the preset's rule are not those of another
        settings = {"rule_kwargs": "{}"} | settings
    config = configs.with_settings(config, settings)
    named = ("rule", "suite", "estimator", "meta_steps", "particles", "unroll", "seed")
    given = {name: getattr(arguments, name) for name in named if getattr(arguments, name) is not None}
    return configs.replace(config, **given)


def _join(arguments: argparse.Namespace) -> None:
    """Makes this one of several processes. JAX ends the process itself at some of the mistakes caught here."""
    count, number = arguments.num_processes, arguments.process_id
    if count is not None and count < 1:
        raise UsageError(f"--num-processes must be at least 1, not {count}")
    if number is not None and not 0 <= number < (count or number + 1):
        raise UsageError(f"--process-id must be within 0 to {(count or 1) - 1}, not {number}")
    if arguments.coordinator is not None:
        host, colon, port = arguments.coordinator.rpartition(":")
        if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise UsageError(f"--coordinator takes HOST:PORT, such as 10.0.0.1:9876, not {arguments.coordinator!r}")
        if number == 0 and _in_use(int(port)):
            raise UsageError(f"the port {port} of --coordinator is in use on this machine: name a free one")
    if arguments.workdir is None:
        raise UsageError("several processes share one folder: name it by --workdir")
    try:
        jax.distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"cannot join the other processes: {error}; give --coordinator, --num-processes, --process-id"
        ) from None


def _in_use(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of which only a closed connection is left
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False

"""The link between workers: a round's all-reduce goes on while the next steps are computed."""

import threading
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .. import communication
from .transform import Flight, LocalSGD, LocalSGDState, Outbox
from .workers import map_workers, worker_axes


class Link:
    """Carries a linked transform's messages: starts an all-reduce, lets the steps go on, takes the result later.

    To be called after every step. At the end of a round it hands the workers' messages to a thread, which runs the
    all-reduce as a program of its own; ``overlap`` steps later it waits for what is left of it, and makes the outer
    step. The numbers are those of the same ``local_sgd`` without ``linked``, up to rounding. Every process makes a
    link and calls it after the same steps; :meth:`wait` comes before any other collective.

    On CPU, programs that one thread starts follow one another: hence the thread. On a GPU or TPU programs of one device
    take turns whoever starts them; there, the processes' CPU devices can carry the messages.

    Args:
        opt: ``local_sgd(..., overlap=tau, linked=True)``.
        state: its state as the steps have it, stacked as by :func:`~learned_opt.local_sgd.spread_workers`. What was on
            its way when it was saved is lost, a round at most.
        mesh: as in :func:`~learned_opt.local_sgd.map_workers`.

    Raises:
        ValueError: if the transform is not linked.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from learned_opt.local_sgd import Link, local_sgd, map_workers, spread_workers, worker_axes
        >>> opt = local_sgd(optax.sgd(0.1), sync_every=4, overlap=2, mixing=0.5, linked=True)
        >>> state = opt.init(jnp.zeros(3))
        >>> axes = worker_axes(state)
        >>> def step(params, state, target):
        ...     updates, state = opt.update(params - target, state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> step = jax.jit(map_workers(step, in_axes=(0, axes, 0), out_axes=(0, axes)))
        >>> params, state = spread_workers(jnp.zeros(3), 2), spread_workers(state, 2, axes)
        >>> link = Link(opt, state)
        >>> for _ in range(7):
        ...     params, state = step(params, state, jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
        ...     params, state = link(params, state)
        >>> print(state.round, state.anchor.round(3))
        1 [0.688 0.688 0.688]

    Reference:
        Douillard et al., "Streaming DiLoCo with overlapping communication", 2025 (arXiv:2501.18512).
    """

    def __init__(self, opt: LocalSGD, state: LocalSGDState, *, mesh: Mesh | None = None) -> None:
        halves = getattr(opt, "halves", None)
        if halves is None:
            raise ValueError("Link: carries local_sgd(..., overlap=tau, linked=True), and this transform is none")
        self._halves, self._count = halves, halves.count(state.anchor)
        self._round, self._since, self._period = (int(x) for x in (state.round, state.since_sync, state.period))
        self._flight: tuple[int, Future[Any]] | None = None
        self._bytes: dict[int, int] = {}  # a round of a fragment, known once its program is traced
        axes, names = worker_axes(state), halves.axis_name

        def mapped(fn: Any, in_axes: Any, out_axes: Any) -> Any:
            return jax.jit(map_workers(fn, in_axes=in_axes, out_axes=out_axes, mesh=mesh, axis_name=names[0]))

        def sender(part: int) -> Any:
            def send(message: Outbox) -> tuple[Flight, Any]:
                flight, left, self._bytes[part] = halves.send(message)
                return flight, left

            return mapped(send, (0,), (None, 0))

        def taker(part: int) -> Any:
            def take(params: Any, state: LocalSGDState, flight: Flight, left: Any) -> Any:
                state = state._replace(bytes=communication.add_bytes(state.bytes, self._bytes[part]))
                return halves.take(part, params, state, flight, left)

            return mapped(take, (0, axes, None, 0), (0, axes))

        self._send = [sender(part) for part in range(self._count)]
        self._compiled: dict[int, Any] = {}
        self._take = [taker(part) for part in range(self._count)]
        self._copy = jax.jit(lambda message: jax.tree.map(jnp.copy, message))  # the next step may be given the state

    def __call__(self, params: Any, state: LocalSGDState) -> tuple[Any, LocalSGDState]:
        """Send or take what is due after a step.

        Args:
            params: of all workers, ``[K, ...]``, as the step returned them.
            state: likewise.

        Returns:
            ``(params, state)`` for the next step.

        Raises:
            Exception: what went wrong in the all-reduce, when its result is due.
        """
        self._since += 1
        if self._flight is not None and self._since >= self._halves.overlap:
            part, future = self._flight
            self._flight = None
            params, state = self._take[part](params, state, *future.result())
            self._period = int(np.asarray(state.period))
        elif self._since >= self._period:
            part = self._round % self._count
            self._round, self._since = self._round + 1, 0
            deltas = self._halves.pick(state.outbox.deltas, state.anchor, part)
            error = state.outbox.error
            if jax.tree.leaves(error):
                error = self._halves.pick(error, state.anchor, part)
            message = self._copy(state.outbox._replace(deltas=deltas, error=error))
            self._flight = part, self._start(part, message)
        return params, state

    def wait(self) -> None:
        """Wait until nothing is on its way; the result is still taken when it is due.

        Before any other collective of these processes, and at the end: two at a time would get into each other's way.

        Raises:
            Exception: what went wrong in the all-reduce.
        """
        if self._flight is not None:
            self._flight[1].result()

    def carry(self, program: Any, message: Outbox) -> tuple[Flight, Any]:
        """Run the all-reduce and wait for it; called in the thread. To be replaced by what a test or a benchmark needs.

        Args:
            program: compiled, ``message -> (flight, error)``.
            message: of all workers.

        Returns:
            Its result.
        """
        return jax.block_until_ready(program(message))

    def _start(self, part: int, message: Outbox) -> "Future[Any]":
        if part not in self._compiled:  # here: settings such as enable_x64 are a thread's own
            self._compiled[part] = self._send[part].lower(message).compile()
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(self.carry(self._compiled[part], message))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="local-sgd-link", daemon=True).start()  # a stuck one is the watchdog's
        return future

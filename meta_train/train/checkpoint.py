"""Checkpoints of a meta-training run: Orbax, asynchronous and atomic, with a checksum against damage."""

import logging
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from ..errors import UserError

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each save


class CheckpointError(UserError):
    """The checkpoints cannot be written or read."""


def manager(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """The run's checkpoints, the last ``keep`` of them, under ``workdir/checkpoints``.

    Args:
        workdir: the run's folder; the same for all processes.
        keep: how many to keep.

    Returns:
        An Orbax manager, for :func:`save` and :func:`restore`; close it at the end.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True)
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


@jax.jit
def checksum(state: Any) -> jax.Array:
    r"""A uint32 that changes when any one element of the state does.

    :math:`\sum_i (2i+1)\, b_i \bmod 2^{32}` over the elements' bits :math:`b_i`. Integer sums do not depend on their
    order, so a state has the same checksum on any number of devices.

    Args:
        state: a pytree of arrays of at most 4 bytes an element, or 8.

    Returns:
        A uint32 scalar.
    """
    total = jnp.zeros((), jnp.uint32)
    offset = 0
    for leaf in jax.tree.leaves(state):
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        size = leaf.dtype.itemsize
        bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)).reshape(-1)
        places = 2 * (offset + jnp.arange(bits.size, dtype=jnp.uint32)) + 1
        total += jnp.sum(places * bits.astype(jnp.uint32), dtype=jnp.uint32)
        offset += bits.size
    return total


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Saves the state of a step in the background; returns once the state is copied, so it may be donated.

    Args:
        checkpoints: from :func:`manager`.
        step: the meta-step.
        state: a pytree of arrays.

    Raises:
        CheckpointError: this save, or the one before it, could not be written.
    """
    try:
        saved = checkpoints.save(step, args=ocp.args.StandardSave({"state": state, "checksum": checksum(state)}))
    except Exception as error:  # Orbax and its storage layer raise many kinds
        raise CheckpointError(f"cannot save a checkpoint under {checkpoints.directory}: {_line(error)}") from None
    if not saved:
        raise CheckpointError(f"cannot save checkpoint {step} under {checkpoints.directory}: there are later ones")


def finish(checkpoints: ocp.CheckpointManager) -> None:
    """Waits for the saves under way and closes.

    Raises:
        CheckpointError: a save could not be written.
    """
    try:
        checkpoints.wait_until_finished()
        checkpoints.close()
    except Exception as error:
        raise CheckpointError(f"cannot save a checkpoint under {checkpoints.directory}: {_line(error)}") from None


def restore(checkpoints: ocp.CheckpointManager, like: Any) -> tuple[int, Any] | None:
    """The latest sound checkpoint; a damaged one is passed over for the one before, with a warning, and deleted.

    Args:
        checkpoints: from :func:`manager`.
        like: a pytree of ``jax.ShapeDtypeStruct`` with shardings: where the arrays go, on whatever devices there
            are now.

    Returns:
        ``(step, state)``, or ``None`` if nothing has been saved.

    Raises:
        CheckpointError: none of what has been saved is sound, or it was saved by another version.
    """
    wanted = {"state": like, "checksum": jax.ShapeDtypeStruct((), jnp.uint32)}
    steps = sorted(checkpoints.all_steps(), reverse=True)
    for step in steps:
        try:
            found = checkpoints.restore(step, args=ocp.args.StandardRestore(wanted))
            sound = int(checksum(found["state"])) == int(found["checksum"])
            why = "its checksum does not match"
        except Exception as error:  # a damaged file can fail anywhere in Orbax or its storage layer
            sound, why = False, _line(error)
        if sound:
            for damaged in steps[: steps.index(step)]:  # beside later ones nothing would be saved
                checkpoints.delete(damaged)
            return step, found["state"]
        warnings.warn(f"checkpoint {step} is damaged ({why}); trying the one before", stacklevel=2)
    if steps:  # to begin again would overwrite them
        raise CheckpointError(
            f"no checkpoint under {checkpoints.directory} can be restored: they are damaged, or of another version of "
            "learned-opt; begin again in another folder"
        )
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__

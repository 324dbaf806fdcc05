"""What the processes of a run tell each other; nothing is sent where there is one."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def world_size() -> int:
    """The number of processes; 1 where there is only this one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: object) -> list:
    """`value` of every process, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def largest(value: int) -> int:
    """The largest of a number of all processes."""
    return max(gather(value))


def agreed(attempt: Callable[[], Result]) -> Result:
    """What `attempt` gives in this process, once it has ended in all.

    Raises:
        Exception: the error of the first process in which it failed, there.
        SystemExit: with status 1, in the others.
    """
    error = None
    try:
        result = attempt()
    except Exception as caught:
        error = caught
    failed = gather(error is not None)
    if error is not None and (world_size() == 1 or failed.index(True) == dist.get_rank()):
        raise error
    if any(failed):
        time.sleep(1)  # a launcher ends the others with the first that leaves, and the one that failed has to speak
        raise SystemExit(1)
    return result

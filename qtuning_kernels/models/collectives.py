"""What the processes of a run tell each other; nothing is sent where there is one."""

import torch.distributed as dist


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

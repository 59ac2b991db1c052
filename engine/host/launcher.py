"""What a launcher tells a process of its place among the others: the environment, read in one place. No torch."""

import os

from bsnas.engine.host.errors import UserError


def rank() -> int:
    """This process's number among all; 0 without a launcher. Raises `UserError`, as all of these, for nonsense."""
    return _number("RANK", default=0)


def world_size() -> int:
    """How many processes there are on all machines."""
    count = _number("WORLD_SIZE", default=1, smallest=1)
    if rank() >= count:
        raise UserError(
            f"RANK is {rank()} and WORLD_SIZE {count}; ranks count from 0 to WORLD_SIZE - 1: set both, or unset both, "
            "or start with deepspeed"
        )
    return count


def local_rank() -> int:
    """This process's number among those of this machine, and that of its GPU."""
    return _number("LOCAL_RANK", default=0)


def local_size() -> int:
    """How many processes there are on this machine, by torchrun's name for it or by DeepSpeed's."""
    name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    return _number(name, default=1, smallest=1)


def cores() -> int:
    """This process's share of the cores that the processes of this machine may use, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // local_size())


def master_port() -> int | None:
    """The port at which rank 0 waits for the others; None without a launcher."""
    return _number("MASTER_PORT", default=1, smallest=1, most=65535) if "MASTER_PORT" in os.environ else None


def master_address() -> str:
    """The machine of rank 0; this one without a launcher."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if not address.strip():
        raise UserError("the environment variable MASTER_ADDR is empty; unset it, or give the host of rank 0")
    return address


def _number(name: str, *, default: int, smallest: int = 0, most: int | None = None) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < smallest or (most is not None and int(text) > most):
        range_ = f"of at least {smallest}" if most is None else f"from {smallest} to {most}"
        raise UserError(
            f"the environment variable {name} is {text!r}, not a whole number {range_}; unset it, or "
            "start with deepspeed, which sets it"
        )
    return int(text)

"""Threads that run whole chunks of images side by side on a CPU.

Threads inside each operation wait for one another 60 times per network, and worse when the machine has other work; a
chunk of its own for every thread needs no waiting, and its activations stay in that core's cache.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


def worker_count(device: torch.device) -> int:
    """As many as torch would use threads inside an operation on a CPU; one elsewhere."""
    return torch.get_num_threads() if device.type == "cpu" else 1


class RunAll(Protocol):
    """Calls a function for several tasks, some at once; gives results in the order of the tasks."""

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task], /) -> list[Result]: ...


@contextmanager
def chunk_workers(count: int) -> Iterator[RunAll]:
    """A `RunAll` over `count` threads, each of which uses one thread inside operations."""
    if count == 1:
        yield lambda function, tasks: [function(task) for task in tasks]
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda function, tasks: list(pool.map(function, tasks))
    finally:
        torch.set_num_threads(threads)  # the initializers also changed the default of threads to come

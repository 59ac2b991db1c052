"""What every test gets: one thread for torch, no GPU test where there is no GPU, and a DeepSpeed process on request."""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from bsnas.engine.host.distributed import Process, start_process


def pytest_configure(config: pytest.Config) -> None:
    """The networks of the tests are small and test processes run side by side, so more threads only get in the way."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, or one worker would end with them alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is false on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="module")
def alone() -> Iterator[Process]:
    """This process as the only one, joined through DeepSpeed, on the CPU; nothing of it is left for other modules."""
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        process = start_process()
    import deepspeed.comm

    yield replace(process, device=torch.device("cpu"))
    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    os.environ.clear()
    os.environ.update(before)

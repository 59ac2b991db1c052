"""What every test gets: one thread for torch, and no GPU test where there is no GPU."""

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """The networks of the tests are small and test processes run side by side, so more threads only get in the way."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU: torch.cuda.is_available() is false on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

"""A driver for Triton that compiles for a GPU and launches nothing: what the host does can run, and be timed, anywhere.

Written against the driver interface of Triton 3.8 (triton/backends/driver.py, and what triton/runtime/jit.py and
triton/compiler/compiler.py call of it).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

WARP = 32


class Handed(NamedTuple):
    """What a launch hands to the driver."""

    grid: tuple[int, int, int]
    kernel: str
    """Hash of the compiled kernel."""
    arguments: tuple[Any, ...]


@contextmanager
def stand_in_driver(capability: int) -> Iterator[list[Handed]]:
    """Within it, Triton's active driver is a stand-in for a GPU of that compute capability; yields what it is handed.

    Kernels that were launched before keep their compiled code: use kernels of one test, or a fresh process.
    """
    handed: list[Handed] = []
    before = driver._active
    driver.set_active(_Driver(capability, handed))  # type: ignore[arg-type]
    try:
        yield handed
    finally:
        driver._active = before


class _Driver:
    def __init__(self, capability: int, handed: list[Handed]) -> None:
        self.utils = _Utils()
        self._target = GPUTarget("cuda", capability, WARP)
        self._handed = handed

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(
            x: int, y: int, z: int, stream: int, function: int, packed: Any, metadata: Any, enter: Any, leave: Any,
            *arguments: Any,
        ) -> None:  # fmt: skip
            self._handed.append(Handed((x, y, z), kernel, arguments))

        kernel = metadata.hash
        return launch


class _Utils:
    """Loads nothing, on a GPU with room for everything."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

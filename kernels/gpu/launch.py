"""Launches of Triton kernels that find their compiled code by a short key."""

from functools import partial
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MOST_KEPT = 4096


class CachedLaunches:
    """A Triton kernel, launched as `kernel[grid](*tensors_and_numbers, **constexprs_and_options)`.

    Triton binds and classifies every argument at each launch before it looks up the compiled kernel. Here the key is
    the arguments themselves, tensors by dtype and by address modulo 16: finer than Triton's own classes, so the kernel
    found is the one that Triton would take. What is not known yet, and everything in the interpreter, is left to it.
    Constexprs and options are given by name, in any order, and come after the other parameters in the signature.
    """

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self._compiled = isinstance(fn, JITFunction)
        self._found: dict[tuple[Any, ...], tuple[CompiledKernel, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int]) -> Any:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int], *args: Any, **named: Any) -> None:
        if not self._compiled:
            self.fn[grid](*args, **named)
            return
        arguments = [(arg.dtype, arg.data_ptr() & 15) if isinstance(arg, Tensor) else arg for arg in args]
        key = (driver.active.get_current_device(), *named.items(), *arguments)
        found = self._found.get(key)
        if found is not None:
            kernel, constexprs = found
            kernel[grid[0], 1, 1](*args, *constexprs)
            return
        kernel = self.fn[grid](*args, **named)
        if len(self._found) >= MOST_KEPT:  # numbers of rows without end, as batches of evaluation may have
            self._found.clear()
        self._found[key] = kernel, [named[name] for name in self.fn.arg_names[len(args) :]]

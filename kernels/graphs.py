"""CUDA graphs: a replay in place of the launches from Python, about twenty for a block that trains.

Off by default; `set_cuda_graphs(True)` or BSNAS_CUDA_GRAPHS=1 is the one switch, and results are the same bit for bit.

Evaluation is captured as a whole pass over a batch (`Replays`), which needs no copies between operations. In training
the path changes with every step, so every operation that trains gets a graph of its forward and one of its backward,
captured at its first use over buffers that it keeps: the input, everything that forward saves, the gradients. They take
as much memory as the operation's own step, so operations are captured for the batch size they first see, until all
graphs together have taken a budget; other batches and the other operations are launched as before.

An output lives in such a buffer until the operation's next forward. While a forward waits for its backward, the same
operation runs without its graph.
"""

import os
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

MEMORY_KEPT_FREE = 0.2
"""Share of the GPU that captures leave free."""
Forward = Callable[[Tensor], list[Tensor]]
"""x -> the output, then what backward needs. Moves running statistics."""
Backward = Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]]
"""(gradient of the output, x, saved) -> the gradients of x and of the parameters."""

_switch: bool | None = None


def set_cuda_graphs(on: bool | None) -> None:
    """Turn CUDA graphs on or off; None leaves it to BSNAS_CUDA_GRAPHS (1 is on)."""
    global _switch
    _switch = on


@contextmanager
def switched_off() -> Iterator[None]:
    """Within it nothing is captured."""
    global _switch
    before, _switch = _switch, False
    try:
        yield
    finally:
        _switch = before


def switched_on() -> bool:
    """What `set_cuda_graphs` says, else BSNAS_CUDA_GRAPHS."""
    return os.environ.get("BSNAS_CUDA_GRAPHS") == "1" if _switch is None else _switch


def why_not(x: Tensor, backend: str) -> str | None:
    """Why what a backend computes on x cannot be captured, or None when it can."""
    if not x.is_cuda:
        return f"they need an NVIDIA GPU and the tensor is on {x.device.type}"
    return None if backend == "triton" else f"they record the Triton kernels and the backend is {backend!r}"


def check(x: Tensor, backend: str) -> None:
    """Raise RuntimeError, which says why, when graphs are switched on and cannot run."""
    reason = why_not(x, backend) if switched_on() else None
    if reason is not None:
        raise RuntimeError(f"CUDA graphs cannot run: {reason}; leave BSNAS_CUDA_GRAPHS unset, or train on the GPU")


def enabled() -> bool:
    """Whether steps are to be captured; torch.compile has its own way to do so."""
    return switched_on() and not torch.compiler.is_compiling()


class Step(NamedTuple):
    """One operation's training step."""

    forward: Forward
    backward: Backward
    state: list[Tensor]
    """What forward moves: running statistics."""


class Pending:
    """Lives as long as the autograd node whose backward will read the buffers."""


def capture(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """-> the tensors that each replay fills, and the replay. All kernels must have been compiled and loaded before."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (the loader's) may allocate meanwhile: only this one is held to the rules of a capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = run()
    return outputs, graph.replay


def spare_memory() -> int:
    """Bytes that captures may take now; they cannot use what torch has cached."""
    free, total = torch.cuda.mem_get_info()
    return free - int(MEMORY_KEPT_FREE * total)


def held_memory() -> int:
    """Bytes that torch holds of the GPU, nothing of it unused: a capture gives that back too."""
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


class Replays:
    """One function of one tensor, without gradients, captured for every shape that comes again.

    The first call of a shape launches, which compiles and loads kernels as a capture must not; where memory is short,
    so do all others. Results lie in buffers that the next call overwrites. The function is given with each call and not
    kept: an owner whose method it is would live, with these buffers, until Python looks for cycles.
    """

    def __init__(self) -> None:
        self._captured: dict[Hashable, tuple[Tensor, list[Tensor], Callable[[], None]] | None] = {}
        """Per shape the input's buffer, the results and the replay; None after the first call."""

    def __call__(self, run: Callable[[Tensor], list[Tensor]], x: Tensor) -> list[Tensor]:
        key = (x.shape, x.stride(), x.dtype, x.device)
        if key not in self._captured:
            self._captured[key] = None
            return run(x)
        captured = self._captured[key]
        if captured is None:
            if spare_memory() <= 0:
                return run(x)
            given = torch.empty_like(x)
            captured = self._captured[key] = (given, *capture(lambda: run(given)))
        given, results, replay = captured
        given.copy_(x)
        replay()
        return results


class Captured:
    """The graphs of one operation and the buffers that they read and write."""

    def __init__(self, step: Step, x: Tensor) -> None:
        self.x = torch.empty_like(x)
        self.x.copy_(x)
        before = [tensor.clone() for tensor in step.state]
        z, *saved = step.forward(self.x)  # compiles and loads the kernels, which a capture must not
        step.backward(torch.zeros_like(z), self.x, saved)
        del z, saved
        outputs, self.replay_forward = capture(lambda: step.forward(self.x))
        self.z, *saved = outputs
        self.grad = torch.empty_like(self.z)
        self.grads, self.replay_backward = capture(lambda: step.backward(self.grad, self.x, saved))
        for tensor, value in zip(step.state, before, strict=True):
            tensor.copy_(value)
        self._pending: weakref.ref[Pending] | None = None

    @property
    def busy(self) -> bool:
        """Whether a forward still waits for its backward; one whose autograd graph is gone does not."""
        return self._pending is not None and self._pending() is not None

    def forward(self, x: Tensor, pending: Pending | None) -> Tensor:
        self.x.copy_(x)
        self.replay_forward()
        self._pending = None if pending is None else weakref.ref(pending)
        return self.z.detach()

    def backward(self, grad: Tensor) -> list[Tensor]:
        """Gradient of x in its buffer; those of parameters are copies, since autograd keeps them across steps."""
        self.grad.copy_(grad)
        self.replay_backward()
        self._pending = None
        return [self.grads[0].detach(), *torch._foreach_mul(self.grads[1:], 1.0)]


class Operation(NamedTuple):
    """What is known of an operation that trains."""

    captured: Captured | None
    """None where it is launched, since graphs have taken their budget."""
    taken: int
    """Bytes of the GPU's memory."""
    watched: list[weakref.finalize]  # type: ignore[type-arg]
    """Waits for the end of the parameters."""


class Graphs:
    """The captured operations of a process, by what their launches depend on, and what they may take of its memory."""

    def __init__(self, budget: int | None = None) -> None:
        """`budget` in bytes; None takes what is free when the first operation is captured, less MEMORY_KEPT_FREE."""
        self._given = self._budget = budget
        self._found: dict[Hashable, Operation] = {}
        self.taken = 0
        """Bytes of the GPU's memory."""

    def find(self, step: Step, x: Tensor, parameters: Sequence[Tensor], numbers: Any) -> Captured | None:
        """The graphs of an operation; None where it has to be launched. They go when one of its parameters does."""
        key = (x.shape[1:], x.dtype, x.device, tuple(map(_place, (*parameters, *step.state))), repr(numbers))
        found = self._found.get(key)
        if found is None:
            # A view, such as a 1x1 convolution's weight as a matrix, may last for one forward: its base is what lives.
            owners = [parameter if parameter._base is None else parameter._base for parameter in parameters]
            found = self._found[key] = self._add(step, x, [weakref.finalize(p, self._drop, key) for p in owners])
        captured = found.captured
        return None if captured is None or captured.x.shape != x.shape or captured.busy else captured

    def _add(self, step: Step, x: Tensor, watched: list[weakref.finalize]) -> Operation:  # type: ignore[type-arg]
        if self._budget is not None and self.taken >= self._budget:
            return Operation(None, 0, watched)
        before = held_memory()
        if self._budget is None:
            self._budget = spare_memory()
            if self._budget <= 0:
                return Operation(None, 0, watched)
        captured = Captured(step, x)
        taken = held_memory() - before
        self.taken += taken
        return Operation(captured, taken, watched)

    def _drop(self, key: Hashable) -> None:
        found = self._found.pop(key, None)
        if found is not None:
            self.taken -= found.taken

    def clear(self) -> None:
        """Give back the memory of all graphs; operations that train again are captured anew, within a new budget."""
        for found in self._found.values():
            for finalizer in found.watched:
                finalizer.detach()
        if self._found:
            self._found.clear()
            torch.cuda.empty_cache()
        self.taken, self._budget = 0, self._given

    def __len__(self) -> int:
        """How many operations are captured."""
        return sum(found.captured is not None for found in self._found.values())


def _place(tensor: Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


GRAPHS = Graphs()

"""The marks for torch.compile do what its own do."""

import torch
from torch import Tensor

from bsnas.kernels.compiler import constant, opaque


def test_constants_are_marked_as_torch_marks_them() -> None:
    def ours() -> None: ...

    def theirs() -> None: ...

    torch.compiler.assume_constant_result(theirs)
    assert vars(constant(ours)) == vars(theirs) != {}


def test_the_compiler_does_not_look_into_what_is_opaque() -> None:
    compiling: list[bool] = []

    @opaque
    def inner(x: Tensor, *, factor: float) -> Tensor:
        compiling.append(torch.compiler.is_compiling())
        return factor * x

    def outer(x: Tensor) -> Tensor:
        return inner(x + 1, factor=2.0) + 1

    x = torch.arange(3.0)
    compiled = torch.compile(outer, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(x), outer(x))
    assert compiling == [False] * 4
    assert inner.__name__ == "inner"

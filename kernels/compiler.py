"""Marks of functions for torch.compile that do not import it.

torch.compiler's own do so where they are written, which took a quarter of the start of every script that scores.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """The compiler calls it once and keeps the result: torch.compiler.assume_constant_result, to the letter."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def opaque(function: Function) -> Function:
    """The compiler does not look into it: torch.compiler.disable, from the first call on."""
    marked: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        if not marked:
            marked.append(torch.compiler.disable(function))
        return marked[0](*args, **named)

    return call  # type: ignore[return-value]

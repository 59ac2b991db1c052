"""Non-dominated sets: nothing else is at least as accurate and at most as costly, and better in one of the two."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def pareto_set(items: Iterable[Item], cost: Callable[[Item], float], value: Callable[[Item], float]) -> list[Item]:
    """The items that no other dominates (cost down, value up), by ascending cost.

    Of items equal in both only the first is kept, so cost and value both rise strictly along the result.
    """
    front: list[Item] = []
    for item in sorted(items, key=lambda item: (cost(item), -value(item))):
        if not front or value(item) > value(front[-1]):
            front.append(item)
    return front

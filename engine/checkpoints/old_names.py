"""Names of weights before stems and tails were blocks like the others: files with them can still be read."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_RENAMED = (
    # supernets
    (r"stem\.0\.weights\.all\.conv", r"stem_conv.weight"),
    (r"stem\.0\.norms\.\w+\.0\.(\w+)", r"stem_bn.\1"),
    (r"stem\.1\.weights\.all\.(depthwise|project)", r"separable_\1"),
    (r"stem\.1\.norms\.\w+\.(\d)\.(\w+)", r"separable_bns.\1.\2"),
    (r"tail\.0\.weights\.all\.conv", r"tail_weight"),
    (r"tail\.0\.norms\.\w+i(\d+)\.0\.(\w+)", r"tail_bns.c\1.\2"),
    # released networks
    (r"stem\.0\.conv\.(\d)\.(\w+)", r"stem.\1.\2"),
    (r"stem\.1\.(depthwise|project)\.(\d)\.(\w+)", r"separable.\1.\2.\3"),
    (r"tail\.0\.conv\.(\d)\.(\w+)", r"tail.\1.\2"),
)
"""What a name is now, and what it was."""


def old_name(name: str) -> str:
    """What a weight was called; most are still called that."""
    for now, then in _RENAMED:
        if match := re.fullmatch(now, name):
            return match.expand(then)
    return name


def with_present_names(weights: Any, names: Iterable[str]) -> Any:
    """Weights by the names that a network has now; as they are unless all of them have the old ones."""
    names = list(names)
    old = {old_name(name): name for name in names}
    if not isinstance(weights, Mapping) or weights.keys() == set(names) or weights.keys() != old.keys():
        return weights
    return {old[name]: tensor for name, tensor in weights.items()}


def with_present_order(content: Mapping[str, Any], part: str, parameters: Iterable[str]) -> Mapping[str, Any]:
    """A checkpoint whose optimizer numbers the parameters as the network does now.

    `parameters` are their names in order, `content[part]` the weights. An optimizer knows parameters by their numbers,
    and these followed from the order of the weights, so the old ones follow from their names in the file.
    """
    weights = content.get(part)
    now = list(parameters)
    old = {old_name(name): name for name in now}
    if not isinstance(weights, Mapping) or not any(name in weights and name not in now for name in old):
        return content
    then = [old[name] for name in weights if name in old]
    optimization = content.get("optimization")
    if not isinstance(optimization, Mapping) or len(then) != len(now):
        return content
    state = optimization.get("optimizer", {}).get("state")
    if not isinstance(state, Mapping):
        return content
    place = {name: number for number, name in enumerate(now)}
    numbers = {number: place[name] for number, name in enumerate(then)}
    moved = {numbers.get(index, index): values for index, values in state.items()}
    optimizer = {**optimization["optimizer"], "state": moved}
    return {**content, "optimization": {**optimization, "optimizer": optimizer}}

"""Spaces of the form of the paper's Table 1: stem, separable block, clusters of inverted residuals, tail. No torch.

It is also the form in which files held a space before rows could be of any family; hashes in them are of that form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bsnas.engine.space.arch import Operation
from bsnas.engine.space.space import Space
from bsnas.engine.space.table import Cluster, Row, TableError, with_tuples


def mobile_cluster(
    *, blocks: int, kernels: tuple[int, ...], expansions: tuple[int, ...], channels: tuple[int, ...], stride: int
) -> Cluster:
    """A cluster of inverted residuals: one line of Table 1."""
    row = Row(family="ir", blocks=blocks, stride=stride, kernels=kernels, expansions=expansions)
    return Cluster(channels=channels, rows=(row,))


def mobile_space(
    *,
    clusters: Sequence[Cluster],
    stem_channels: int = 32,
    stem_stride: int = 2,
    separable_channels: int = 16,
    tail_channels: int = 1280,
    **network: Any,
) -> Space:
    """A space of Table 1's form; `network` are further fields of `Space`.

    Args:
        clusters: the searched ones.
        stem_channels: output of the stem's 3x3 convolution.
        stem_stride: its stride.
        separable_channels: output of the stem's 3x3 depthwise-separable convolution.
        tail_channels: output of the last 1x1 convolution, before the average pool.
    """
    if not clusters:
        raise TableError("a space needs at least one cluster", "cluster")
    stem = Cluster(channels=(stem_channels,), rows=(Row(family="conv", stride=stem_stride),))
    separable = Cluster(channels=(separable_channels,), rows=(Row(family="separable"),))
    tail = Cluster(channels=(tail_channels,), rows=(Row(family="conv", kernels=(1,)),))
    return Space(table=(stem, separable, *clusters, tail), **network)


def mobile_form(space: Space) -> dict[str, Any] | None:
    """The space as files held it before there were rows, or None where that could not say it."""
    rows = [row for cluster in space.clusters for row in cluster.rows]
    ordinary = len(rows) == len(space.clusters) and all(row.family == "ir" and row.expansions for row in rows)
    if not ordinary or len(space.stem) != 2 or len(space.tail) != 1:
        return None
    (stem, separable), (tail,) = space.stem, space.tail
    form = {
        "resolution": space.resolution,
        "input_channels": space.input_channels,
        "classes": space.classes,
        "stem_channels": stem.channels[0],
        "stem_stride": stem.rows[0].stride,
        "separable_channels": separable.channels[0],
        "tail_channels": tail.channels[0],
        "clusters": [
            {"channels": list(cluster.channels), **{key: _plain(getattr(row, key)) for key in _ROW}}
            for cluster in space.clusters
            for row in cluster.rows
        ],
        "live": [[str(op) for op in ops] for ops in space.live],
    }
    table = {name: value for name, value in form.items() if name != "live"}
    return form if of_mobile_form(table, ()) == space.full() else None


_ROW = ("blocks", "kernels", "expansions", "stride")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def of_mobile_form(data: Mapping[str, Any], live: tuple[tuple[Operation, ...], ...]) -> Space:
    """The space that files held before there were rows, without its live operations.

    Raises `UserError`, or one of several errors, when the data is none.
    """
    fields = dict(data)
    clusters = [mobile_cluster(**with_tuples(cluster)) for cluster in fields.pop("clusters")]
    return replace(mobile_space(clusters=clusters, **fields), live=live)

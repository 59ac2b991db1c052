"""A plot of the evaluation benchmark: time against the number of models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bsnas.engine.host.errors import UserError

CONTENDERS = {
    "sequential_s": "(a) one after another, eager NCHW",
    "best_eager_s": "(b) one after another, best eager",
    "ours_s": "batched evaluator",
}


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """One panel per space, both axes logarithmic. Raises `UserError` for a file type that is none."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    spaces = list(dict.fromkeys(row["space"] for row in rows))
    figure, axes = pyplot.subplots(1, len(spaces), figsize=(5 * len(spaces), 4), sharey=True, squeeze=False)
    for axis, space in zip(axes[0], spaces, strict=True):
        of_space = sorted((row for row in rows if row["space"] == space), key=lambda row: row["models"])
        for key, label in CONTENDERS.items():
            axis.loglog([row["models"] for row in of_space], [row[key] for row in of_space], marker="o", label=label)
        axis.set(title=f"{space} space, {of_space[0]['images']} images", xlabel="models", ylabel="seconds")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].legend()
    figure.tight_layout()
    try:
        figure.savefig(file)
    except (ValueError, OSError) as error:
        raise UserError(f"plot {file} cannot be written: {error}; choose a .png or .svg file") from None
    pyplot.close(figure)

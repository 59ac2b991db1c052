"""What a search found, for TensorBoard: progress as scalars and histograms, the architecture and the front as images.

The training writes its own scalars and distributions (engine/training/metrics.py).
A search has a directory of its own beside
them, written anew from the run's files whenever it is called, so a continued search is not drawn twice.
"""

import io
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from bsnas.engine.runs.facts import RunFacts, Search
from bsnas.search.reporting.architecture import architecture_picture
from bsnas.search.reporting.evolution import draw_front
from bsnas.search.reporting.picture import Picture


def write_search_events(run: RunFacts) -> Path | None:
    """Events of the newest search under tensorboard/search-NAME; None when the run has no search."""
    if not run.searches:
        return None
    search = run.searches[-1]
    directory = run.directory.tensorboard / f"search-{search.file.stem}"
    shutil.rmtree(directory, ignore_errors=True)
    with SummaryWriter(str(directory)) as writer:
        _write_generations(writer, search)
        if run.chosen is not None:
            picture = architecture_picture(run.space, run.chosen, "Retrained" if run.retrained else "Best found")
            writer.add_image("search/architecture", pixels(picture), dataformats="HWC")
            writer.add_text("search/architecture", str(run.chosen))
        writer.add_image("search/pareto", pixels(draw_front([("", run)])), dataformats="HWC")
    return directory


def _write_generations(writer: SummaryWriter, search: Search) -> None:
    best = 0.0
    for number, rows in enumerate(search.generations):
        top1 = np.array([row["top1"] for row in rows])
        if not len(top1):
            continue
        best = max(best, float(top1.max()))
        writer.add_scalar("search/best_top1", best, number)
        writer.add_scalar("search/median_top1", float(np.median(top1)), number)
        writer.add_histogram("search/top1", top1, number)
        writer.add_histogram("search/macs", np.array([row["macs"] for row in rows], np.float64), number)


def pixels(picture: Picture) -> npt.NDArray[np.uint8]:
    """The picture as RGB [H, W, 3]."""
    buffer = io.BytesIO()
    picture.save_png(buffer)
    return np.asarray(Image.open(buffer).convert("RGB"))

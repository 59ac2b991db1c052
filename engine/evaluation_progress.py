"""The progress bar of an evaluation: effective images a second (models x images / time) and the time left."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} images/s")


class EvaluationProgress:
    """Counts model-images. Silent when it is turned off, or when the output is not a terminal."""

    def __init__(self, enabled: bool, description: str, total: int) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            _Speed(),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task(description, total=total)

    def advance(self, model_images: int) -> None:
        self._progress.advance(self._task, model_images)

    def __enter__(self) -> "EvaluationProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

"""The progress of an evaluation: effective images a second (models x images / time) and the time left."""

from bsnas.engine.host.console import Progress


class EvaluationProgress(Progress):
    """Counts model-images. Silent when it is turned off, or when the output is not a terminal."""

    def __init__(self, enabled: bool, description: str, total: int) -> None:
        super().__init__(description, total, unit="images", enabled=enabled)

"""Training of one released network, from scratch or from inherited weights (paper, section 4.1)."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bsnas.engine.config import RunConfig, SafetyConfig
from bsnas.engine.data.dataset import Dataset
from bsnas.engine.data.file_list import FileList
from bsnas.engine.data.loading.evaluation_set import EvaluationSet
from bsnas.engine.host.distributed import Process, on_main
from bsnas.engine.host.precision import default_precision
from bsnas.engine.runs.rundir import NetworkDir, read_json, write_json
from bsnas.engine.training.loop import Part, Step, Training, Weights
from bsnas.engine.training.teacher import teacher_of
from bsnas.kernels import graphs


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of correctly classified images, and the mean loss."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def measure_accuracy(network: nn.Module, images: EvaluationSet, device: torch.device, batch: int = 256) -> Accuracy:
    """Top-1, top-5 and cross-entropy of a network in evaluation mode, fp32."""
    network.eval()
    labels = torch.from_numpy(images.labels).to(device)
    correct1 = correct5 = 0
    loss = 0.0
    for start in range(0, len(labels), batch):
        logits = network(images.normalized(device, torch.float32, start, start + batch))
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = best == labels[start : start + batch, None]
        correct1 += int(hits[:, 0].sum())
        correct5 += int(hits.sum())
        loss += float(functional.cross_entropy(logits, labels[start : start + batch], reduction="sum"))
    count = len(labels)
    return Accuracy(top1=correct1 / count, top5=correct5 / count, loss=loss / count, images=count)


class NetworkTraining(Training):
    """Trains a released network.

    Its checkpoints are in `directory`; a training that was started with the same request continues there.
    """

    doing, counted, to_continue = "retraining", "steps", "the same command continues"

    def __init__(
        self,
        network: nn.Module,
        config: RunConfig,
        directory: Path,
        request: Mapping[str, Any],
        process: Process,
        data: Dataset,
        deepspeed_overrides: Mapping[str, Any],
        safety: SafetyConfig = SafetyConfig(),  # noqa: B008 - frozen
        *,
        images: FileList | None = None,
        epochs: int | None = None,
        start: Path | None = None,
    ) -> None:
        """Begin, or continue what is in `directory`.

        Args:
            request: what `directory` is claimed for.
            images: by default all of train/, the search-validation images included.
            epochs: by default those of `config.retrain`.
            start: the checkpoints of another training of this network, which this one goes on from.
        """
        self.request = dict(request)
        self._untrained = network
        files, planned = NetworkDir(directory), config.retrain.epochs
        epochs = planned if epochs is None else epochs
        on_main(process, lambda: claim(files, self.request))
        super().__init__(
            files,
            data.everything if images is None else images,
            config.data,
            replace(
                config.optimizer,
                batch_size=config.retrain.batch_size,
                learning_rate=config.retrain.learning_rate,
                warmup_epochs=min(config.optimizer.warmup_epochs, planned / 2),
            ),
            epochs=epochs,
            kept_epochs=(epochs,),
            seed=config.seed,
            precision=config.precision or default_precision(process.device),
            process=process,
            fingerprint=data.fingerprint,
            overrides=deepspeed_overrides,
            safety=safety,
            start=start,
            teacher=teacher_of(config, process.device),
            teacher_weight=config.teacher_weight,
        )

    def new_network(self) -> nn.Module:
        return self._untrained

    def paths(self) -> list[tuple[Any, ...]]:
        return [()]

    def description(self) -> dict[str, Any]:
        return {"request": self.request}

    def parts(self) -> dict[str, Part]:
        return {"network": Weights(self.network), "optimization": self.optimization}

    def steps(self) -> Iterator[Step]:
        """A step for each batch."""
        done = self.progress.passes - self.progress.epoch * self.loader.steps_per_epoch
        for images, labels in self.loader.epoch(self.progress.epoch, start=done):
            position = self.position
            self.add_pass(images, labels)
            yield Step(parameters=self.network.parameters(), position=position, describe=self._describe())

    def _describe(self) -> Callable[[list[int]], str]:
        epoch, step = self.progress.epoch, self.progress.passes

        def describe(ranks: list[int]) -> str:
            images = self.loader.names(step - 1, ranks or [self.process.rank])
            return f"epoch {epoch + 1}, step {step}, network {self.request.get('arch')}, images {images}"

        return describe

    def epoch_values(self) -> dict[str, float]:
        return {"learning_rate": self.rate((self.progress.passes - 1) / self.loader.steps_per_epoch)}

    def after_training(self) -> None:
        graphs.GRAPHS.clear()  # whoever scores the network needs the memory


class RungTraining(NetworkTraining):
    """Trains a network of the finals on the training images that are not for search-validation.

    The rate is constant after the warmup. With `decay_epochs` it falls to zero, linearly, over so many last epochs: a
    network is compared after such a decay, and the next rung goes on from before it.
    """

    def __init__(self, *arguments: Any, decay_epochs: int = 0, **settings: Any) -> None:
        self.decay_epochs = decay_epochs
        super().__init__(*arguments, **settings)

    def rate(self, position: float, decay_power: float = 1.0) -> float:
        config, left = self.optimizer_config, self.epochs - position
        warmup = min(1.0, position / config.warmup_epochs) if config.warmup_epochs else 1.0
        decay = min(1.0, left / self.decay_epochs) if self.decay_epochs else 1.0
        return config.learning_rate * warmup * decay


def claim(files: NetworkDir, request: Mapping[str, Any]) -> None:
    """Record what is trained in a directory; the checkpoints of another request go."""
    if not files.request_file.is_file() or read_json(files.request_file) != request:
        shutil.rmtree(files.checkpoints, ignore_errors=True)
        for file in (files.network_file, files.result_file, files.metrics_file):
            file.unlink(missing_ok=True)
        write_json(files.request_file, dict(request))

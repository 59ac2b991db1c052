"""Training of one released network, from scratch or from inherited weights (paper, section 4.1)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint import read_state, write_state
from engine.config import RunConfig
from engine.data import Dataset
from engine.distributed import Process, average_batchnorm
from engine.evaluation_set import EvaluationSet
from engine.image_files import list_images
from engine.loader import TrainLoader
from engine.metrics import Meter, MetricsLog, Reporter
from engine.optimization import Optimization, default_precision, learning_rate
from engine.subnet import Subnet


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of correctly classified images."""

    top1: float
    top5: float
    images: int


@torch.no_grad()
def measure_accuracy(network: nn.Module, images: EvaluationSet, device: torch.device, batch: int = 256) -> Accuracy:
    """Top-1 and top-5 of a network in evaluation mode, fp32."""
    network.eval()
    labels = torch.from_numpy(images.labels).to(device)
    correct1 = correct5 = 0
    for start in range(0, len(labels), batch):
        logits = network(images.normalized(device, torch.float32, start, start + batch))
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = best == labels[start : start + batch, None]
        correct1 += int(hits[:, 0].sum())
        correct5 += int(hits.sum())
    return Accuracy(top1=correct1 / len(labels), top5=correct5 / len(labels), images=len(labels))


class StandaloneTrainer:
    """Trains a released network on all images of train/, the search-validation images included.

    The state after each epoch is in `directory`; a training that was started with the same request continues there.
    """

    def __init__(
        self,
        network: Subnet,
        config: RunConfig,
        directory: Path,
        request: Mapping[str, Any],
        process: Process,
        data: Dataset,
        deepspeed_overrides: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.process = process
        self.file = directory / "checkpoint.pt"
        self.request = dict(request)
        self.epochs = config.retrain.epochs
        optimizer = replace(
            config.optimizer,
            batch_size=config.retrain.batch_size,
            learning_rate=config.retrain.learning_rate,
            warmup_epochs=min(config.optimizer.warmup_epochs, self.epochs / 2),
        )
        self.optimizer_config = optimizer
        precision = config.precision or default_precision(process)
        self.loader = TrainLoader(
            list_images(data.root / "train", data.classes),
            config.data,
            batch_size=process.per_rank(optimizer.batch_size),
            seed=config.seed,
            rank=process.rank,
            world_size=process.world_size,
            device=process.device,
            dtype=torch.float32 if precision == "fp32" else torch.float16,
        )
        self.criterion = nn.CrossEntropyLoss(label_smoothing=optimizer.label_smoothing)
        self.epoch = 0
        state = read_state(self.file) if self.file.is_file() else None
        if state is not None and state["request"] == self.request:
            network.load_state_dict(state["network"])
            self.epoch = state["epoch"]
        self.network = network.to(process.device)
        self.optimization = Optimization(self.network, optimizer, process, precision, deepspeed_overrides)
        if self.epoch and state is not None:
            self.optimization.optimizer.load_state_dict(state["optimizer"])
        self.reporter = Reporter(self.epochs, enabled=process.is_main, doing="retraining")
        self.log: MetricsLog | None = None
        if process.is_main:
            os.makedirs(directory, exist_ok=True)
            self.log = MetricsLog(directory / "metrics.jsonl", directory / "tensorboard", resume_epoch=self.epoch)

    def train(self) -> None:
        """Train the epochs that are still to do."""
        while self.epoch < self.epochs:
            self.train_epoch()
        if self.log is not None:
            self.log.close()

    def train_epoch(self) -> None:
        meter = Meter(self.process.device)
        self.network.train()
        for step, (images, labels) in enumerate(self.loader.epoch(self.epoch)):
            logits = self.optimization.forward(images)
            loss = self.criterion(logits.float(), labels)
            self.optimization.backward(loss)
            epoch = self.epoch + step / self.loader.steps_per_epoch
            lr = learning_rate(self.optimizer_config, self.optimizer_config.learning_rate, epoch, self.epochs)
            self.optimization.step(self.network.parameters(), lr)
            meter.add(loss, logits, labels)
            if self.reporter.due():
                self.reporter.show(epoch, meter.peek(self.loader.wait_seconds), done=False)
        self.epoch += 1
        average_batchnorm(self.network)
        values = meter.read(self.loader.wait_seconds)
        self.reporter.show(self.epoch, values, done=True)
        if self.log is not None:
            self.log.write("epoch", self.epoch, {**values, "learning_rate": lr})
            state = {
                "request": self.request,
                "epoch": self.epoch,
                "network": self.network.state_dict(),
                "optimizer": self.optimization.optimizer.state_dict(),
            }
            write_state(self.file, state)

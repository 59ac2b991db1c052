"""Training of one released network, from scratch or from inherited weights (paper, section 4.1)."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bsnas.engine.checkpoints.checkpoint import CheckpointWriter, read_state
from bsnas.engine.checkpoints.manifest import Checkpoint, Manifest, Progress
from bsnas.engine.checkpoints.tensor_file import load_weights, take
from bsnas.engine.config import RunConfig, SafetyConfig
from bsnas.engine.data.dataset import Dataset
from bsnas.engine.data.loading.evaluation_set import EvaluationSet
from bsnas.engine.data.loading.loader import TrainLoader
from bsnas.engine.host.distributed import Process, average_batchnorm, on_main
from bsnas.engine.host.preemption import Preempted, deferred, saving, signal_name
from bsnas.engine.runs.rundir import NetworkDir, read_json, write_json
from bsnas.engine.training.metrics import Meter, MetricsLog, Reporter
from bsnas.engine.training.optimization import Optimization, default_precision, learning_rate
from bsnas.engine.training.resume import device_name, find_checkpoint, load_of_rank, of_ranks
from bsnas.engine.training.watch import Watch
from bsnas.kernels import graphs


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

    Its checkpoints are in `directory`; a training that was started with the same request continues there.
    """

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
    ) -> None:
        self.config = config
        self.process = process
        self.data = data
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
            data.everything,
            config.data,
            batch_size=process.per_rank(optimizer.batch_size),
            seed=config.seed,
            rank=process.rank,
            world_size=process.world_size,
            device=process.device,
            dtype=torch.float32 if precision == "fp32" else torch.float16,
        )
        self.criterion = nn.CrossEntropyLoss(label_smoothing=optimizer.label_smoothing)
        self.progress = Progress()
        self.meter: Meter | None = None
        """Sums of the epoch under way."""
        self.reporter = Reporter(self.epochs, enabled=process.is_main, doing="retraining")
        files = NetworkDir(directory)
        on_main(process, lambda: claim(files, self.request))
        found = find_checkpoint(files.checkpoints, process, data.fingerprint, self.reporter.say)
        state = read_state(found.file) if found else None
        if found is not None and state is not None:
            load_weights(network, state.get("network"), found.file)
        self.network = network.to(process.device)
        self.optimization = Optimization(self.network, optimizer, process, precision, deepspeed_overrides)
        if found is not None and state is not None:
            self._load(state, found)
            self.reporter.say(
                f"continues from {found.file.name}: epoch {self.progress.epoch + 1}, {self.progress.passes} steps made"
            )
        self.log: MetricsLog | None = None
        if process.is_main:
            self.log = MetricsLog(
                files.metrics_file, files.tensorboard, resume_epoch=self.progress.epoch,
                resume_bytes=take(state, "metrics_bytes", int, found.file) if found and state else 0,
            )  # fmt: skip
        self.writer = CheckpointWriter(files.checkpoints, safety.checkpoints)
        self.watch = Watch(process, safety, self.writer, self.progress)

    def train(self) -> None:
        """Train the epochs that are still to do. Raises `Preempted` when told to stop."""
        with deferred():
            try:
                while self.progress.epoch < self.epochs:
                    self.train_epoch()
            finally:
                self.writer.wait()
        graphs.GRAPHS.clear()  # whoever scores the network needs the memory
        if self.log is not None:
            self.log.close()

    def train_epoch(self) -> None:
        """The batches of an epoch, or those that are left of it; then a checkpoint."""
        progress, steps = self.progress, self.loader.steps_per_epoch
        if self.meter is None:  # else the epoch is continued
            self.meter = Meter(self.process.device, waited=self.loader.wait_seconds)
        self.network.train()
        for images, labels in self.loader.epoch(progress.epoch, start=progress.passes - progress.epoch * steps):
            logits = self.optimization.forward(images)
            loss = self.criterion(logits.float(), labels)
            self.optimization.backward(loss)
            self._step()
            self.meter.add(loss, logits, labels)
            progress.passes += 1
            if self.reporter.due():
                self.reporter.show(progress.passes / steps, self.meter.peek(self.loader.wait_seconds), done=False)
            self._between_steps()
        self.watch.settle()
        lr = self._learning_rate(progress.passes - 1)
        progress.epoch += 1
        average_batchnorm(self.network)
        values = self.meter.read(self.loader.wait_seconds)
        self.meter = None
        self.reporter.show(progress.epoch, values, done=True)
        if self.log is not None:
            self.log.write("epoch", progress.epoch, {**values, "learning_rate": lr, "skipped": progress.skipped})
        self._save(whole_epoch=True)

    def _learning_rate(self, step: int) -> float:
        peak = self.optimizer_config.learning_rate
        return learning_rate(self.optimizer_config, peak, step / self.loader.steps_per_epoch, self.epochs)

    def _step(self) -> None:
        step = self.progress.passes
        notes = self.watch.notes(self.optimization.finiteness.loss_is_bad())
        bad = self.optimization.step(self.network.parameters(), self._learning_rate(step), notes)
        self.watch.observe(bad, notes, lambda ranks: self._describe(step, ranks))

    def _between_steps(self) -> None:
        """Nothing is half done here: stop when told to, and save when it is time."""
        if self.watch.stop:
            began = time.perf_counter()
            with saving():
                on_main(self.process, self.writer.wait)  # all ranks learn of a write that failed
                self._save(whole_epoch=False)
                on_main(self.process, self.writer.wait)
            raise Preempted(
                f"stopped by {signal_name()} in epoch {self.progress.epoch + 1} after {self.progress.passes} steps; "
                f"saved in {time.perf_counter() - began:.1f} s; the same command continues"
            )
        if self.watch.save:
            self._save(whole_epoch=False)

    def _describe(self, step: int, ranks: list[int]) -> str:
        epoch, images = step // self.loader.steps_per_epoch + 1, self.loader.names(step, ranks or [self.process.rank])
        return f"epoch {epoch}, step {step + 1}, network {self.request.get('arch')}, images {images}"

    # ---- files

    def _save(self, *, whole_epoch: bool) -> None:
        """Write everything that the training needs to continue, beside it."""
        self.watch.settle()
        inside = None if whole_epoch else of_ranks(self.process, self.optimization, self.meter)
        if self.process.is_main:
            progress = replace(self.progress)
            state = {
                "request": self.request, "network": self.network.state_dict(),
                "optimization": self.optimization.state(), **(inside or {}),
                "metrics_bytes": self.log.bytes_written() if self.log else 0,
            }  # fmt: skip
            manifest = Manifest(
                progress=progress, whole_epoch=whole_epoch, kept=whole_epoch and progress.epoch == self.epochs,
                processes=self.process.world_size, device=device_name(self.process), data=self.data.fingerprint,
            )  # fmt: skip
            self.writer.save(manifest, state)
        self.watch.saved()

    def _load(self, state: dict[str, Any], found: Checkpoint) -> None:
        self.progress = replace(found.manifest.progress)
        self.optimization.load_state(take(state, "optimization", dict, found.file), found.file)
        if not found.manifest.whole_epoch:
            self.meter = Meter(self.process.device, waited=self.loader.wait_seconds)
            load_of_rank(state, self.process, self.optimization, self.meter, found.file)


def claim(files: NetworkDir, request: Mapping[str, Any]) -> None:
    """Record what is trained in a directory; the checkpoints of another request go."""
    if not files.request_file.is_file() or read_json(files.request_file) != request:
        shutil.rmtree(files.checkpoints, ignore_errors=True)
        for file in (files.network_file, files.result_file, files.metrics_file):
            file.unlink(missing_ok=True)
        write_json(files.request_file, dict(request))

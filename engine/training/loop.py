"""The loop of every training here: optimizer steps, epochs, checkpoints; stopped at any step, continued bit for bit."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from bsnas.engine.checkpoints.checkpoint import CheckpointWriter, read_state
from bsnas.engine.checkpoints.manifest import Manifest, Progress
from bsnas.engine.checkpoints.old_names import with_present_order
from bsnas.engine.checkpoints.tensor_file import load_weights, take, take_numbers
from bsnas.engine.config import DataConfig, OptimizerConfig, Precision, SafetyConfig
from bsnas.engine.data.file_list import FileList
from bsnas.engine.data.loading.loader import TrainLoader
from bsnas.engine.host.distributed import Process, average_batchnorm, on_main
from bsnas.engine.host.precision import COMPUTE_DTYPES
from bsnas.engine.host.preemption import Preempted, deferred, saving, signal_name
from bsnas.engine.runs.rundir import NetworkDir, RunDir
from bsnas.engine.training.distillation import kl_divergence
from bsnas.engine.training.kernel_cache import compile_kernels
from bsnas.engine.training.metrics import Meter, MetricsLog, Reporter
from bsnas.engine.training.optimization import Optimization, learning_rate
from bsnas.engine.training.resume import device_name, find_checkpoint, load_of_rank, of_ranks
from bsnas.engine.training.teacher import Teacher
from bsnas.engine.training.watch import Watch

LossOf = Callable[[Tensor], Tensor]
"""A mean loss [] of logits [N, classes], float32."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimizer step moves, with gradients that are in place."""

    parameters: Iterable[nn.Parameter]
    position: float
    """Epochs before it, a fraction included: what the learning rate follows."""
    decay_power: float = 1.0
    """What the decay of the learning rate is raised to."""
    describe: Callable[[list[int]], str]
    """Its epoch, path and images, given the ranks whose loss was not finite."""


class Part(Protocol):
    """Something of a training that its checkpoints hold."""

    def state(self) -> Any:
        """Tensors and plain data."""
        ...

    def load_state(self, content: Mapping[str, Any], name: str, file: Path) -> None:
        """Go on from what `state` gave, `content[name]`. Raises `UserError` when it does not fit."""
        ...


class Weights:
    """The part that is a network."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def state(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def load_state(self, content: Mapping[str, Any], name: str, file: Path) -> None:
        load_weights(self.network, content.get(name), file)


class Numbers(dict[str, float]):
    """The part that is numbers with names."""

    def state(self) -> dict[str, float]:
        return dict(self)

    def load_state(self, content: Mapping[str, Any], name: str, file: Path) -> None:
        self.update(take_numbers(content, name, file))


class Training(ABC):
    """Trains a network, from the start or from the newest checkpoint of its directory.

    A subclass says which network, what its steps are and what else a checkpoint holds.
    """

    doing: ClassVar[str]
    """For the console: training, retraining."""
    counted: ClassVar[str]
    """What `progress.passes` counts, for messages."""
    to_continue: ClassVar[str]
    """How a user continues it."""

    network: nn.Module
    optimization: Optimization

    def __init__(
        self,
        files: RunDir | NetworkDir,
        images: FileList,
        data: DataConfig,
        optimizer: OptimizerConfig,
        *,
        epochs: int,
        kept_epochs: Iterable[int],
        seed: int,
        precision: Precision,
        process: Process,
        fingerprint: str,
        overrides: Mapping[str, Any],
        safety: SafetyConfig,
        start: Path | None = None,
        teacher: Teacher | None = None,
        teacher_weight: float = 0.0,
    ) -> None:
        """`kept_epochs`: after which a checkpoint stays for good. `fingerprint`: of the data set and its split.
        `start`: the checkpoints of another training, of a network alike, whose last epoch this one goes on from.
        `teacher_weight`: share of the loss that is the divergence from the teacher."""
        self.optimizer_config = optimizer
        self._image_shape = (data.channels, data.resolution, data.resolution)
        self.epochs = epochs
        self.kept_epochs = set(kept_epochs)
        self.precision: Precision = precision
        self.process = process
        self.fingerprint = fingerprint
        self.overrides = overrides
        self.loader = TrainLoader(
            images,
            data,
            batch_size=process.per_rank(optimizer.batch_size),
            seed=seed,
            rank=process.rank,
            world_size=process.world_size,
            device=process.device,
            dtype=torch.float32 if precision == "fp32" else torch.float16,
        )
        self.criterion = nn.CrossEntropyLoss(label_smoothing=optimizer.label_smoothing)
        self.teacher, self.teacher_weight = teacher, teacher_weight
        self.meter = Meter(process.device)
        """Sums of the epoch under way."""
        self.reporter = Reporter(epochs, enabled=process.is_main, doing=self.doing)
        self.progress = Progress()
        metrics_bytes = self._start_or_continue(files.checkpoints, start)
        self.log: MetricsLog | None = None
        if process.is_main:
            self.log = MetricsLog(
                files.metrics_file, files.tensorboard, resume_epoch=self.progress.epoch, resume_bytes=metrics_bytes
            )
        self.writer = CheckpointWriter(files.checkpoints, safety.checkpoints)
        self.watch = Watch(process, safety, self.writer, self.progress)

    # ---- what a subclass says

    @abstractmethod
    def new_network(self) -> nn.Module:
        """The network as a training begins with it."""

    def network_of(self, content: Mapping[str, Any], file: Path) -> nn.Module:
        """The network whose weights a checkpoint holds, which are filled in later."""
        return self.new_network()

    @abstractmethod
    def paths(self) -> list[tuple[Any, ...]]:
        """Arguments beside images of forward passes that together hold every operation of the network."""

    @abstractmethod
    def steps(self) -> Iterator[Step]:
        """The steps that are left of the epoch. What is counted before a step is yielded is finished with it."""

    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """What checkpoints hold, by name."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Plain data of a checkpoint that tells which network it is of."""

    @abstractmethod
    def epoch_values(self) -> dict[str, float]:
        """What the line of a finished epoch says besides the meter's values."""

    def before_epoch(self) -> None:  # noqa: B027 - optional
        """What is due between two epochs."""

    def after_training(self) -> None:  # noqa: B027 - optional
        """What is due when all epochs are trained."""

    # ---- the loop

    def train(self) -> None:
        """Train the epochs that are still to do. Raises `Preempted` when told to stop."""
        with deferred():
            try:
                while self.progress.epoch < self.epochs:
                    self.before_epoch()
                    self.train_epoch()
                self.after_training()
            finally:
                self.writer.wait()
        if self.log is not None:
            self.log.close()

    def train_epoch(self) -> None:
        """The steps of an epoch, or those that are left of it; then a checkpoint."""
        self.network.train()
        self.meter.restart_clock(self.loader.wait_seconds)
        self.make_steps(self.steps())
        self.watch.settle()
        self.progress.epoch += 1
        average_batchnorm(self.network)
        values = self.meter.read(self.loader.wait_seconds)
        self.epoch_finished(values)
        self.reporter.show(self.progress.epoch, values, done=True)
        self.write("epoch", {**values, **self.epoch_values(), "skipped": self.progress.skipped})
        self.save(whole_epoch=True)

    def epoch_finished(self, values: dict[str, float]) -> None:  # noqa: B027 - optional
        """The meter's values of a finished epoch, before anything is written."""

    def make_steps(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self._step(step)
            if self.reporter.due():
                self.reporter.show(self.position, self.meter.peek(self.loader.wait_seconds), done=False)
            self._stop_or_save()

    def add_pass(self, images: Tensor, labels: Tensor, *path: Any, loss_of: LossOf | None = None) -> Tensor:
        """Add the gradients of a batch: images [N, C, H, W], labels [N] or probabilities [N, classes].

        `loss_of` takes the place of the cross-entropy with the labels. Returns the logits [N, classes], float32,
        without a graph.
        """
        logits = self.optimization.forward(images, *path).float()
        loss = loss_of(logits) if loss_of is not None else self.loss(images, logits, labels)
        self.optimization.backward(loss)
        self.meter.add(loss, logits, labels)
        self.progress.passes += 1
        return logits.detach()

    def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy with the labels, and with what the teacher says where there is one."""
        loss = self.criterion(logits, labels)
        if self.teacher is None:
            return loss
        return torch.lerp(loss, kl_divergence(logits, self.teacher(images)), self.teacher_weight)

    @property
    def position(self) -> float:
        """Epochs so far, a fraction included; a round of paths may reach past the end of its epoch."""
        done = self.progress.epoch
        return min(max(self.progress.passes / self.loader.steps_per_epoch, done), done + 1)

    def rate(self, position: float, decay_power: float = 1.0) -> float:
        """The learning rate there."""
        config = self.optimizer_config
        return learning_rate(config, config.learning_rate, position, self.epochs, decay_power)

    def _step(self, step: Step) -> None:
        notes = self.watch.notes(self.optimization.finiteness.loss_is_bad())
        bad = self.optimization.step(step.parameters, self.rate(step.position, step.decay_power), notes)
        self.watch.observe(bad, notes, step.describe)

    def _stop_or_save(self) -> None:
        """Nothing is half done here: stop when told to, and save when it is time."""
        if self.watch.stop:
            began = time.perf_counter()
            with saving():
                on_main(self.process, self.writer.wait)  # all ranks learn of a write that failed
                self.save(whole_epoch=False)
                on_main(self.process, self.writer.wait)
            raise Preempted(
                f"stopped by {signal_name()} in epoch {self.progress.epoch + 1} after {self.progress.passes} "
                f"{self.counted}; saved in {time.perf_counter() - began:.1f} s; {self.to_continue}"
            )
        if self.watch.save:
            self.save(whole_epoch=False)

    # ---- files

    def wrap(self, network: nn.Module) -> None:
        """Train this network from now on."""
        self.network = network.to(self.process.device)
        shape = (self.process.per_rank(self.optimizer_config.batch_size), *self._image_shape)
        dtype = COMPUTE_DTYPES[self.precision]
        failed = compile_kernels(self.network, self.paths(), shape, self.process, dtype)
        if failed:
            self.reporter.say(f"{len(failed)} kernels were not compiled ahead, the first: {failed[0]}")
        self.optimization = Optimization(
            self.network, self.optimizer_config, self.process, self.precision, self.overrides
        )

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """A line of the metrics file."""
        if self.log is not None:
            self.log.write(kind, self.progress.epoch, values)

    def save(self, *, whole_epoch: bool) -> None:
        """Write everything that the training needs to continue, beside it."""
        self.watch.settle()
        inside = {} if whole_epoch else of_ranks(self.process, self._parts_of_rank())
        if self.process.is_main:
            manifest = Manifest(
                progress=replace(self.progress),
                whole_epoch=whole_epoch,
                kept=whole_epoch and self.progress.epoch in self.kept_epochs,
                processes=self.process.world_size,
                device=device_name(self.process),
                data=self.fingerprint,
            )
            parts = {name: part.state() for name, part in self.parts().items()}
            metrics_bytes = self.log.bytes_written() if self.log else 0
            self.writer.save(manifest, {**self.description(), **parts, **inside, "metrics_bytes": metrics_bytes})
        self.watch.saved()

    def _start_or_continue(self, checkpoints: Path, start: Path | None) -> int:
        """Fill in the newest checkpoint, or begin. Returns how much of the metrics file belongs to that state."""
        found = find_checkpoint(checkpoints, self.process, self.fingerprint, self.reporter.say, start)
        if found is None:
            self.wrap(self.new_network())
            return 0
        content: Mapping[str, Any] = read_state(found.file)
        self.progress = replace(found.manifest.progress)
        self.wrap(self.network_of(content, found.file))
        weights = next(name for name, part in self.parts().items() if isinstance(part, Weights))
        content = with_present_order(content, weights, (name for name, _ in self.network.named_parameters()))
        for name, part in self.parts().items():
            part.load_state(content, name, found.file)
        if not found.manifest.whole_epoch:
            load_of_rank(content, self.process, self._parts_of_rank(), found.file)
        self.reporter.say(
            f"continues from {found.file.name}: epoch {self.progress.epoch + 1}, {self.progress.passes} "
            f"{self.counted} made"
        )
        if found.file.parent == start:  # whose epochs may have had other numbers of batches
            self.progress = Progress(
                epoch=self.progress.epoch, passes=self.progress.epoch * self.loader.steps_per_epoch
            )
            return 0
        return take(content, "metrics_bytes", int, found.file)

    def _parts_of_rank(self) -> dict[str, Any]:
        """What differs between ranks inside an epoch."""
        return {"statistics_of_ranks": self.optimization.statistics, "meter_of_ranks": self.meter}

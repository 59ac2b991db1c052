"""Supernet training with step-shrinking (paper, Algorithm 1)."""

import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bsnas.engine.checkpoints.checkpoint import CheckpointWriter, load_checkpoint
from bsnas.engine.checkpoints.manifest import Manifest, Progress
from bsnas.engine.checkpoints.tensor_file import load_weights, take, take_numbers
from bsnas.engine.config import RunConfig, SafetyConfig
from bsnas.engine.data.dataset import Dataset
from bsnas.engine.data.loading.evaluation_set import EvaluationSet, evaluation_set
from bsnas.engine.data.loading.loader import TrainLoader
from bsnas.engine.evaluation.evaluator import Evaluator
from bsnas.engine.host.distributed import Process, average_batchnorm, on_main
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.preemption import Preempted, deferred, saving, signal_name
from bsnas.engine.networks.supernet import Supernet, crop_to
from bsnas.engine.runs.rundir import RunDir, write_json
from bsnas.engine.space.sampling import fair_archs, fair_round, uniform_arch, uniform_round
from bsnas.engine.space.shrink import importance, importance_to_json, shrink
from bsnas.engine.space.space import Arch, Space
from bsnas.engine.training.kernel_cache import compile_kernels
from bsnas.engine.training.metrics import Meter, MetricsLog, Reporter
from bsnas.engine.training.optimization import Optimization, default_precision, learning_rate
from bsnas.engine.training.resume import device_name, find_checkpoint, load_of_rank, of_ranks
from bsnas.engine.training.step_scores import score_thirds
from bsnas.engine.training.watch import Watch
from bsnas.kernels import graphs

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE_SUBNETS = 20
"""Random subnets that are scored before and after each shrink step (paper, Figure 5)."""


class SupernetTrainer:
    """Trains the supernet of a run, from the start or from its newest checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        process: Process,
        data: Dataset,
        deepspeed_overrides: Mapping[str, Any],
        safety: SafetyConfig = SafetyConfig(),  # noqa: B008 - frozen
    ) -> None:
        self.config = config
        self.run = run
        self.process = process
        self.data = data
        self.overrides = deepspeed_overrides
        self.precision = config.precision or default_precision(process)
        self.loader = TrainLoader(
            data.train,
            config.data,
            batch_size=process.per_rank(config.optimizer.batch_size),
            seed=config.seed,
            rank=process.rank,
            world_size=process.world_size,
            device=process.device,
            dtype=torch.float32 if self.precision == "fp32" else torch.float16,
        )
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.optimizer.label_smoothing)
        self.draw_round = fair_round if config.sampling.sampler == "fair" else uniform_round
        self.progress = Progress()
        self.last_values: dict[str, float] = {}
        self.probes: dict[str, float] = {}
        """Median top-1 of random subnets by the moment they were scored."""
        self.meter: Meter | None = None
        """Sums of the epoch under way."""
        self.supernet: Supernet
        self.optimization: Optimization
        self.reporter = Reporter(config.shrink.total_epochs, enabled=process.is_main)
        metrics_bytes = self._start_or_continue()
        self.log = (
            MetricsLog(run.metrics_file, run.tensorboard, resume_epoch=self.progress.epoch, resume_bytes=metrics_bytes)
            if process.is_main
            else None
        )
        self.writer = CheckpointWriter(run.checkpoints, safety.checkpoints)
        self.watch = Watch(process, safety, self.writer, self.progress)

    def _start_or_continue(self) -> int:
        """Fill in the newest checkpoint, or begin. Returns how much of the metrics file belongs to that state."""
        found = find_checkpoint(self.run.checkpoints, self.process, self.data.fingerprint, self.reporter.say)
        if found is None:
            torch.manual_seed(self.config.seed)
            self._wrap(Supernet(self.config.space, self.config.sharing))
            return 0
        space, state = load_checkpoint(found.file, self.config.space)
        self.progress = replace(found.manifest.progress)
        schedule = self.config.shrink
        if self.progress.epoch > schedule.total_epochs or self.progress.shrink_steps > len(schedule.keep):
            raise UserError(
                f"{found.file} is past the end of this training: {self.progress.epoch} epochs and "
                f"{self.progress.shrink_steps} shrink steps; use the run's own files"
            )
        supernet = Supernet(space, self.config.sharing)
        self.reporter.say(
            f"continues from {found.file.name}: epoch {self.progress.epoch + 1}, {self.progress.passes} passes made"
        )
        load_weights(supernet, state.get("supernet"), found.file)
        self._wrap(supernet)
        self.optimization.load_state(take(state, "optimization", dict, found.file), found.file)
        self.probes = take_numbers(state, "probes", found.file)
        self.last_values = take_numbers(state, "last_values", found.file)
        if not found.manifest.whole_epoch:
            self.meter = Meter(self.process.device, waited=self.loader.wait_seconds)
            load_of_rank(state, self.process, self.optimization, self.meter, found.file)
        if self.progress.paths and self.config.sampling.batches == "shared":
            self.progress.batches -= 1  # the paths of the round that are left see its batch again
        return take(state, "metrics_bytes", int, found.file)

    @property
    def space(self) -> Space:
        return self.supernet.space

    def _wrap(self, supernet: Supernet) -> None:
        self.supernet = supernet.to(self.process.device)
        images = self.process.per_rank(self.config.optimizer.batch_size)
        compile_kernels(self.supernet, self.process, images, COMPUTE_DTYPES[self.precision])
        self.optimization = Optimization(
            self.supernet, self.config.optimizer, self.process, self.precision, self.overrides
        )

    # ---- the whole training

    def train(self) -> None:
        """Train all epochs and make all shrink steps that are still to do. Raises `Preempted` when told to stop."""
        if self.progress.epoch == self.config.shrink.total_epochs:
            self.reporter.say(f"all {self.progress.epoch} epochs are trained")
        with deferred():
            try:
                self._train()
            finally:
                self.writer.wait()
        if self.log is not None:
            self.log.close()

    def _train(self) -> None:
        steps = self.config.shrink.step_epochs
        while self.progress.epoch < self.config.shrink.total_epochs:
            if self.progress.epoch in steps[self.progress.shrink_steps :]:
                self.make_shrink_step()
                self._save(whole_epoch=True)
            self.train_epoch()
        self.probe("final")

    def train_epoch(self) -> None:
        """Rounds until as many passes are made as the epochs so far have batches, at least one; then a checkpoint."""
        progress, per_epoch = self.progress, self.loader.steps_per_epoch
        end = (progress.epoch + 1) * per_epoch
        if self.meter is None:  # else the epoch is continued
            self.meter = Meter(self.process.device, waited=self.loader.wait_seconds)
        batches = self._batches()
        self.supernet.train()
        while progress.paths or progress.passes < end or progress.rounds == progress.first_round:
            self.train_round(batches, self.meter)
            if self.reporter.due():
                epoch = min(progress.passes, end) / per_epoch
                self.reporter.show(epoch, self.meter.peek(self.loader.wait_seconds), done=False)
        self.watch.settle()
        progress.epoch += 1
        progress.first_round = progress.rounds
        average_batchnorm(self.supernet)
        values = self.last_values = self.meter.read(self.loader.wait_seconds)
        self.meter = None
        self.reporter.show(progress.epoch, values, done=True)
        counts = {"rounds": progress.rounds, "skipped": progress.skipped}
        self._write("epoch", {**values, "learning_rate": self._learning_rate(), **counts})
        self._save(whole_epoch=True)

    def train_round(self, batches: Iterator[tuple[Tensor, Tensor]], meter: Meter) -> None:
        """One round of paths (engine/space/sampling.py), or what is left of it."""
        paths = self.draw_round(self.space, self.config.seed, self.progress.rounds)
        first = self.progress.paths
        for number, arch in enumerate(paths[first:], first):
            if number == first or self.config.sampling.batches == "fresh":
                images, labels = self._next(batches)
            logits = self.optimization.forward(images, arch)
            loss = self.criterion(logits.float(), labels)
            self.optimization.backward(loss)
            meter.add(loss, logits, labels)
            if self.config.sampling.update == "path":
                self._step([arch])
            self.progress.passes += 1
            if self.config.sampling.update == "path" and number + 1 < len(paths):
                self.progress.paths = number + 1
                self._between_steps()
        if self.config.sampling.update == "round":
            self._step(paths)
        self.progress.rounds += 1
        self.progress.paths = 0
        self._between_steps()

    def _step(self, paths: list[Arch]) -> None:
        """One optimizer step with the gradients of some paths."""
        notes = self.watch.notes(self.optimization.finiteness.loss_is_bad())
        bad = self.optimization.step(self._parameters_of(paths), self._learning_rate(), notes)
        epoch, step, batches = self.progress.epoch, self.progress.passes, self.progress.batches
        self.watch.observe(bad, notes, lambda ranks: self._describe(epoch, step, batches, paths, ranks))

    def _between_steps(self) -> None:
        """Nothing is half done here: stop when told to, and save when it is time."""
        if self.watch.stop:
            began = time.perf_counter()
            with saving():
                on_main(self.process, self.writer.wait)  # all ranks learn of a write that failed
                self._save(whole_epoch=False)
                on_main(self.process, self.writer.wait)
            raise Preempted(
                f"stopped by {signal_name()} in epoch {self.progress.epoch + 1} after {self.progress.passes} passes; "
                f"saved in {time.perf_counter() - began:.1f} s; continue with --resume"
            )
        if self.watch.save:
            self._save(whole_epoch=False)

    def _describe(self, epoch: int, step: int, batches: int, paths: list[Arch], ranks: list[int]) -> str:
        """Where in the training a step was, for whoever looks for its fault."""
        images = self.loader.names(batches - 1, ranks or [self.process.rank])
        shown = str(paths[0]) if len(paths) == 1 else f"any of the {len(paths)} of the round"
        return f"epoch {epoch + 1}, pass {step + 1}, path {shown}, images {images}"

    def _parameters_of(self, paths: list[Arch]) -> list[nn.Parameter]:
        """Each once, found by its id: a tensor's own hash is Python code."""
        return list({id(p): p for arch in paths for p in self.supernet.active_parameters(arch)}.values())

    def _learning_rate(self) -> float:
        done = self.progress.epoch  # a round may reach past the end of its epoch, far past it for tiny data sets
        epoch = min(max(self.progress.passes / self.loader.steps_per_epoch, done), done + 1)
        config = self.config.optimizer
        return learning_rate(config, config.learning_rate, epoch, self.config.shrink.total_epochs)

    # ---- images

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from the next one that no pass has seen, without end."""
        epoch, start = divmod(self.progress.batches, self.loader.steps_per_epoch)
        while True:
            yield from self.loader.epoch(epoch, start=start)
            epoch, start = epoch + 1, 0

    def _next(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        batch = next(batches)  # `_batches` begins to run here, with the count before
        self.progress.batches += 1
        return batch

    # ---- shrinking

    def make_shrink_step(self) -> None:
        """Score fair models, drop operations, and go on with the smaller supernet (Algorithm 1, lines 4-16)."""
        step = self.progress.shrink_steps
        keep = self.config.shrink.keep[step]
        before = self.space
        self.probe(f"before step {step + 1}")
        archs = fair_archs(
            before, self.config.seed + step + 1, before.max_live * self.config.shrink.models_per_operation
        )
        self.reporter.say(f"shrink step {step + 1}: scoring {len(archs)} subnets to keep {keep} operations per block")
        scores = score_thirds(self.evaluator(), archs, self.config.shrink.confidence)
        ratios = importance(before, archs, scores.ranks)
        after = shrink(before, ratios, keep)
        if self.log is not None:
            self.log.distribution("shrink/top1", scores.top1, self.progress.epoch)
            self.log.distribution("shrink/R", [r for block in ratios for r in block.values()], self.progress.epoch)
        if self.process.is_main:
            write_json(
                self.run.shrink_file(step + 1),
                {
                    "keep": keep,
                    "models": scores.to_json(archs),
                    "importance": importance_to_json(ratios),
                },
            )
            write_json(self.run.space_file(step + 1), after.to_json())
        self._shrink_to(after)
        self.progress.shrink_steps += 1
        counts = {"models": len(archs), "images_saved": scores.images_saved}
        self._write("shrink", {"step": step + 1, "architectures": float(after.num_architectures), **counts})
        self.reporter.say(
            f"shrink step {step + 1}: {before.num_architectures:.3g} -> {after.num_architectures:.3g} architectures"
        )
        self.probe(f"after step {step + 1}")

    def _shrink_to(self, space: Space) -> None:
        """Replace supernet and optimizer by smaller ones with the same values; what is dropped leaves memory."""
        momentum = {
            name: self.optimization.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.supernet.named_parameters()
            if "momentum_buffer" in self.optimization.optimizer.state.get(parameter, {})
        }
        finiteness = self.optimization.finiteness.state()
        smaller = self.supernet.shrunk(space)
        self.optimization.close()
        self._wrap(smaller)
        parameters = {n: p for n, p in self.supernet.named_parameters() if n in momentum}
        for name, buffer in crop_to(dict(parameters), momentum).items():
            self.optimization.optimizer.state[parameters[name]]["momentum_buffer"].copy_(buffer)
        self.optimization.finiteness.load(finiteness)
        if self.process.device.type == "cuda":
            torch.cuda.empty_cache()

    def evaluator(self) -> Evaluator:
        """Scores subnets with the weights of this moment on the search-validation set."""
        graphs.GRAPHS.clear()  # scoring needs the memory; training captures anew
        recalibration: EvaluationSet | None = None
        if self.config.shrink.bn == "recalibrate":
            recalibration = recalibration_set(self.config, self.data)
        return Evaluator(
            self.supernet,
            evaluation_set(self.data.search_val, self.config.data),
            bn=self.config.shrink.bn,
            recalibration=recalibration,
            process=self.process,
            dtype=COMPUTE_DTYPES[self.precision],
            memory_budget_mib=self.config.evaluation.memory_mib,
            store=self.run.evaluations,
            progress=self.process.is_main,
        )

    def probe(self, when: str) -> None:
        """Score the same number of random subnets and write their top-1 distribution (paper, Figure 5)."""
        rng = random.Random(self.config.seed)
        archs = [uniform_arch(self.space, rng) for _ in range(PROBE_SUBNETS)]
        top1 = sorted(score.top1 for score in self.evaluator().evaluate(archs))
        self.probes[when] = median(top1)
        self._write("probe", {"when": when, "top1": top1, "median": median(top1)})
        self.reporter.say(
            f"{PROBE_SUBNETS} random subnets {when}: "
            f"one-shot top-1 {top1[0]:.4f} / {median(top1):.4f} / {top1[-1]:.4f} (min / median / max)"
        )

    def figures(self) -> dict[str, Any]:
        """What a finished training reports: every probe, every space, and the last epoch's speed."""
        return {
            "epochs": self.progress.epoch,
            "passes": self.progress.passes,
            "architectures": [str(space.num_architectures) for space in self.run.spaces()],
            "skipped": self.progress.skipped,
            "checkpoint_stall_seconds": self.writer.stall_seconds,
            **self.last_values,
            "probes": self.probes,
        }

    # ---- files

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(kind, self.progress.epoch, values)

    def _save(self, *, whole_epoch: bool) -> None:
        """Write everything that the training needs to continue, beside it."""
        self.watch.settle()
        inside = None if whole_epoch else of_ranks(self.process, self.optimization, self.meter)
        if self.process.is_main:
            progress = replace(self.progress)
            state = {
                "space": self.space.to_json(), "supernet": self.supernet.state_dict(),
                "optimization": self.optimization.state(), **(inside or {}), "probes": dict(self.probes),
                "last_values": dict(self.last_values), "metrics_bytes": self.log.bytes_written() if self.log else 0,
            }  # fmt: skip
            at_step = progress.epoch in (*self.config.shrink.step_epochs, self.config.shrink.total_epochs)
            manifest = Manifest(
                progress=progress, whole_epoch=whole_epoch, kept=whole_epoch and at_step,
                processes=self.process.world_size, device=device_name(self.process), data=self.data.fingerprint,
            )  # fmt: skip
            self.writer.save(manifest, state)
        self.watch.saved()


def recalibration_set(config: RunConfig, data: Dataset) -> EvaluationSet:
    """Training images, seeded, seen through the evaluation transform."""
    count = min(config.evaluation.recalibration_images, len(data.train))
    indices = sorted(random.Random(config.seed).sample(range(len(data.train)), count))
    return evaluation_set(data.train.subset(indices), config.data)

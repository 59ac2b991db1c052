"""Supernet training with step-shrinking (paper, Algorithm 1)."""

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bsnas.engine.checkpoints.checkpoint import space_of
from bsnas.engine.config import RunConfig, SafetyConfig, SamplingConfig
from bsnas.engine.data.dataset import Dataset
from bsnas.engine.data.loading.evaluation_set import evaluation_set
from bsnas.engine.evaluation.evaluator import Evaluator
from bsnas.engine.evaluation.trained_run import evaluator_of
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.precision import default_precision
from bsnas.engine.networks.supernet import Supernet, crop_to
from bsnas.engine.runs.rundir import RunDir, write_json
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel, size_scale
from bsnas.engine.space.limited_sampling import archs_inside
from bsnas.engine.space.limits import format_count
from bsnas.engine.space.sampling import fair_archs, fair_round, sandwich_round, uniform_arch, uniform_round
from bsnas.engine.space.shrink import importance, importance_to_json, shrink, shrink_inside
from bsnas.engine.space.space import Space
from bsnas.engine.training.distillation import distillation
from bsnas.engine.training.loop import LossOf, Numbers, Part, Step, Training, Weights
from bsnas.engine.training.step_scores import score_thirds
from bsnas.engine.training.teacher import teacher_of
from bsnas.kernels import graphs

PROBE_SUBNETS = 20
"""Random subnets that are scored before and after each shrink step (paper, Figure 5)."""


def round_of(sampling: SamplingConfig) -> Callable[[Space, int, int], list[Arch]]:
    """Draws the paths of a round from a space, a seed and the number of the round."""
    if sampling.sampler == "sandwich":
        return partial(sandwich_round, count=sampling.sandwich_paths)
    return fair_round if sampling.sampler == "fair" else uniform_round


class SupernetTraining(Training):
    """Trains the supernet of a run, and shrinks it between epochs."""

    doing, counted, to_continue = "training", "passes", "continue with --resume"
    network: Supernet

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
        self.data = data
        self.draw_round = round_of(config.sampling)
        self.last_values = Numbers()
        """The meter's values of the last epoch."""
        self.probes = Numbers()
        """Median top-1 of random subnets by the moment they were scored."""
        schedule = config.shrink
        super().__init__(
            run,
            data.train,
            config.data,
            config.optimizer,
            epochs=schedule.total_epochs,
            kept_epochs=(*schedule.step_epochs, schedule.total_epochs),
            seed=config.seed,
            precision=config.precision or default_precision(process.device),
            process=process,
            fingerprint=data.fingerprint,
            overrides=deepspeed_overrides,
            safety=safety,
            teacher=teacher_of(config, process.device),
            teacher_weight=config.teacher_weight,
        )

    @property
    def space(self) -> Space:
        return self.network.space

    # ---- the network and its state

    def new_network(self) -> Supernet:
        torch.manual_seed(self.config.seed)
        return Supernet(self.config.space, self.config.sharing)

    def network_of(self, content: Mapping[str, Any], file: Path) -> Supernet:
        space = space_of(content, file, self.config.space)
        if self.progress.epoch > self.epochs or self.progress.shrink_steps > len(self.config.shrink.keep):
            raise UserError(
                f"{file} is past the end of this training: {self.progress.epoch} epochs and "
                f"{self.progress.shrink_steps} shrink steps; use the run's own files"
            )
        if self.config.sampling.batches == "shared":  # before 0.2 the batch of a round under way was counted too
            self.progress.batches = self.progress.rounds
        return Supernet(space, self.config.sharing)

    def paths(self) -> list[tuple[Any, ...]]:
        return [(arch,) for arch in fair_round(self.space, 0, 0)]

    def description(self) -> dict[str, Any]:
        return {"space": self.space.to_json()}

    def parts(self) -> dict[str, Part]:
        return {
            "supernet": Weights(self.network),
            "optimization": self.optimization,
            "probes": self.probes,
            "last_values": self.last_values,
        }

    # ---- epochs

    def train(self) -> None:
        """Train all epochs and make all shrink steps that are still to do. Raises `Preempted` when told to stop."""
        if self.progress.epoch == self.epochs:
            self.reporter.say(f"all {self.epochs} epochs are trained")
        super().train()

    def before_epoch(self) -> None:
        if self.progress.epoch in self.config.shrink.step_epochs[self.progress.shrink_steps :]:
            self.make_shrink_step()
            self.save(whole_epoch=True)

    def after_training(self) -> None:
        self.probe("final")

    def steps(self) -> Iterator[Step]:
        """Rounds until as many passes are made as the epochs so far have batches, at least one round."""
        progress, batches = self.progress, self.batches()
        end = (progress.epoch + 1) * self.loader.steps_per_epoch
        while progress.paths or progress.passes < end or progress.rounds == progress.first_round:
            yield from self.round(batches)
        progress.first_round = progress.rounds

    def round(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Step]:
        """The steps of one round of paths (engine/space/sampling.py), or of what is left of it."""
        progress, sampling = self.progress, self.config.sampling
        paths = self.draw_round(self.space, self.config.seed, progress.rounds)
        first = progress.paths
        loss_of: LossOf | None = None
        for number, arch in enumerate(paths[first:], first):
            if number == first or sampling.batches == "fresh":
                batch, (images, labels) = progress.batches, next(batches)
            position = self.position
            logits = self.add_pass(images, labels, arch, loss_of=loss_of)
            if number == 0 and sampling.distill != "none":  # the sandwich's largest, whose round is never half done
                loss_of = distillation(sampling.distill, logits)
            ends = number + 1 == len(paths)
            if ends or sampling.batches == "fresh":
                progress.batches += 1
            if ends:
                progress.rounds += 1
            progress.paths = 0 if ends or sampling.update == "round" else number + 1
            if sampling.update == "path":
                yield self._step_of([arch], position, batch, self.decay_power(arch))
        if sampling.update == "round":
            yield self._step_of(paths, self.position, batch)

    def _step_of(self, paths: list[Arch], position: float, batch: int, decay_power: float = 1.0) -> Step:
        epoch, made = self.progress.epoch, self.progress.passes

        def describe(ranks: list[int]) -> str:
            images = self.loader.names(batch, ranks or [self.process.rank])
            shown = str(paths[0]) if len(paths) == 1 else f"any of the {len(paths)} of the round"
            return f"epoch {epoch + 1}, pass {made}, path {shown}, images {images}"

        # Each once, found by its id: a tensor's own hash is Python code.
        parameters = {id(p): p for arch in paths for p in self.network.active_parameters(arch)}
        return Step(parameters=parameters.values(), position=position, decay_power=decay_power, describe=describe)

    def decay_power(self, arch: Arch) -> float:
        """What the decay of a path's learning rate is raised to, by the size of its network.

        DYNAS (arXiv 2503.10740) lets the rate of small networks decay faster, which are trained more than enough by
        the larger ones that share their weights. Here the power falls with the logarithm of the parameters.
        """
        most = self.config.sampling.complexity_decay
        if most == 1:
            return 1.0
        return most ** (1 - 2 * size_scale(self.space)(arch))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from the next one that no finished pass has seen, without end."""
        epoch, start = divmod(self.progress.batches, self.loader.steps_per_epoch)
        while True:
            yield from self.loader.epoch(epoch, start=start)
            epoch, start = epoch + 1, 0

    def epoch_finished(self, values: dict[str, float]) -> None:
        self.last_values.update(values)

    def epoch_values(self) -> dict[str, float]:
        return {"learning_rate": self.rate(self.position), "rounds": self.progress.rounds}

    # ---- shrinking

    def make_shrink_step(self) -> None:
        """Score fair models, drop operations, and go on with the smaller supernet (Algorithm 1, lines 4-16)."""
        step = self.progress.shrink_steps
        keep = self.config.shrink.keep[step]
        before = self.space
        self.probe(f"before step {step + 1}")
        archs, limit = self._models_of_step(step), self.config.shrink.macs_limit
        self.reporter.say(f"shrink step {step + 1}: scoring {len(archs)} subnets to keep {keep} operations per block")
        scores = score_thirds(self.evaluator(), archs, self.config.shrink.confidence, self.config.shrink.score)
        ratios = importance(before, archs, scores.ranks)
        if limit is None:
            after = shrink(before, ratios, keep)
        else:
            best = max(range(len(archs)), key=lambda i: scores.ranks[i])
            after = shrink_inside(before, ratios, keep, limit, archs[best])
        self._warn_of_lost_range(before, after)
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
        torch.cuda.empty_cache()
        self.progress.shrink_steps += 1
        counts = {"models": len(archs), "images_saved": scores.images_saved}
        self.write("shrink", {"step": step + 1, "architectures": float(after.num_architectures), **counts})
        self.reporter.say(
            f"shrink step {step + 1}: {before.num_architectures:.3g} -> {after.num_architectures:.3g} architectures"
        )
        self.probe(f"after step {step + 1}")

    def _models_of_step(self, step: int) -> list[Arch]:
        """Fair paths (Algorithm 1, lines 5-8), or random ones inside the budget of MACs where there is one."""
        schedule, seed = self.config.shrink, self.config.seed + step + 1
        count = schedule.models(self.space.max_live)
        if schedule.macs_limit is None:
            return fair_archs(self.space, seed, count)
        return archs_inside(self.space, schedule.macs_limit, seed, count)

    def _warn_of_lost_range(self, before: Space, after: Space) -> None:
        """Say so when a step without a budget leaves less than four fifths of the range of MACs."""
        if self.config.shrink.macs is not None:
            return
        (low, high), (new_low, new_high) = (CostModel(space).macs.range() for space in (before, after))
        if new_high - new_low < 0.8 * (high - low):
            self.reporter.say(
                f"the step leaves {format_count(new_low)} to {format_count(new_high)} of {format_count(low)} to "
                f"{format_count(high)} multiply-adds; a budget stays reachable with --shrink.macs LOW HIGH"
            )

    def _shrink_to(self, space: Space) -> None:
        """Replace supernet and optimizer by smaller ones with the same values; what is dropped leaves memory."""
        states = self.optimization.optimizer.state
        momenta = {name: states[p]["momentum_buffer"] for name, p in self.network.named_parameters()}
        finiteness = self.optimization.finiteness.state()
        smaller = self.network.shrunk(space)
        parameters = dict(smaller.named_parameters())
        momenta = crop_to(parameters, momenta)
        del states
        self.optimization.close()
        self.wrap(smaller)
        for name, momentum in momenta.items():
            self.optimization.optimizer.state[parameters[name]]["momentum_buffer"].copy_(momentum)
        self.optimization.finiteness.load(finiteness)

    def evaluator(self) -> Evaluator:
        """Scores subnets with the weights of this moment on the search-validation set."""
        graphs.GRAPHS.clear()  # scoring needs the memory; training captures anew
        search_val = evaluation_set(self.data.search_val, self.config.data)
        return evaluator_of(self.run, self.config, self.process, self.data, search_val, self.network)

    def probe(self, when: str) -> None:
        """Score the same number of random subnets and write their top-1 distribution (paper, Figure 5)."""
        rng = random.Random(self.config.seed)
        archs = [uniform_arch(self.space, rng) for _ in range(PROBE_SUBNETS)]
        top1 = sorted(score.top1 for score in self.evaluator().evaluate(archs))
        self.probes[when] = median(top1)
        self.write("probe", {"when": when, "top1": top1, "median": median(top1)})
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

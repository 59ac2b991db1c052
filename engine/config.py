"""The configuration of a run: frozen dataclasses whose docstrings are the command line's help."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import BlockOp, Operation
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.limits import Limit, check_reachable, parse_count
from bsnas.engine.space.space import Sharing, Space

Config = TypeVar("Config")
Precision = Literal["fp32", "bf16", "fp16"]
ScoreName = Literal["top1", "loss"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which paths are trained, and when their gradients reach the weights."""

    sampler: Literal["fair", "uniform", "sandwich"] = "fair"
    """`fair`: strict fairness as FairNAS, with tied channels. `uniform`: as SPOS. `sandwich`: as BigNAS, a round is the
    network with the most MACs, some fair paths and the one with the fewest."""
    update: Literal["round", "path"] = "round"
    """`round`: gradients of a round's paths add up to one optimizer step. `path`: one optimizer step per path."""
    batches: Literal["shared", "fresh"] = "shared"
    """`shared`: one image batch goes through all paths of a round. `fresh`: each path gets its own."""
    sandwich_paths: int = 2
    """Fair paths in a round of the sandwich."""
    distill: Literal["none", "kl", "alpha"] = "none"
    """What the sandwich's other paths learn: the labels, or the largest one's predictions (in-place distillation) by KL
    divergence, as BigNAS, or by AlphaNet's clipped alpha-divergence."""
    complexity_decay: float = 1.0
    """Complexity-aware learning rate, after DYNAS, with one step per path: the rate's decay is raised to this power for
    the path with the fewest parameters, to its inverse for the one with most, and between for others. 1 is off."""

    def __post_init__(self) -> None:
        if self.sampler == "sandwich" and (self.update, self.batches) != ("round", "shared"):
            raise UserError(
                f"the sandwich with update {self.update} and {self.batches} batches; it makes one step of all its "
                "paths on one batch: give --sampling.update round --sampling.batches shared"
            )
        if self.sampler != "sandwich" and self.distill != "none":
            raise UserError(
                f"distill {self.distill} with the {self.sampler} sampler, whose rounds have no largest network to "
                "learn from; give --sampling.sampler sandwich, or --sampling.distill none"
            )
        if self.sandwich_paths < 1:
            raise UserError(f"sandwich paths {self.sandwich_paths}; need at least 1, as 2")
        if not 1 <= self.complexity_decay <= 10:
            raise UserError(f"complexity decay {self.complexity_decay}: give a number from 1 (off) to 10, as 2")
        if self.complexity_decay != 1 and self.update != "path":
            raise UserError(
                f"complexity decay {self.complexity_decay} with one step per round, whose paths share a rate; give "
                "--sampling.update path, which the sandwich cannot have, or --sampling.complexity-decay 1"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with linear warmup and one cosine cycle over all epochs (paper, section 4.1)."""

    batch_size: int = 512
    """Images of one pass over all processes together."""
    learning_rate: float = 0.045
    """Peak learning rate, reached after the warmup."""
    momentum: float = 0.9
    weight_decay: float = 4e-5
    """L2 weight decay."""
    warmup_epochs: float = 5
    """Epochs of linear warmup; must be fewer than all epochs."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.learning_rate <= 0 or not 0 <= self.momentum < 1:
            raise UserError(
                f"batch size {self.batch_size}, learning rate {self.learning_rate}, momentum {self.momentum}: "
                "need batch size >= 1, learning rate > 0 and 0 <= momentum < 1"
            )
        if self.weight_decay < 0 or self.warmup_epochs < 0 or not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"weight decay {self.weight_decay}, warmup epochs {self.warmup_epochs}, label smoothing "
                f"{self.label_smoothing}: need values >= 0, label smoothing < 1"
            )


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """Step-shrinking (paper, Algorithm 1)."""

    first_epochs: int = 120
    """Epochs on the full space before the first step (T_f)."""
    interval_epochs: int = 40
    """Epochs after each step (T_i)."""
    keep: tuple[int, ...] = (9, 5, 3)
    """Most operations that a block keeps at each step (N_r); empty trains without shrinking."""
    models_per_operation: int = 200
    """Subnets drawn at a step for each operation of a block (M)."""
    models_most: int | None = None
    """Most subnets drawn at a step, however many operations there are; by default no limit."""
    macs: tuple[str, str] | None = None
    """Multiply-adds, as 10M 40M, inside which a step draws its subnets and keeps networks reachable."""
    bn: Literal["running", "recalibrate"] = "running"
    """Batch normalisation of scored subnets: statistics kept in training, or recomputed for each subnet."""
    score: ScoreName = "top1"
    """What ranks scored subnets: top-1, or the mean loss, which tells more apart with few images."""
    confidence: float | None = None
    """Stop scoring a subnet once its third is certain at this confidence, as 0.999; by default all images are seen."""

    def __post_init__(self) -> None:
        possible = self.bn == "running" and self.score == "top1"
        if self.confidence is not None and not (0.5 < self.confidence < 1 and possible):
            raise UserError(
                f"shrink confidence {self.confidence} with bn {self.bn} and score {self.score}: give a number between "
                "0.5 and 1, as 0.999, with --shrink.bn running and --shrink.score top1; or none to score every subnet "
                "on all images"
            )
        if self.first_epochs < 1 or self.interval_epochs < 1 or self.models_per_operation < 1:
            raise UserError(
                f"first epochs {self.first_epochs}, interval epochs {self.interval_epochs}, models per operation "
                f"{self.models_per_operation}: each must be at least 1"
            )
        if self.models_most is not None and self.models_most < 3:
            raise UserError(f"models most {self.models_most}: a step compares thirds; give at least 3, or none")
        self.macs_limit  # noqa: B018 - raises for what is no limit
        if any(keep < 1 for keep in self.keep) or list(self.keep) != sorted(set(self.keep), reverse=True):
            raise UserError(f"keep {self.keep}: give falling numbers of at least 1, as 9 5 3")

    @property
    def macs_limit(self) -> Limit | None:
        return Limit("macs", *map(parse_count, self.macs)) if self.macs else None

    def models(self, operations: int) -> int:
        """Subnets that a step draws where the largest block has so many operations."""
        wanted = operations * self.models_per_operation
        return wanted if self.models_most is None else min(wanted, self.models_most)

    @property
    def total_epochs(self) -> int:
        return self.first_epochs + len(self.keep) * self.interval_epochs

    @property
    def step_epochs(self) -> tuple[int, ...]:
        """The epochs at whose start a step is made."""
        return tuple(self.first_epochs + step * self.interval_epochs for step in range(len(self.keep)))


@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """Training of a released network; data, optimizer and schedule are the supernet's unless set here."""

    epochs: int = 240
    """Epochs of the stand-alone training."""
    learning_rate: float = 0.045
    """Peak learning rate, reached after the warmup."""
    batch_size: int = 512
    """Images of one step over all processes together."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.learning_rate <= 0 or self.batch_size < 1:
            raise UserError(
                f"retraining with epochs {self.epochs}, learning rate {self.learning_rate}, batch size "
                f"{self.batch_size}: each must be positive"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How subnets are scored."""

    recalibration_images: int = 2048
    """Training images whose statistics `bn=recalibrate` takes."""
    memory_mib: int | None = None
    """Memory budget of an evaluation in MiB; by default a share of what is free."""


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """What keeps a run from losing work. Nothing here changes a result, so it may differ between starts of a run."""

    checkpoint_minutes: float = 10
    """Minutes between checkpoints inside an epoch; there is one after every epoch anyway."""
    checkpoints: int = 2
    """Newest checkpoints to keep, besides those at shrink steps."""
    max_skipped: int = 20
    """Optimizer steps in a row without finite loss and gradients after which a training stops."""
    timeout_minutes: float = 30
    """Minutes that a process waits for the others before it gives them up."""

    def __post_init__(self) -> None:
        if not 0 < self.checkpoint_minutes < math.inf or not 0 < self.timeout_minutes < math.inf:
            raise UserError(
                f"checkpoint minutes {self.checkpoint_minutes}, timeout minutes {self.timeout_minutes}: "
                "each must be above 0"
            )
        if self.checkpoints < 1 or self.max_skipped < 1:
            raise UserError(f"checkpoints {self.checkpoints}, max skipped {self.max_skipped}: each must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's result."""

    preset: str
    """Name of the preset that the run started from."""
    space: Annotated[Space, tyro.conf.Suppress, PlainValidator(Space.from_json), PlainSerializer(Space.to_json)]
    """The full search space."""
    data: DataConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    shrink: ShrinkConfig = field(default_factory=ShrinkConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    sharing: Sharing = "channels"
    """Who shares convolution weights inside a block."""
    teacher: str | None = None
    """Network to learn from beside the labels: a file of TorchScript, torch.export (.pt2) or ONNX that takes images as
    this training sees them. Supernet, finals and retraining learn from it; it costs its forward pass."""
    teacher_weight: float = 0.5
    """Share of the loss that is the divergence from the teacher."""
    teacher_sha256: Annotated[str | None, tyro.conf.Suppress] = None
    """Of the teacher's file, taken when the run began."""
    precision: Precision | None = None
    """Compute precision; by default bf16 on a GPU and fp32 on a CPU. Weights are always fp32."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        if not 0 < self.teacher_weight <= 1:
            raise UserError(f"teacher weight {self.teacher_weight}; it must be above 0 and at most 1, as 0.5")
        if self.optimizer.warmup_epochs >= self.shrink.total_epochs:
            raise UserError(
                f"warmup of {self.optimizer.warmup_epochs} epochs in a training of {self.shrink.total_epochs}; "
                "set --optimizer.warmup-epochs lower"
            )
        if limit := self.shrink.macs_limit:
            check_reachable((limit,), {"macs": CostModel(self.space).macs.range()})
        if self.data.resolution != self.space.resolution:
            raise UserError(
                f"data resolution {self.data.resolution} and space resolution {self.space.resolution} differ; "
                "set both to the same"
            )
        if self.data.channels != self.space.input_channels:
            raise UserError(
                f"data channels {self.data.channels} and input channels {self.space.input_channels} of the space "
                "differ; set both to the same"
            )


def to_json(config: Any) -> Any:
    """A configuration dataclass as JSON-ready data."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def from_json(kind: type[Config], data: Any, source: Path) -> Config:
    """The configuration that `to_json` wrote; every field is checked. Raises `UserError` naming `source`."""
    try:
        config = TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{source}: {where}: {first['msg']}; take a file that this program wrote ({error.error_count()} problems)"
        ) from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply; take a file that this program wrote") from None
    lost = _lost(data, to_json(config), "")
    if lost:
        raise UserError(f"{source}: {lost}; take a file that this program wrote")
    return config


def read_config(data: Any, source: Path) -> RunConfig:
    """The configuration of a run. Raises `UserError` naming `source`."""
    if not isinstance(data, dict):
        raise UserError(f"{source} holds no configuration; restore it or start a new run")
    try:
        data = {**data, "space": _of_this_form(data["space"])}
    except UserError as error:
        raise UserError(f"{source}: space: {error}") from None
    except (TypeError, KeyError):
        pass  # what it is instead is told below
    return from_json(RunConfig, data, source)


def _of_this_form(space: Any) -> Any:
    """The JSON of a space as files hold it now, whichever version wrote it. Raises `UserError` when it is none.

    Operations of older runs are lists of numbers.
    """
    live = [
        [op if isinstance(op, str) else str(Operation(BlockOp(*op[:-1]), op[-1])) for op in ops]
        for ops in space["live"]
    ]
    space = {**space, "live": live}
    return space if "table" in space else Space.from_json(space).to_json()


def _lost(given: Any, taken: Any, where: str) -> str | None:
    """What of some JSON data did not arrive in the configuration unchanged; None when all did."""
    if isinstance(given, Mapping) and isinstance(taken, Mapping):
        for name, value in given.items():
            place = f"{where}.{name}".lstrip(".")
            if name not in taken:
                return f"{place} is unknown; allowed are {', '.join(taken)}"
            if problem := _lost(value, taken[name], place):
                return problem
        return None
    if isinstance(given, (list, tuple)) and isinstance(taken, (list, tuple)) and len(given) == len(taken):
        pairs = enumerate(zip(given, taken, strict=True))
        return next((p for i, (a, b) in pairs if (p := _lost(a, b, f"{where}.{i}"))), None)
    if isinstance(given, float) and not math.isfinite(given):
        return f"{where} is {given}, which is no number to compute with"
    same = given == taken and (type(given) is type(taken) or {type(given), type(taken)} == {int, float})
    return None if same else f"{where} is {given!r:.60}, taken as {taken!r:.60}"

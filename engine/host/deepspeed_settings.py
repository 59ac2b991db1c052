"""What a user's DeepSpeed JSON may set: known keys alone, since one that is mistyped or has no effect must not pass.

Everything here was seen to work; what this system decides itself is refused with the option that decides it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from bsnas.engine.host.errors import UserError

OWN_OPTIONS = {
    **dict.fromkeys(("fp16", "bf16", "bfloat16", "amp", "torch_autocast", "data_types"), "--precision fp16 or bf16"),
    "optimizer": "--optimizer.learning-rate, --optimizer.momentum and --optimizer.weight-decay",
    "scheduler": "--optimizer.learning-rate and --optimizer.warmup-epochs",
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "--optimizer.batch-size"),
    **dict.fromkeys(("gradient_accumulation_steps", "managed_gradient_accumulation"), "--sampling.update"),
    "seed": "--seed",
    **dict.fromkeys(
        ("tensorboard", "csv_monitor", "wandb", "comet"), "the run's own metrics.jsonl and tensorboard/, always there"
    ),
}
"""By a key of DeepSpeed's: what sets it here."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _CommsLogger(_Settings):
    enabled: bool = True
    verbose: bool = False
    prof_all: bool = True
    prof_ops: list[str] = []
    debug: bool = False


class _FlopsProfiler(_Settings):
    enabled: bool = True
    profile_step: PositiveInt = 1
    module_depth: int = -1
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: str | None = None


class _Throughput(_Settings):
    enabled: bool = True
    synchronized: bool = True


class _Timers(_Settings):
    throughput: _Throughput


class _Zero(_Settings):
    stage: Literal[0]


class Settings(_Settings):
    """The keys that are taken, with their types."""

    comms_logger: _CommsLogger
    communication_data_type: Literal["fp32", "fp16", "bf16"]
    dump_state: bool
    flops_profiler: _FlopsProfiler
    gradient_clipping: NonNegativeFloat
    gradient_predivide_factor: PositiveFloat
    memory_breakdown: bool
    prescale_gradients: bool
    steps_per_print: PositiveInt
    timers: _Timers
    wall_clock_breakdown: bool
    zero_optimization: _Zero


def load_deepspeed_settings(file: Path | None) -> dict[str, Any]:
    """A user's DeepSpeed JSON. Raises `UserError` when it is no JSON object, or sets what cannot be set."""
    if file is None:
        return {}
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"DeepSpeed configuration {file} cannot be read: {error}; give a JSON file") from None
    if not isinstance(settings, dict):
        raise UserError(
            f'DeepSpeed configuration {file} holds no JSON object; give a file like {{"comms_logger": {{}}}}'
        )
    check_deepspeed_settings(settings, str(file))
    return settings


def check_deepspeed_settings(settings: Mapping[str, Any], source: str) -> None:
    """Raise `UserError` for a key that is unknown, decided here, or of another type."""
    for key in settings:
        if key in OWN_OPTIONS:
            raise UserError(f"{source}: {key} is decided by {OWN_OPTIONS[key]}; remove it from the DeepSpeed file")
        if key not in Settings.model_fields:
            allowed = ", ".join(sorted(Settings.model_fields))
            raise UserError(f"{source}: {key!r:.60} is no key that has an effect here; allowed are {allowed}")
    zero = settings.get("zero_optimization")
    if zero is not None and zero != {"stage": 0}:
        raise UserError(
            f"{source}: zero_optimization is {json.dumps(zero):.80}; allowed is stage 0 alone, because higher stages "
            "move weights of operations that a step did not use; remove it from the DeepSpeed file"
        )
    try:
        Settings.model_validate(dict(settings))
    except ValidationError as error:
        # No key of the file itself is required.
        wrong = [found for found in error.errors() if found["type"] != "missing" or len(found["loc"]) > 1]
        for first in wrong[:1]:
            where = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{source}: {where}: {first['msg']} (it is {first['input']!r:.60}); mend it in the DeepSpeed file"
            ) from None

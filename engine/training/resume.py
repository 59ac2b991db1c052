"""Which checkpoint a training goes on from, and what it says when that is not bit for bit the run it was."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bsnas.engine.checkpoints.keep import newest_checkpoint, set_newer_aside
from bsnas.engine.checkpoints.manifest import Checkpoint
from bsnas.engine.checkpoints.tensor_file import check_tensor
from bsnas.engine.host.distributed import Process, gather_to_main, on_main
from bsnas.engine.host.errors import UserError
from bsnas.engine.training.metrics import Meter
from bsnas.engine.training.optimization import Optimization


def find_checkpoint(directory: Path, process: Process, data: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that this many processes can continue from, the same on all ranks; None to start.

    `data` is the fingerprint of the data set and its split. Raises `UserError` when it is another, when every
    checkpoint is damaged, or when none lies between epochs and the number of processes has changed.
    """
    return on_main(process, lambda: _find(directory, process, data, say))


def _find(directory: Path, process: Process, data: str, say: Callable[[str], None]) -> Checkpoint | None:
    found = newest_checkpoint(directory, say=say)
    if found is None:
        return None
    set_newer_aside(found)
    if found.manifest.data != data:
        raise UserError(
            f"checkpoint {found.file} was trained on another data set or split than the run's now "
            f"(fingerprint {found.manifest.data[:12]}, now {data[:12]}); restore it, or start anew in another --run"
        )
    before, now = found.manifest.processes, process.world_size
    if before != now:
        found = newest_checkpoint(directory, lambda manifest: manifest.whole_epoch, say=lambda _: None)
        if found is None:
            raise UserError(
                f"the run was stopped inside its first epoch with {before} processes; continue with {before}, "
                "or start anew in another --run"
            )
        say(
            f"{now} processes instead of {before}: continues from the end of epoch {found.manifest.progress.epoch}; "
            "batches and paths stay the same, but each process normalises its own part of a batch and sums are "
            "rounded in another order, so that results are no longer bit for bit those of an undisturbed run"
        )
        set_newer_aside(found)
    device = device_name(process)
    if found.manifest.device != device:
        say(
            f"{device} instead of {found.manifest.device}: kernels round differently there, so that results are no "
            "longer bit for bit those of an undisturbed run"
        )
    return found


def device_name(process: Process) -> str:
    """What computes: the GPU's name, or cpu."""
    return torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "cpu"


def of_ranks(process: Process, optimization: Optimization, meter: Meter | None) -> dict[str, Any]:
    """What differs between ranks inside an epoch, for the main process's checkpoint: statistics and sums."""
    assert meter is not None
    return {
        "statistics_of_ranks": gather_to_main(process, optimization.statistics.values),
        "meter_of_ranks": gather_to_main(process, meter.state()),
    }


def load_of_rank(
    state: Mapping[str, Any], process: Process, optimization: Optimization, meter: Meter, file: Path
) -> None:
    """Give this rank its own part of `of_ranks` back. Raises `UserError` when it does not fit."""
    own = {"statistics_of_ranks": optimization.statistics.values, "meter_of_ranks": meter.state()}
    for name, tensor in own.items():
        like = tensor.new_empty(1).expand(process.world_size, *tensor.shape)
        check_tensor(state.get(name), like=like, name=name, file=file)
    optimization.statistics.values.copy_(state["statistics_of_ranks"][process.rank])
    meter.load(state["meter_of_ranks"][process.rank])

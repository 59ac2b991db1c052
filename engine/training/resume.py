"""Which checkpoint a training goes on from, and what it says when that is not bit for bit the run it was."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bsnas.engine.checkpoints.keep import newest_checkpoint, set_newer_aside
from bsnas.engine.checkpoints.manifest import Checkpoint
from bsnas.engine.checkpoints.tensor_file import check_tensor
from bsnas.engine.host.distributed import Process, gather_to_main, on_main
from bsnas.engine.host.errors import UserError


def find_checkpoint(
    directory: Path, process: Process, data: str, say: Callable[[str], None], start: Path | None = None
) -> Checkpoint | None:
    """The newest checkpoint that this many processes can continue from, the same on all ranks; None to start.

    Where `directory` has none, the newest of `start`, the directory of a training to go on from. `data` is the
    fingerprint of the data set and its split. Raises `UserError` when it is another, when every checkpoint is damaged,
    or when none lies between epochs and the number of processes has changed.
    """

    def find() -> Checkpoint | None:
        found = _find(directory, process, data, say)
        return found if found is not None or start is None else _find(start, process, data, say)

    return on_main(process, find)


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


class PartOfRank(Protocol):
    """A tensor that differs between ranks inside an epoch."""

    def state(self) -> Tensor: ...

    def load(self, state: Tensor) -> None: ...


def of_ranks(process: Process, parts: Mapping[str, PartOfRank]) -> dict[str, Any]:
    """The parts of all ranks, for the main process's checkpoint."""
    return {name: gather_to_main(process, part.state()) for name, part in parts.items()}


def load_of_rank(content: Mapping[str, Any], process: Process, parts: Mapping[str, PartOfRank], file: Path) -> None:
    """Give this rank its own part of `of_ranks` back. Raises `UserError` when it does not fit."""
    for name, part in parts.items():
        own = part.state()
        like = own.new_empty(1).expand(process.world_size, *own.shape)
        check_tensor(content.get(name), like=like, name=name, file=file)
        part.load(content[name][process.rank])

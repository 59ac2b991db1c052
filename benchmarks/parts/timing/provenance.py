"""When, from which commit and on which device a figure was measured."""

import torch

from bsnas.engine.runs.commands import commit, hardware, now


def provenance() -> dict[str, str]:
    """`date` (UTC, to the second) and `commit`, marked with + when files differ from it."""
    return {"date": now(), "commit": commit()}


def device_name(device: torch.device) -> str:
    """The hardware, and of a processor what else its speed depends on: instruction set and threads."""
    if device.type == "cuda":
        return hardware(device)
    return f"{hardware(device)}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"

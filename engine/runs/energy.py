"""Energy that the machine itself reports: NVIDIA's counters (NVML), or the processor's (RAPL); nothing is estimated."""

from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made, of one GPU or of the processor packages, whichever computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first = self._read()

    def joules(self) -> float | None:
        """None where the device does not report energy, or a counter has wrapped around."""
        now = self._read()
        if now is None or self._first is None or now < self._first:
            return None
        return now - self._first

    def _read(self) -> float | None:
        return _gpu_joules(self._device) if self._device.type == "cuda" else _package_joules()


def _gpu_joules(device: torch.device) -> float | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        # NVML numbers all GPUs of the machine, torch the visible ones: the UUID names the same one in both.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid)) / 1000
    except Exception:  # a missing library, an old driver, a virtual GPU: each raises its own kind
        return None


def _package_joules() -> float | None:
    files = sorted(RAPL.glob("intel-rapl:?/energy_uj"))
    try:
        return sum(int(file.read_text()) for file in files) / 1e6 if files else None
    except (OSError, ValueError):  # only root may read it on most systems
        return None

"""Numbers that are none never reach weights or statistics: what an optimizer step checks and takes back, on the device.

The host does not wait for the device. A step whose loss or gradients are not finite runs like any other, but SGD's
fused kernel is told to write nothing (`found_inf`), and the running statistics that its forward passes changed are
put back from a copy. Ranks agree without asking, since they check gradients after these were averaged.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0, 0.5, 2000
"""Dynamic loss scale of fp16, as torch.amp.GradScaler."""
INITIAL_SCALE = 65536.0
_ALIGNMENT = 16
"""Floats: vector loads of the kernels want 64 bytes."""


class RunningStatistics:
    """The running means and variances of a network's batch normalisations, moved into one tensor.

    So a copy of all is one kernel. The layers' buffers become parts of it; each has its own version counter, since
    autograd would take a change of one for a change of all.
    """

    def __init__(self, network: nn.Module) -> None:
        layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        places = [(m, name) for m in layers for name in ("running_mean", "running_var") if getattr(m, name) is not None]
        sizes = [-(-getattr(m, name).numel() // _ALIGNMENT) * _ALIGNMENT for m, name in places]
        device = next(network.parameters()).device
        self.values = torch.zeros(sum(sizes), device=device)
        self._kept = torch.zeros_like(self.values)
        self._changed = False
        offset = 0
        for (layer, name), size in zip(places, sizes, strict=True):
            buffer = getattr(layer, name)
            part = self.values[offset : offset + buffer.numel()].data
            part.copy_(buffer)
            setattr(layer, name, part)
            offset += size

    def state(self) -> Tensor:
        """All of them: they differ between ranks inside an epoch."""
        return self.values

    def load(self, state: Tensor) -> None:
        self.values.copy_(state)

    def keep(self) -> None:
        """Copy them before they change, once until the next `settle`."""
        if not self._changed:
            self._kept.copy_(self.values)
            self._changed = True

    def settle(self, bad: Tensor) -> None:
        """Leave the changes since `keep`, or take them back where `bad` [1] is not 0."""
        if self._changed:
            torch.where(bad != 0, self._kept, self.values, out=self.values)
            self._changed = False


class Finiteness:
    """Checks and unscales gradients, and keeps the loss scale of fp16."""

    def __init__(self, device: torch.device, *, scaled: bool) -> None:
        self.scaled = scaled
        self.scale = torch.full((), INITIAL_SCALE if scaled else 1.0, device=device)
        self._growth = torch.zeros((), dtype=torch.int32, device=device)
        self._one = torch.ones((), device=device)
        self._loss = torch.zeros((), device=device)

    def scaled_loss(self, loss: Tensor) -> Tensor:
        """The loss to run backward from; it is also remembered until the next `check`."""
        self._loss = self._loss + loss.detach().float()
        return loss * self.scale if self.scaled else loss

    def loss_is_bad(self) -> Tensor:
        """Whether a loss since the last `check` was not finite: bool []."""
        return ~self._loss.isfinite()

    def spread(self, gradients: Sequence[Tensor]) -> None:
        """Make the gradients tell of a loss that was not finite though they may be: nothing is added otherwise."""
        gradients[-1].add_((self._loss * 0).to(gradients[-1].dtype))

    def check(self, gradients: Sequence[Tensor]) -> Tensor:
        """[1]: 1 when a gradient is not finite, else 0. Gradients are divided by the loss scale."""
        bad = torch.zeros(1, device=self.scale.device)
        inverse = self.scale.double().reciprocal().float() if self.scaled else self._one
        torch._amp_foreach_non_finite_check_and_unscale_(list(gradients), bad, inverse)
        self._loss = torch.zeros_like(self._loss)
        if self.scaled:
            torch._amp_update_scale_(self.scale, self._growth, bad, GROWTH, BACKOFF, GROWTH_INTERVAL)
        return bad

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "growth": self._growth}

    def load(self, state: dict[str, Tensor]) -> None:
        self.scale.copy_(state["scale"])
        self._growth.copy_(state["growth"])
